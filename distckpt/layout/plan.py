"""The read plan of a restore: which pieces, and which parts of pieces, make up the boxes that a rank wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from distckpt.layout.box import Box, pieces
from distckpt.layout.checksum_index import ChecksumIndex
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Shard, Variable

_FEW_SHARDS = 16


class ReadItem(msgspec.Struct, frozen=True):
    """A box to read. A struct, since there is one for each piece.

    Attributes:
        box: In the global tensor; all or a part of one piece.
        checksum: Index of its checksum in the file's checksum dataset when `box` is a whole piece, else -1.
    """

    box: Box
    checksum: int


class _Part(NamedTuple):
    """A box to read of each variable of a class; see `Places`.

    Attributes:
        box: As `ReadItem.box`.
        origin: `ReadItem.checksum` of the first variable.
        stride: From there to that of the next variable.
    """

    box: Box
    origin: int
    stride: int


class _Parts(NamedTuple):
    """The parts that make up a box."""

    want: Box
    parts: list[_Part]


class ReadPlanner:
    """What to read of the variables of one file.

    Ranks want the same boxes of variables that are cut alike: the last one of each class is remembered.
    """

    def __init__(self, variables: Sequence[Variable], index: ChecksumIndex) -> None:
        """Local.

        Args:
            variables: The stored tensors; the shards of each tile its shape.
            index: The places of their checksums.
        """
        self._variables = variables
        self._index = index
        self._finders: dict[int, _Finder] = {}  # by class
        self._last: dict[int, _Parts] = {}  # by class

    def items(self, variable: int, want: Box) -> list[ReadItem]:
        """The boxes to read so that all of `want` is there: disjoint, in the order of shards and pieces.

        Args:
            variable: Index of the variable.
            want: A box of it; an empty one needs nothing.
        """
        of_class = self._index.classes[variable]
        last = self._last.get(of_class)
        if last is None or last.want != want:
            last = self._last[of_class] = _Parts(want, list(self._parts(variable, want)))
        ordinal = self._index.ordinals[variable]
        return [ReadItem(box, origin + ordinal * stride) for box, origin, stride in last.parts]

    def _parts(self, variable: int, want: Box) -> Iterator[_Part]:
        """The parts that make up a box of a variable, or of another one of its class."""
        if want.numel == 0:
            return
        stored, of_class = self._variables[variable], self._index.classes[variable]
        itemsize = dtype_info(stored.dtype).itemsize
        origins, strides = self._index.places[of_class]
        for number in self._touched(of_class, stored.shards, want):
            shard = stored.shards[number]
            box = Box(shard.offset, shard.shape)
            covered = box == want  # the usual case: nothing was resharded
            for origin, piece in enumerate(pieces(box, itemsize), origins[number]):
                common = piece if covered else piece.intersect(want)
                if common == piece:
                    yield _Part(piece, origin, strides[number])
                elif common:
                    yield _Part(common, -1, 0)

    def _touched(self, of_class: int, shards: list[Shard], want: Box) -> Sequence[int]:
        """Indices of shards that may have elements of `want`: of many shards exactly those, of few all."""
        if len(shards) > _FEW_SHARDS:
            finder = self._finders.get(of_class)
            if finder is None:
                finder = self._finders[of_class] = _Finder(shards)
            return finder.touched(want)
        for index, shard in enumerate(shards):
            if shard.offset == want.offset and shard.shape == want.shape:
                return (index,)
        return range(len(shards))


class _Finder:
    """Many shards, as arrays."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._starts = np.array([shard.offset for shard in shards], np.int64)
        self._stops = self._starts + np.array([shard.shape for shard in shards], np.int64)

    def touched(self, want: Box) -> list[int]:
        """Indices of shards that have elements of `want`."""
        offset = np.array(want.offset, np.int64)
        stop = offset + np.array(want.shape, np.int64)
        found = np.all((self._starts < stop) & (self._stops > offset), axis=1)
        touched: list[int] = np.flatnonzero(found).tolist()
        return touched
