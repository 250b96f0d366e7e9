"""Matching a stored object graph with a live one.

The rules are those of TensorFlow's object-based checkpoints (`restore` and `bind_object` in its checkpoint package):
matching walks edges from the root, by parent and local name, and never compares keys. Three are ours: parameter groups
match by their members, slots of a pair (optimizer, parameter) all or none, a value whose kind changed is a mismatch.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import torch

from distckpt.graph.adapters.optimizer import Group, Groups, claim_of_pair
from distckpt.graph.claims import Claim
from distckpt.graph.python_value import holds_nothing
from distckpt.graph.selection import Selection
from distckpt.graph.values import PythonValue, TensorValue, Value, is_meta, is_uninitialised
from distckpt.graph.view import LiveGraph, LiveNode
from distckpt.layout.keys import escape
from distckpt.layout.records import OWN_VALUE, Node


@dataclass(frozen=True, slots=True)
class Match:
    """A stored attribute and where it goes.

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
        return f"{self.optimizer.key}/.slots/{self.parameter.key}"

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


@dataclass(slots=True)
class Binding:
    """The result of matching.

    Attributes:
        matches: Stored values with their live counterparts.
        new_slots: Optimizer state to create or to drop.
        mismatches: Differences of kind, and of slot names.
        pending: Stored keys whose parent is bound, to the parent's key and what of it they wait for, in words.
        awaited: All names that something waits for; an object with several names may come by any of them.
        duplicates: (saved node key, first live key, other live key): one saved node, two live objects.
        combined: (first saved key, other saved key, live key): two saved values, one live one.
        warnings: What the user should know.
        matched: Ids of live nodes and names of their values that found a stored one.
    """

    matches: list[Match] = field(default_factory=list)
    new_slots: list[NewSlots] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    pending: dict[str, tuple[str, str]] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)
    combined: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    matched: set[tuple[int, str]] = field(default_factory=set)


def bind(selection: Selection, live: LiveGraph, hollow: Container[str] = ()) -> Binding:
    """Match a stored graph with a live one. Local; changes nothing.

    Args:
        selection: The stored graph, or the part of it that is to be restored.
        live: A fresh walk.
        hollow: Keys of stored containers without any value inside.
    """
    binder = _Binder(selection, live.nodes, hollow)
    binder.bind_nodes()
    binder.find_ready()
    binder.bind_groups()
    binder.bind_values()
    binder.bind_slots()
    return binder.result


#: Names of values that are the whole of their object.
_WHOLE = {OWN_VALUE: "a tensor", ".state": "the state of an object with state_dict() or serialize()"}


