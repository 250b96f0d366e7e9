"""The manifest as bytes: sealed JSON in the dataset `/.manifest`.

The first field of the JSON object is its own checksum, an xxh3-64 of every byte behind that field. So the dataset is
one self-contained JSON document padded with blanks, and a save patches it with a single write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Shape
from distckpt.layout.collector import collector_off
from distckpt.layout.records import FORMAT, FORMAT_VERSION, Manifest, ManifestHeader, Node, Shard, Variable
from distckpt.layout.tiling import tilings_of
from distckpt.layout.validation import validate
from distckpt.storage.hdf5_types import itemsize
from distckpt.timing import Timing

_SEAL = re.compile(rb'\{"manifest_checksum":"([0-9a-f]{16})",')

#: Digits that are set aside for a number which is known only when the file exists; enough for petabytes.
_OFFSET_DIGITS = 16

#: What is set aside for the timing, which is known only when the data are written. In bytes.
_TIMING_NBYTES = 1024
#: Length of the checksum at the front, in bytes.
_SEAL_NBYTES = len('{"manifest_checksum":"0123456789abcdef",')

#: An offset beyond the end of any file; an int64 holds its sum with the size of any variable.
_MAX_OFFSET = 1 << 61

#: Capacities are multiples of this, in bytes.
_CAPACITY_STEP = 4096

_encoder = msgspec.json.Encoder()

#: What the manifests of all files of a layout have in common, field by field: most of each.
EncodedLayout = Mapping[str, bytes]


class _Version(msgspec.Struct):
    """The fields that say whether the others can be understood."""

    format: str
    format_version: int


class _StoredVariable(msgspec.Struct, frozen=True, omit_defaults=True):
    """A variable in the file: as `Variable`, with the index of its shards in `_StoredManifest.tilings`."""

    key: str
    dtype: str
    shape: Shape
    offset: int
    tiling: Annotated[int, msgspec.Meta(ge=0)]
    numpy: bool = False


class _StoredManifest(ManifestHeader, frozen=True):
    """A manifest in the file. Each way of cutting variables is there once.

    A file of thousands of ranks has millions of shards, and every rank that restores decodes all of this.
    """

    tilings: list[list[Shard]]
    variables: list[_StoredVariable]
    timing: Timing | None = None  # the last field, see `sealed`


class Unsealed(NamedTuple):
    """A manifest as JSON, but for the timing and the checksum, which are known only when the data are written.

    Attributes:
        parts: The fields, one after the other: the large ones are those of an `EncodedLayout`, not copies.
    """

    parts: list[bytes]

    @property
    def max_nbytes(self) -> int:
        """Upper bound for the length of the manifest, whatever timing it will have."""
        return sum(map(len, self.parts)) + _SEAL_NBYTES + _TIMING_NBYTES


def encode_unsealed(manifest: Manifest, layout: EncodedLayout | None = None) -> Unsealed:
    """All of a manifest but the timing.

    Args:
        manifest: What to encode.
        layout: `encode_layout` of another manifest with the same object graph and variables, if there is one.
    """
    fields = {**_header_fields(manifest), **(encode_layout(manifest) if layout is None else layout)}
    parts: list[bytes] = []
    for name, value in fields.items():
        parts += (b'"%s":' % name.encode(), value if isinstance(value, bytes) else _encoder.encode(value), b",")
    return Unsealed(parts)


def sealed(unsealed: Unsealed, timing: Timing | None) -> list[bytes]:
    """The manifest with a timing, and its checksum at the front; in parts to be written one after the other."""
    return _with_checksum([*unsealed.parts, b'"timing":%s}' % _encoder.encode(timing)])


def _with_checksum(parts: list[bytes]) -> list[bytes]:
    hasher = xxhash.xxh3_64()
    for part in parts:
        hasher.update(part)
    return [b'{"manifest_checksum":"%s",' % hasher.hexdigest().encode(), *parts]


def encode(manifest: Manifest) -> bytes:
    """The manifest as sealed JSON, without padding."""
    return b"".join(sealed(encode_unsealed(manifest), manifest.timing))


def encode_layout(manifest: Manifest) -> EncodedLayout:
    """The fields of `_StoredManifest` that say what is stored where."""
    tilings = tilings_of(manifest.variables)
    variables = [
        _StoredVariable(variable.key, variable.dtype, variable.shape, variable.offset, tiling, variable.numpy)
        for variable, tiling in zip(manifest.variables, tilings.which, strict=True)
    ]
    fields = {"object_graph": manifest.object_graph, "tilings": tilings.distinct, "variables": variables}
    return {name: _encoder.encode(value) for name, value in fields.items()}


def max_nbytes(manifest: Manifest) -> int:
    """Upper bound for the length of the encoded manifest, whatever offsets, file length and timing it will have."""
    numbers = [variable.offset for variable in manifest.variables]
    numbers.append(manifest.file_nbytes)
    return encode_unsealed(manifest).max_nbytes + sum(_OFFSET_DIGITS - len(str(number)) for number in numbers)


def capacity_for(nbytes: int) -> int:
    """Size of a manifest dataset for `nbytes` of JSON, with room for a later counter, time or python value."""
    needed = nbytes + nbytes // 16 + 1024
    return -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP


def decode(data: bytes) -> Manifest:
    """Read a manifest, padded or not.

    Raises:
        CorruptCheckpointError: It is damaged, or of a format version that this distckpt does not know.
    """
    data = data.rstrip(b" ")
    seal = _SEAL.match(data)
    if seal is None:
        raise CorruptCheckpointError("the manifest is damaged: it does not begin with its checksum")
    with collector_off():
        try:
            stored = msgspec.json.decode(data, type=_StoredManifest)
            _check_version(stored)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _check_version_of(data)
            _check_seal(data, seal)
            raise CorruptCheckpointError(f"the manifest is not what distckpt writes: {error}") from error
        _check_seal(data, seal)
        return _loaded(stored)


def _loaded(stored: _StoredManifest) -> Manifest:
    tilings = stored.tilings
    try:
        variables = [
            Variable(var.key, var.dtype, var.shape, var.offset, tilings[var.tiling], var.numpy)
            for var in stored.variables
        ]
    except IndexError as error:
        raise CorruptCheckpointError(
            "the manifest is not what distckpt writes: a variable's shards are missing"
        ) from error
    return Manifest(**_header_fields(stored), variables=variables, timing=stored.timing)


def _header_fields(header: ManifestHeader) -> dict[str, Any]:
    return {name: getattr(header, name) for name in ManifestHeader.__struct_fields__}


def _check_version_of(data: bytes) -> None:
    """The manifest of another version may be of another form."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        _check_version(msgspec.json.decode(data, type=_Version))


