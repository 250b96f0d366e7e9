"""Assignment of shards to the ranks that write them, so that all ranks write about the same number of bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from distckpt.layout.aggregation import SMALL_NBYTES
from distckpt.layout.box import Box, flat_boxes
from distckpt.layout.cover import Cover
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.merged_values import MergedValue
from distckpt.layout.records import Shard

#: Boxes are split among several writers only if each gets at least about this many bytes.
MIN_PART_NBYTES = 256 << 10

# Parts that are whole multiples of a row are longer runs in the file. With at least this many rows for each writer, the
# largest part is at most 1/16 above the mean.
_MIN_ROWS_PER_PART = 16


def assign_shards(
    tensors: Sequence[MergedValue], covers: Sequence[Cover], size: int, trust_lowest: bool
) -> list[list[Shard]]:
    """The shards of each tensor, each with the rank that writes it, ascending by offset.

    Args:
        tensors: The tensors, in file order.
        covers: The cover of each tensor.
        size: Number of ranks.
        trust_lowest: Whether the lowest holder writes each box; else the holders share the work, except for buffers.
    """
    loads = [0] * size
    lowest = _LowestHolders(loads)
    shards: list[list[Shard]] = []
    replicas: list[_Replica] = []
    for variable, (value, cover) in enumerate(zip(tensors, covers, strict=True)):
        itemsize = dtype_info(str(value.attribute.dtype)).itemsize
        if trust_lowest or value.buffer or not cover.replicated:
            shards.append(lowest.write(cover, itemsize))
        else:
            shards.append([])
            replicas += [
                _Replica(variable, box, box.numel * itemsize, holders)
                for box, holders in zip(cover.boxes, cover.holders, strict=True)
            ]
    lowest.add_loads()
    _assign_replicas(replicas, loads, shards)
    return shards


class _LowestHolders:
    """The shards written by their lowest holders; tensors with the same cover share one list."""

    def __init__(self, loads: list[int]) -> None:
        self._loads = loads
        self._shards: dict[int, list[Shard]] = {}
        self._nbytes_per_element: Counter[int] = Counter()

    def write(self, cover: Cover, itemsize: int) -> list[Shard]:
        """Assign each box of a tensor to its lowest holder; returns the shards."""
        shards = self._shards.get(id(cover))
        if shards is None:
            shards = self._shards[id(cover)] = cover.lowest_holders_shards()
        self._nbytes_per_element[id(cover)] += itemsize
        return shards

    def add_loads(self) -> None:
        """Add the bytes of all shards assigned so far to the loads of their ranks."""
        for cover, nbytes in self._nbytes_per_element.items():
            for shard in self._shards[cover]:
                self._loads[shard.rank] += nbytes * math.prod(shard.shape)


@dataclass(frozen=True, slots=True)
class _Replica:
    """A box that any of its holders may write; usually there are several."""

    variable: int
    box: Box
    nbytes: int
    holders: list[int]


def _assign_replicas(replicas: Sequence[_Replica], loads: list[int], shards: list[list[Shard]]) -> None:
    """Assign each box to the holders with the fewest bytes so far: first boxes with a single holder, then by size.

    Small boxes come last, in stretches of neighbours that can go into one write, beginning with those that have the
    fewest holders.
    """
    dealer = _Dealer(loads)
    small: dict[tuple[int, ...], list[_Replica]] = {}
    others: list[_Replica] = []
    for replica in replicas:
        if replica.nbytes < SMALL_NBYTES and len(replica.holders) > 1:
            small.setdefault(tuple(replica.holders), []).append(replica)
        else:
            others.append(replica)
    for replica in sorted(others, key=lambda replica: (len(replica.holders) > 1, -replica.nbytes)):
        dealer.deal(replica, _writers(replica, loads))
    for holders, row in sorted(small.items(), key=lambda item: len(item[0])):
        writers = _stretches([replica.nbytes for replica in row], [loads[rank] for rank in holders])
        for replica, writer in zip(row, writers, strict=True):
            dealer.deal(replica, (holders[writer],))
    for variable, parts in dealer.dealt.items():
        shards[variable] = dealer.join(parts)


def _stretches(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Assign a row of boxes to holders, so that neighbours stay together and the loads become about equal.

    The holders are filled up to one level, one after the other. A box goes to the holder where its middle falls, so
    each holder ends within one box of the level.

    Args:
        sizes: Bytes of each box.
        loads: Bytes that each holder has so far.

    Returns:
        For each box: index of its holder.
    """
    room = np.maximum(0, _level(sum(sizes), loads) - np.array(loads))
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    writers: list[int] = np.searchsorted(np.cumsum(room), middles, side="right").tolist()
    return writers


