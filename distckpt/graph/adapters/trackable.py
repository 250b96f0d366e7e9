"""`Trackable` and `Checkpoint`: nodes whose attributes are edges and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distckpt.graph.adapters.base import Adapter, Part
from distckpt.graph.adapters.containers import assign_python_value, attribute
from distckpt.graph.trackable import Trackable, tracked_attributes
from distckpt.layout.keys import unescape
from distckpt.log import log


class TrackableAdapter(Adapter):
    """Attributes in order of first assignment."""

    def handles(self, cls: type) -> bool:
        """`Trackable` and its subclasses."""
        return issubclass(cls, Trackable)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Every checkpointable attribute; those of other kinds are left out with a debug message."""
        assert isinstance(obj, Trackable)
        for name, value in tracked_attributes(obj):
            part = attribute(name, value)
            if part is not None:
                yield part
            else:
                log.debug("attribute %r of %s is a %s and is not saved", name, type(obj).__name__, type(value).__name__)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set the attributes; a list or dict is changed in place, so that others who hold it see the saved content."""
        for escaped, value in saved.items():
            name = unescape(escaped)
            if not assign_python_value(vars(obj).get(name), value):
                setattr(obj, name, value)