def _check_version(header: _Version | ManifestHeader) -> None:
    if header.format != FORMAT:
        raise CorruptCheckpointError(f"the manifest's format is unknown. Expected {FORMAT!r}. Got {header.format!r}.")
    if header.format_version != FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"the file has format version {header.format_version}, this distckpt reads version {FORMAT_VERSION}. "
            "Use the distckpt that wrote it, or a newer one."
        )


def _check_seal(data: bytes, seal: re.Match[bytes]) -> None:
    expected = seal[1].decode()
    got = xxhash.xxh3_64_hexdigest(memoryview(data)[seal.end() :])
    if got != expected:
        raise CorruptCheckpointError(f"the manifest is damaged. Expected checksum {expected}. Got {got}.")


# ---- does it fit the file? ---------------------------------------------------------------------------------------


def problems(manifest: Manifest) -> list[str]:
    """What a manifest says that cannot be true of any file; `extent_problems` compares it with the file at hand."""
    found = validate(manifest.variables)
    found += [
        f"{variable.key}: impossible offset {variable.offset}"
        for variable in manifest.variables
        if not -1 <= variable.offset <= _MAX_OFFSET
    ]
    keys = {variable.key for variable in manifest.variables}
    if len(keys) != len(manifest.variables):
        found.append("two variables have the same key")
    if manifest.world_size < 1:
        found.append(f"world size {manifest.world_size}")
    if not 0 <= manifest.file_nbytes <= _MAX_OFFSET:
        found.append("impossible length of the file")
    return found + _graph_problems(manifest.object_graph.nodes, keys | manifest.python_state.keys())


def _graph_problems(nodes: Sequence[Node], stored: set[str]) -> list[str]:
    """References of an object graph to nodes that it does not have, or to other values than the stored ones."""
    no_nodes = set(_referred(nodes)).difference(range(len(nodes)))
    no_values = {attribute.checkpoint_key for node in nodes for attribute in node.attributes} - stored
    found = [] if nodes else ["the object graph has no root"]
    for number, node in enumerate(nodes if no_nodes or no_values else ()):
        found += [
            f"node {number} refers to node {other}, of {len(nodes)}" for other in _referred([node]) if other in no_nodes
        ]
        found += [
            f"node {number} has a value {attribute.checkpoint_key!r} that is not stored"
            for attribute in node.attributes
            if attribute.checkpoint_key in no_values
        ]
    return found


def _referred(nodes: Sequence[Node]) -> list[int]:
    """The nodes to which some nodes refer."""
    slots = [slot for node in nodes for slot in node.slot_variables]
    return [
        *[child.node_id for node in nodes for child in node.children],
        *[parameter for node in nodes for parameter in node.parameters or ()],
        *[slot.original_variable_node_id for slot in slots],
        *[slot.slot_variable_node_id for slot in slots],
    ]


def nbytes_of(variable: Variable) -> int:
    """Size of a variable's dataset in bytes."""
    return math.prod(variable.shape) * itemsize(variable.dtype)


def sizes_of(variables: Sequence[Variable]) -> np.ndarray:
    """int64, size of each variable's dataset in bytes."""
    return np.array([math.prod(variable.shape) * itemsize(variable.dtype) for variable in variables], np.int64)


def extent_problems(
    variables: Sequence[Variable], sizes: np.ndarray, offsets: np.ndarray, file_nbytes: int
) -> list[str]:
    """Which variables are not inside a file of `file_nbytes`, or share bytes with another.

    Args:
        variables: Variables for which `problems` found nothing.
        sizes: Their `sizes_of`.
        offsets: int64, position of each in the file; negative ones are left out.
        file_nbytes: Length of the file in bytes.
    """
    ends = offsets + sizes
    placed = np.flatnonzero((sizes > 0) & (offsets >= 0))
    outside = placed[ends[placed] > file_nbytes]
    order = placed[np.argsort(offsets[placed], kind="stable")]
    clashes = np.flatnonzero(ends[order][:-1] > offsets[order][1:])
    return [
        f"{variables[i].key}: {sizes[i]} bytes at offset {offsets[i]} are not inside the file of {file_nbytes} bytes"
        for i in outside.tolist()
    ] + [f"{variables[order[i]].key} and {variables[order[i + 1]].key} overlap" for i in clashes.tolist()]
