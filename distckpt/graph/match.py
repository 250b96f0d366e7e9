"""What matching a stored object graph with a live one results in."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import torch

from distckpt.graph.adapters.optimizer import claim_of_pair
from distckpt.graph.claims import Claim
from distckpt.graph.group_order import GroupOrder
from distckpt.graph.python_value import holds_nothing
from distckpt.graph.values import PythonValue, TensorValue, Value, dtype_name
from distckpt.graph.view import LiveNode
from distckpt.layout.keys import slots_key
from distckpt.layout.records import OWN_VALUE, STATE

#: What the values of `WHOLE` are, for messages.
WHOLE_IN_WORDS = {OWN_VALUE: "a tensor", STATE: "the state of an object with state_dict() or serialize()"}


class Match(msgspec.Struct, frozen=True):
    """A stored attribute and where it goes. A struct, since there is one for each value.

    Attributes:
        key: Checkpoint key of the stored value.
        name: The attribute's name.
        node: The live node.
        value: The live value of that name; None where the node's adapter takes stored values it has no live one for.
    """

    key: str
    name: str
    node: LiveNode
    value: Value | None

    @property
    def claim(self) -> Claim:
        """See `Adapter.claim`."""
        return self.node.adapter.claim(self.node.obj, self.name)


@dataclass(frozen=True, slots=True)
class NewSlots:
    """A parameter whose optimizer state is to become exactly the stored one.

    Attributes:
        optimizer: The optimizer's live node.
        parameter: The parameter's live node.
        slots: Slot name to the stored attributes (name to key) of its node; empty to drop the live state.
    """

    optimizer: LiveNode
    parameter: LiveNode
    slots: dict[str, dict[str, str]]

    @property
    def pair(self) -> str:
        """Key below which the slots of the pair (optimizer, parameter) are."""
        return slots_key(self.optimizer.key, self.parameter.key)

    @property
    def keys(self) -> list[str]:
        """Keys of the stored values."""
        return [key for attributes in self.slots.values() for key in attributes.values()]

    @property
    def claim(self) -> Claim:
        """See `Adapter.claim`."""
        return claim_of_pair(self.optimizer.obj, parameter_of(self.parameter))


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A stored value that does not fit the live one.

    Attributes:
        key: Checkpoint key.
        saved: What the file has.
        live: What the program has.
    """

    key: str
    saved: str
    live: str


@dataclass(frozen=True, slots=True)
class Surplus:
    """Elements of a live container of python values that the stored one does not have.

    Attributes:
        node: The container's live node.
        names: Attribute names of the elements.
        n_saved: Number of elements of the stored one, which is not empty.
    """

    node: LiveNode
    names: list[str]
    n_saved: int


@dataclass(slots=True)
class Binding:
    """The result of matching.

    Attributes:
        matches: Stored values with their live counterparts.
        new_slots: Optimizer state to create or to drop.
        mismatches: Differences of kind, and of slot names.
        pending: Stored keys whose parent is bound, to the parent's key and what of it they wait for, in words.
        awaited: All names that something waits for; an object with several names may get any of them.
        duplicates: (saved node key, first live key, other live key): one saved node, two live objects.
        combined: (first saved key, other saved key, live key): two saved values, one live one.
        warnings: What the user should know.
        matched: Node id and name of each live value that found a stored one, to the key of the first that it found.
        excused: Node id and name of each live value that the file need not have: of slots, and surplus elements.
        surplus: Elements that go when all stored ones of their container are restored.
        group_orders: By `id()` of the optimizer.
    """

    matches: list[Match] = field(default_factory=list)
    new_slots: list[NewSlots] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    pending: dict[str, tuple[str, str]] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)
    combined: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    matched: dict[tuple[int, str], str] = field(default_factory=dict)
    excused: set[tuple[int, str]] = field(default_factory=set)
    surplus: list[Surplus] = field(default_factory=list)
    group_orders: dict[int, GroupOrder] = field(default_factory=dict)


def parameter_of(node: LiveNode) -> torch.Tensor:
    """What an optimizer knows of a variable: the tensor inside a `ShardedVariable`."""
    parameter = getattr(node.obj, "tensor", node.obj)
    assert isinstance(parameter, torch.Tensor)
    return parameter


def is_hollow(value: Value) -> bool:
    """Whether a live value is a container without any value inside, which counts as no value."""
    return isinstance(value, PythonValue) and holds_nothing(value.value)


def refused(node: LiveNode) -> str:
    """A live object that cannot take a stored value, and why, for messages."""
    kind = f"a {type(node.obj).__qualname__}"
    return f"{kind}: {node.problem}" if node.problem else kind


def describe(value: Value | None) -> str:
    """A live value in words, for messages."""
    match value:
        case PythonValue(value=held):
            return f"the python value {held!r:.60}"
        case TensorValue():
            return f"a tensor of shape {value.global_shape} and dtype {dtype_name(value.tensor.dtype)}"
        case _:
            return "nothing"
