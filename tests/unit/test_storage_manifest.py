from __future__ import annotations

import gc
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.records import Attribute, Child, Manifest, Node, ObjectGraph, Shard, SlotVariable, Variable
from distckpt.storage import manifest as manifests
from tests.checkpoint_files import make_manifest

VARIABLES = [
    Variable("a", "float32", (4, 5), 4096, [Shard(0, (0, 0), (2, 5)), Shard(1, (2, 0), (2, 5))]),
    Variable("größe/b", "bfloat16", (), 8, [Shard(0, (), ())], numpy=True),
    Variable("e", "int64", (0, 3), -1, []),
]


def manifest(**changes: Any) -> Manifest:
    nodes = [
        Node(children=[Child(1, "a b/c")], attributes=[Attribute(".value", "a")]),
        Node(slot_variables=[SlotVariable(0, "exp_avg", 1)], parameters=[0], per_rank=True),
    ]
    fields = {
        "object_graph": ObjectGraph(nodes),
        "python_state": {"step": msgspec.Raw(b"[1,2.5]"), "n": msgspec.Raw(b'"x"')},
        "metadata": {"text": "\u2028 ü", "nan": None},
        "versions": {"torch": "2"},
        **changes,
    }
    return msgspec.structs.replace(make_manifest(VARIABLES), **fields)


def test_round_trip() -> None:
    data = manifests.encode(manifest())
    decoded = manifests.decode(data)
    assert decoded == manifest()
    assert manifests.decode(data.ljust(10000)) == manifest()
    assert bytes(decoded.python_state["step"]) == b"[1,2.5]"


def test_the_seal_is_the_first_field_and_covers_the_rest() -> None:
    data = manifests.encode(manifest())
    seal, rest = data.split(b",", 1)
    assert json.loads(seal + b"}") == {"manifest_checksum": xxhash.xxh3_64_hexdigest(rest)}
    assert json.loads(data)["python_state"] == {"step": [1, 2.5], "n": "x"}


def test_every_flipped_bit_is_found() -> None:
    data = manifests.encode(manifest())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(CorruptCheckpointError):
            manifests.decode(bytes(damaged))


@pytest.mark.parametrize("length", [0, 1, 30, 60, 200, -1])
def test_every_truncation_is_found(length: int) -> None:
    with pytest.raises(CorruptCheckpointError, match="the manifest is damaged"):
        manifests.decode(manifests.encode(manifest())[:length])


def seal(document: bytes) -> bytes:
    body = document[1:]
    return b'{"manifest_checksum":"%s",%s' % (xxhash.xxh3_64_hexdigest(body).encode(), body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(format="other"), "Expected 'distckpt'. Got 'other'"),
        (lambda document: document.update(format_version=1), "format version 1, this distckpt reads version 2"),
        (lambda document: document.pop("variables"), "not what distckpt writes: .*variables"),
        (lambda document: document["variables"][0].update(shape=["x"]), "not what distckpt writes"),
        (lambda document: document.update(format_version="1"), "not what distckpt writes"),
        (lambda document: document["variables"][0].update(tiling=3), "a variable's shards are missing"),
        (lambda document: document["variables"][0].update(tiling=-1), "not what distckpt writes"),
    ],
    ids=["format", "version", "missing", "type", "version type", "tiling", "negative tiling"],
)
def test_a_manifest_of_another_kind(change: Any, message: str) -> None:
    document = json.loads(manifests.encode(manifest()))
    change(document)
    with pytest.raises(CorruptCheckpointError, match=message):
        manifests.decode(seal(json.dumps(document).encode()))


def test_a_later_version_may_have_more_fields() -> None:
    """Unknown fields are ignored, so that adding one needs no new version."""
    document = {**json.loads(manifests.encode(manifest())), "novelty": 1}
    assert manifests.decode(seal(json.dumps(document).encode())).variables == VARIABLES


def test_variables_that_are_cut_alike_share_their_shards() -> None:
    a, b, _ = VARIABLES
    variables = [a, b, *(Variable(key, "int8", (4, 5), 0, list(a.shards)) for key in "xyz")]
    data = manifests.encode(manifest(variables=variables))
    assert [len(tiling) for tiling in json.loads(data)["tilings"]] == [2, 1]
    decoded = manifests.decode(data).variables
    assert decoded == variables
    assert all(variable.shards is decoded[0].shards for variable in decoded[2:])


