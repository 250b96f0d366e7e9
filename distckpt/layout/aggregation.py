"""Aggregation: small parts of a file are sent to one rank, which writes them together.

A shard of a bias or of a norm is a few bytes. If every rank wrote its own, there would be ranks times variables writes,
each into a page (on a parallel file system: a locked extent) that other ranks are writing as well. So ranks send such
parts to an aggregator, which writes them as a few long ranges.

The file is divided into bins of equal length; a variable belongs to the bin in which it begins. If a bin has many
shards of small variables, its small variables are aggregated.

This is two-phase I/O, and the aggregators are those of ROMIO (R. Thakur, W. Gropp, E. Lusk: Data Sieving and Collective
I/O in ROMIO, Frontiers '99), but who sends what to whom is settled once per layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Variables below this size are small: they are neighbours in the file, while larger ones are aligned. In bytes.
SMALL_NBYTES = 64 << 10

#: Length of a bin. An aggregator has the bytes of one bin in memory, twice. In bytes.
BIN_NBYTES = 4 << 20

#: With fewer shards of small variables than this in a bin, writing them takes no longer than sending them.
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
        """For the wire: `EXTENT_NBYTES` for each."""
        return np.stack(self).tobytes()

    def slice(self, part: slice) -> Extents:
        """Some of them."""
        return Extents(self.starts[part], self.sizes[part])


#: Bytes of an encoded extent.
EXTENT_NBYTES = 16


@dataclass(frozen=True, slots=True)
class SmallParts:
    """What one rank writes of small variables.

    Attributes:
        extents: Where each part is in the file, ascending.
        bins: The bin of each part.
        is_shard: For each part, whether other ranks write other parts of its variable.
    """

    extents: Extents
    bins: _Ints
    is_shard: npt.NDArray[np.bool_]

    @classmethod
    def of_variables(cls, offsets: _Ints, extents: Extents, is_shard: npt.NDArray[np.bool_]) -> SmallParts:
        """From where the variable of each part begins in the file."""
        return cls(extents, offsets // BIN_NBYTES, is_shard)

    def crowded(self, n_bins: int, n_ranks: int) -> npt.NDArray[np.uint8]:
        """For each bin, whether it has many shards, supposing that all ranks have as many there as this one."""
        shards = np.bincount(self.bins[self.is_shard], minlength=n_bins)
        return (shards * n_ranks >= MIN_SHARDS).astype(np.uint8)

    def within(self, number: int) -> slice:
        """Which of the parts are in a bin."""
        first, stop = np.searchsorted(self.bins, (number, number + 1)).tolist()
        return slice(first, stop)


def count_bins(file_nbytes: int) -> int:
    """Number of bins of a file."""
    return -(-file_nbytes // BIN_NBYTES)


def aggregators(n_bins: int, n_ranks: int) -> list[int]:
    """The rank that writes each of some bins: spread over the ranks, and neighbours at the same one."""
    return [number * n_ranks // n_bins for number in range(n_bins)]


class _Move(NamedTuple):
    """Parts of equal size, from where they arrive to where they are put together.

    Attributes:
        size: Bytes of each.
        sources: Position of each in what has arrived.
        targets: Position of each in the memory of the bin.
    """

    size: int
    sources: _Ints
    targets: _Ints


@dataclass(frozen=True, slots=True)
class Assembly:
    """How an aggregator puts a bin together.

    Attributes:
        lengths: Bytes that each rank sends: its parts, concatenated.
        start: Position of the bin's memory in the file.
        nbytes: Size of that memory.
        runs: (position in the memory, size) of each run without a gap, to be written.
    """

    lengths: list[int]
    start: int
    nbytes: int
    runs: list[tuple[int, int]]
    _moves: list[_Move]

    @classmethod
    def of(cls, by_rank: Sequence[Extents]) -> Assembly:
        """From what each rank sends.

        Args:
            by_rank: Its parts, in the order in which it sends them; those of all ranks are disjoint, and there is one.
        """
        starts = np.concatenate([extents.starts for extents in by_rank])
        sizes = np.concatenate([extents.sizes for extents in by_rank])
        sources = np.cumsum(sizes) - sizes
        start = int(starts.min())
        targets = starts - start
        order = np.argsort(targets)
        first, last = targets[order], (targets + sizes)[order]
        gaps = np.flatnonzero(first[1:] != last[:-1])
        begins, ends = first[[0, *(gaps + 1)]], last[[*gaps, -1]]
        of_size = ((int(size), np.flatnonzero(sizes == size)) for size in np.unique(sizes))
        return cls(
            lengths=[int(extents.sizes.sum()) for extents in by_rank],
            start=start,
            nbytes=int(last[-1]),
            runs=list(zip(begins.tolist(), (ends - begins).tolist(), strict=True)),
            _moves=[_Move(size, sources[which], targets[which]) for size, which in of_size],
        )

    def put_together(self, arrived: npt.NDArray[np.uint8], memory: npt.NDArray[np.uint8]) -> None:
        """Copy what ranks have sent into the order of the file.

        Args:
            arrived: What the ranks have sent, by rank; `sum(lengths)` bytes.
            memory: Takes the bytes of `runs`; `nbytes` bytes.
        """
        windows = np.lib.stride_tricks.sliding_window_view
        for size, sources, targets in self._moves:
            windows(memory, size, writeable=True)[targets] = windows(arrived, size)[sources]
