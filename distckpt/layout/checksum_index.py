"""Where the checksum of every piece stands in the file's checksum dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Shape, piece_count
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Shard, Variable


@dataclass(frozen=True, slots=True)
class ChecksumIndex:
    """Checksums by writing rank, within that in order of variables, shards, pieces: each rank writes its own at once.

    Attributes:
        firsts: For each variable, for each of its shards: index of the first of its checksums.
        total: Number of checksums in the file.
    """

    firsts: list[list[int]]
    total: int


#: From this many shards of a variable on, NumPy is faster than a loop over them.
_MANY_SHARDS = 64


def index_checksums(variables: Sequence[Variable]) -> ChecksumIndex:
    """Find the place of every checksum; writers and readers find the same."""
    many = any(len(variable.shards) >= _MANY_SHARDS for variable in variables)
    return _index_many(variables) if many else _index_few(variables)


def _index_few(variables: Sequence[Variable]) -> ChecksumIndex:
    per_rank: dict[int, int] = {}
    before = []  # for each shard, the pieces of its rank in the shards before it
    for variable in variables:
        itemsize = dtype_info(variable.dtype).itemsize
        of_variable = []
        for shard in variable.shards:
            so_far = per_rank.get(shard.rank, 0)
            of_variable.append(so_far)
            per_rank[shard.rank] = so_far + piece_count(shard.shape, itemsize)
        before.append(of_variable)
    ranks = sorted(per_rank)
    *starts, total = accumulate((per_rank[rank] for rank in ranks), initial=0)
    start_of = dict(zip(ranks, starts, strict=True))
    firsts = [
        [start_of[shard.rank] + so_far for shard, so_far in zip(variable.shards, of_variable, strict=True)]
        for variable, of_variable in zip(variables, before, strict=True)
    ]
    return ChecksumIndex(firsts, total)


def _index_many(variables: Sequence[Variable]) -> ChecksumIndex:
    tilings = _Tilings(variables)
    tiles = [tilings.of(variable) for variable in variables]
    per_rank = np.zeros(tilings.n_ranks, np.int64)
    for tile in tiles:
        np.add.at(per_rank, tile.ranks, tile.counts)
    following = np.cumsum(per_rank) - per_rank
    firsts: list[list[int]] = []
    for tile in tiles:
        firsts.append((following[tile.ranks] + tile.before).tolist())
        np.add.at(following, tile.ranks, tile.counts)
    return ChecksumIndex(firsts, int(per_rank.sum()))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """The shards of a variable.

    Attributes:
        ranks: Who wrote each: its place among all ranks that wrote something.
        counts: Pieces of each.
        before: Pieces of the same rank's shards before each.
    """

    ranks: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]


class _Tilings:
    """Shards of several variables; a list of shards that variables share is counted once."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        lists = {id(variable.shards): variable.shards for variable in variables}
        # The ranks of a hostile manifest may be any numbers.
        ranks = {shard.rank for shards in lists.values() for shard in shards}
        self._places = {rank: place for place, rank in enumerate(sorted(ranks))}
        self.n_ranks = len(ranks)
        self._known: dict[tuple[int, int], _Tiles] = {}

    def of(self, variable: Variable) -> _Tiles:
        """The shards of a variable, which must stay alive."""
        itemsize = dtype_info(variable.dtype).itemsize
        key = (id(variable.shards), itemsize)
        tiles = self._known.get(key)
        if tiles is None:
            tiles = self._known[key] = _tiles(variable.shards, itemsize, self._places)
        return tiles


def _tiles(shards: Sequence[Shard], itemsize: int, places: Mapping[int, int]) -> _Tiles:
    known: dict[Shape, int] = {}
    before: dict[int, int] = {}
    counts, earlier = [], []
    for shard in shards:
        count = known.get(shard.shape)
        if count is None:
            count = known[shard.shape] = piece_count(shard.shape, itemsize)
        counts.append(count)
        so_far = before.get(shard.rank, 0)
        earlier.append(so_far)
        before[shard.rank] = so_far + count
    ranks = np.array([places[shard.rank] for shard in shards], np.int64)
    return _Tiles(ranks, np.array(counts, np.int64), np.array(earlier, np.int64))
