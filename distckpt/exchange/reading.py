"""Reading together: what several ranks of a node want of the same bytes is read once and handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.exchange.node import UNIT_NBYTES, FailedElsewhere, Round, agreed, run_rounds
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import Span, Wanted, bands, hull, hulls_that_meet, is_worth_exchanging, plan_rounds
from distckpt.source import Source
from distckpt.storage.transfer import Progress, copy_bits
from distckpt.storage.units import Held, shared_parts


def read_together(
    node: Coordinator, source: Source, reads: Sequence[TensorRead], *, verify: bool, progress: Progress | None
) -> list[TensorRead]:
    """Read what ranks of one node want of the same bytes, or in strips between those of other ranks.

    Collective over the node. Where a rank fails, all ranks of the node stop, and just that rank raises: an agreement of
    all ranks must follow.

    Args:
        node: The ranks of this node.
        source: The file.
        reads: What this rank wants.
        verify: Compare the checksums of all pieces that are read whole.
        progress: Called with the number of bytes just put into tensors.

    Returns:
        The reads that are left to this rank alone; none when another rank has failed.

    Raises:
        CorruptCheckpointError: The bytes of a tensor do not match their checksum.
    """
    if node.size == 1:
        return list(reads)
    try:
        reading = _plan(node, source, reads, verify)
        done = reading is not None and reading.run(progress)
    except FailedElsewhere:
        return []
    if not done or reading is None:
        return list(reads)
    return [read for read in reads if read.variable not in reading.boxes or reading.own.get(read.variable) is not read]


def _plan(node: Coordinator, source: Source, reads: Sequence[TensorRead], verify: bool) -> _Reading | None:
    """What to read together, agreed by the node; None if nothing."""
    own: dict[int, TensorRead] = {}

    def find_hulls() -> bytes:
        own.update((read.variable, read) for read in reads if _can_be_exchanged(source, read))
        return _hulls(source, own).tobytes()

    gathered = node.gather_all("hulls", agreed(node, find_hulls))
    meeting = agreed(node, lambda: _meeting(gathered))
    if not meeting:
        return None
    boxes = node.gather_all("boxes", agreed(node, lambda: _encode_boxes(meeting, own)))
    return agreed(node, lambda: _Reading(node, source, own, boxes, verify))


def _can_be_exchanged(source: Source, read: TensorRead) -> bool:
    """Whether the bytes are one range of the file, and can be copied into the tensor as they are."""
    return read.cast is None and source.is_one_range(read.variable) and not read.target.tensor.is_inference()


def _hulls(source: Source, reads: Mapping[int, TensorRead]) -> np.ndarray:
    hulls = np.zeros((len(source.manifest.variables), 2), np.int64)
    hulls[list(reads)] = [_hull(read) for read in reads.values()] or np.empty((0, 2))
    return hulls


def _hull(read: TensorRead) -> Span:
    spans = [hull(block.box, read.target.global_shape) for block in read.target.blocks()] or [Span(0, 0)]
    return spans[0] if len(spans) == 1 else Span(min(spans).start, max(span.stop for span in spans))


def _meeting(gathered: Sequence[bytes]) -> list[int]:
    """The variables of which ranks hold elements among those of others, given the hulls of all ranks."""
    return hulls_that_meet(np.stack([np.frombuffer(data, np.int64).reshape(-1, 2) for data in gathered]))


def _encode_boxes(variables: Sequence[int], reads: Mapping[int, TensorRead]) -> bytes:
    own = ((index, block.box) for index in variables if index in reads for block in reads[index].target.blocks())
    return msgspec.msgpack.encode(list(own))


class _Reading:
    """One exchange: its plan, which is the same on all ranks of the node, and what this rank takes.

    Attributes:
        own: What this rank wants, by variable.
        boxes: Variables that are exchanged, to the boxes that ranks want of them.
    """

    def __init__(
        self,
        node: Coordinator,
        source: Source,
        own: dict[int, TensorRead],
        gathered: Sequence[bytes],
        verify: bool,
    ) -> None:
        self.own = own
        self._node = node
        self._source = source
        boxes: dict[int, list[Box]] = {}
        for of_rank in gathered:
            for index, box in msgspec.msgpack.decode(of_rank, type=list[tuple[int, Box]]):
                boxes.setdefault(index, []).append(box)
        files = {index: source.in_file(index) for index in boxes}
        self.boxes = {
            index: found
            for index, found in boxes.items()
            if is_worth_exchanging(found, files[index].shape, files[index].itemsize)
        }
        self._files = {index: files[index] for index in self.boxes}
        pieces = {index: source.pieces(index) for index in self.boxes}
        self._reader = source.unit_reader(pieces, verify=verify)
        self._held = {
            index: [Held(*block) for block in own[index].target.blocks()] for index in self.boxes if index in own
        }
        self._rounds = plan_rounds(
            self._files,
            {index: bands([piece.span for piece in found]) for index, found in pieces.items()},
            {index: Wanted(found, files[index].shape) for index, found in self.boxes.items()},
            node.size,
            UNIT_NBYTES,
        )

    def run(self, progress: Progress | None) -> bool:
        """Read and hand on; False where there is no shared memory. Collective over the node."""
        reader, rank = self._reader, self._node.rank
        done = run_rounds(
            self._node,
            self._rounds,
            before=lambda this: reader.read(this.units[rank], this.parts[rank]),
            after=lambda this: self._take(this, progress),
        )
        self._source.count(reader.report)
        return done

    @torch.no_grad()
    def _take(self, this: Round, progress: Progress | None) -> None:
        """Copy what this rank wants of all units."""
        for unit, part in zip(this.units, this.parts, strict=True):
            for there, here in shared_parts(unit, part, self._files, self._held):
                copy_bits(here, there)
                if progress is not None:
                    progress(here.numel() * here.element_size())
