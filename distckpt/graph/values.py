"""What a node of the live object graph holds: edges to other objects, and its own values.

One of each is made per value in every walk, so they are structs, which are made several times faster than dataclasses.
"""

from __future__ import annotations

from typing import TypeGuard

import msgspec
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.parameter import UninitializedTensorMixin as _Uninitialised  # type: ignore[attr-defined]  # not in the stubs

from distckpt.layout.box import Box, Shape
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


class TensorValue(msgspec.Struct, frozen=True):
    """A tensor that belongs to a node, or this rank's shard of it.

    Attributes:
        name: As `layout.records.Attribute.name`.
        tensor: What this rank holds, of shape `box.shape`.
        global_shape: Shape of the whole tensor.
        box: This rank's shard.
        in_place: Restore writes into `tensor`; otherwise a new tensor is read and handed to the adapter.
        buffer: Replicas may differ.
        numpy: The live object is a NumPy array.
        holder: The DTensor that `tensor` is the local shard of, where restore has to make a new one like it.
    """

    name: str
    tensor: torch.Tensor
    global_shape: Shape
    box: Box
    in_place: bool = True
    buffer: bool = False
    numpy: bool = False
    holder: torch.Tensor | None = None


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
    shape = tuple(tensor.shape)
    return TensorValue(name, tensor, shape, Box((0,) * len(shape), shape), in_place, buffer, numpy)
