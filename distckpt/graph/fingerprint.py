"""Cheap hashes of values, to tell whether replicas on different ranks agree."""

from __future__ import annotations

import torch
import xxhash

from distckpt.tensor_bytes import bytes_of, is_packed

#: Tensors up to this many bytes are hashed whole; of larger ones this much is sampled.
_SAMPLE_NBYTES = 64 << 10
_SAMPLE_BLOCKS = 16
_BLOCK_NBYTES = _SAMPLE_NBYTES // _SAMPLE_BLOCKS

#: Bytes per element to a dtype that torch can copy whatever the bits are.
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint_bytes(data: bytes) -> int:
    """xxh3-64 of an encoded python value; never 0, which means "not computed"."""
    return xxhash.xxh3_64_intdigest(data) or 1


def fingerprint(tensor: torch.Tensor, *, whole: bool) -> int:
    """xxh3-64 of a tensor's bytes, or of a fixed sample of a large tensor; never 0, which means "not computed".

    Call it without gradients.

    Args:
        tensor: On any device, of any strides.
        whole: Hash all bytes whatever the size.
    """
    sampled = tensor.nbytes > _SAMPLE_NBYTES and not whole
    if is_packed(tensor):
        data = bytes_of(tensor)
        return (_digest_of_sample(data, tensor.element_size()) if sampled else xxhash.xxh3_64_intdigest(data)) or 1
    tensor = _copyable(tensor)
    if sampled:
        tensor = _sample(tensor)
    tensor = tensor.cpu().contiguous()
    return xxhash.xxh3_64_intdigest(bytes_of(tensor)) or 1


def _copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements such that torch can copy them: not every dtype has that, and some views are lazy."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    raw = _RAW.get(tensor.element_size())
    return tensor if raw is None or tensor.is_contiguous() else tensor.view(raw)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced blocks of a large tensor, the first and the last elements among them."""
    if not tensor.is_contiguous():
        axis = max(range(tensor.dim()), key=tensor.size)
        rows = torch.linspace(0, tensor.size(axis) - 1, min(_SAMPLE_BLOCKS, tensor.size(axis))).long()
        tensor = tensor.index_select(axis, rows.to(tensor.device))
        return tensor.reshape(-1)[: _SAMPLE_NBYTES // tensor.element_size()]
    flat = tensor.view(-1)
    block = _BLOCK_NBYTES // tensor.element_size()
    return flat.as_strided((_SAMPLE_BLOCKS, block), (_step(flat.numel(), block), 1), flat.storage_offset())


def _digest_of_sample(data: memoryview, itemsize: int) -> int:
    """The same for the bytes of a packed tensor, which are hashed where they lie."""
    step = _step(len(data) // itemsize, _BLOCK_NBYTES // itemsize) * itemsize
    hasher = xxhash.xxh3_64()
    for start in range(0, _SAMPLE_BLOCKS * step, step):
        hasher.update(data[start : start + _BLOCK_NBYTES])
    return hasher.intdigest()


def _step(numel: int, block: int) -> int:
    """Elements from the start of one block of a sample to the start of the next."""
    return (numel - block) // (_SAMPLE_BLOCKS - 1)
