"""How the ranks that hold a tensor cover it: the different boxes, and who holds each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Box, Shape
from distckpt.layout.records import Shard
from distckpt.layout.tiling import find_gap, find_overlap
from distckpt.layout.wording import rank_list


@dataclass(frozen=True, slots=True)
class Cover:
    """The boxes of a tensor and their holders. Most tensors of a model share few covers.

    Attributes:
        boxes: Different, not empty, ascending by offset.
        holders: For each box: the ranks that hold it, ascending.
        order: Rows of all holders, box by box; a row is a place in the list of ranks that `cover` was given.
        starts: For each box: where its holders begin in `order`.
        weights: For each row: what `SavePlan.weights` has for this tensor.
        problems: Why the boxes do not tile the shape, as sentences without the key.
    """

    boxes: list[Box]
    holders: list[list[int]]
    order: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    weights: npt.NDArray[np.int64]
    problems: list[str]

    @property
    def replicated(self) -> bool:
        """Whether more than one rank holds some box."""
        return len(self.order) > len(self.boxes)

    def lowest_holders_shards(self) -> list[Shard]:
        """The shards when each box is written by its lowest holder."""
        return [Shard(holders[0], *box) for box, holders in zip(self.boxes, self.holders, strict=True)]


def cover(ranks: Sequence[int], rows: Sequence[Sequence[int]], shape: Shape) -> Cover:
    """Sort out who holds what of a tensor.

    Args:
        ranks: The ranks that hold it, ascending.
        rows: For each of them offset and extent in elements, one list; a box with a zero extent counts as none.
        shape: Global shape.
    """
    ndim = len(shape)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, numbers in enumerate(rows):
        if 0 not in numbers[ndim:]:
            rows_of.setdefault(tuple(numbers), []).append(row)
    ordered = sorted(rows_of)
    boxes = [Box(numbers[:ndim], numbers[ndim:]) for numbers in ordered]
    holders = [[ranks[row] for row in rows_of[numbers]] for numbers in ordered]
    weights = np.zeros(len(rows), np.int64)
    for same in rows_of.values():
        if len(same) > 1:
            weights[same] = 1
            weights[same[0]] = 1 - len(same)
    return Cover(
        boxes,
        holders,
        np.array([row for numbers in ordered for row in rows_of[numbers]], np.intp),
        np.cumsum([0, *(len(same) for same in holders[:-1])], dtype=np.intp),
        weights,
        list(_problems(ranks, boxes, holders, shape)),
    )


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
            "overlap. Ranks may hold the same box, or boxes without a common element."
        )
        return
    gap = find_gap(boxes, shape)
    if gap:
        first = f", the first ones in {describe(gap.first)}" if gap.first else ""
        yield (
            f"{gap.numel} of the elements of the global shape {shape} are on no rank{first}. It is held by "
            f"{rank_list(ranks)}. Save it on all ranks that have a shard, with the right global shape and offsets."
        )


def describe(box: Box) -> str:
    """A box as text."""
    return f"the box at offset {box.offset} of shape {box.shape}"
