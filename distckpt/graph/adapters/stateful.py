"""Objects that give their state as one structure: `state_dict`/`load_state_dict`, and `PythonState`.

A structure is stored as its tensors, each a value of its own, and the rest with references to them.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from distckpt.graph.adapters.base import Adapter, Part, Problem
from distckpt.graph.claims import Claim
from distckpt.graph.python_value import TensorRef, is_python_value, resolve
from distckpt.graph.sharding import array_value, tensor_value
from distckpt.graph.trackable import PythonState
from distckpt.graph.values import PythonValue, TensorValue, UnsaveableError
from distckpt.layout.keys import edge_name, escape
from distckpt.layout.records import STATE

#: Name of the value of a structure that is nothing but a tensor or an array.
_BARE = ".bare"


@dataclass(slots=True)
class _Flattening:
    """The tensors found in a structure so far, and what cannot be stored."""

    tensors: list[TensorValue] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def strip(self, value: Any, path: str) -> Any:
        """The structure with every tensor replaced by a reference to its name."""
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._reference(value, path)
        kind = type(value)
        if kind in (list, tuple):
            return kind(self.strip(item, f"{path}/{index}") for index, item in enumerate(value))
        if kind in (dict, collections.OrderedDict):
            return kind((key, self.strip(item, f"{path}/{_component(key)}")) for key, item in value.items())
        if not is_python_value(value):
            self.problems.append(
                Problem(
                    path.strip("/"),
                    f"its state holds a {kind.__module__}.{kind.__qualname__}, which only pickle could store. "
                    "Leave it out of the state, or convert it to numbers, strings, containers of those, or tensors.",
                )
            )
            return None
        return value

    def _reference(self, value: torch.Tensor | np.ndarray, path: str) -> TensorRef:
        name = path.lstrip("/") or _BARE
        try:
            found = array_value(value, name) if isinstance(value, np.ndarray) else tensor_value(value, name)
        except UnsaveableError as error:
            self.problems.append(Problem(name, str(error)))
            return TensorRef(name)
        holder = value if isinstance(value, torch.Tensor) else None
        self.tensors.append(msgspec.structs.replace(found, in_place=False, holder=holder))
        return TensorRef(name)


def _component(key: Any) -> str:
    # No str looks like the name of another key, for its own dots are doubled.
    return escape(edge_name(key)) if type(key) in (str, int) else f".k{escape(repr(key))}"


def flatten(state: object, prefix: str, rest_name: str) -> Iterable[Part]:
    """The values that store a structure: its tensors, named by their path below `prefix`, and the rest.

    Args:
        state: Nested dicts, lists and tuples of tensors, arrays and python values.
        prefix: Start of every tensor's name; may be empty.
        rest_name: Name of the python value that holds the structure itself.
    """
    flattening = _Flattening()
    rest = flattening.strip(state, prefix)
    yield from flattening.tensors
    yield from flattening.problems
    yield PythonValue(rest_name, rest)


def unflatten(saved: Mapping[str, object], rest_name: str) -> Any:
    """The structure that `flatten` was given, with the tensors that were read."""
    tensors = {name: value for name, value in saved.items() if name != rest_name}
    return resolve(saved[rest_name], tensors)


def state_dict_or_none(obj: torch.nn.Module | torch.optim.Optimizer) -> object:
    """The `state_dict()` of an object that is stored in parts, to find what they lack; None where it raises.

    Those that keep their state for other ways to ask for it raise: that says nothing of what would be lost.
    """
    try:
        return obj.state_dict()
    except Exception:
        return None


class StatefulAdapter(Adapter):
    """Schedulers, gradient scalers, data loaders, metrics: anything with `state_dict` and `load_state_dict`."""

    takes_all = True
    needs = STATE

    def handles(self, cls: type) -> bool:
        """Classes with both methods."""
        return callable(getattr(cls, "state_dict", None)) and callable(getattr(cls, "load_state_dict", None))

    def parts(self, obj: Any, rank: int) -> Iterable[Part]:
        """The flattened `state_dict()`; nothing when it is empty, as that of a disabled gradient scaler."""
        state = obj.state_dict()
        return flatten(state, "", STATE) if isinstance(state, torch.Tensor | np.ndarray) or state else ()

    def claim(self, obj: object, name: str) -> Claim:
        """The whole state, whatever tensors the file has of it."""
        return obj, STATE

    def restore(self, obj: Any, saved: Mapping[str, object]) -> None:
        """Rebuild the state and load it."""
        obj.load_state_dict(unflatten(saved, STATE))


class PythonStateAdapter(Adapter):
    """`PythonState`: a str or bytes of the user's making."""

    takes_all = True
    needs = STATE

    def handles(self, cls: type) -> bool:
        """`PythonState` and its subclasses."""
        return issubclass(cls, PythonState)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """What `serialize()` returns."""
        assert isinstance(obj, PythonState)
        value = obj.serialize()
        if not isinstance(value, str | bytes):
            raise UnsaveableError(f"serialize() must return str or bytes. Got {type(value).__qualname__}.")
        return (PythonValue(STATE, value),)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand it back."""
        value = saved[STATE]
        assert isinstance(obj, PythonState)
        assert isinstance(value, str | bytes)
        obj.deserialize(value)
