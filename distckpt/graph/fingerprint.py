"""Cheap hashes of values, to tell whether replicas on different ranks agree."""

from __future__ import annotations

import torch
import xxhash

from distckpt.tensor_bytes import bytes_of

#: Tensors up to this many bytes are hashed whole; of larger ones this much is sampled.
_SAMPLE_NBYTES = 64 << 10
_SAMPLE_BLOCKS = 16

#: Bytes per element to a dtype that torch can copy whatever the bits are.
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint_bytes(data: bytes) -> int:
    """xxh3-64 of an encoded python value; never 0, which means "not computed"."""
    return xxhash.xxh3_64_intdigest(data) or 1


def fingerprint(tensor: torch.Tensor, *, whole: bool) -> int:
    """xxh3-64 of a tensor's bytes, or of a fixed sample of a large tensor; never 0, which means "not computed".

    Args:
        tensor: On any device, of any strides.
        whole: Hash all bytes whatever the size.
    """
    with torch.no_grad():
        tensor = _copyable(tensor)
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > _SAMPLE_NBYTES and not whole:
            tensor = _sample(tensor)
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
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
    block = _SAMPLE_NBYTES // _SAMPLE_BLOCKS // tensor.element_size()
    step = (flat.numel() - block) // (_SAMPLE_BLOCKS - 1)
    return flat.as_strided((_SAMPLE_BLOCKS, block), (step, 1), flat.storage_offset())
