"""Aggregation: small parts of a file are sent to one rank, which writes them together.

A shard of a bias or of a norm has a few bytes. If every rank wrote its own, there would be ranks times variables
writes, each into a page (on a parallel file system: a locked extent) that other ranks write to as well. So ranks send
such parts to an aggregator, which writes them as a few long ranges.

The file is divided into bins of equal length; a variable belongs to the bin in which it begins. If a bin has many
shards of small variables, its small variables are aggregated.

This is two-phase I/O, and the aggregators are those of ROMIO (R. Thakur, W. Gropp, E. Lusk: Data Sieving and Collective
I/O in ROMIO, Frontiers '99), but the messages are planned once per layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Variables below this size are small: they are neighbours in the file, while larger ones are aligned. In bytes.
SMALL_NBYTES = 64 << 10

#: Length of a bin. An aggregator holds the bytes of one bin in memory twice. In bytes.
BIN_NBYTES = 4 << 20

#: Bins with fewer shards of small variables than this are not aggregated: writing those takes no longer than sending.
MIN_SHARDS = 256

_Ints = npt.NDArray[np.int64]


class Extents(NamedTuple):
    """Ranges of bytes in the file.

    Attributes:
        starts: Position of the first byte of each.
        sizes: Bytes of each; none is empty.
    """

    starts: _Ints
    sizes: _Ints

    @classmethod
    def decode(cls, encoded: memoryview) -> Extents:
        """See `encode`."""
        return cls(*np.frombuffer(encoded, np.int64).reshape(2, -1))

    def encode(self) -> bytes:
        """Encode for a message, in `EXTENT_NBYTES` for each extent."""
        return np.stack(self).tobytes()

    def slice(self, part: slice) -> Extents:
        """The extents of a slice."""
        return Extents(self.starts[part], self.sizes[part])


#: Bytes of an encoded extent.
EXTENT_NBYTES = 16


@dataclass(frozen=True, slots=True)
class SmallParts:
    """The parts of small variables that one rank writes.

    Attributes:
        extents: Position and size of each part in the file.
        bins: Index of the bin of each part, ascending once `take` has ordered them.
        is_shard: For each part, whether other ranks write other parts of its variable.
    """

    extents: Extents
    bins: _Ints
    is_shard: npt.NDArray[np.bool_]

    @classmethod
    def of_variables(cls, offsets: _Ints, extents: Extents, is_shard: npt.NDArray[np.bool_]) -> SmallParts:
        """Assign parts to bins by `offsets`, the position in the file at which the variable of each part begins."""
        return cls(extents, offsets // BIN_NBYTES, is_shard)

    def take(self, order: _Ints) -> SmallParts:
        """The same parts in another order, in which those of a bin are neighbours and bins ascend."""
        starts, sizes = self.extents
        return SmallParts(Extents(starts[order], sizes[order]), self.bins[order], self.is_shard[order])

    def crowded(self, n_bins: int, n_ranks: int) -> npt.NDArray[np.uint8]:
        """For each bin, 1 if it has at least `MIN_SHARDS` shards, assuming that all ranks have as many as this one."""
        shards = np.bincount(self.bins[self.is_shard], minlength=n_bins)
        return (shards * n_ranks >= MIN_SHARDS).astype(np.uint8)

    def within(self, number: int) -> slice:
        """The slice of the parts that are in a bin."""
        first, stop = np.searchsorted(self.bins, (number, number + 1)).tolist()
        return slice(first, stop)


def count_bins(file_nbytes: int) -> int:
    """Number of bins of a file."""
    return -(-file_nbytes // BIN_NBYTES)


def aggregators(n_bins: int, n_ranks: int) -> list[int]:
    """The rank that writes each bin: bins are spread evenly over the ranks, and neighbours go to the same rank."""
    return [number * n_ranks // n_bins for number in range(n_bins)]


class _Move(NamedTuple):
    """Copies of parts of equal size, from the messages received into the order of the file.

    Attributes:
        size: Bytes of each part.
        sources: Position of each part in the concatenated messages.
        targets: Position of each part among all parts in the order of the file.
    """

    size: int
    sources: _Ints
    targets: _Ints


@dataclass(frozen=True, slots=True)
class Assembly:
    """How an aggregator puts a bin together from the messages of all ranks.

    Attributes:
        lengths: Bytes that each rank sends: its parts, concatenated.
        runs: (position in the file, size) of each run without a gap, to be written.
    """

    lengths: list[int]
    runs: list[tuple[int, int]]
    _moves: list[_Move]

    @classmethod
    def of(cls, by_rank: Sequence[Extents]) -> Assembly:
        """Plan the assembly of a bin.

        Args:
            by_rank: The parts of each rank, in the order in which it sends them. No two parts overlap, and at least one
                rank has one.
        """
        starts = np.concatenate([extents.starts for extents in by_rank])
        sizes = np.concatenate([extents.sizes for extents in by_rank])
        sources = np.cumsum(sizes) - sizes
        order = np.argsort(starts)
        first, last = starts[order], (starts + sizes)[order]
        targets = np.empty_like(sources)
        targets[order] = np.cumsum(sizes[order]) - sizes[order]
        gaps = np.flatnonzero(first[1:] != last[:-1])
        begins, ends = first[[0, *(gaps + 1)]], last[[*gaps, -1]]
        moved = np.empty(0, np.int64) if np.array_equal(sources, targets) else np.unique(sizes)
        of_size = ((int(size), np.flatnonzero(sizes == size)) for size in moved)
        return cls(
            lengths=[int(extents.sizes.sum()) for extents in by_rank],
            runs=list(zip(begins.tolist(), (ends - begins).tolist(), strict=True)),
            _moves=[_Move(size, sources[which], targets[which]) for size, which in of_size],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all messages, and of all runs."""
        return sum(self.lengths)

    def put_together(self, arrived: npt.NDArray[np.uint8], memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Bring the received parts into the order of the file.

        Args:
            arrived: The messages of all ranks, concatenated by rank; `nbytes` bytes.
            memory: Of `nbytes` bytes; receives the parts, unless they have arrived in the order of the file.

        Returns:
            The bytes of `runs`, one after the other: `arrived` or `memory`.
        """
        for size, sources, targets in self._moves:
            _windows(memory, size)[targets] = _windows(arrived, size)[sources]
        return memory if self._moves else arrived


def _windows(data: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.void]:
    """Every `size` consecutive bytes as one element, so that parts are copied whole and not byte by byte."""
    return np.ndarray(len(data) - size + 1, f"V{size}", data, strides=(1,))


def rounds_of(roots: Sequence[int]) -> list[list[int]]:
    """Divide bins into rounds, in each of which every rank has at most one bin to write: all can write at once.

    Args:
        roots: The aggregator of each bin.

    Returns:
        Indices of bins, ascending in each round.
    """
    rounds: list[list[int]] = []
    taken: Counter[int] = Counter()
    for number, root in enumerate(roots):
        if taken[root] == len(rounds):
            rounds.append([])
        rounds[taken[root]].append(number)
        taken[root] += 1
    return rounds