class _Binder:
    """One matching: nodes first, then what depends on all nodes being known."""

    def __init__(self, selection: Selection, live: list[LiveNode], hollow: Container[str]) -> None:
        self.saved = selection.graph.nodes
        self.partial = selection.partial
        self.with_slots = selection.slots
        self.live = live
        self.hollow = hollow
        self.ready: set[int] = set()  # uninitialised parameters that the file can initialise
        self.result = Binding()
        self.live_of: dict[int, int] = {}
        self.saved_of: dict[int, int] = {}
        self.key_of: dict[tuple[int, str], str] = {}
        self.groups: list[tuple[int, int]] = []
        self.queue: deque[tuple[int, int]] = deque()

    # ---- nodes (restore and bind_object in TensorFlow) ----

    def bind_nodes(self) -> None:
        """Breadth-first from the roots along edges of the same name."""
        if not self.saved or not self.live:
            return
        self.bind_pair(0, 0)
        while self.queue:
            saved_id, live_id = self.queue.popleft()
            if isinstance(self.live[live_id].obj, Groups):
                self.groups.append((saved_id, live_id))
                continue
            node = self.live[live_id]
            if self.saved[saved_id].children and OWN_VALUE in node.values:
                found = Mismatch(node.key, "an object with parts of its own", describe(node.values[OWN_VALUE]))
                self.result.mismatches.append(found)
                continue
            if hasattr(node.adapter, "elements") and saved_id not in self.partial:
                self.compare_lengths(self.saved[saved_id], node)
            for child in self.saved[saved_id].children:
                target = node.children.get(child.local_name)
                if target is None:
                    self.edge_without_target(child.node_id, live_id, child.local_name)
                else:
                    self.bind_pair(child.node_id, target)

    def compare_lengths(self, saved: Node, node: LiveNode) -> None:
        """Warn of a list, tuple or dict that has another number of elements than saved."""
        before, now = len(saved.children) + len(saved.attributes), len(node.children) + len(node.values)
        of_a_container = _WHOLE.keys().isdisjoint(attribute.name for attribute in saved.attributes)
        if before != now and of_a_container:
            kind = type(node.obj).__qualname__
            self.result.warnings.append(f"{node.key}: a {kind} of {now} element(s), saved with {before}")

    def bind_pair(self, saved_id: int, live_id: int) -> None:
        """Bind a stored node to a live one, unless it is bound to another."""
        bound = self.live_of.get(saved_id)
        if bound == live_id:
            return
        if bound is not None:
            keys = (self.live[bound].key, self.live[live_id].key)
            self.result.duplicates.append((self.any_key(saved_id), *keys))
            return
        self.live_of[saved_id] = live_id
        self.saved_of.setdefault(live_id, saved_id)
        self.queue.append((saved_id, live_id))

    def edge_without_target(self, saved_id: int, live_id: int, name: str) -> None:
        """The live parent has no child of that name: another kind of value has the name, or it may come later."""
        node = self.live[live_id]
        value = node.values.get(escape(name))
        if value is not None and not is_hollow(value):
            self.result.mismatches.append(
                Mismatch(node.attribute_key(value.name), "an object or tensor", describe(value))
            )
            return
        if not node.adapter.per_rank:  # what another rank saved for itself waits for nothing
            self.result.awaited.add(name)
            for key in self.keys_below(saved_id):
                self.result.pending.setdefault(key, (node.key, f"attribute {name!r}"))

    def find_ready(self) -> None:
        """Uninitialised parameters and buffers of lazy modules: initialised together or not at all, since the first
        forward of a module in between fails.
        """
        for live_id in self.saved_of:
            node = self.live[live_id]
            if isinstance(node.obj, torch.nn.Module):
                lazy = [n for n in node.children.values() if is_uninitialised(self.live[n].obj)]
                if all(map(self.has_saved_value, lazy)):
                    self.ready.update(lazy)

    def has_saved_value(self, live_id: int) -> bool:
        """Whether the file has a tensor for a live node."""
        saved_id = self.saved_of.get(live_id)
        return saved_id is not None and any(found.name == OWN_VALUE for found in self.saved[saved_id].attributes)

    def keys_below(self, node_id: int) -> list[str]:
        """Keys of a stored node's values and of its descendants', slots included."""
        keys, seen, stack = [], {node_id}, [node_id]
        while stack:
            node = self.saved[stack.pop()]
            keys += [attribute.checkpoint_key for attribute in node.attributes]
            below = {child.node_id for child in node.children}
            below.update(slot.slot_variable_node_id for slot in node.slot_variables)
            stack += below - seen
            seen |= below
        return keys

    def any_key(self, node_id: int) -> str:
        """A name for a stored node in messages."""
        return next(iter(self.keys_below(node_id)), f"node {node_id}")

    # ---- parameter groups ----

    def bind_groups(self) -> None:
        """Match groups by their set of parameters, in any order; failing that by index."""
        for saved_id, live_id in self.groups:
            saved_groups = [child.node_id for child in self.saved[saved_id].children]
            live_groups = list(self.live[live_id].children.values())
            self.match_groups(saved_groups, live_groups, self.live[live_id].key)

    def match_groups(self, saved_groups: list[int], live_groups: list[int], key: str) -> None:
        """Bind the groups of one optimizer."""
        free = list(live_groups)
        left = []
        for saved_id in saved_groups:
            # Of a pipeline's group every rank holds only some members, maybe none.
            members = {self.live_of.get(member) for member in self.saved[saved_id].parameters or ()} - {None}
            twin = next((n for n in free if members == set(self.live[n].parameters or ())), None)
            if twin is None:
                left.append(saved_id)
            else:
                free.remove(twin)
                self.bind_pair(saved_id, twin)
        if not left:
            return
        if len(saved_groups) != len(live_groups):
            self.result.warnings.append(
                f"{key}: {len(left)} saved parameter group(s) have no live group with the same parameters; "
                "the live groups keep their options"
            )
            return
        if any(self.saved[saved_id].parameters for saved_id in left):
            self.result.warnings.append(f"{key}: parameter groups have other members than saved; matched by index")
        for saved_id in left:
            index = saved_groups.index(saved_id)
            if live_groups[index] in free:
                self.bind_pair(saved_id, live_groups[index])

    # ---- values ----

    def bind_values(self) -> None:
        """Match the attributes of every bound node."""
        for saved_id, live_id in self.live_of.items():
            self.match_attributes(self.saved[saved_id], live_id)

    def match_attributes(self, saved: Node, live_id: int) -> None:
        """Match the attributes of one pair of nodes; of several saved values for a live one the first counts."""
        node = self.live[live_id]
        if is_foreign(saved, node):
            found = Mismatch(node.key, "an object of another kind", f"a {type(node.obj).__qualname__}")
            self.result.mismatches.append(found)
            return
        for attribute in saved.attributes:
            value = node.values.get(attribute.name)
            key = attribute.checkpoint_key
            first = self.key_of.get((live_id, attribute.name))
            if first is not None:
                self.result.combined.append((first, key, node.attribute_key(attribute.name)))
            elif value is None and live_id not in self.ready and not node.adapter.takes(attribute.name, node.values):
                self.value_without_target(key, attribute.name, node)
            else:
                self.key_of[live_id, attribute.name] = key
                self.result.matches.append(Match(key, attribute.name, node, value))
                self.result.matched.add((live_id, attribute.name))

    def value_without_target(self, key: str, name: str, node: LiveNode) -> None:
        """The live node has no value of that name: an object has the name, or it may come later."""
        if name == OWN_VALUE and is_meta(node.obj):
            self.result.awaited.add(node.key.rpartition("/")[2])  # or for another object of that name
            self.result.pending.setdefault(key, (node.key, "the memory (to_empty())"))
            return
        if name in _WHOLE and not is_uninitialised(node.obj):  # no attribute ever has such a name
            self.result.mismatches.append(Mismatch(key, _WHOLE[name], f"a {type(node.obj).__qualname__}"))
            return
        for local_name in node.children:
            if escape(local_name) == name:
                if key in self.hollow:  # the live container has got elements since
                    return
                live = self.live[node.children[local_name]]
                self.result.mismatches.append(Mismatch(key, "a python value", f"a {type(live.obj).__qualname__}"))
                return
        if not name.startswith(".rank/"):  # what another rank saved for itself waits for nothing
            self.result.awaited.add(name)
            self.result.pending.setdefault(key, (node.key, f"attribute {name!r}"))

    # ---- slots ----

    def bind_slots(self) -> None:
        """Match the slots of every bound optimizer, pair by pair."""
        for saved_id, live_id in list(self.live_of.items()):
            node = self.live[live_id]
            if isinstance(node.obj, torch.optim.Optimizer) and self.saved_of[live_id] == saved_id:
                self.match_optimizer(saved_id, node)

    def match_optimizer(self, saved_id: int, node: LiveNode) -> None:
        """Match all slots of one optimizer."""
        if not self.with_slots:
            self.leave_slots(node, node.slots)
            return
        saved = self.saved[saved_id]
        stored: dict[int, dict[str, int]] = {}
        for slot in saved.slot_variables:
            stored.setdefault(slot.original_variable_node_id, {})[slot.slot_name] = slot.slot_variable_node_id
        for parameter_id in self.parameters_of(node):
            variable_id = self.saved_of.get(parameter_id)
            if variable_id is None:
                continue
            slots = stored.pop(variable_id, {})
            if OWN_VALUE not in self.live[parameter_id].values and parameter_id not in self.ready:
                self.slots_without_target(node, variable_id, slots)
            elif slots or saved_id not in self.partial:
                self.match_pair(node, parameter_id, slots)
            else:  # the file may have slots of the pair, outside of what is restored
                self.leave_slots(node, (parameter_id,))
        for variable_id, slots in stored.items():  # no such parameter in this optimizer yet
            self.slots_without_target(node, variable_id, slots)

    def leave_slots(self, node: LiveNode, parameter_ids: Iterable[int]) -> None:
        """Say that live slots are not expected to be in the file."""
        for parameter_id in parameter_ids:
            for slot_id in node.slots.get(parameter_id, {}).values():
                self.result.matched.update((slot_id, name) for name in self.live[slot_id].values)

    def slots_without_target(self, node: LiveNode, variable_id: int, slots: dict[str, int]) -> None:
        """The optimizer has no such parameter, or one that has no values yet; both may come later."""
        for slot_id in slots.values():
            for attribute in self.saved[slot_id].attributes:
                waits_for = f"parameter {self.any_key(variable_id)}"
                self.result.pending.setdefault(attribute.checkpoint_key, (node.key, waits_for))

    def parameters_of(self, node: LiveNode) -> list[int]:
        """Live node ids of an optimizer's parameters."""
        groups = self.live[node.children["param_groups"]].children.values()
        return [parameter for group in groups for parameter in self.live[group].parameters or ()]

    def match_pair(self, node: LiveNode, parameter_id: int, stored: dict[str, int]) -> None:
        """All slots of a pair or none."""
        live = node.slots.get(parameter_id, {})
        if live and live.keys() == stored.keys():
            for name, slot_id in live.items():
                self.match_attributes(self.saved[stored[name]], slot_id)
            return
        if live and stored:
            key = f"{node.key}/.slots/{self.live[parameter_id].key}"
            self.result.mismatches.append(Mismatch(key, f"slots {sorted(stored)}", f"slots {sorted(live)}"))
            return
        self.leave_slots(node, (parameter_id,))  # the file says: no state; so the live one is not "missing" from it
        slots = {
            name: {attribute.name: attribute.checkpoint_key for attribute in self.saved[slot_id].attributes}
            for name, slot_id in stored.items()
        }
        self.result.new_slots.append(NewSlots(node, self.live[parameter_id], slots))


