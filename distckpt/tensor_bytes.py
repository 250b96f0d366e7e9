"""The memory of tensors as bytes, for any dtype."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable

import torch

from distckpt.errors import CheckpointError

#: An integer of each size: elements are moved as bits, whatever their dtype can compute.
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in a file, which another version of torch may have written.

    Raises:
        CheckpointError: This torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype {name}: torch {torch.__version__} has none of that name. Restore with a newer torch, or leave such "
            "variables out (RestoreOptions.only)."
        )
    return dtype


def require_memory() -> None:
    """Check that new tensors have memory of their own: to read or write what has none would end the process.

    Raises:
        RuntimeError: They have not, within a `FakeTensorMode` for instance.
    """
    kind = type(torch.empty(0, device="cpu"))
    if kind is not torch.Tensor:
        raise RuntimeError(
            f"a mode of torch is active that makes each new tensor a {kind.__qualname__}, without memory of its own. "
            "Save and restore outside of it."
        )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writeable view of a contiguous CPU tensor's memory, which keeps the tensor.

    NumPy has no bfloat16 or float8, and `tensor.view(torch.uint8).numpy()` takes 5 us; this takes 1 us.
    """
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # else nothing would keep it
    return memoryview(memory).cast("B")


class Memory:
    """Memory that tensors of any shape and dtype are laid out in.

    Args:
        data: The memory, as a contiguous tensor of uint8.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self._of_dtype: dict[torch.dtype, torch.Tensor] = {}

    def room(self, like: torch.Tensor, start: int) -> torch.Tensor:
        """Room for the elements of `like`, as a contiguous tensor, from byte `start`, a multiple of their size.

        To narrow the memory and to view that as another dtype and shape takes three times as long.
        """
        itemsize = like.element_size()
        memory = self._of_dtype.get(like.dtype)
        if memory is None:
            whole = len(self.data) - len(self.data) % itemsize
            memory = self._of_dtype[like.dtype] = self.data[:whole].view(like.dtype)
        first = start // itemsize
        if like.is_contiguous():
            return memory.as_strided(like.shape, like.stride(), first)
        return memory[first : first + like.numel()].view(like.shape)


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is the bytes of the elements in row-major order, readable by the CPU."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def share_memory(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether two tensors may have memory in common: from its first to its last element a tensor counts as having all.

    Empty tensors have none.
    """
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in tensors if tensor.numel())
    return any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the last one's end."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def mark_changed(tensor: torch.Tensor) -> None:
    """Tell autograd that the tensor changed: a backward pass that still needs the old values must fail."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def copy_bits(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy elements of the same dtype bit for bit, between any strides and devices."""
    if non_blocking and (source.is_conj() or source.is_neg()):
        # On its GPU: for a target on the CPU torch would do it there, before the bytes have come.
        source = source.resolve_conj().resolve_neg()
    raw = RAW.get(source.element_size())
    lazy = source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg()
    if raw is not None and not lazy:
        target, source = target.view(raw), source.view(raw)
    elif source.dtype is torch.complex128 and not lazy:  # its copy crashes where it is not aligned
        target, source = torch.view_as_real(target), torch.view_as_real(source)
    target.copy_(source, non_blocking=non_blocking)
