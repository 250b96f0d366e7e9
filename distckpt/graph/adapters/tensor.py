"""Tensors, sharded variables and NumPy arrays: nodes with one value and no edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from distckpt.graph.adapters.base import Adapter, Part
from distckpt.graph.claims import Claim
from distckpt.graph.sharding import array_value, tensor_value
from distckpt.graph.trackable import ShardedVariable
from distckpt.graph.values import TensorValue, is_uninitialised, is_uninitialised_class
from distckpt.layout.records import OWN_VALUE


class TensorAdapter(Adapter):
    """`torch.Tensor`, `nn.Parameter`, `DTensor`."""

    def handles(self, cls: type) -> bool:
        """Tensors of every class."""
        return issubclass(cls, torch.Tensor)

    def parts(self, obj: Any, rank: int) -> Iterable[Part]:
        """The tensor's own value."""
        return (tensor_value(obj),)


class UninitialisedAdapter(Adapter):
    """Parameters and buffers of lazy modules, without a shape so far."""

    def handles(self, cls: type) -> bool:
        """`UninitializedParameter` and `UninitializedBuffer`."""
        return is_uninitialised_class(cls)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """None: it is a node without a value."""
        return ()

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Initialise it."""
        value = saved[OWN_VALUE]
        assert is_uninitialised(obj)
        assert isinstance(value, torch.Tensor)
        with torch.inference_mode(mode=False), torch.no_grad():
            obj.materialize(value.shape)
            obj.copy_(value)


class ShardedVariableAdapter(Adapter):
    """`ShardedVariable`: a block whose place the user gives."""

    def handles(self, cls: type) -> bool:
        """`ShardedVariable` and its subclasses."""
        return issubclass(cls, ShardedVariable)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """This rank's block."""
        assert isinstance(obj, ShardedVariable)
        local = tensor_value(obj.tensor)
        return (TensorValue(OWN_VALUE, local.tensor, obj.global_shape, obj.boxes),)

    def claim(self, obj: object, name: str) -> Claim:
        """The block itself: it may be in another `ShardedVariable`, too."""
        assert isinstance(obj, ShardedVariable)
        return obj.tensor, name


class ArrayAdapter(Adapter):
    """`np.ndarray`, stored as a tensor."""

    def handles(self, cls: type) -> bool:
        """Arrays of every class."""
        return issubclass(cls, np.ndarray)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """The array's own value."""
        assert isinstance(obj, np.ndarray)
        return (array_value(obj),)

    def refusal(self, obj: object, name: str, encoded: bytes | None) -> str | None:
        """The memory of a read-only array cannot be written."""
        assert isinstance(obj, np.ndarray)
        return None if obj.flags.writeable else "a read-only NumPy array (call setflags(write=True) first)"
