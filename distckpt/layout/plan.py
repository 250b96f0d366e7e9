"""The read plan of a restore: which pieces, and which parts of pieces, make up the boxes that a rank wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distckpt.layout.box import Box, pieces
from distckpt.layout.checksum_index import ChecksumIndex
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Shard, Variable

_FEW_SHARDS = 16


class ReadItem(NamedTuple):
    """A box to read.

    Attributes:
        box: In the global tensor; all or a part of one piece.
        checksum: Index of its checksum in the file's checksum dataset when `box` is a whole piece, else -1.
    """

    box: Box
    checksum: int


class ReadPlanner:
    """What to read of the variables of one file."""

    def __init__(self, variables: Sequence[Variable], index: ChecksumIndex) -> None:
        """Local.

        Args:
            variables: The stored tensors; the shards of each tile its shape.
            index: The places of their checksums.
        """
        self._variables = variables
        self._index = index
        self._finders: dict[int, _Finder] = {}  # by identity of a list of shards, which variables share

    def items(self, variable: int, want: Box) -> list[ReadItem]:
        """The boxes to read so that all of `want` is there: disjoint, in the order of shards and pieces.

        Args:
            variable: Index of the variable.
            want: A box of it; an empty one needs nothing.
        """
        if want.numel == 0:
            return []
        stored, firsts = self._variables[variable], self._index.firsts[variable]
        itemsize = dtype_info(stored.dtype).itemsize
        items: list[ReadItem] = []
        for number in self._touched(stored.shards, want):
            shard = stored.shards[number]
            box = Box(shard.offset, shard.shape)
            covered = box == want  # the usual case: nothing was resharded
            for checksum, piece in enumerate(pieces(box, itemsize), firsts[number]):
                common = piece if covered else piece.intersect(want)
                if common:
                    items.append(ReadItem(common, checksum if common == piece else -1))
        return items

    def _touched(self, shards: list[Shard], want: Box) -> Sequence[int]:
        """Indices of shards that may have elements of `want`: of many shards exactly those, of few all."""
        if len(shards) > _FEW_SHARDS:
            finder = self._finders.get(id(shards))
            if finder is None:
                finder = self._finders[id(shards)] = _Finder(shards)
            return finder.touched(want)
        for index, shard in enumerate(shards):
            if shard.offset == want.offset and shard.shape == want.shape:
                return (index,)
        return range(len(shards))


class _Finder:
    """Many shards, as arrays. Ranks want the same boxes of variables that are cut alike: the last one is remembered."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._starts = np.array([shard.offset for shard in shards], np.int64)
        self._stops = self._starts + np.array([shard.shape for shard in shards], np.int64)
        self._last: tuple[Box, list[int]] | None = None

    def touched(self, want: Box) -> list[int]:
        """Indices of shards that have elements of `want`."""
        if self._last is None or self._last[0] != want:
            offset = np.array(want.offset, np.int64)
            stop = offset + np.array(want.shape, np.int64)
            found = np.all((self._starts < stop) & (self._stops > offset), axis=1)
            self._last = want, np.flatnonzero(found).tolist()
        return self._last[1]
