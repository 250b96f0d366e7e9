"""The records that travel between rooms, between ranks and into the file.

Local records describe what one rank holds; the manifest describes the whole checkpoint. All are plain data: they know
neither live objects nor MPI nor HDF5. The names of the object graph (`children`, `local_name`, `attributes`,
`checkpoint_key`, `slot_variables`) are those of TensorFlow's trackable_object_graph.proto.
"""

from __future__ import annotations

from typing import Any

import msgspec

from distckpt.layout.box import Shape
from distckpt.timing import Timing

FORMAT = "distckpt"
FORMAT_VERSION = 2
CHECKSUM_ALGORITHM = "xxh3-64"

#: Name of the attribute that is a node's own value; every other attribute name is the key suffix below the node.
OWN_VALUE = ".value"

#: Name of the value that holds a structure without its tensors, which are values of the same node.
STATE = ".state"

#: Names of values that are the whole of their object.
WHOLE = (OWN_VALUE, STATE)


# ---- the stored object graph -----------------------------------------------------------------------------------


class Child(msgspec.Struct, frozen=True):
    """An edge of the object graph.

    Attributes:
        node_id: Index of the child in the node list.
        local_name: Name of the edge, unescaped.
    """

    node_id: int
    local_name: str


class Attribute(msgspec.Struct, frozen=True):
    """A stored value of a node.

    Attributes:
        name: `OWN_VALUE`, or the escaped suffix that `checkpoint_key` adds to the key of the node.
        checkpoint_key: The unique name of the value; for a tensor also its dataset path, without leading slash.
    """

    name: str
    checkpoint_key: str


