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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.layout.box import piece_count
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Shard, Variable


class Places(NamedTuple):
    """Where the checksums of a class stand: for each shard two numbers.

    Attributes:
        origins: Index of its first checksum in the first variable of the class.
        strides: From there to that of the next variable of the class.
    """

    origins: array[int]
    strides: array[int]


@dataclass(frozen=True, slots=True)
class ChecksumIndex:
    """The places of all checksums.

    Attributes:
        classes: For each variable: number of its class.
        ordinals: For each variable: how many of its class come before it.
        places: For each class: where its checksums stand.
        total: Number of checksums in the file.
    """

    classes: list[int]
    ordinals: list[int]
    places: list[Places]
    total: int

    def firsts(self, variable: int) -> list[int]:
        """For each shard of a variable: index of the first of its checksums."""
        ordinal = self.ordinals[variable]
        origins, strides = self.places[self.classes[variable]]
        return [origin + ordinal * stride for origin, stride in zip(origins, strides, strict=True)]

    def first(self, variable: int, shard: int) -> int:
        """Index of the first checksum of one shard."""
        origins, strides = self.places[self.classes[variable]]
        return origins[shard] + self.ordinals[variable] * strides[shard]


def index_checksums(variables: Sequence[Variable]) -> ChecksumIndex:
    """Find the place of every checksum; writers and readers find the same."""
    numbers: dict[tuple[tuple[Shard, ...], int], int] = {}  # shards and bytes per element to number of the class
    known: dict[tuple[int, str], int] = {}  # the same by identity of the list of shards, and dtype
    classes: list[int] = []
    ordinals: list[int] = []
    members: list[int] = []  # of each class: how many
    for variable in variables:
        alike = (id(variable.shards), variable.dtype)
        number = known.get(alike)
        if number is None:
            itemsize = dtype_info(variable.dtype).itemsize
            number = known[alike] = numbers.setdefault((tuple(variable.shards), itemsize), len(numbers))
            if number == len(members):
                members.append(0)
        classes.append(number)
        ordinals.append(members[number])
        members[number] += 1
    places, total = _place([_count(shards, itemsize) for shards, itemsize in numbers], members)
    return ChecksumIndex(classes, ordinals, places, total)


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


def _place(classes: Sequence[_Counted], members: Sequence[int]) -> tuple[list[Places], int]:
    """Where each class stands, and the number of all checksums."""
    per_rank: Counter[int] = Counter()  # the ranks of a hostile manifest may be any numbers
    for counted, n_members in zip(classes, members, strict=True):
        for rank, count in counted.per_rank.items():
            per_rank[rank] += n_members * count
    ranks = sorted(per_rank)
    *starts, total = itertools.accumulate((per_rank[rank] for rank in ranks), initial=0)
    following = dict(zip(ranks, starts, strict=True))
    places = []
    for (writers, counts, strides), n_members in zip(classes, members, strict=True):
        found = Places(array("q"), array("q", [strides[rank] for rank in writers]))
        for rank, count in zip(writers, counts, strict=True):
            found.origins.append(following[rank])
            following[rank] += count
        for rank, count in strides.items():
            following[rank] += (n_members - 1) * count
        places.append(found)
    return places, total
