"""Access to the memory of tensors as bytes, for any dtype."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Sequence

import torch

from distckpt.errors import CheckpointError

#: Size of an element in bytes to an integer dtype of that size: elements are copied as bits, whatever their dtype.
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: Dtypes that torch cannot copy as what they are: complex128 unless aligned, the others at all or with some strides.
_COPIED_AS_BITS = {
    dtype
    for name in ("complex128", "float4_e2m1fn_x2", *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)))
    if (dtype := getattr(torch, name, None))
}

#: Classes of tensors that have memory of their own and torch's own operations. A subclass may have neither.
PLAIN_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter})


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name, which another version of torch may have written.

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
    """Check that new tensors have real memory: accessing that of one without would crash the process.

    Raises:
        RuntimeError: They have none, for instance within a `FakeTensorMode`.
    """
    kind = type(torch.empty(0, device="cpu"))
    if kind is not torch.Tensor:
        raise RuntimeError(
            f"a mode of torch is active that makes each new tensor a {kind.__qualname__}, without memory of its own. "
            "Save and restore outside of it."
        )


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writeable view of a contiguous CPU tensor's memory, which keeps the tensor alive.

    NumPy has no bfloat16 or float8, and `tensor.view(torch.uint8).numpy()` takes 5 us; this takes 1 us.
    """
    nbytes = tensor.nbytes
    if nbytes == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # keeps the tensor alive
    return memoryview(memory).cast("B")


class Memory:
    """A buffer in which tensors of any shape and dtype are placed.

    Args:
        data: The memory, as a contiguous tensor of uint8.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self._of_dtype: dict[torch.dtype, torch.Tensor] = {}

    def room(self, like: torch.Tensor, start: int) -> torch.Tensor:
        """A contiguous tensor in the buffer with the shape and dtype of `like`.

        Slicing the buffer and viewing the slice as another dtype and shape would take three times as long.

        Args:
            like: A tensor with the wanted shape and dtype.
            start: Position of the first element, in bytes; a multiple of the element's size.
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


def sharing_memory(tensors: Sequence[torch.Tensor]) -> set[int]:
    """Indices of the tensors that may share memory with another one.

    A tensor counts as holding all bytes from its first to its last element, except beside other columns of one buffer;
    an empty one holds none.
    """
    spans = sorted([(tensor.data_ptr(), index) for index, tensor in enumerate(tensors) if tensor.numel()])
    found: set[int] = set()
    band: list[int] = []  # tensors whose bytes overlap, as a chain
    stop = 0
    for start, index in [*spans, (1 << 64, -1)]:
        if start >= stop:
            if len(band) > 1 and not _are_columns([tensors[member] for member in band]):
                found.update(band)
            band = []
        if index >= 0:
            band.append(index)
            stop = max(stop, start + _extent(tensors[index]))
    return found


def _are_columns(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors, by address, are disjoint parts of the rows of one buffer."""
    pitches, columns = set(), []
    for tensor in tensors:
        dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
        stride, size = max(dims, default=(0, 1))
        pitches.add(stride * tensor.element_size())
        columns.append((tensor.data_ptr(), _extent(tensor) - (size - 1) * stride * tensor.element_size()))
    pitch = pitches.pop()
    if pitches or not pitch:
        return False
    places = sorted(((start - columns[0][0]) % pitch, nbytes) for start, nbytes in columns)
    return all(place + nbytes <= after for (place, nbytes), (after, _) in itertools.pairwise([*places, (pitch, 0)]))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the start of the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def mark_changed(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd that tensors have changed, so that a backward pass that needs the old values fails."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def copy_bits(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy elements of the same dtype bit for bit, between any strides and devices."""
    if non_blocking and (source.is_conj() or source.is_neg()):
        # Resolve on the GPU: for a target on the CPU torch would do it there, before the bytes have arrived.
        source = source.resolve_conj().resolve_neg()
    raw = RAW.get(source.element_size())
    lazy = source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg()
    if raw is not None and not lazy:
        target, source = target.view(raw), source.view(raw)
    elif source.dtype is torch.complex128 and not lazy:  # its copy crashes where it is not aligned
        target, source = torch.view_as_real(target), torch.view_as_real(source)
    target.copy_(source, non_blocking=non_blocking)


def can_join(dtype: torch.dtype, sources: Iterable[torch.Tensor]) -> bool:
    """Whether torch can join tensors of a dtype in one call, which leaves their bits as they are."""
    return dtype not in _COPIED_AS_BITS and PLAIN_CLASSES.issuperset(map(type, sources))


def joined(sources: Iterable[torch.Tensor], target: torch.Tensor | None = None) -> torch.Tensor:
    """The elements of tensors of one dtype on one device, for which `can_join` holds, one after the other.

    Args:
        sources: The tensors, at least one; any shapes, any strides.
        target: 1-d, receives the elements; None makes a new tensor.
    """
    return torch.cat([source if source.dim() == 1 else source.reshape(-1) for source in sources], out=target)


def join(target: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors bit for bit into contiguous memory, one after the other, in a few calls of torch.

    Args:
        target: The memory: a 1-d tensor with as many elements as all sources together.
        sources: Tensors of the same dtype, at least one, on the CPU; any shapes, any strides.
    """
    with torch.no_grad():
        if can_join(target.dtype, sources):
            joined(sources, target)
            return
        start = 0
        for source in sources:
            part = target[start : start + source.numel()]
            if is_packed(source):
                bytes_of(part)[:] = bytes_of(source)
            else:
                copy_bits(part.view(source.shape), source)
            start += source.numel()
