"""What to read for a restore, and whether the shards that a file claims can be true."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distckpt.layout.box import MAX_NDIM, Box, Shape, pieces
from distckpt.layout.checksum_index import ChecksumIndex
from distckpt.layout.dtypes import dtype_info, is_known
from distckpt.layout.records import Shard, Variable
from distckpt.layout.tiling import find_gap, find_overlap

_FEW_SHARDS = 16
_MAX_NBYTES = 1 << 62


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


def validate(variables: Sequence[Variable]) -> list[str]:
    """What is wrong with the variables of a manifest that nobody vouches for; empty when all shards tile the shapes."""
    problems: list[str] = []
    sound: set[tuple[int, Shape, str]] = set()  # variables that are cut alike share the list of shards
    for variable in variables:
        kind = (id(variable.shards), variable.shape, variable.dtype)
        if kind not in sound:
            found = validate_shards(variable)
            problems += found
            if not found:
                sound.add(kind)
    return problems


def validate_shards(variable: Variable) -> list[str]:
    """What is wrong with a variable of a manifest that nobody vouches for; empty when its shards tile its shape."""
    shape = variable.shape
    if not is_known(variable.dtype):
        return [f"{variable.key}: unknown dtype {variable.dtype!r}."]
    too_large = math.prod(shape) * dtype_info(variable.dtype).itemsize > _MAX_NBYTES
    if len(shape) > MAX_NDIM or any(not 0 <= size <= _MAX_NBYTES for size in shape) or too_large:
        return [f"{variable.key}: impossible shape {_text(shape)}."]
    if _are_bands(variable.shards, shape):
        return []
    boxes = [Box(shard.offset, shard.shape) for shard in variable.shards]
    wrong = [i for i, box in enumerate(boxes) if not box.within(shape) or box.numel == 0]
    if wrong:
        more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        return [f"{_shard(variable, wrong[0])} is empty or outside of the shape {shape}{more}."]
    overlap = find_overlap(boxes)
    if overlap:
        return [f"{_shard(variable, overlap.first)} overlaps {_shard(variable, overlap.second)}."]
    gap = find_gap(boxes, shape)
    if gap:
        first = f", the first ones at {gap.first.offset}, {gap.first.shape}" if gap.first else ""
        return [f"{variable.key}: {gap.numel} elements of the shape {shape} are in no shard{first}."]
    return []


def _are_bands(shards: Sequence[Shard], shape: Shape) -> bool:
    """Whether shards tile the shape one after the other along dimension 0, as they do in most files."""
    if not shape:
        return len(shards) == 1 and shards[0].offset == shards[0].shape == ()
    width, origin, position = shape[1:], (0,) * (len(shape) - 1), 0
    if 0 in width:
        return False
    for shard in shards:
        if shard.shape[1:] != width or shard.offset[1:] != origin or shard.offset[:1] != (position,):
            return False
        if shard.shape[0] <= 0:
            return False
        position += shard.shape[0]
    return position == shape[0]


def _shard(variable: Variable, index: int) -> str:
    shard = variable.shards[index]
    return f"{variable.key}: shard {index} at offset {_text(shard.offset)} of shape {_text(shard.shape)}"


def _text(numbers: Sequence[int]) -> str:
    """A shape of bounded length: that of a hostile manifest may be anything."""
    text = str(tuple(numbers[:MAX_NDIM]))
    return text if len(text) <= 200 else f"{text[:200]}..."
