"""What a node of the live object graph holds: edges to other objects, and its own values.

One of each is made per value in every walk, so they are structs, which are made several times faster than dataclasses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeGuard

import msgspec
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.parameter import UninitializedTensorMixin as _Uninitialised  # type: ignore[attr-defined]  # not in the stubs

from distckpt.layout.box import Box, Shape
from distckpt.layout.meshes import Sharding
from distckpt.layout.placement import joined
from distckpt.layout.records import OWN_VALUE


class UnsaveableError(ValueError):
    """A live value cannot be stored; the message says what it is and what to do. The walk adds its key."""


class Edge(msgspec.Struct, frozen=True):
    """A named dependency of one live object on another.

    Attributes:
        name: The local name, unescaped.
        target: The live object.
        buffer: The target is a module buffer, whose replicas may differ.
    """

    name: str
    target: object
    buffer: bool = False


class Block(NamedTuple):
    """A box of a global tensor, and this rank's memory of its elements."""

    box: Box
    tensor: torch.Tensor


class TensorValue(msgspec.Struct, frozen=True):
    """A tensor that belongs to a node, or this rank's shard of it.

    Attributes:
        name: As `layout.records.Attribute.name`.
        tensor: What this rank holds. With one box it has the shape of the box. With several it is a 1-d tensor of all
            boxes one after the other; or, where the boxes are all combinations of some intervals along each dimension,
            a tensor in which those intervals are adjacent.
        global_shape: Shape of the whole tensor.
        boxes: This rank's shard: usually one box; several are disjoint, with empty ones last. None where this rank has
            no part of a tensor without dimensions.
        in_place: Restore writes into `tensor`; otherwise a new tensor is read and handed to the adapter.
        buffer: Replicas may differ.
        numpy: The live object is a NumPy array.
        holder: The DTensor that `tensor` is the local shard of, where restore has to make a new one like it.
        sharding: Placements and mesh of a DTensor; None for other tensors.
    """

    name: str
    tensor: torch.Tensor
    global_shape: Shape
    boxes: tuple[Box, ...]
    in_place: bool = True
    buffer: bool = False
    numpy: bool = False
    holder: torch.Tensor | None = None
    sharding: Sharding | None = None

    def blocks(self) -> list[Block]:
        """The boxes that have elements, each with its part of `tensor`."""
        boxes, tensor = self.boxes, self.tensor
        if len(boxes) == 1 and tensor.shape == boxes[0].shape:
            return [Block(boxes[0], tensor)]
        if not boxes:
            return []
        with torch.no_grad():
            if tensor.dim() == len(self.global_shape) != 1:
                return [Block(box, _cell(tensor, place)) for box, place in zip(boxes, joined(boxes), strict=True)]
            return list(_in_sequence(tensor, boxes))

    def block_with(self, box: Box) -> Block:
        """The block that contains a box; there is one."""
        own = self.boxes[0]
        if len(self.boxes) == 1 and self.tensor.shape == own.shape:  # nearly always
            return Block(own, self.tensor)
        return next(block for block in self.blocks() if block.box.contains(box))


def _cell(tensor: torch.Tensor, place: Box) -> torch.Tensor:
    for axis, (start, extent) in enumerate(zip(place.offset, place.shape, strict=True)):
        tensor = tensor.narrow(axis, start, extent)
    return tensor


def _in_sequence(tensor: torch.Tensor, boxes: Sequence[Box]) -> Iterator[Block]:
    start = 0
    for box in boxes:
        if box.numel:
            yield Block(box, tensor.narrow(0, start, box.numel).view(box.shape))
            start += box.numel


class PythonValue(msgspec.Struct, frozen=True):
    """A python value that belongs to a node.

    Attributes:
        name: As `layout.records.Attribute.name`.
        value: The live value.
    """

    name: str
    value: object


Value = TensorValue | PythonValue


def is_uninitialised(obj: object) -> TypeGuard[UninitializedParameter | UninitializedBuffer]:
    """Whether an object is a parameter or buffer of a lazy module, without a shape so far."""
    return isinstance(obj, _Uninitialised)


def is_uninitialised_class(cls: type) -> bool:
    """Whether objects of this class are parameters or buffers without a shape so far."""
    return issubclass(cls, _Uninitialised)


def is_meta(obj: object) -> bool:
    """Whether an object is a tensor on the meta device, or a `ShardedVariable` of one: it has no memory so far."""
    tensor = getattr(obj, "tensor", obj)
    return isinstance(tensor, torch.Tensor) and tensor.is_meta


def replicated(
    tensor: torch.Tensor,
    name: str = OWN_VALUE,
    *,
    in_place: bool = True,
    buffer: bool = False,
    numpy: bool = False,
) -> TensorValue:
    """The value of a plain tensor: every rank that has it holds all of it."""
    whole = _whole(tensor.shape)
    return TensorValue(name, tensor, whole.shape, (whole,), in_place, buffer, numpy)


@functools.lru_cache(maxsize=4096)  # models repeat few shapes
def _whole(shape: torch.Size) -> Box:
    return Box.whole(shape)


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype in records and files, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
