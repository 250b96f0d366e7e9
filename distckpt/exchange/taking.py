"""One rank's part in reading together: what it wants, what it reads for all, and what it takes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from distckpt.device import gpu_of
from distckpt.exchange.node import UNIT_NBYTES
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import InFile, PieceSpan, Span, Unit, bands, hull, strided_pieces_within
from distckpt.layout.parcels import Cell
from distckpt.layout.rounds import Party, plan_rounds
from distckpt.source import Source
from distckpt.storage.reading import ReadReport
from distckpt.storage.room import Arrivals
from distckpt.storage.threads import one_at_a_time
from distckpt.storage.transfer import Progress
from distckpt.storage.units import Held, HeldArray, shared_arrays, shared_parts
from distckpt.tensor_bytes import is_packed, mark_changed, sharing_memory


class Want(NamedTuple):
    """The tensors that this rank is to read in a restore.

    Attributes:
        source: The open checkpoint.
        reads: The reads: each names a variable and its target.
        verify: Compare the checksums of all pieces that are read whole.
        progress: Called with the number of bytes just put into tensors.
        threads: Most threads that read; None for one per core that the node has for this rank.
    """

    source: Source
    reads: Sequence[TensorRead]
    verify: bool
    progress: Progress | None
    threads: int | None = None


class Own(NamedTuple):
    """The reads of a `Want` that an exchange can serve.

    Attributes:
        reads: Variable index to read, for variables that are one range of the file and need no conversion, and whose
            tensors have their memory for themselves: of those that share it the last one read wins, and an exchange
            would mix them.
        hulls: For each variable of the file, the hull of this rank's boxes as (start, stop), in elements; (0, 0)
            without any. The bytes of an int64 array of shape (variables, 2).
    """

    reads: dict[int, TensorRead]
    hulls: bytes

    @classmethod
    def of(cls, want: Want) -> Own:
        """Select the reads and compute their hulls. Local."""
        sharing = sharing_memory([read.target.tensor for read in want.reads])
        reads = {
            read.variable: read
            for number, read in enumerate(want.reads)
            if number not in sharing and _can_be_exchanged(want.source, read)
        }
        hulls = np.zeros((len(want.source.manifest.variables), 2), np.int64)
        hulls[list(reads)] = [_hull(read) for read in reads.values()] or np.empty((0, 2))
        return cls(reads, hulls.tobytes())

    def wishes(self, variables: Iterable[int]) -> bytes:
        """This rank's wishes for some variables, encoded for `decode_wishes`."""
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
        box: The elements, in global coordinates.
        is_packed: Whether the rank takes them into a packed tensor. It then verifies the strided pieces within.
    """

    box: Box
    is_packed: bool


def decode_wishes(encoded: Iterable[bytes]) -> dict[int, list[Wish]]:
    """Variable index to the wishes for it, from the encoded wishes of several ranks."""
    wishes: dict[int, list[Wish]] = {}
    for of_rank in encoded:
        for index, wish in msgspec.msgpack.decode(of_rank, type=list[tuple[int, Wish]]):
            wishes.setdefault(index, []).append(wish)
    return wishes


def boxes_of(wishes: Mapping[int, Iterable[Wish]]) -> dict[int, list[Box]]:
    """Variable index to the boxes of its wishes."""
    return {index: [wish.box for wish in found] for index, found in wishes.items()}


def stack_hulls(encoded: Sequence[bytes]) -> np.ndarray:
    """Several `Own.hulls` as one array of shape (ranks, variables, 2)."""
    return np.stack([np.frombuffer(data, np.int64).reshape(-1, 2) for data in encoded])


def _can_be_exchanged(source: Source, read: TensorRead) -> bool:
    return read.cast is None and source.is_one_range(read.variable) and not read.target.tensor.is_inference()


def _hull(read: TensorRead) -> Span:
    boxes, shape = read.target.boxes, read.target.global_shape
    if len(boxes) == 1:  # nearly always
        return hull(boxes[0], shape)
    spans = [hull(box, shape) for box in boxes if box.numel] or [Span(0, 0)]
    return Span(min(spans).start, max(span.stop for span in spans))


class Taking:
    """Variables that are read together: the plan of who reads what, and the copies into this rank's tensors.

    Every rank makes one, from the same wishes and parties. In each round it calls `read` for its own units and then,
    once all ranks have read, `take` for each unit or parcel that its node can see. After the last round it calls
    `settle`, whatever happened, and, if no rank failed, `finish`. All methods are local.

    With several threads, thread t of rank r is mover r * n_threads + t. Each thread reads its unit, and takes those of
    its counterparts on all ranks, so that what one mover has read comes in order.

    Attributes:
        files: Variable index to its place in the file.
        n_threads: Threads of each rank that move units; the same on all ranks.
        rounds: For each round, the unit of each mover; the same on all ranks.

    Args:
        want: What this rank wants.
        own: The part of it that can be exchanged.
        files: Variable index to its place in the file, for all that the parties want.
        wishes: Variable index to the wishes of all ranks.
        parties: The movers that share what they read, and what they want.
        size: Number of ranks.
        n_threads: See above.
    """

    def __init__(
        self,
        want: Want,
        own: Own,
        files: Mapping[int, InFile],
        wishes: Mapping[int, Sequence[Wish]],
        parties: Sequence[Party],
        size: int,
        n_threads: int = 1,
    ) -> None:
        source = want.source
        variables = sorted({index for party in parties for index in party.wanted})
        pieces = {index: source.pieces(index) for index in variables}
        moved = {index: bands([piece.span for piece in found]) for index, found in pieces.items()}
        self.files = {index: files[index] for index in variables}
        self.n_threads = n_threads
        self.rounds = plan_rounds(self.files, moved, parties, size * n_threads, UNIT_NBYTES)
        self._want = want
        self._progress = one_at_a_time(want.progress) if n_threads > 1 else want.progress
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
        self._arrivals = _arrivals(self._tensors, n_threads)  # of each thread

    def read(self, mover: int, unit: Unit, memory: memoryview) -> None:
        """Read a unit into memory, and verify the pieces that end in it, except those that a rank verifies in `take`.

        Raises:
            CorruptCheckpointError: The file is too short, or a checksum is wrong.
        """
        self._reader.read(unit, memory, mover)

    @torch.no_grad()
    def take(self, mover: int, unit: Unit, cells: Iterable[Cell], memory: memoryview) -> None:
        """Copy this rank's elements of a unit into its tensors, and verify the pieces that these now hold whole.

        Args:
            mover: The mover that has read the unit.
            unit: The unit.
            cells: The boxes in the memory, and their places there.
            memory: The bytes of the unit, or of a parcel of it.

        Raises:
            CorruptCheckpointError: A checksum is wrong.
        """
        of_variable: dict[int, list[Cell]] = {}
        for cell in cells:
            of_variable.setdefault(cell.variable, []).append(cell)
        for index, ranges in itertools.groupby(unit, key=operator.attrgetter("variable")):
            self._copy(of_variable.get(index, ()), memory, self._arrivals[mover % self.n_threads])
            self._verifier.feed(ranges, memory, mover)

    def _copy(self, cells: Sequence[Cell], memory: memoryview, arrivals: Arrivals) -> None:
        for source, target in shared_arrays(cells, memory, self._arrays):
            np.copyto(target, source)
            self._tell(target.nbytes)
        for there, here in shared_parts(cells, memory, self._tensors):
            arrivals.pass_on(here, there)
            self._tell(here.nbytes)

    def _tell(self, nbytes: int) -> None:
        if self._progress is not None:
            self._progress(nbytes)

    def settle(self) -> None:
        """Wait until all bytes taken are in the tensors, also on GPUs, and tell autograd that these changed."""
        mark_changed(block.tensor for blocks in self._arrays.values() for block in blocks)
        with ExitStack() as all_of_them:
            for arrivals in self._arrivals:
                all_of_them.callback(arrivals.finish)

    def finish(self) -> list[TensorRead]:
        """Add the bytes read and verified to the source's counts; returns the reads that this rank must do itself."""
        self._want.source.count(self._reader.report)
        self._want.source.count(ReadReport(bytes_verified=self._verifier.bytes_verified))
        own = self._own.reads
        return [
            read for read in self._want.reads if read.variable not in self.files or own.get(read.variable) is not read
        ]


def _divide(held: Mapping[int, Sequence[Held]]) -> tuple[dict[int, list[HeldArray]], dict[int, list[Held]]]:
    """The blocks that NumPy can copy into, and the others."""
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


def _arrivals(tensors: Mapping[int, Iterable[Held]], n_threads: int) -> list[Arrivals]:
    """What each thread stages bytes with that do not go straight into arrays."""
    if n_threads == 1:
        return [Arrivals()]
    # As of now, for the threads do not know the stream of the program.
    gpus = {gpu for blocks in tensors.values() for block in blocks if (gpu := gpu_of(block.tensor)) is not None}
    return [Arrivals(gpus, n_buffers=1) for _ in range(n_threads)]


def _taken_whole(pieces: Sequence[PieceSpan], wishes: Iterable[Wish]) -> dict[PieceSpan, Box]:
    """The pieces that some rank receives whole, and verifies after taking them."""
    return strided_pieces_within(pieces, (wish.box for wish in wishes if wish.is_packed))
