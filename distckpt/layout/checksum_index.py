"""Where the checksum of every piece stands in the file's checksum dataset.

Checksums stand by writing rank, so that each rank writes its own at once. Within a rank they stand by class of
variables, within a class by variable, then by shard and by piece; variables with equal shards and elements of equal
size are one class, and classes stand in order of their first variables. So two numbers per shard of a class say where
the checksums of all its variables are: readers with thousands of ranks' shards before them compute just those they
need.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.layout.box import piece_count
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Shard, Variable
from distckpt.layout.tiling import tilings_of


class _Places(NamedTuple):
    """Where the checksums of a class stand.

    Attributes:
        origins: For each shard: index of its first checksum in the first variable of the class.
        strides: For each shard: from there to that of the next variable of the class.
    """

    origins: array[int]
    strides: array[int]


@dataclass(slots=True, eq=False)
class Firsts:
    """For each shard of one variable: index of the first of its checksums."""

    _places: _Places
    _ordinal: int

    def __getitem__(self, shard: int) -> int:
        return self._places.origins[shard] + self._ordinal * self._places.strides[shard]

    def __len__(self) -> int:
        return len(self._places.origins)

    def __iter__(self) -> Iterator[int]:
        return (self[shard] for shard in range(len(self)))


@dataclass(frozen=True, slots=True)
class ChecksumIndex:
    """The places of all checksums.

    Attributes:
        firsts: Those of each variable.
        total: Number of checksums in the file.
    """

    firsts: list[Firsts]
    total: int


def index_checksums(variables: Sequence[Variable]) -> ChecksumIndex:
    """Find the place of every checksum; writers and readers find the same."""
    tilings = tilings_of(variables)
    itemsizes = [dtype_info(variable.dtype).itemsize for variable in variables]
    classes: list[_Class] = list(zip(tilings.which, itemsizes, strict=True))
    members = Counter(classes)
    counted = {of_class: _count(tilings.distinct[of_class[0]], of_class[1]) for of_class in members}
    places, total = _place(counted, members)
    ordinals = {of_class: itertools.count() for of_class in members}
    return ChecksumIndex([Firsts(places[of_class], next(ordinals[of_class])) for of_class in classes], total)


#: Variables that are cut alike: index of their tiling, and bytes per element.
_Class = tuple[int, int]


class _Counted(NamedTuple):
    """The writers of a tiling's shards, the number of pieces of each, and for each writer the sum of its own."""

    ranks: list[int]
    counts: list[int]
    per_rank: Counter[int]


def _count(shards: Sequence[Shard], itemsize: int) -> _Counted:
    ranks = [shard.rank for shard in shards]
    counts = [piece_count(shard.shape, itemsize) for shard in shards]
    per_rank: Counter[int] = Counter()
    for rank, count in zip(ranks, counts, strict=True):
        per_rank[rank] += count
    return _Counted(ranks, counts, per_rank)


def _place(classes: Mapping[_Class, _Counted], members: Mapping[_Class, int]) -> tuple[dict[_Class, _Places], int]:
    """Where each class stands, and the number of all checksums."""
    per_rank: Counter[int] = Counter()  # the ranks of a hostile manifest may be any numbers
    for of_class, counted in classes.items():
        for rank, count in counted.per_rank.items():
            per_rank[rank] += members[of_class] * count
    ranks = sorted(per_rank)
    *starts, total = itertools.accumulate((per_rank[rank] for rank in ranks), initial=0)
    following = dict(zip(ranks, starts, strict=True))
    places = {}
    for of_class, (writers, counts, strides) in classes.items():
        places[of_class] = _Places(array("q"), array("q", [strides[rank] for rank in writers]))
        for rank, count in zip(writers, counts, strict=True):
            places[of_class].origins.append(following[rank])
            following[rank] += count
        for rank, count in strides.items():
            following[rank] += (members[of_class] - 1) * count
    return places, total
