"""From a live tensor to the box of the global tensor that this rank holds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distckpt.graph.values import TensorValue, UnsaveableError, replicated
from distckpt.layout.box import Box, Shape
from distckpt.layout.meshes import Sharding, strides
from distckpt.layout.placement import Cut, Interval, boxes_of, inner_first, left_over, local_shape
from distckpt.layout.records import OWN_VALUE
from distckpt.tensor_bytes import PLAIN_CLASSES
from distckpt.words import rank_list

if TYPE_CHECKING:  # loading it takes a second
    from torch.distributed.tensor import DTensor, Placement

#: Errors list the ranks of a mesh up to this size; of a larger one, its shape.
_MAX_NAMED = 32


def tensor_value(tensor: torch.Tensor, name: str = OWN_VALUE, *, in_place: bool = True) -> TensorValue:
    """The value of a tensor: a DTensor's local shard, any other tensor as a replicated one.

    Raises:
        UnsaveableError: The tensor has no bytes to store (meta, sparse, quantized, subclasses without memory, freed
            storage), or a placement is no shard.
    """
    cls = type(tensor)
    if cls in PLAIN_CLASSES:
        _require_plain(tensor)
        _require_storage(tensor)
        return replicated(tensor, name, in_place=in_place)
    if _is_dtensor_class(cls):
        value = _dtensor_value(tensor, name, in_place)  # type: ignore[arg-type]  # it is a DTensor
    else:
        _require_plain(tensor)
        value = replicated(tensor, name, in_place=in_place)
    if type(value.tensor) is torch.Tensor:
        _require_storage(value.tensor)
    else:
        _require_memory(value.tensor)
    return value


def array_value(array: np.ndarray, name: str = OWN_VALUE, *, in_place: bool = True) -> TensorValue:
    """The value of a NumPy array; the tensor shares its memory where the array is writeable.

    Raises:
        UnsaveableError: The array's dtype has no torch counterpart (object, str, datetime, other byte order), or it
            is masked.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise UnsaveableError("a masked array has more than its numbers. Keep its data and its mask as two arrays.")
    if not array.flags.writeable:
        array, in_place = array.copy(), False
    try:
        tensor = torch.from_numpy(_in_common_form(array))
    except (TypeError, ValueError) as error:
        raise UnsaveableError(
            f"a NumPy array of dtype {array.dtype} cannot be stored ({error}). Use a copy of a native numeric dtype."
        ) from error
    return replicated(tensor, name, in_place=in_place, numpy=True)


def _in_common_form(array: np.ndarray) -> np.ndarray:
    """The same memory as the type that has the array's dtype: C has two of 64 bits, and torch knows one unsigned."""
    return array.view(np.uint64) if array.dtype == np.uint64 else array


@torch.inference_mode(mode=False)  # else training could not change it
def new_like(
    holder: torch.Tensor, like: TensorValue, shape: Shape, dtype: torch.dtype
) -> tuple[torch.Tensor, TensorValue]:
    """An uninitialised tensor of global `shape`, sharded as another one where the shapes agree, and its value.

    Args:
        holder: The other tensor; gives device and, as a DTensor, mesh and placements.
        like: Its value; gives this rank's shard.
        shape: Global shape of the new tensor.
        dtype: Its dtype.
    """
    if _is_dtensor(holder) and tuple(holder.shape) == shape:
        tensor: torch.Tensor = torch.empty_like(holder, dtype=dtype, requires_grad=False)
        assert _is_dtensor(tensor)  # as its holder is
        return tensor, _dtensor_value(tensor, OWN_VALUE, in_place=True)
    if like.global_shape == shape:
        # Laid out alike, such as channels last: kernels of fused optimizers take the elements as they lie in memory.
        tensor = torch.empty_like(like.tensor.detach().as_subclass(torch.Tensor), dtype=dtype)
        return tensor, TensorValue(OWN_VALUE, tensor, shape, like.boxes)
    return new_plain(shape, dtype, like.tensor.device)


@torch.inference_mode(mode=False)
def new_plain(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, TensorValue]:
    """An uninitialised replicated tensor and its value."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return tensor, replicated(tensor)


def process_number() -> int:
    """This rank's number in torch.distributed; -1 where that was not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else -1


def _is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return _is_dtensor_class(type(tensor))