def _level(nbytes: int, loads: Sequence[int]) -> float:
    """The level that the holders with the smallest loads reach when `nbytes` are added evenly, as water would rise."""
    # The level if the k emptiest holders share the bytes, for each k; the right k gives the smallest.
    levels = (np.cumsum(np.sort(loads)) + nbytes) / np.arange(1, len(loads) + 1)
    return float(levels.min())


def _writers(replica: _Replica, loads: Sequence[int]) -> Sequence[int]:
    """The holders that write a part of the box, ascending: all of them, or those with the fewest bytes so far."""
    count = replica.nbytes // MIN_PART_NBYTES
    if count >= len(replica.holders):
        return replica.holders
    if count <= 1:
        return (min(replica.holders, key=loads.__getitem__),)
    return sorted(sorted(replica.holders, key=loads.__getitem__)[:count])


class _Dealt(NamedTuple):
    """A box divided among its writers.

    Attributes:
        shards: The shards that they write, in row-major order.
        numels: (rank, number of elements) of each writer.
    """

    shards: list[Shard]
    numels: list[tuple[int, int]]


class _Dealer:
    """Divides boxes among their writers, and adds to the loads of these.

    A model has many tensors with the same boxes, most of which get the same writers, so results are cached.

    Attributes:
        dealt: For each variable: its boxes so far.
    """

    def __init__(self, loads: list[int]) -> None:
        self.dealt: dict[int, list[_Dealt]] = {}
        self._loads = loads
        self._cut: dict[tuple[Box, tuple[int, ...]], _Dealt] = {}
        self._joined: dict[tuple[int, ...], list[Shard]] = {}

    def deal(self, replica: _Replica, writers: Sequence[int]) -> None:
        """Cut a box into nearly equal parts, one for each writer."""
        dealt = self._parts(replica.box, writers)
        itemsize = replica.nbytes // replica.box.numel
        for rank, numel in dealt.numels:
            self._loads[rank] += itemsize * numel
        self.dealt.setdefault(replica.variable, []).append(dealt)

    def _parts(self, box: Box, writers: Sequence[int]) -> _Dealt:
        key = (box, tuple(writers))
        dealt = self._cut.get(key)
        if dealt is None:
            parts = list(zip(writers, even_parts(box, len(writers)), strict=True))
            shards = [Shard(rank, *each) for rank, part in parts for each in part]
            numels = [(rank, sum(each.numel for each in part)) for rank, part in parts]
            dealt = self._cut[key] = _Dealt(shards, numels)
        return dealt

    def join(self, parts: Sequence[_Dealt]) -> list[Shard]:
        """The shards of all boxes of a tensor, ascending by offset; tensors with the same boxes share one list."""
        key = tuple(map(id, parts))
        shards = self._joined.get(key)
        if shards is None:
            shards = [shard for part in parts for shard in part.shards]
            shards.sort(key=attrgetter("offset"))
            self._joined[key] = shards
        return shards


@lru_cache(maxsize=1024)
def even_parts(box: Box, count: int) -> list[list[Box]]:
    """Cut a box into `count` parts of nearly equal size, in row-major order; each part is one or a few boxes."""
    row_numel = _row_numel(box, count)
    rows = box.numel // row_numel
    bounds = [rows * i // count * row_numel for i in range(count + 1)]
    return [flat_boxes(box, start, stop) for start, stop in pairwise(bounds)]


def _row_numel(box: Box, count: int) -> int:
    """Number of elements of the largest rows that can be divided into `count` parts of nearly equal size."""
    for axis in range(1, len(box.shape)):
        rows = math.prod(box.shape[:axis])
        if rows % count == 0 or rows >= _MIN_ROWS_PER_PART * count:
            return math.prod(box.shape[axis:])
    return 1
