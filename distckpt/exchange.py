"""Reading together: what several ranks of a node want of the same bytes is read once and handed on in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.shared_memory import SharedMemory
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import Unit, Wanted, bands, hull, hulls_that_meet, is_worth_exchanging, plan_rounds
from distckpt.log import log
from distckpt.request import Attempt
from distckpt.source import Source
from distckpt.storage.transfer import Progress, copy_bits
from distckpt.storage.units import Held, InFile, UnitReader, shared_parts

#: Bytes that a rank moves in one round. Two such units of every rank are in memory, and in the shared cache.
UNIT_NBYTES = 2 << 20

T = TypeVar("T")


class _FailedElsewhere(Exception):
    """Another rank of the node has failed."""


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
        reading = _plan(node, source, reads)
        done = reading is not None and reading.run(verify, progress)
    except _FailedElsewhere:
        return []
    if not done or reading is None:
        return list(reads)
    return [read for read in reads if read.variable not in reading.boxes or reading.own.get(read.variable) is not read]


def _agreed(node: Coordinator, work: Callable[[], T]) -> T:
    """Do local work; where it fails on a rank, all ranks of the node stop."""
    attempt = Attempt.of(work)
    if node.any_failed(attempt.error is not None):
        attempt.require()
        raise _FailedElsewhere
    return attempt.value


def _plan(node: Coordinator, source: Source, reads: Sequence[TensorRead]) -> _Reading | None:
    """What to read together, agreed by the node; None if nothing."""
    own = _agreed(node, lambda: {read.variable: read for read in reads if _can_be_exchanged(source, read)})
    hulls = _agreed(node, lambda: _hulls(source, own))
    gathered = node.gather_all("hulls", hulls.tobytes())
    meeting = _agreed(node, lambda: _meeting(gathered, hulls.shape))
    if not meeting:
        return None
    wants = node.gather_all("boxes", _agreed(node, lambda: _encode_boxes(meeting, own)))
    return _agreed(node, lambda: _Reading(node, source, own, wants))


def _can_be_exchanged(source: Source, read: TensorRead) -> bool:
    """Whether the bytes are one range of the file, and can be copied into the tensor as they are."""
    return read.cast is None and source.in_file(read.variable).offset >= 0 and not read.target.tensor.is_inference()


def _hulls(source: Source, reads: dict[int, TensorRead]) -> np.ndarray:
    hulls = np.zeros((len(source.manifest.variables), 2), np.int64)
    for index, read in reads.items():
        spans = [hull(block.box, read.target.global_shape) for block in read.target.blocks()]
        if spans:
            hulls[index] = min(span.start for span in spans), max(span.stop for span in spans)
    return hulls


def _meeting(gathered: Sequence[bytes], shape: tuple[int, ...]) -> list[int]:
    """The variables of which ranks hold elements among those of others, given the hulls of all ranks."""
    return hulls_that_meet(np.stack([np.frombuffer(data, np.int64).reshape(shape) for data in gathered]))


def _encode_boxes(variables: Sequence[int], reads: Mapping[int, TensorRead]) -> bytes:
    own = ((index, block.box) for index in variables if index in reads for block in reads[index].target.blocks())
    return msgspec.msgpack.encode(list(own))


class _Reading:
    """One exchange: the plan, which is the same on all ranks of the node, and the rounds.

    Attributes:
        own: What this rank wants, by variable.
        boxes: Variables that are exchanged, to the boxes that ranks want of them.
    """

    def __init__(self, node: Coordinator, source: Source, own: dict[int, TensorRead], wants: Sequence[bytes]) -> None:
        self.own = own
        self._node = node
        self._source = source
        boxes: dict[int, list[Box]] = {}
        for of_rank in wants:
            for index, box in msgspec.msgpack.decode(of_rank, type=list[tuple[int, Box]]):
                boxes.setdefault(index, []).append(box)
        files = {index: source.in_file(index) for index in boxes}
        self.boxes = {
            index: found
            for index, found in boxes.items()
            if is_worth_exchanging(found, files[index].shape, files[index].itemsize)
        }
        self._files: dict[int, InFile] = {index: files[index] for index in self.boxes}
        self._pieces = {index: source.pieces(index) for index in self.boxes}
        self._held = {
            index: [Held(*block) for block in own[index].target.blocks()] for index in self.boxes if index in own
        }
        self._rounds = plan_rounds(
            source.manifest.variables,
            {index: bands([piece.span for piece in pieces]) for index, pieces in self._pieces.items()},
            {index: Wanted(found, files[index].shape) for index, found in self.boxes.items()},
            node.size,
            UNIT_NBYTES,
        )

    def run(self, verify: bool, progress: Progress | None) -> bool:
        """Read and hand on; False where there is no shared memory. Collective over the node."""
        if not self._rounds:
            return True
        memory = self._node.shared_memory(2 * UNIT_NBYTES)
        if memory is None:
            log.warning("no shared memory on this node: every rank reads for itself")
            return False
        reader = self._source.unit_reader(self._pieces, verify=verify)
        try:
            failure = self._move(reader, memory, progress)
        finally:
            memory.free()
        self._source.count(reader.report)
        if self._node.any_failed(failure is not None):
            raise failure or _FailedElsewhere
        return True

    def _move(self, reader: UnitReader, memory: SharedMemory, progress: Progress | None) -> BaseException | None:
        """The rounds, which a failing rank leaves together with the others; returns what failed here.

        The memory has two halves: while the slowest rank still takes from one, the others read into the other one.
        """
        failure: BaseException | None = None
        parts = [torch.frombuffer(part, dtype=torch.uint8) for part in memory.parts]
        for number, units in enumerate(self._rounds):
            start = number % 2 * UNIT_NBYTES
            stop = start + UNIT_NBYTES
            try:
                reader.read(units[self._node.rank], memory.parts[self._node.rank][start:stop])
            except BaseException as error:
                failure = error
            if memory.fence(failed=failure is not None):
                break
            try:
                for unit, part in zip(units, parts, strict=True):
                    self._take(unit, part[start:stop], progress)
            except BaseException as error:
                failure = error
        return failure

    @torch.no_grad()
    def _take(self, unit: Unit, memory: torch.Tensor, progress: Progress | None) -> None:
        """Copy what this rank wants of a unit."""
        for there, here in shared_parts(unit, memory, self._files, self._held):
            copy_bits(here, there)
            if progress is not None:
                progress(here.numel() * here.element_size())
