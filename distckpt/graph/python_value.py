"""Python values as JSON, exact in type and value, without pickle.

None, bool, str, small int and finite float stand for themselves. Everything else is an object
`{"type": ..., "value": ...}`, so that no value can be mistaken for a tag.
"""

from __future__ import annotations

import base64
import collections
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

_SMALL_INT = 2**53
_SEQUENCE_TYPES = (tuple, list)
_MAPPING_TYPES = (dict, collections.OrderedDict, collections.Counter)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for a tensor inside an encoded structure.

    Attributes:
        name: Name of the node's attribute that holds the tensor.
    """

    name: str


_SCALAR_TYPES = frozenset({type(None), bool, int, float, complex, str, bytes, TensorRef})


class UnsupportedValueError(ValueError):
    """The value cannot be stored without pickle."""


def is_python_value(value: object) -> bool:
    """Whether `encode` accepts the value: None, bool, int, float, complex, str, bytes, NumPy scalars, and tuples,
    lists and dicts of those. Exact types: a subclass would come back as something else.
    """
    kind = type(value)
    if kind in _SCALAR_TYPES:
        return True
    if kind in _SEQUENCE_TYPES:
        return all(map(is_python_value, value))  # type: ignore[call-overload]
    if kind in _MAPPING_TYPES:
        items = value.items()  # type: ignore[attr-defined]
        return all(is_python_value(key) and is_python_value(item) for key, item in items)
    return _is_numpy_scalar(value)


def _is_numpy_scalar(value: object) -> bool:
    # The names of a structured scalar's fields would be lost.
    return isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.names is None


def encode(value: object) -> bytes:
    """Encode a python value as JSON.

    Raises:
        UnsupportedValueError: The value, or one inside it, is of another type, or a str that UTF-8 cannot express.
    """
    try:
        return msgspec.json.encode(_to_json(value))
    except UnicodeEncodeError as error:
        raise UnsupportedValueError(f"a str with lone surrogates cannot be stored ({error})") from error
    except RecursionError as error:
        raise UnsupportedValueError(f"a container cannot be stored: {too_deep()}") from error


def too_deep() -> str:
    """What to say of a container for which Python's stack is too short."""
    limit = sys.getrecursionlimit()
    return (
        f"it contains itself, or has more levels than Python's recursion limit ({limit}) leaves room for, which is "
        f"about {limit // 5}. Store it flat"
    )


def decode(data: bytes) -> Any:
    """The python value that `encode` was given.

    Raises:
        ValueError: The bytes are not what `encode` writes.
    """
    try:
        return _from_json(msgspec.json.decode(data))
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error) as error:
        raise ValueError(f"not an encoded python value: {data[:80]!r} ({error})") from error


def resolve(value: Any, tensors: dict[str, Any]) -> Any:
    """A copy of a decoded structure with every `TensorRef` replaced by the tensor of that name."""
    kind = type(value)
    if kind is TensorRef:
        return tensors[value.name]
    if kind in _SEQUENCE_TYPES:
        return kind(resolve(item, tensors) for item in value)
    if kind in _MAPPING_TYPES:
        return kind({key: resolve(item, tensors) for key, item in value.items()})
    return value


def references(value: Any) -> Iterator[str]:
    """The names of the tensors to which a decoded structure refers."""
    kind = type(value)
    if kind is TensorRef:
        yield value.name
    elif kind in _SEQUENCE_TYPES:
        for item in value:
            yield from references(item)
    elif kind in _MAPPING_TYPES:
        for item in value.values():
            yield from references(item)


def holds_nothing(value: Any) -> bool:
    """Whether a value is a container that has only such containers inside, if anything."""
    kind = type(value)
    if kind in _MAPPING_TYPES:
        return all(map(holds_nothing, value.values()))
    return kind in _SEQUENCE_TYPES and all(map(holds_nothing, value))


def _tagged(kind: str, value: object) -> dict[str, object]:
    return {"type": kind, "value": value}


def _to_json(value: Any) -> object:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SMALL_INT <= value <= _SMALL_INT else _tagged("int", hex(value))
    if kind is float:
        return value if math.isfinite(value) else _tagged("float", struct.pack("<d", value).hex())
    if kind is complex:
        return _tagged("complex", [_to_json(value.real), _to_json(value.imag)])
    if kind is bytes:
        return _tagged("bytes", base64.b64encode(value).decode())
    if kind in _SEQUENCE_TYPES:
        return _tagged(kind.__name__, [_to_json(item) for item in value])
    if kind in _MAPPING_TYPES:
        return _tagged(kind.__name__, [[_to_json(key), _to_json(item)] for key, item in value.items()])
    if kind is TensorRef:
        return _tagged("tensor", value.name)
    if _is_numpy_scalar(value):
        return _tagged("numpy", [value.dtype.str, base64.b64encode(value.tobytes()).decode()])
    raise UnsupportedValueError(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be stored")


def _from_json(data: Any) -> Any:
    if isinstance(data, list):
        raise TypeError("a bare list")
    if not isinstance(data, dict):
        return data
    value = data["value"]
    match data["type"]:
        case "int":
            return int(value, 16)
        case "float":
            return struct.unpack("<d", bytes.fromhex(value))[0]
        case "complex":
            return complex(_from_json(value[0]), _from_json(value[1]))
        case "bytes":
            return base64.b64decode(value, validate=True)
        case "tuple":
            return tuple(map(_from_json, value))
        case "list":
            return list(map(_from_json, value))
        case "dict" | "OrderedDict" | "Counter" as name:
            pairs = {_from_json(key): _from_json(item) for key, item in value}
            return {kind.__name__: kind for kind in _MAPPING_TYPES}[name](pairs)
        case "tensor" if isinstance(value, str):
            return TensorRef(value)
        case "numpy":
            return _numpy_scalar(np.dtype(value[0]), base64.b64decode(value[1], validate=True))
        case other:
            raise ValueError(f"unknown type {other!r} of an encoded python value")


def _numpy_scalar(dtype: np.dtype[Any], data: bytes) -> np.generic:
    if dtype.names is not None:
        raise TypeError(f"a structured scalar of {dtype}")
    scalar: np.generic = np.frombuffer(data, dtype)[0] if dtype.itemsize else dtype.type()
    return scalar
