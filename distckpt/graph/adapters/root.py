"""Node 0 of a checkpoint: the root object with what a `Checkpoint` attaches to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from distckpt.graph.adapters.base import Adapter, Omission, Part, Problem
from distckpt.graph.adapters.containers import assign_python_value, attribute
from distckpt.graph.claims import Claim
from distckpt.graph.values import Edge, Value, replicated
from distckpt.layout.keys import escape

COUNTER_KEY = "save_counter"


class RootAdapter(Adapter):
    """The root's own adapter, the attributes of the Checkpoint around it, and the save counter.

    Made anew for every walk; it is in no registry.
    """

    def __init__(
        self, owner: object, inner: Adapter, attached: Mapping[str, object], counter: torch.Tensor | None
    ) -> None:
        """Local.

        Args:
            owner: The Checkpoint.
            inner: How the root object itself is saved.
            attached: Further children of node 0, by name.
            counter: 0-d int64 tensor that stands for the save counter; None for `write` and `read`.
        """
        self.owner = owner
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
        own: dict[str, Part] = {}
        for part in self.inner.parts(obj, rank):
            own[part.name] = part
            yield part
        for name, value in self.attached.items():
            attached = attribute(name, value)
            if attached is not None:
                yield attached if isinstance(attached, Omission) else self._unless_taken(attached, own)
        if self.counter is not None:
            yield self._unless_taken(replicated(self.counter, COUNTER_KEY, in_place=False), own)

    def _unless_taken(self, part: Part, own: Mapping[str, Part]) -> Part:
        """The part, or the problem that the root got another one of that name by itself."""
        taken = own.get(part.name)
        if taken is None or (isinstance(part, Edge) and isinstance(taken, Edge) and part.target is taken.target):
            return part
        return Problem(part.name, "the root and the Checkpoint both have something of this name. Rename one of them.")

    def structure_of(self, name: str) -> str | None:
        """See `Adapter.structure_of`: nothing attached, else the root's own adapter knows."""
        return None if self._is_attached(name) else self.inner.structure_of(name)

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """See `Adapter.takes`: the root's own adapter knows."""
        return self.inner.takes(name, live)

    def exact(self, name: str) -> bool:
        """See `Adapter.exact`: the counter is one integer, for all else the root's own adapter knows."""
        return name == COUNTER_KEY or (not self._is_attached(name) and self.inner.exact(name))

    def refusal(self, obj: object, name: str, encoded: bytes | None) -> str | None:
        """See `Adapter.refusal`: nothing attached, else the root's own adapter knows."""
        return None if self._is_attached(name) else self.inner.refusal(obj, name, encoded)

    def _is_attached(self, name: str) -> bool:
        return name == COUNTER_KEY or any(escape(other) == name for other in self.attached)

    def claim(self, obj: object, name: str) -> Claim:
        """See `Adapter.claim`. What is attached belongs to the Checkpoint: others may have the same root."""
        return (self.owner, name) if self._is_attached(name) else self.inner.claim(obj, name)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand each value to the root, the attached attribute or the counter."""
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
