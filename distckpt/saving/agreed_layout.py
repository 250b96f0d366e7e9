"""What the ranks agreed on when the layout last changed, and what follows from it for each save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from distckpt.exchange.aggregation import Aggregation
from distckpt.graph.adapters.root import COUNTER_KEY
from distckpt.graph.capture import Capture
from distckpt.graph.values import TensorValue
from distckpt.layout.box import Box
from distckpt.layout.records import LocalLayout, SavePlan
from distckpt.options import SaveOptions
from distckpt.saving.draft import NewFile
from distckpt.storage.packing import LiveJobs, Packing, Place
from distckpt.storage.transfer import sub_tensor


class _Source(NamedTuple):
    """Where the elements of a box that this rank writes come from.

    Attributes:
        place: Index of the box, among those that this rank writes.
        tensor: Index of the tensor, among this rank's tensors in order.
        box: The box, which is not all that this rank has of the tensor.
    """

    place: int
    tensor: int
    box: Box


@dataclass(frozen=True, slots=True)
class _Writes:
    """What this rank writes in every save of a layout, and where it comes from.

    Attributes:
        packing: What it writes.
        tensors: For each box, the index of its tensor among this rank's tensors in order.
        cut: The boxes that are not all that this rank has of their tensor.
        counter: Index of the box of the save counter; None where another rank writes it, or nobody.
    """

    packing: Packing
    tensors: list[int]
    cut: list[_Source]
    counter: int | None


@dataclass(slots=True)
class AgreedLayout:
    """What was agreed when the layout last changed; later saves of the same layout only compare digests.

    Attributes:
        plan: What this rank writes and compares.
        layout: This rank's layout, as it was merged.
        replicas: The option under which it was merged.
        weights: `plan.weights` as uint64.
        keys: Checkpoint key of each tensor of this rank, in order.
        offsets: Position of every variable in the file; None until a file was created.
        aggregation: The small variables that aggregators write for all ranks.
    """

    plan: SavePlan
    layout: LocalLayout
    replicas: str
    weights: np.ndarray
    keys: list[str]
    offsets: np.ndarray | None = None
    aggregation: Aggregation = field(default_factory=Aggregation)
    _writes: _Writes | None = None

    @property
    def warned(self) -> set[str]:
        """What rank 0 has warned of that this rank leaves out."""
        return set(self.layout.warnings)

    def has_layout(self, layout: LocalLayout, options: SaveOptions) -> bool:
        """Whether this rank holds the same kinds of values in the same places as when the ranks last agreed."""
        old = self.layout
        return layout.graph == old.graph and layout.boxes == old.boxes and options.replicas == self.replicas

    def holds_for(self, layout: LocalLayout, options: SaveOptions) -> bool:
        """Whether rank 0 can save what this rank holds without hearing more than a digest from it."""
        if layout.problems or layout.dropped or not set(layout.warnings) <= self.warned:
            return False
        if not self.has_layout(layout, options):
            return False
        watched = self.plan.watched
        if not watched:
            return True
        new, old = np.frombuffer(layout.fingerprints, np.uint64), np.frombuffer(self.layout.fingerprints, np.uint64)
        return bool((new[watched] == old[watched]).all())

    def place(self, offsets: np.ndarray) -> None:
        """Take the positions of the variables in a new file, and in those that follow. The same on all ranks."""
        self.offsets = offsets
        self.aggregation = Aggregation()
        self._writes = None

    def jobs(self, file: NewFile, captured: Capture) -> LiveJobs:
        """What this rank writes in one save."""
        held = captured.tensors
        if self._writes is None:
            self._writes = self._list_writes(held)
        writes = self._writes
        tensors = [held[tensor].tensor for tensor in writes.tensors]
        for place, tensor, box in writes.cut:
            block = held[tensor].block_with(box)
            tensors[place] = sub_tensor(block.tensor.detach(), box, block.box)
        if writes.counter is not None and file.counter:
            tensors[writes.counter] = torch.tensor(file.counter, device="cpu")
        return LiveJobs(writes.packing, tensors)

    def _list_writes(self, held: Sequence[TensorValue]) -> _Writes:
        assert self.offsets is not None, "a file was made"
        variables, keys, offsets = self.plan.variables, self.keys, self.offsets.tolist()
        places, cut, counter = [], [], None
        for number, item in enumerate(self.plan.items):
            value, box, key = held[item.tensor], Box(item.offset, item.shape), keys[item.tensor]
            offset = offsets[variables[item.tensor]]
            places.append(Place(key, offset, value.global_shape, box, item.checksum, value.tensor.dtype))
            if value.boxes != (box,):  # seldom
                cut.append(_Source(number, item.tensor, box))
            if key == COUNTER_KEY:
                counter = number
        return _Writes(Packing.of(places), [item.tensor for item in self.plan.items], cut, counter)
