"""What one rank wants, what it moves of what is read together, and what it takes of it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from distckpt.exchange.node import UNIT_NBYTES
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import PieceSpan, Span, Unit, bands, hull, strided_pieces_within
from distckpt.layout.parcels import Cell
from distckpt.layout.rounds import Party, plan_rounds
from distckpt.source import Source
from distckpt.storage.room import Arrivals
from distckpt.storage.transfer import Progress
from distckpt.storage.units import Held, HeldArray, shared_arrays, shared_parts
from distckpt.tensor_bytes import is_packed, mark_changed


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

    def wishes(self, variables: Iterable[int]) -> bytes:
        """What this rank wants of some variables, for `decode_wishes`."""
        reads = [(index, self.reads[index]) for index in variables if index in self.reads]
        return msgspec.msgpack.encode(
            [
                (index, Wish(block.box, is_packed(block.tensor)))
                for index, read in reads
                for block in read.target.blocks()
            ]
        )


class Wish(NamedTuple):
    """A box of a variable that a rank wants.

    Attributes:
        box: The elements.
        is_packed: The rank has their bytes together when it has taken them: it verifies them then.
    """

    box: Box
    is_packed: bool


def decode_wishes(encoded: Iterable[bytes]) -> dict[int, list[Wish]]:
    """Variable to what is wanted of it, from the wishes of several ranks."""
    wishes: dict[int, list[Wish]] = {}
    for of_rank in encoded:
        for index, wish in msgspec.msgpack.decode(of_rank, type=list[tuple[int, Wish]]):
            wishes.setdefault(index, []).append(wish)
    return wishes


def boxes_of(wishes: Mapping[int, Iterable[Wish]]) -> dict[int, list[Box]]:
    """Just the boxes."""
    return {index: [wish.box for wish in found] for index, found in wishes.items()}


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
        wishes: What any rank wants, by variable.
        parties: Who wants what of the variables.
        size: Number of ranks.
    """

    def __init__(
        self, want: Want, own: Own, wishes: Mapping[int, Sequence[Wish]], parties: Sequence[Party], size: int
    ) -> None:
        source = want.source
        variables = sorted({index for party in parties for index in party.wanted})
        pieces = {index: source.pieces(index) for index in variables}
        moved = {index: bands([piece.span for piece in found]) for index, found in pieces.items()}
        self.files = {index: source.in_file(index) for index in variables}
        self.rounds = plan_rounds(self.files, moved, parties, size, UNIT_NBYTES)
        self._want = want
        self._own = own
        reads = {index: own.reads[index] for index in variables if index in own.reads}
        held = {
            index: [Held(box, tensor.detach()) for box, tensor in read.target.blocks()] for index, read in reads.items()
        }
        self._arrays, self._tensors = _divide(held)
        taken = {index: _taken_whole(found, wishes[index]) for index, found in pieces.items()}
        read = {index: [piece for piece in found if piece not in taken[index]] for index, found in pieces.items()}
        self._reader = source.unit_reader(self.files, read, verify=want.verify)
        self._verifier = source.taken_verifier(self.files, taken, held, verify=want.verify)
        self._arrivals = Arrivals()

    def read(self, unit: Unit, memory: memoryview) -> None:
        """Read a unit, and verify the pieces that end in it; but for those that their takers verify.

        Raises:
            CorruptCheckpointError: The file is too short, or a checksum is wrong.
        """
        self._reader.read(unit, memory)

    @torch.no_grad()
    def take(self, mover: int, unit: Unit, cells: Iterable[Cell], memory: memoryview) -> None:
        """Copy what this rank wants of some memory, and verify the pieces that it has whole then.

        Args:
            mover: The rank that has read it.
            unit: What was read.
            cells: What this node wants of it, and where that is in the memory.
            memory: The bytes.

        Raises:
            CorruptCheckpointError: A checksum is wrong.
        """
        of_variable: dict[int, list[Cell]] = {}
        for cell in cells:
            of_variable.setdefault(cell.variable, []).append(cell)
        for index, ranges in itertools.groupby(unit, key=operator.attrgetter("variable")):
            self._copy(of_variable.get(index, ()), memory)
            # At once: another variable may be restored into the same memory.
            self._verifier.feed(ranges, memory, mover)

    def _copy(self, cells: Sequence[Cell], memory: memoryview) -> None:
        for source, target in shared_arrays(cells, memory, self._arrays):
            np.copyto(target, source)
            self._tell(target.nbytes)
        for there, here in shared_parts(cells, memory, self._tensors):
            self._arrivals.pass_on(here, there)
            self._tell(here.nbytes)

    def _tell(self, nbytes: int) -> None:
        if self._want.progress is not None:
            self._want.progress(nbytes)

    def settle(self) -> None:
        """See that all that was taken is in the tensors, those on GPUs too, and that torch knows; called whatever
        happened.
        """
        for blocks in self._arrays.values():
            for block in blocks:
                mark_changed(block.tensor)
        self._arrivals.finish()

    def finish(self) -> list[TensorRead]:
        """Add to what the source has counted; returns the reads that are left to this rank alone."""
        self._want.source.count(self._reader.report)
        self._want.source.count(self._verifier.report)
        own = self._own.reads
        return [
            read for read in self._want.reads if read.variable not in self.files or own.get(read.variable) is not read
        ]


def _divide(held: Mapping[int, Sequence[Held]]) -> tuple[dict[int, list[HeldArray]], dict[int, list[Held]]]:
    """Blocks that are copied into as arrays, and the others."""
    arrays: dict[int, list[HeldArray]] = {}
    tensors: dict[int, list[Held]] = {}
    for index, blocks in held.items():
        for block in blocks:
            array = HeldArray.of(block)
            if array is None:
                tensors.setdefault(index, []).append(block)
            else:
                arrays.setdefault(index, []).append(array)
    return arrays, tensors


def _taken_whole(pieces: Sequence[PieceSpan], wishes: Iterable[Wish]) -> list[PieceSpan]:
    """The pieces that some rank verifies when it has taken them."""
    return list(strided_pieces_within(pieces, (wish.box for wish in wishes if wish.is_packed)))
