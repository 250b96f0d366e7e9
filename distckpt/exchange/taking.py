"""What one rank wants, what it moves of what is read together, and what it takes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from distckpt.exchange.node import UNIT_NBYTES
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import Span, Unit, bands, hull
from distckpt.layout.parcels import Cell
from distckpt.layout.rounds import Party, plan_rounds
from distckpt.source import Source
from distckpt.storage.room import Arrivals
from distckpt.storage.transfer import Progress
from distckpt.storage.units import Held, shared_parts


class Want(NamedTuple):
    """What this rank reads.

    Attributes:
        source: The file.
        reads: What of it.
        verify: Compare the checksums of all pieces that are read whole.
        progress: Called with the number of bytes just put into tensors.
    """

    source: Source
    reads: Sequence[TensorRead]
    verify: bool
    progress: Progress | None


class Own(NamedTuple):
    """What this rank wants and can take from others.

    Attributes:
        reads: By variable; those whose bytes are one range of the file, and can be copied into the tensor as they are.
        hulls: From the first to behind the last element of each variable of the file; int64, (0, 0) for no elements.
    """

    reads: dict[int, TensorRead]
    hulls: bytes

    @classmethod
    def of(cls, want: Want) -> Own:
        """Find it out. Local."""
        reads = {read.variable: read for read in want.reads if _can_be_exchanged(want.source, read)}
        hulls = np.zeros((len(want.source.manifest.variables), 2), np.int64)
        hulls[list(reads)] = [_hull(read) for read in reads.values()] or np.empty((0, 2))
        return cls(reads, hulls.tobytes())

    def boxes(self, variables: Iterable[int]) -> bytes:
        """The boxes of some variables, for `decode_boxes`."""
        reads = [(index, self.reads[index]) for index in variables if index in self.reads]
        return msgspec.msgpack.encode([(index, block.box) for index, read in reads for block in read.target.blocks()])


def decode_boxes(encoded: Iterable[bytes]) -> dict[int, list[Box]]:
    """Variable to the boxes of it, from those of several ranks."""
    boxes: dict[int, list[Box]] = {}
    for of_rank in encoded:
        for index, box in msgspec.msgpack.decode(of_rank, type=list[tuple[int, Box]]):
            boxes.setdefault(index, []).append(box)
    return boxes


def stack_hulls(encoded: Sequence[bytes]) -> np.ndarray:
    """Several `Own.hulls` as one array of shape (ranks, variables, 2)."""
    return np.stack([np.frombuffer(data, np.int64).reshape(-1, 2) for data in encoded])


def _can_be_exchanged(source: Source, read: TensorRead) -> bool:
    return read.cast is None and source.is_one_range(read.variable) and not read.target.tensor.is_inference()


def _hull(read: TensorRead) -> Span:
    spans = [hull(block.box, read.target.global_shape) for block in read.target.blocks()] or [Span(0, 0)]
    return spans[0] if len(spans) == 1 else Span(min(spans).start, max(span.stop for span in spans))


class Taking:
    """Variables that are read together: which rank reads what when, and what this rank takes.

    Attributes:
        files: Where the variables are in the file, by index.
        rounds: For each round, for each rank, what it reads; the same on all ranks.

    Args:
        want: What this rank wants.
        own: The same, as far as it can come from others.
        parties: Who wants what of the variables.
        size: Number of ranks.
    """

    def __init__(self, want: Want, own: Own, parties: Sequence[Party], size: int) -> None:
        source = want.source
        variables = sorted({index for party in parties for index in party.wanted})
        pieces = {index: source.pieces(index) for index in variables}
        moved = {index: bands([piece.span for piece in found]) for index, found in pieces.items()}
        self.files = {index: source.in_file(index) for index in variables}
        self.rounds = plan_rounds(self.files, moved, parties, size, UNIT_NBYTES)
        self._want = want
        self._own = own
        self._reader = source.unit_reader(pieces, verify=want.verify)
        self._arrivals = Arrivals()
        reads = {index: own.reads[index] for index in variables if index in own.reads}
        self._held: Mapping[int, Sequence[Held]] = {
            index: [Held(*block) for block in read.target.blocks()] for index, read in reads.items()
        }

    def read(self, unit: Unit, memory: memoryview) -> None:
        """Read a unit, and verify the pieces that end in it.

        Raises:
            CorruptCheckpointError: The file is too short, or a checksum is wrong.
        """
        self._reader.read(unit, memory)

    @torch.no_grad()
    def take(self, cells: Iterable[Cell], memory: memoryview) -> None:
        """Copy what this rank wants of some memory."""
        for there, here in shared_parts(cells, memory, self._held):
            self._arrivals.pass_on(here, there)
            if self._want.progress is not None:
                self._want.progress(here.numel() * here.element_size())

    def settle(self) -> None:
        """See that all that was taken is in the tensors, those on GPUs too; called whatever happened."""
        self._arrivals.finish()

    def finish(self) -> list[TensorRead]:
        """Add to what the source has counted; returns the reads that are left to this rank alone."""
        self._want.source.count(self._reader.report)
        own = self._own.reads
        return [
            read for read in self._want.reads if read.variable not in self.files or own.get(read.variable) is not read
        ]
