"""Whether the variables of a manifest can be true, whoever wrote it: the shards of each tile its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distckpt.layout.box import MAX_NDIM, Box, Shape
from distckpt.layout.dtypes import dtype_info, is_known
from distckpt.layout.records import Shard, Variable
from distckpt.layout.tiling import find_gap, find_overlap

_MAX_NBYTES = 1 << 62


def validate(variables: Sequence[Variable]) -> list[str]:
    """The problems of all variables, one sentence each; see `validate_shards`."""
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
    """What is wrong with a variable of an untrusted manifest; empty when its shards tile its shape."""
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
    """Whether shards tile the shape as consecutive bands along dimension 0, as in most files."""
    if not shape:
        return len(shards) == 1 and shards[0].offset == shards[0].shape == ()
    width, origin, position = shape[1:], (0,) * (len(shape) - 1), 0
    if 0 in width:
        return False
    for shard in shards:
        if shard.shape[1:] != width or shard.offset[1:] != origin or shard.offset[:1] != (position,):
            return False
        if not shard.shape or shard.shape[0] <= 0:
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
