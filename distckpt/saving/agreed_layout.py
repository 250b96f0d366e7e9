"""What the ranks agreed on when the layout last changed, and what follows from it for each save."""

from __future__ import annotations

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
from distckpt.storage.transfer import WriteJob, sub_tensor


class _Write(NamedTuple):
    """A box that this rank writes in every save of the layout.

    Attributes:
        tensor: Index of the tensor, among this rank's tensors in order.
        key: Its checkpoint key.
        offset: Position of its variable in the file, in bytes.
        box: The box.
        checksum: As `PlanItem.checksum`.
    """

    tensor: int
    key: str
    offset: int
    box: Box
    checksum: int


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
    _writes: list[_Write] = field(default_factory=list)

    def has_layout(self, layout: LocalLayout, options: SaveOptions) -> bool:
        """Whether this rank holds the same kinds of values in the same places as when the ranks last agreed."""
        old = self.layout
        return layout.graph == old.graph and layout.boxes == old.boxes and options.replicas == self.replicas

    def holds_for(self, layout: LocalLayout, options: SaveOptions) -> bool:
        """Whether rank 0 can save what this rank holds without hearing more than a digest from it."""
        if layout.problems or not self.has_layout(layout, options):
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
        self._writes = []

    def jobs(self, file: NewFile, captured: Capture) -> list[WriteJob]:
        """What this rank writes in one save, in file order."""
        self._writes = self._writes or self._list_writes()
        tensors, jobs = captured.tensors, []
        for tensor, key, offset, box, checksum in self._writes:
            value = tensors[tensor]
            part = _part_of(value, box)
            if key == COUNTER_KEY and file.counter:
                part = torch.tensor(file.counter, device="cpu")
            jobs.append(WriteJob(key, offset, value.global_shape, box, part, checksum))
        return jobs

    def _list_writes(self) -> list[_Write]:
        assert self.offsets is not None, "a file was made"
        variables, keys, offsets = self.plan.variables, self.keys, self.offsets.tolist()
        return [
            _Write(
                item.tensor,
                keys[item.tensor],
                offsets[variables[item.tensor]],
                Box(item.offset, item.shape),
                item.checksum,
            )
            for item in self.plan.items
        ]


def _part_of(value: TensorValue, box: Box) -> torch.Tensor:
    """This rank's memory of the elements of a box."""
    tensor = value.tensor
    if value.boxes != (box,) or tensor.shape != box.shape:  # seldom
        block = value.block_with(box)
        tensor = sub_tensor(block.tensor, box, block.box)
    return tensor.detach() if tensor.requires_grad else tensor
