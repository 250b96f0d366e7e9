"""Fingerprints: fast hashes of values, by which ranks check that their replicas agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import xxhash

from distckpt.device import Copy, DeviceCopies, gpu_of, pinned_memory
from distckpt.tensor_bytes import RAW, Memory, bytes_of, is_packed

#: Tensors of at most this many bytes are hashed whole; of larger ones a sample of this size.
_SAMPLE_NBYTES = 64 << 10
_SAMPLE_BLOCKS = 16
_BLOCK_NBYTES = _SAMPLE_NBYTES // _SAMPLE_BLOCKS

#: Most bytes copied at once of tensors that are not packed, or on a GPU, and so are copied to be hashed.
_BATCH_NBYTES = 4 << 20
#: Copies begin at multiples of this, in bytes.
_ALIGNMENT = 16


def fingerprint_bytes(data: bytes | memoryview) -> int:
    """xxh3-64 of bytes, such as an encoded python value; never 0, which means "not computed"."""
    return xxhash.xxh3_64_intdigest(data) or 1


def fingerprints(tensors: Sequence[torch.Tensor], *, whole: bool) -> list[int]:
    """The `fingerprint` of each tensor. Those on GPUs are copied in batches, since a wait costs more than hashing.

    Call it under `torch.no_grad`. Local.

    Args:
        tensors: Tensors on any device, with any strides.
        whole: Hash all bytes whatever the size.
    """
    found = [0] * len(tensors)
    on_gpus: list[tuple[int, torch.device]] = []
    for place, tensor in enumerate(tensors):
        gpu = gpu_of(tensor)
        if gpu is None or (whole and tensor.nbytes > _BATCH_NBYTES):
            found[place] = fingerprint(tensor, whole=whole)
        else:
            on_gpus.append((place, gpu))
    # A generator, as the part to hash of a strided or lazy tensor may be a copy in GPU memory.
    parts = (_OnGpu(place, gpu, _hashed_part(tensors[place], whole=whole)) for place, gpu in on_gpus)
    for batch in _batches(parts):
        for part, each in zip(batch, _digests(batch), strict=True):
            found[part.place] = each
    return found


def fingerprint(tensor: torch.Tensor, *, whole: bool) -> int:
    """xxh3-64 of a tensor's bytes, or of a fixed sample of a large tensor; never 0, which means "not computed".

    Call it under `torch.no_grad`. Local.

    Args:
        tensor: A tensor on any device, with any strides.
        whole: Hash all bytes whatever the size.
    """
    if is_packed(tensor):
        data = bytes_of(tensor)
        sampled = _is_sampled(tensor, whole)
        return (_digest_of_sample(data, tensor.element_size()) if sampled else xxhash.xxh3_64_intdigest(data)) or 1
    hasher = xxhash.xxh3_64()
    for part in [tensor] if _is_sampled(tensor, whole) else _slices(tensor):
        packed = _hashed_part(part, whole=whole).cpu().contiguous()
        hasher.update(bytes_of(packed))
    return hasher.intdigest() or 1


# ---- the part of a tensor that is hashed -------------------------------------------------------------------------


def _is_sampled(tensor: torch.Tensor, whole: bool) -> bool:
    return tensor.nbytes > _SAMPLE_NBYTES and not whole


def _hashed_part(tensor: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """The tensor, or a sample of it, in a form that torch can copy."""
    copyable = _copyable(tensor)
    return _sample(copyable) if _is_sampled(tensor, whole) else copyable


def _slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Divide a tensor, in row-major order, into parts of at most `_BATCH_NBYTES`, to be copied one by one."""
    if tensor.nbytes <= _BATCH_NBYTES:
        yield tensor
        return
    n_rows = max(1, _BATCH_NBYTES * len(tensor) // tensor.nbytes)
    for start in range(0, len(tensor), n_rows):
        yield from _slices(tensor[start : start + n_rows] if n_rows > 1 else tensor[start])


def _copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in a form that torch can copy: it cannot copy every dtype, and some views are lazy."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    raw = RAW.get(tensor.element_size())
    return tensor if raw is None or tensor.is_contiguous() else tensor.view(raw)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A sample of a large tensor: evenly spaced blocks of elements in row-major order, whatever the strides.

    The first block begins with the first element.
    """
    block = _BLOCK_NBYTES // tensor.element_size()
    step = _step(tensor.numel(), block)
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat.as_strided((_SAMPLE_BLOCKS, block), (step, 1), flat.storage_offset())
    starts = torch.arange(_SAMPLE_BLOCKS, device=tensor.device) * step
    places = starts[:, None] + torch.arange(block, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def _digest_of_sample(data: memoryview, itemsize: int) -> int:
    """The digest of the sample that `_sample` takes, of a packed tensor whose bytes are hashed in place."""
    step = _step(len(data) // itemsize, _BLOCK_NBYTES // itemsize) * itemsize
    hasher = xxhash.xxh3_64()
    for start in range(0, _SAMPLE_BLOCKS * step, step):
        hasher.update(data[start : start + _BLOCK_NBYTES])
    return hasher.intdigest()


def _step(numel: int, block: int) -> int:
    """Elements from the start of one block of a sample to the start of the next."""
    return (numel - block) // (_SAMPLE_BLOCKS - 1)


# ---- tensors on GPUs ----------------------------------------------------------------------------------------------


class _OnGpu(NamedTuple):
    """The part to hash of a tensor on a GPU.

    Attributes:
        place: Index of the tensor.
        gpu: The GPU.
        hashed: The part, of at most `_BATCH_NBYTES`; any strides.
    """

    place: int
    gpu: torch.device
    hashed: torch.Tensor


def _batches(parts: Iterable[_OnGpu]) -> Iterator[list[_OnGpu]]:
    """Divide parts into batches that fit into one buffer."""
    batch: list[_OnGpu] = []
    used = 0
    for part in parts:
        nbytes = _padded(part.hashed.nbytes)
        if used + nbytes > _BATCH_NBYTES:
            yield batch
            batch, used = [], 0
        batch.append(part)
        used += nbytes
    if batch:
        yield batch


def _digests(batch: Sequence[_OnGpu]) -> list[int]:
    """The fingerprint of each part of a batch, which is copied to pinned memory together."""
    memory = Memory(pinned_memory(_BATCH_NBYTES))
    streams = DeviceCopies()
    copies, start = [], 0
    for part in batch:
        copies.append(Copy(part.gpu, memory.room(part.hashed, start), part.hashed))
        start += _padded(part.hashed.nbytes)
    try:
        streams.start(copies)
    finally:
        streams.finish()
    return [fingerprint_bytes(bytes_of(copy.target)) for copy in copies]


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
