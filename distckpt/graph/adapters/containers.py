"""Lists, tuples and dicts with trackable objects inside. Read live: whatever they hold now is what counts."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch

from distckpt.graph.adapters.base import Adapter, Omission, Part, Problem
from distckpt.graph.adapters.registry import adapter_for, is_missed, refusal, unwrap
from distckpt.graph.python_value import decode, encode, is_python_value
from distckpt.graph.trackable import NoDependency
from distckpt.graph.values import Edge, PythonValue
from distckpt.layout.keys import dict_key, edge_name, escape, unescape


def part_of(name: str, value: object) -> Part:
    """What a named value is to its parent: a python value of its own, or an edge to another node."""
    if isinstance(value, torch.Tensor):  # by far the most values are
        return Edge(name, value)
    if is_python_value(value):
        return PythonValue(escape(name), value)
    target = unwrap(value)
    if adapter_for(target) is None:
        kind = type(value)
        return Problem(
            escape(name),
            f"a {kind.__module__}.{kind.__qualname__} cannot be checkpointed. Give it state_dict() and "
            "load_state_dict(), wrap it in a PythonState, or keep it out with NoDependency.",
        )
    return Edge(name, target)


def attribute(name: str, value: object) -> Part | None:
    """What an attribute is to its owner; None where nothing of it could be saved: such are left out silently."""
    problem = refusal(value)
    if problem is None:
        return part_of(name, value)
    return Omission(escape(name), f"left out: {problem}") if is_missed(value) else None


def assign_python_value(live: object, saved: object) -> bool:
    """Write a saved list or dict into the live one. Returns False when that is not possible."""
    if isinstance(live, list) and isinstance(saved, list):
        live[:] = saved
    elif isinstance(live, dict) and isinstance(saved, dict):
        live.clear()
        live.update(saved)
    else:
        return False
    return True


class SequenceAdapter(Adapter):
    """list, tuple, namedtuple, deque: elements named by position, those of a namedtuple by field."""

    is_container = True

    def handles(self, cls: type) -> bool:
        """Exact lists and deques, and tuples with their subclasses."""
        return cls in (list, collections.deque) or issubclass(cls, tuple)

    def elements(self, obj: Any) -> Iterable[tuple[object, object]]:
        """See `Adapter.elements`: index and element."""
        return tuple(enumerate(obj))

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Elements that are python values are values of the container, all others are edges."""
        assert isinstance(obj, Iterable)
        names = getattr(obj, "_fields", None)
        for index, element in enumerate(obj):
            if not isinstance(element, NoDependency):
                yield part_of(names[index] if names else str(index), element)

    def refusal(self, obj: object, name: str, encoded: bytes | None) -> str | None:
        """An element of a tuple cannot be replaced: it must be equal, or a list or dict that can be filled anew."""
        if encoded is None or isinstance(obj, MutableSequence):
            return None
        live, saved = _element(obj, name), decode(bytes(encoded))
        if encode(live) == bytes(encoded) or (type(live) is type(saved) and isinstance(live, list | dict)):
            return None
        return f"{live!r:.60} in a tuple, which cannot change (use a list)"

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set the elements, and append those beyond the end; a list or dict is changed in place."""
        for name, value in saved.items():
            if isinstance(obj, MutableSequence) and int(name) >= len(obj):
                obj.append(value)  # of a deque the last ones stay, as many as it holds
            elif not assign_python_value(_element(obj, name), value) and isinstance(obj, MutableSequence):
                obj[int(name)] = value

    def drop(self, obj: Any, names: Collection[str]) -> None:
        """See `Adapter.drop`."""
        for _ in names:
            obj.pop()


def _element(obj: Any, name: str) -> object:
    return getattr(obj, name) if hasattr(obj, "_fields") else obj[int(name)]


class MappingAdapter(Adapter):
    """dict and its subclasses with str or int keys."""

    is_container = True

    def handles(self, cls: type) -> bool:
        """Dicts of every class."""
        return issubclass(cls, dict)

    def elements(self, obj: Any) -> Iterable[tuple[object, object]]:
        """See `Adapter.elements`: key and element."""
        return tuple(obj.items())

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Elements that are python values are values of the container, all others are edges."""
        assert isinstance(obj, dict)
        for key, element in obj.items():
            if isinstance(element, NoDependency):
                continue
            if type(key) is int or (type(key) is str and _is_utf8(key)):
                yield part_of(edge_name(key), element)
            else:
                yield Problem(
                    "",
                    f"a dict key of type {type(key).__qualname__} ({key!r}) cannot be stored. "
                    "Use str keys without lone surrogates, or int keys.",
                )

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set the elements."""
        assert isinstance(obj, MutableMapping)
        for escaped, value in saved.items():
            key = dict_key(unescape(escaped))
            if not assign_python_value(obj.get(key), value):
                obj[key] = value

    def drop(self, obj: Any, names: Collection[str]) -> None:
        """See `Adapter.drop`."""
        for escaped in names:
            del obj[dict_key(unescape(escaped))]


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
