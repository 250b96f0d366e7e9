"""Node 0 of a checkpoint: the root object with what a `Checkpoint` attaches to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from distckpt.graph.adapters.base import Adapter, Part
from distckpt.graph.adapters.containers import assign_python_value, part_of
from distckpt.graph.adapters.registry import is_checkpointable
from distckpt.graph.values import replicated
from distckpt.layout.keys import escape

COUNTER_KEY = "save_counter"


class RootAdapter(Adapter):
    """The root's own adapter, the attributes of the Checkpoint around it, and the save counter.

    Made anew for every walk; it is in no registry.
    """

    def __init__(self, inner: Adapter, attached: Mapping[str, object], counter: torch.Tensor | None) -> None:
        """Local.

        Args:
            inner: How the root object itself is saved.
            attached: Further children of node 0, by name.
            counter: 0-d int64 tensor that stands for the save counter; None for `write` and `read`.
        """
        self.inner = inner
        self.attached = attached
        self.counter = counter
        self.per_rank = inner.per_rank
        self.takes_all = inner.takes_all
        self.on_attached: Callable[[str, object], None] | None = None
        self.on_counter: Callable[[int], None] | None = None

    def handles(self, cls: type) -> bool:
        """Never asked by class."""
        return False

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """The root's parts, the attached ones, the counter."""
        yield from self.inner.parts(obj, rank)
        for name, value in self.attached.items():
            if is_checkpointable(value):
                yield part_of(name, value)
        if self.counter is not None:
            yield replicated(self.counter, COUNTER_KEY, in_place=False)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand every value to whom it belongs."""
        names = {escape(name): name for name in self.attached}
        own = {}
        for escaped, value in saved.items():
            if escaped == COUNTER_KEY and isinstance(value, torch.Tensor) and self.on_counter is not None:
                self.on_counter(int(value))
            elif escaped not in names:
                own[escaped] = value
            elif not assign_python_value(self.attached[names[escaped]], value) and self.on_attached is not None:
                self.on_attached(names[escaped], value)
        if own:
            self.inner.restore(obj, own)