def test_deep_nesting_is_corruption() -> None:
    document = b'{"format":"distckpt","format_version":2,"metadata":' + b"[" * 100000 + b"]" * 100000 + b"}"
    with pytest.raises(CorruptCheckpointError):
        manifests.decode(seal(document))


def test_the_collector_is_as_before() -> None:
    data = manifests.encode(manifest())
    assert gc.isenabled()
    manifests.decode(data)
    assert gc.isenabled()
    gc.disable()
    try:
        manifests.decode(data)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("offset", [-1, 0, 123456789012345])
def test_max_nbytes_does_not_depend_on_the_offsets(offset: int) -> None:
    changed = [msgspec.structs.replace(variable, offset=offset) for variable in VARIABLES]
    known = manifest(variables=changed, file_nbytes=max(offset, 0))
    assert manifests.max_nbytes(known) == manifests.max_nbytes(manifest())
    assert len(manifests.encode(known)) <= manifests.max_nbytes(known)


def test_the_layout_is_encoded_once_for_many_manifests() -> None:
    layout = manifests.encode_layout(manifest())
    later = manifests.encode_unsealed(manifest(variables=[], time=5.0, save_counter=8), layout)
    assert later == manifests.encode_unsealed(manifest(time=5.0, save_counter=8))
    assert later != manifests.encode_unsealed(manifest())
    assert all(any(field is part for part in later.parts) for field in layout.values()), "no copies"


def test_capacity_has_room_to_spare() -> None:
    for nbytes in (0, 1000, 4096, 10**6, 10**6 + 1):
        capacity = manifests.capacity_for(nbytes)
        assert capacity % 4096 == 0
        assert nbytes + nbytes // 16 + 1024 <= capacity < nbytes + nbytes // 16 + 1024 + 4096


def test_no_problems() -> None:
    assert manifests.problems(manifest()) == []
    offsets = np.array([variable.offset for variable in VARIABLES])
    assert manifests.extent_problems(VARIABLES, manifests.sizes_of(VARIABLES), offsets, 4096 + 80) == []


@pytest.mark.parametrize(
    ("offsets", "file_nbytes", "expected"),
    [
        ([4096, 8, -1], 4175, ["a: 80 bytes at offset 4096 are not inside the file of 4175 bytes"]),
        ([4096, 4174, -1], 9999, ["a and größe/b overlap"]),
        ([4096, 4095, -1], 9999, ["größe/b and a overlap"]),
        ([-1, -1, -1], 0, []),
        ([4096, 4176, 4100], 4178, []),
    ],
)
def test_extent_problems(offsets: list[int], file_nbytes: int, expected: list[str]) -> None:
    sizes = manifests.sizes_of(VARIABLES)
    assert manifests.extent_problems(VARIABLES, sizes, np.array(offsets), file_nbytes) == expected


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (Node(children=[Child(2, "x")]), "node 0 refers to node 2, of 1"),
        (Node(children=[Child(-1, "x")]), "node 0 refers to node -1, of 1"),
        (Node(parameters=[1]), "node 0 refers to node 1, of 1"),
        (Node(slot_variables=[SlotVariable(0, "exp_avg", 7)]), "node 0 refers to node 7, of 1"),
        (Node(attributes=[Attribute(".value", "no such key")]), "node 0 has a value 'no such key' that is not stored"),
    ],
)
def test_graphs_that_refer_to_nothing(node: Node, expected: str) -> None:
    assert manifests.problems(manifest(object_graph=ObjectGraph([node]))) == [expected]


def test_a_graph_without_a_root() -> None:
    assert manifests.problems(manifest(object_graph=ObjectGraph([]))) == ["the object graph has no root"]


def test_impossible_worlds() -> None:
    assert manifests.problems(manifest(world_size=0)) == ["world size 0"]
    assert manifests.problems(manifest(variables=[VARIABLES[0]] * 2)) == ["two variables have the same key"]
    assert manifests.problems(manifest(file_nbytes=10**400)) == ["impossible length of the file"]
