"""Which tensors share memory: two objects may have the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distckpt.words import listing

_MAX_NAMED = 10


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor share memory, as after `expand()`: writing to one would change another."""
    if tensor.is_contiguous():
        return False
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    extent = 1
    for stride, size in dims:
        if stride < extent:
            return stride == 0 or _has_equal_offsets(dims)
        extent += (size - 1) * stride
    return False


def _has_equal_offsets(dims: Sequence[tuple[int, int]]) -> bool:
    # Dimensions that interleave, such as sizes (2, 3) with strides (3, 2), are rare enough to count elements.
    offsets = np.zeros(1, np.int64)
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * np.arange(size)).reshape(-1)
    return bool(len(np.unique(offsets)) < len(offsets))


@dataclass(frozen=True, slots=True, order=True)
class _Range:
    """The memory of one tensor: addresses from its first byte to behind its last."""

    start: int
    stop: int
    key: str


def shared_memory_warnings(keys: Iterable[str], tensors: Iterable[torch.Tensor]) -> list[str]:
    """At most one sentence, about tensors that are different objects in the same memory.

    Args:
        keys: Checkpoint key of each tensor.
        tensors: Different objects; tied ones come once.
    """
    ranges = sorted(found for key, tensor in zip(keys, tensors, strict=True) for found in _range(key, tensor))
    pairs = list(_overlapping(ranges))
    if not pairs:
        return []
    named = listing(pairs, _MAX_NAMED)
    return [
        f"different tensors share memory, and each is saved as a variable of its own: {named}. Tie them to save one."
    ]


def _range(key: str, tensor: torch.Tensor) -> Iterator[_Range]:
    if tensor.numel():
        start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield _Range(start, start + (last + 1) * tensor.element_size(), key)


def _overlapping(ranges: Sequence[_Range]) -> Iterator[str]:
    """Pairs of neighbours in memory; of many tensors in one place not every pair is named."""
    widest: _Range | None = None
    for found in ranges:
        if widest is not None and found.start < widest.stop:
            yield " and ".join(sorted((widest.key, found.key)))
        if widest is None or found.stop > widest.stop:
            widest = found
