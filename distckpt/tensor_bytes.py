"""The memory of a tensor as bytes, for any dtype, without a copy."""

from __future__ import annotations

import ctypes

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writeable view of a contiguous CPU tensor's memory; valid as long as the caller keeps the tensor.

    NumPy has no bfloat16 or float8, and `tensor.view(torch.uint8).numpy()` takes 5 us; this takes 1 us.
    """
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is the bytes of the elements in row-major order, readable by the CPU."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def mark_changed(tensor: torch.Tensor) -> None:
    """Tell autograd that the tensor changed: a backward pass that still needs the old values must fail."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