def is_foreign(saved: Node, node: LiveNode) -> bool:
    """Whether a stored node has something, but not what the live object's adapter cannot do without."""
    needed = node.adapter.needs
    if needed is None or not (saved.attributes or saved.children):
        return False
    return all(attribute.name != needed for attribute in saved.attributes)


_PER_RANK = re.compile(r"(?:^|/)\.rank/(\d+)(?:/|$)")


def is_of_other_rank(key: str, size: int) -> bool:
    """Whether a key is that of a per-rank value of a rank that a job of `size` ranks does not have."""
    found = _PER_RANK.search(key)
    return found is not None and int(found[1]) >= size


def missing_values(live: LiveGraph, binding: Binding) -> list[str]:
    """Keys of live values without a stored one. Parameter-group entries keep their value and do not count."""
    missing = []
    for node_id, node in enumerate(live.nodes):
        if isinstance(node.obj, Group) or not node.values:
            continue
        values = node.values.items()
        names = [name for name, value in values if (node_id, name) not in binding.matched and not is_hollow(value)]
        if names and not (node.adapter.takes_all and len(names) < len(node.values)):
            missing += [node.attribute_key(name) for name in names]
    return missing


def parameter_of(node: LiveNode) -> torch.Tensor:
    """What an optimizer knows of a variable: the tensor inside a `ShardedVariable`."""
    parameter = getattr(node.obj, "tensor", node.obj)
    assert isinstance(parameter, torch.Tensor)
    return parameter


def is_hollow(value: Value) -> bool:
    """Whether a live value is a container without any value inside; such count as nothing."""
    return isinstance(value, PythonValue) and holds_nothing(value.value)


def describe(value: Value | None) -> str:
    """A live value in words, for messages."""
    match value:
        case PythonValue(value=held):
            return f"the python value {held!r:.60}"
        case TensorValue():
            return f"a tensor of shape {value.global_shape} and dtype {str(value.tensor.dtype).removeprefix('torch.')}"
        case _:
            return "nothing"