class SlotVariable(msgspec.Struct, frozen=True):
    """Optimizer state that belongs to a variable; recorded on the optimizer's node.

    Attributes:
        original_variable_node_id: Node of the variable.
        slot_name: Name in the optimizer's state, such as "exp_avg".
        slot_variable_node_id: Node that holds the state.
    """

    original_variable_node_id: int
    slot_name: str
    slot_variable_node_id: int


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node of the object graph; node 0 is the root.

    Attributes:
        children: Edges, in the order in which they were tracked.
        attributes: Stored values.
        slot_variables: Slots, when the node is an optimizer.
        parameters: Node ids of a parameter group's members, when the node is a parameter group.
        per_rank: The node is a `PerRank`: its edges and attributes are named by rank, with keys below ".rank/".
    """

    children: list[Child] = []
    attributes: list[Attribute] = []
    slot_variables: list[SlotVariable] = []
    parameters: list[int] | None = None
    per_rank: bool = False


class ObjectGraph(msgspec.Struct, frozen=True):
    """The stored object graph."""

    nodes: list[Node]


# ---- what one rank holds ----------------------------------------------------------------------------------------


class LocalAttribute(msgspec.Struct, frozen=True, array_like=True):
    """A value that this rank holds, or a part of it; without the data.

    Attributes:
        name: As `Attribute.name`.
        dtype: torch dtype name such as "bfloat16"; None for a python value.
        global_shape: Shape of the whole tensor; () for a python value.
        buffer: A module buffer: replicas may differ, the lowest rank's bytes are stored.
        numpy: The live value is a NumPy array.
        n_boxes: Number of boxes that this rank's shard consists of, empty ones included. 0 where this rank has no part
            of a tensor without dimensions, of which no box is empty.
        hollow: A container without any value inside: no value, where another rank has objects in it.
    """

    name: str
    dtype: str | None
    global_shape: Shape
    buffer: bool = False
    numpy: bool = False
    n_boxes: int = 1
    hollow: bool = False


class LocalNode(msgspec.Struct, frozen=True, array_like=True):
    """A node of this rank's object graph; ids are local.

    Attributes:
        children: (local node id, local name) per edge.
        attributes: Values of this node.
        slots: (variable's local node id, slot name, slot's local node id), when the node is an optimizer.
        parameters: Local node ids of a parameter group's members.
        per_rank: As `Node.per_rank`.
        whole: A container that has python values only: together they are one value, the same on all ranks.
    """

    children: list[tuple[int, str]]
    attributes: list[LocalAttribute]
    slots: list[tuple[int, str, int]]
    parameters: list[int] | None = None
    per_rank: bool = False
    whole: bool = False


class LocalLayout(msgspec.Struct, frozen=True, array_like=True):
    """What one rank holds. "In order" means: nodes by id, each node's attributes as listed.

    Attributes:
        graph: msgpack of `list[LocalNode]`; most ranks of a job have the same bytes, which are then merged once.
        boxes: int64, native byte order: offset then shape of each box of this rank's shard, for each tensor in order.
        fingerprints: uint64 per attribute in order: xxh3-64 of the value (large tensors: of a sample), 0 where it was
            not computed.
        python_values: Encoded python values, in order.
        problems: What this rank cannot save, one sentence each; not empty means that merging fails with these.
        shardings: Placements and mesh in words, as this rank sees them; only errors show them.
        sharding_of: uint32 for each tensor in order: index in `shardings`.
        warnings: What this rank leaves out, one sentence each; rank 0 warns of it, once.
        dropped: Waiting values of restores that this save replaces, one sentence each; rank 0 warns of them each time.
    """

    graph: bytes
    boxes: bytes
    fingerprints: bytes
    python_values: list[bytes]
    problems: list[str]
    shardings: list[str] = []
    sharding_of: bytes = b""
    warnings: list[str] = []
    dropped: list[str] = []


# ---- what rank 0 answers -----------------------------------------------------------------------------------------


class PlanItem(msgspec.Struct, frozen=True, array_like=True):
    """A box that this rank writes.

    Attributes:
        tensor: Index of the tensor, among this rank's tensors in order.
        offset: Start of the box in the global tensor.
        shape: Extent of the box.
        checksum: Index of the first of its pieces' checksums in the file's checksum dataset.
    """

    tensor: int
    offset: Shape
    shape: Shape
    checksum: int


class SavePlan(msgspec.Struct, frozen=True, array_like=True):
    """What one rank does in a save, and in the next ones as long as no layout changes.

    Attributes:
        plan_id: Identifies the agreed global layout; the same on all ranks.
        keys: Checkpoint key of each attribute of this rank, in order.
        variables: For each tensor of this rank, in order: index in the manifest's variables.
        items: What this rank writes.
        weights: For each attribute in order: what to multiply its fingerprint with so that the sum over all ranks is 0
            modulo 2**64 when replicas agree: 1 - n for the lowest of n holders, 1 for the others, 0 when not compared.
        watched: Positions, among the attributes in order, of the python values that this rank watches because rank 0
            does not hold them; when one changes, values must be gathered again.
    """

    plan_id: int
    keys: list[str]
    variables: list[int]
    items: list[PlanItem]
    weights: list[int]
    watched: list[int]


# ---- the manifest ------------------------------------------------------------------------------------------------


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """A box of a variable and the rank that wrote it."""

    rank: int
    offset: Shape
    shape: Shape


class Variable(msgspec.Struct, frozen=True):
    """A stored tensor.

    Attributes:
        key: Checkpoint key; also the dataset's path in the file.
        dtype: torch dtype name.
        shape: Global shape.
        offset: Position of the first byte in the file; -1 when the dataset is empty.
        shards: The boxes as written; they tile the global shape. Variables that are cut alike may share the list.
        numpy: The saved object was a NumPy array.
    """

    key: str
    dtype: str
    shape: Shape
    offset: int
    shards: list[Shard]
    numpy: bool = False


class ManifestHeader(msgspec.Struct, frozen=True):
    """The part of a manifest about the checkpoint as a whole; its variables and the timing are not in it.

    Attributes:
        format: Always `FORMAT`.
        format_version: Readers refuse versions they do not know.
        save_id: Unique name of this save.
        save_counter: The counter after this save; None for a file made by `write`.
        world_size: Number of ranks that saved.
        time: Seconds since the epoch, on rank 0.
        host: Host of rank 0.
        transport: "mpio" or "posix".
        versions: Library name to version.
        checksums: `CHECKSUM_ALGORITHM`, or None when the file has no checksums.
        metadata: The user's metadata, an encoded python value.
        object_graph: The stored object graph.
        python_state: Checkpoint key to encoded python value.
        file_nbytes: Length of the file in bytes.
    """

    format: str
    format_version: int
    save_id: str
    save_counter: int | None
    world_size: int
    time: float
    host: str
    transport: str
    versions: dict[str, str]
    checksums: str | None
    metadata: Any
    object_graph: ObjectGraph
    python_state: dict[str, msgspec.Raw]
    file_nbytes: int


class Manifest(ManifestHeader, frozen=True):
    """The whole checkpoint without its data; stored in the file as JSON (`storage.manifest`).

    Attributes:
        variables: All tensors, in file order.
        timing: How long the save took until this was written: what comes later, such as the commit and, of a save that
            all ranks wait for, the fsync, it cannot know. None where nobody has noted it.
    """

    variables: list[Variable]
    timing: Timing | None = None
