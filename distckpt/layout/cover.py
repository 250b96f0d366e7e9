"""Covers: the different boxes of a tensor, and the ranks that hold each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Box, Shape
from distckpt.layout.records import Shard
from distckpt.layout.tiling import find_gap, find_overlap
from distckpt.words import rank_list


@dataclass(frozen=True, slots=True)
class Cover:
    """The boxes of a tensor and their holders. Made by `cover`; most tensors of a model share few covers.

    A rank's shard is one box, or a few that belong together; replicas are ranks with the same shard.

    Attributes:
        boxes: The different boxes with elements, ascending by offset.
        holders: For each box: the ranks that hold it, ascending.
        shards: The different shards, ascending by their first box.
        order: Rows of all holders, shard by shard; a row is an index into the list of ranks passed to `cover`.
        starts: For each shard: the index in `order` of its first holder.
        weights: For each row: the value of `SavePlan.weights` for this tensor.
        problems: Reasons why the boxes do not tile the shape, as sentences without the key.
    """

    boxes: list[Box]
    holders: list[list[int]]
    shards: list[tuple[Box, ...]]
    order: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    weights: npt.NDArray[np.int64]
    problems: list[str]

    @property
    def replicated(self) -> bool:
        """Whether some shard has more than one holder."""
        return len(self.order) > len(self.shards)

    def rows(self, shard: int) -> npt.NDArray[np.intp]:
        """The rows of the holders of a shard."""
        stop = self.starts[shard + 1] if shard + 1 < len(self.starts) else len(self.order)
        return self.order[self.starts[shard] : stop]

    def lowest_holders_shards(self) -> list[Shard]:
        """The shards to write if the lowest holder of each box writes it."""
        return [Shard(holders[0], *box) for box, holders in zip(self.boxes, self.holders, strict=True)]


def cover(ranks: Sequence[int], rows: Sequence[Sequence[int]], shape: Shape) -> Cover:
    """Find the different boxes of a tensor, their holders, and problems with them.

    Args:
        ranks: The ranks that hold the tensor, ascending.
        rows: For each of these ranks one list: offset and extent, in elements, of each of its boxes. Boxes with a zero
            extent are ignored.
        shape: Global shape.
    """
    rows_of: dict[tuple[Box, ...], list[int]] = {}
    for row, numbers in enumerate(rows):
        shard = _boxes(numbers, len(shape))
        if shard:
            rows_of.setdefault(shard, []).append(row)
    shards = sorted(rows_of)
    weights = np.zeros(len(rows), np.int64)
    for same in rows_of.values():
        if len(same) > 1:
            weights[same] = 1
            weights[same[0]] = 1 - len(same)
    held = sorted((box, [ranks[row] for row in rows_of[shard]]) for shard in shards for box in shard)
    boxes, holders = [box for box, _ in held], [holders for _, holders in held]
    return Cover(
        boxes,
        holders,
        shards,
        np.array([row for shard in shards for row in rows_of[shard]], np.intp),
        np.cumsum([0, *(len(rows_of[shard]) for shard in shards[:-1])], dtype=np.intp),
        weights,
        list(_problems(ranks, boxes, holders, shape)),
    )


def _boxes(numbers: Sequence[int], ndim: int) -> tuple[Box, ...]:
    """The boxes of one rank, without empty ones."""
    if len(numbers) == 2 * ndim:
        return () if 0 in numbers[ndim:] else (Box(tuple(numbers[:ndim]), tuple(numbers[ndim:])),)
    cut = [numbers[start : start + 2 * ndim] for start in range(0, len(numbers), 2 * ndim)]
    return tuple(Box(tuple(one[:ndim]), tuple(one[ndim:])) for one in cut if 0 not in one[ndim:])


def _problems(
    ranks: Sequence[int], boxes: Sequence[Box], holders: Sequence[Sequence[int]], shape: Shape
) -> Iterator[str]:
    outside = [i for i, box in enumerate(boxes) if not box.within(shape)]
    for i in outside:
        yield (
            f"{describe(boxes[i])} on {rank_list(holders[i])} is outside of the global shape {shape}. "
            "Pass offset and shape in elements of the global tensor."
        )
    if outside:
        return
    overlap = find_overlap(boxes)
    if overlap:
        a, b = overlap
        yield (
            f"{describe(boxes[a])} on {rank_list(holders[a])} and {describe(boxes[b])} on {rank_list(holders[b])} "
            "overlap. Ranks may hold the same shard, or shards without a common element."
        )
        return
    gap = find_gap(boxes, shape)
    if gap:
        first = f", the first ones in {describe(gap.first)}" if gap.first else ""
        where = f"by {rank_list(ranks)}" if ranks else "by none of the ranks that save"
        yield (
            f"{gap.numel} of the elements of the global shape {shape} are on no rank{first}. It is held {where}. "
            "Save it on all ranks that have a shard, with the right global shape and offsets."
        )


def describe(box: Box) -> str:
    """A box as text."""
    return f"the box at offset {box.offset} of shape {box.shape}"
