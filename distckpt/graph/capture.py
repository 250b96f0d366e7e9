"""Record a walk of the live objects: the layout that this rank holds, without the data."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from distckpt.graph.fingerprint import fingerprint_bytes, fingerprints
from distckpt.graph.python_value import UnsupportedValueError, encode, holds_nothing
from distckpt.graph.values import PythonValue, TensorValue, Value, dtype_name
from distckpt.graph.view import LiveGraph, LiveNode
from distckpt.layout.box import Box, Shape
from distckpt.layout.records import LocalAttribute, LocalLayout, LocalNode


@dataclass(frozen=True, slots=True)
class Capture:
    """A walk and its record, made by `capture`.

    Attributes:
        graph: The live graph.
        tensors: Its tensors, in order.
        layout: The local layout, which is sent to rank 0.
        python_places: Indices of the python values among all values in order.
    """

    graph: LiveGraph
    tensors: list[TensorValue]
    layout: LocalLayout
    python_places: list[int]

    def tensor_keys(self, keys: Sequence[str]) -> list[str]:
        """The keys of the tensors, from one key for each attribute in order."""
        values = (value for _, value in self.graph.values())
        return [key for key, value in zip(keys, values, strict=True) if type(value) is TensorValue]

    def python_values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The encoded python values by key, from one key for each attribute in order; "" is one that is not stored."""
        values = zip(self.python_places, self.layout.python_values, strict=True)
        return {keys[place]: data for place, data in values if keys[place]}


@torch.no_grad()
def capture(graph: LiveGraph, *, hash_all: bool, skip: np.ndarray | None) -> Capture:
    """Record a live graph. Local; reads tensors, changes nothing.

    Args:
        graph: A fresh walk.
        hash_all: Fingerprint every byte of a replicated tensor instead of a sample.
        skip: For each attribute in order, whether it needs no fingerprint; None if all need one.
    """
    held = list(graph.values())
    tensors = [value for _, value in held if type(value) is TensorValue]
    problems = list(graph.problems)
    encoded = {
        place: _encode(node, value, problems) for place, (node, value) in enumerate(held) if type(value) is PythonValue
    }
    shardings = ["" if value.sharding is None else value.sharding.words for value in tensors]
    number_of = {words: number for number, words in enumerate(dict.fromkeys(shardings))}
    layout = LocalLayout(
        graph=msgspec.msgpack.encode([_record(node) for node in graph.nodes]),
        boxes=b"".join([_numbers(value.boxes) for value in tensors]),
        fingerprints=_fingerprints(held, encoded, hash_all, skip).tobytes(),
        python_values=list(encoded.values()),
        problems=problems,
        shardings=list(number_of),
        sharding_of=np.array([number_of[words] for words in shardings], np.uint32).tobytes(),
        warnings=graph.warnings(),
        dropped=list(graph.dropped),
    )
    return Capture(graph, tensors, layout, list(encoded))


@functools.lru_cache(maxsize=4096)  # models repeat few shapes
def _numbers(boxes: tuple[Box, ...]) -> bytes:
    """The part of `LocalLayout.boxes` that belongs to one tensor."""
    return np.array([number for box in boxes for number in (*box.offset, *box.shape)], np.int64).tobytes()


def _fingerprints(
    held: Sequence[tuple[LiveNode, Value]], encoded: Mapping[int, bytes], hash_all: bool, skip: np.ndarray | None
) -> np.ndarray:
    """The array for `LocalLayout.fingerprints`; `encoded` has the python values by their index in order."""
    found = np.zeros(len(held), np.uint64)
    places = range(len(held)) if skip is None else np.flatnonzero(~skip).tolist()
    tensors = {place: value.tensor for place in places if type(value := held[place][1]) is TensorValue}
    if tensors:
        found[list(tensors)] = np.array(fingerprints(list(tensors.values()), whole=hash_all), np.uint64)
    for place, data in encoded.items():
        found[place] = fingerprint_bytes(data)
    return found


def _encode(node: LiveNode, value: PythonValue, problems: list[str]) -> bytes:
    try:
        return encode(value.value)
    except UnsupportedValueError as error:
        problems.append(f"{node.attribute_key(value.name)}: {error}")
        return b"null"


def _record(node: LiveNode) -> LocalNode | msgspec.Raw:
    """A node as in `LocalLayout.graph`. Most nodes are leaves with one value, whose few forms are cached."""
    if len(node.values) == 1 and not node.children and not node.slots and node.parameters is None:
        (value,) = node.values.values()
        return _leaf(_fields(value), node.adapter.per_rank, node.adapter.is_container)
    children = [(child, name) for name, child in node.children.items()]
    attributes = [_attribute(_fields(value)) for value in node.values.values()]
    slots = [(variable, name, slot) for variable, own in node.slots.items() for name, slot in own.items()]
    whole = node.adapter.is_container and not children
    return LocalNode(children, attributes, slots, node.parameters, node.adapter.per_rank, whole)


#: The fields of a `LocalAttribute`, but with a torch dtype: faster to make, and to look up in a cache.
_Fields = tuple[str, torch.dtype | None, Shape, bool, bool, int, bool]


def _fields(value: Value) -> _Fields:
    if isinstance(value, PythonValue):
        return value.name, None, (), False, False, 1, holds_nothing(value.value)
    return value.name, value.tensor.dtype, value.global_shape, value.buffer, value.numpy, len(value.boxes), False


@functools.lru_cache(maxsize=4096)
def _leaf(fields: _Fields, per_rank: bool, whole: bool) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(LocalNode([], [_attribute(fields)], [], None, per_rank, whole)))


def _attribute(fields: _Fields) -> LocalAttribute:
    name, dtype, shape, buffer, numpy, n_boxes, hollow = fields
    return LocalAttribute(name, dtype_name(dtype) if dtype else None, shape, buffer, numpy, n_boxes, hollow)