@functools.cache
def _is_dtensor_class(cls: type) -> bool:
    """Whether a class is DTensor, or derived from it. Whoever has one has loaded its module; this does not load it."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and issubclass(cls, dtensor)


def _require_plain(tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise UnsaveableError("a tensor on the meta device has no data. Call to_empty() and initialise it first.")
    if tensor.is_nested:
        raise UnsaveableError("a nested tensor has no single shape. Keep its parts, or a padded tensor.")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsaveableError(
            f"a {tensor.layout} / {tensor.dtype} tensor is not dense. Convert it with to_dense() or dequantize()."
        )


def _require_storage(tensor: torch.Tensor) -> None:
    """Sharding and offloading free the storage of a tensor that keeps its shape: reading it would end the process."""
    if not tensor.data_ptr() and tensor.numel():
        raise UnsaveableError(
            "a tensor without memory has no data; untyped_storage().resize_(0) frees that of a tensor. Bring it back "
            "first, or track the tensors that hold the data."
        )


def _require_memory(tensor: torch.Tensor) -> None:
    """Subclasses may keep their elements in other tensors, or have none: reading their memory would end the process."""
    try:
        # torch warns where a fake tensor is asked for its address
        address = 0 if hasattr(tensor, "fake_mode") else tensor.untyped_storage().data_ptr()
    except RuntimeError:
        address = 0
    if address == 0 and tensor.numel():
        raise UnsaveableError(
            f"a {type(tensor).__qualname__} has no memory of its own. Track the tensors inside, or a plain tensor made "
            "of it."
        )


def _dtensor_value(tensor: DTensor, name: str, in_place: bool) -> TensorValue:
    local = tensor._local_tensor  # to_local() would make a view of a parameter's, and an autograd node with gradients
    _require_plain(local)
    spec = tensor._spec  # the tensor takes several times longer to tell
    shape, boxes, sharding = _known_shards.find(spec.mesh, spec.placements, spec.shape, local.shape)
    return TensorValue(name, local, shape, boxes, in_place, False, False, None, sharding)


class _Shard(NamedTuple):
    """Global shape, boxes of this rank, and placements and mesh."""

    shape: Shape
    boxes: tuple[Box, ...]
    sharding: Sharding


#: From the global and the local size of a DTensor to its shard; for DTensors of the same mesh and placements.
_ShardOf = Callable[[torch.Size, torch.Size], _Shard]


class _KnownShards:
    """Cache of `_shard`. Mesh and placements take long to hash, and are mostly those of the DTensor before."""

    def __init__(self) -> None:
        self._last: tuple[DeviceMesh, tuple[Placement, ...], _ShardOf] | None = None

    def find(self, mesh: DeviceMesh, placements: tuple[Placement, ...], size: torch.Size, local: torch.Size) -> _Shard:
        """See `_shard`."""
        last = self._last
        if last is None or last[0] is not mesh or last[1] != placements:
            last = self._last = mesh, placements, _shard_of(mesh, placements)
        return last[2](size, local)


_known_shards = _KnownShards()


@functools.lru_cache(maxsize=256)  # models have few meshes, and repeat few shapes
def _shard_of(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> _ShardOf:
    words = f"placements ({', '.join(map(repr, placements))}) on the mesh {_mesh_in_words(mesh)}"
    _require_shards(placements, words)
    sharding = Sharding(words, strides(mesh.mesh.flatten().tolist()))
    return functools.lru_cache(maxsize=4096)(functools.partial(_shard, mesh, placements, sharding))


def _shard(
    mesh: DeviceMesh, placements: tuple[Placement, ...], sharding: Sharding, size: torch.Size, local: torch.Size
) -> _Shard:
    """The shard that this rank holds of a DTensor, given its global and its local size."""
    shape, held = tuple(size), tuple(local)
    coordinate = mesh.get_coordinate()
    if 0 in held or coordinate is None:  # torch gives ranks outside of the mesh an empty tensor of one dimension
        origin = (0,) * len(shape)
        empty = Box(origin, held if len(held) == len(shape) else origin)
        return _Shard(shape, (empty,) if shape else (), sharding)  # without dimensions no box is empty
    cuts: list[list[Cut]] = [[] for _ in shape]
    for placement, n_parts, part in zip(placements, mesh.shape, coordinate, strict=True):
        if not placement.is_replicate():
            split = getattr(placement, "split_factor", 1)
            cuts[placement.dim].append(Cut(n_parts, part, split))  # type: ignore[attr-defined]  # was checked
    if len(held) == len(shape):
        intervals = [_intervals(size, own, along) for size, own, along in zip(shape, held, cuts, strict=True)]
        if local_shape(intervals) == held:
            return _Shard(shape, boxes_of(intervals), sharding)
    raise UnsaveableError(
        f"a DTensor's local shape is {held}, which is not what {sharding.words} gives this rank of the global shape "
        f"{shape}. Use ShardedVariable(local, global_shape, offset) to say where it lies."
    )


def _mesh_in_words(mesh: DeviceMesh) -> str:
    few = mesh.size() <= _MAX_NAMED
    ranks = str(mesh.mesh.tolist()) if few else f"{tuple(mesh.shape)} of {rank_list(mesh.mesh.flatten().tolist())}"
    return f"{ranks} {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ranks


def _intervals(size: int, held: int, cuts: list[Cut]) -> list[Interval]:
    """What a rank holds along a dimension: `_StridedShard` has two readings, and only one gives the right size."""
    real_order = inner_first(cuts)
    if real_order is not None:
        intervals = left_over(size, real_order)
        if sum(stop - start for start, stop in intervals) == held:
            return intervals
    return left_over(size, cuts)


def _require_shards(placements: tuple[Placement, ...], words: str) -> None:
    for placement in placements:
        if placement.is_partial():
            raise UnsaveableError(
                f"{placement!r} is a pending reduction, not a shard, in {words}. Call redistribute() first."
            )
        if not placement.is_replicate() and not hasattr(placement, "dim"):
            raise UnsaveableError(
                f"{placement!r} is neither Shard nor Replicate, in {words}. Call redistribute() first, or use "
                "ShardedVariable(local, global_shape, offset)."
            )
