"""Python values as JSON: back exactly as they were, type and bits, or refused."""

from __future__ import annotations

import collections
import enum
import json
import math
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from distckpt.graph.python_value import TensorRef, UnsupportedValueError, decode, encode, is_python_value, resolve

texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]) | st.floats()
numpy_scalars = (
    npst.boolean_dtypes()
    | npst.integer_dtypes()
    | npst.floating_dtypes()
    | npst.complex_number_dtypes()
    | npst.datetime64_dtypes()
    | npst.unicode_string_dtypes()
).flatmap(lambda dtype: npst.arrays(dtype, (1,)).map(lambda array: array[0]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**53 - 2, 2**53 + 2)
    | floats
    | st.complex_numbers()
    | texts
    | st.binary()
    | numpy_scalars
)
keys = st.recursive(st.none() | st.booleans() | st.integers() | texts | st.binary(), lambda k: st.tuples(k, k))
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(keys, st.integers(), max_size=4).map(collections.Counter)
    ),
    max_leaves=12,
)


def identical(a: Any, b: Any) -> bool:
    """Same types, same bits, same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if type(a) is float:
        return struct.pack("<d", a) == struct.pack("<d", b)
    if type(a) is complex:
        return identical(a.real, b.real) and identical(a.imag, b.imag)
    if isinstance(a, dict):
        return identical(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


@given(values)
@example(2**53)
@example(2**53 + 1)
@example(-(10**400))
@example(-0.0)
@example(math.inf)
@example({"type": "int", "value": "0x1"})
@example({(1, (None, True)): {1: "int", "1": "str", b"1": "bytes", 1.5: [[]]}})
@example(np.str_(""))
@example([(), [], {}, "", b""])
def test_round_trip(value: Any) -> None:
    assert is_python_value(value)
    data = encode(value)
    json.loads(data.decode())
    assert identical(decode(data), value)


@given(values, values)
def test_different_values_have_different_encodings(a: Any, b: Any) -> None:
    """Replicas are compared by their encodings."""
    assert (encode(a) == encode(b)) == identical(a, b)


@pytest.mark.parametrize("pattern", ["010000000000f87f", "010000000000f07f", "000000000000f8ff", "000000000000f07f"])
def test_floats_that_are_no_numbers_keep_their_bits(pattern: str) -> None:
    value = struct.unpack("<d", bytes.fromhex(pattern))[0]
    assert struct.pack("<d", decode(encode(value))).hex() == pattern


class _Colour(enum.IntEnum):
    RED = 1


class _Int(int):
    pass


class _List(list[int]):
    pass


class _Pair(collections.namedtuple("_Pair", "a b")):  # noqa: PYI024  # a subclass of tuple is what is tested
    pass


_UNSUPPORTED = [
    {1, 2},
    frozenset(),
    object(),
    int,
    len,
    _Colour.RED,
    _Int(1),
    _List(),
    _Pair(1, 2),
    collections.defaultdict(int),
    bytearray(b"a"),
    range(3),
    np.array(1.0),
    np.zeros(1, [("a", "i4")])[0],
]


@pytest.mark.parametrize("value", _UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_what_only_pickle_could_store_is_refused(value: Any) -> None:
    for held in (value, [value], ({"a": (value,)},)):
        assert not is_python_value(held)
        with pytest.raises(UnsupportedValueError, match="cannot be stored"):
            encode(held)


def test_unsupported_keys_of_a_dict_are_refused() -> None:
    assert not is_python_value({_Colour.RED: 1})
    with pytest.raises(UnsupportedValueError, match="_Colour"):
        encode({_Colour.RED: 1})


def test_text_that_utf8_cannot_express_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match="surrogates"):
        encode(["fine", "\ud800"])


def test_a_container_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UnsupportedValueError, match="contains itself"):
        encode(endless)


def test_references_are_replaced_by_tensors() -> None:
    structure = {"a": [TensorRef("x"), (1, TensorRef("y"))], "b": collections.OrderedDict(z=TensorRef("x"))}
    x, y = object(), object()
    resolved = resolve(decode(encode(structure)), {"x": x, "y": y})
    assert resolved["a"][0] is x
    assert resolved["a"][1] == (1, y)
    assert type(resolved["b"]) is collections.OrderedDict
    assert resolved["b"]["z"] is x


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"{}",
        b'{"type":"int"}',
        b'{"type":"set","value":[]}',
        b'{"type":["int"],"value":1}',
        b'{"type":"int","value":1}',
        b'{"type":"int","value":"0xg"}',
        b'{"type":"float","value":"00"}',
        b'{"type":"float","value":"zz"}',
        b'{"type":"complex","value":[1]}',
        b'{"type":"complex","value":["a","b"]}',
        b'{"type":"bytes","value":"*"}',
        b'{"type":"bytes","value":1}',
        b'{"type":"list","value":1}',
        b'{"type":"dict","value":[1]}',
        b'{"type":"dict","value":[[{"type":"list","value":[]},1]]}',
        b'{"type":"tensor","value":1}',
        b'{"type":"numpy","value":["O","AAAAAAAAAAA="]}',
        b'{"type":"numpy","value":["<f8","AAAA"]}',
        b'{"type":"numpy","value":["<f8",""]}',
        b'{"type":"numpy","value":["nonsense","AA=="]}',
        b'{"type":"numpy","value":["<i1,<i1","AAA="]}',
        b'{"type":"list","value":[' * 100_000,
    ],
)
def test_damaged_encodings_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "value"]) | texts, inner),
)
kinds = st.sampled_from(["int", "float", "complex", "bytes", "tuple", "list", "dict", "Counter", "tensor", "numpy"])


@given(st.fixed_dictionaries({"type": kinds, "value": json_values}) | json_values)
def test_whatever_json_says_decoding_raises_only_value_errors(data: Any) -> None:
    with suppress(ValueError):
        decode(json.dumps(data).encode())
