"""From a live tensor to the box of the global tensor that this rank holds."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distckpt.graph.values import TensorValue, UnsaveableError, replicated
from distckpt.layout.box import Box, Shape
from distckpt.layout.records import OWN_VALUE


def tensor_value(tensor: torch.Tensor, name: str = OWN_VALUE, *, in_place: bool = True) -> TensorValue:
    """The value of a tensor: a DTensor's local shard, any other tensor as a replicated one.

    Raises:
        UnsaveableError: The tensor has no bytes to store (meta, sparse, quantized), or a placement is no shard.
    """
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        _require_plain(tensor)
        return replicated(tensor, name, in_place=in_place)
    if isinstance(tensor, DTensor):
        return _dtensor_value(tensor, name, in_place)
    _require_plain(tensor)
    return replicated(tensor, name, in_place=in_place)


def array_value(array: np.ndarray, name: str = OWN_VALUE, *, in_place: bool = True) -> TensorValue:
    """The value of a NumPy array; the tensor shares its memory where the array is writeable.

    Raises:
        UnsaveableError: The array's dtype has no torch counterpart (object, str, datetime, other byte order).
    """
    if not array.flags.writeable:
        array, in_place = array.copy(), False
    try:
        tensor = torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise UnsaveableError(
            f"a NumPy array of dtype {array.dtype} cannot be stored ({error}). Use a copy of a native numeric dtype."
        ) from error
    return replicated(tensor, name, in_place=in_place, numpy=True)


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
    if isinstance(holder, DTensor) and tuple(holder.shape) == shape:
        tensor: torch.Tensor = torch.empty_like(holder, dtype=dtype, requires_grad=False)
        return tensor, tensor_value(tensor)
    if like.global_shape == shape:
        tensor = torch.empty(like.tensor.shape, dtype=dtype, device=like.tensor.device)
        return tensor, TensorValue(OWN_VALUE, tensor, shape, like.box)
    return new_plain(shape, dtype, like.tensor.device)


def new_plain(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, TensorValue]:
    """An uninitialised replicated tensor and its value."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return tensor, replicated(tensor)


def _require_plain(tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise UnsaveableError("a tensor on the meta device has no data. Call to_empty() and initialise it first.")
    if tensor.is_nested:
        raise UnsaveableError("a nested tensor has no single shape. Keep its parts, or a padded tensor.")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsaveableError(
            f"a {tensor.layout} / {tensor.dtype} tensor is not dense. Convert it with to_dense() or dequantize()."
        )


def _dtensor_value(tensor: DTensor, name: str, in_place: bool) -> TensorValue:
    if torch.is_grad_enabled():  # a walk has it off: to_local() then hands out the local tensor itself
        with torch.no_grad():
            return _dtensor_value(tensor, name, in_place)
    local = tensor.to_local()
    _require_plain(local)
    shape = tuple(tensor.shape)
    box = _shard_box(shape, tensor.device_mesh, tensor.placements)
    if box.shape != tuple(local.shape):
        if local.numel():
            raise UnsaveableError(
                f"a DTensor's local shape is {tuple(local.shape)}, but {tensor.placements} on {tensor.device_mesh} "
                f"gives this rank {box.shape}. Use ShardedVariable(local, global_shape, offset) to say where it lies."
            )
        box = Box((0,) * len(shape), tuple(local.shape) if local.dim() == len(shape) else (0,) * len(shape))
    return TensorValue(name, local, shape, box, in_place)


@functools.lru_cache(maxsize=4096)  # the computation takes 100 us, and models repeat few shapes
def _shard_box(shape: Shape, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Box:
    partial = [str(placement) for placement in placements if placement.is_partial()]
    if partial:
        raise UnsaveableError(
            f"placement {', '.join(partial)} is a pending reduction, not a shard. Call redistribute() first."
        )
    if mesh.get_coordinate() is None:  # this rank is not in the mesh
        return Box((0,) * len(shape), (0,) * len(shape))
    local_shape, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    return Box(tuple(offset), tuple(local_shape))
