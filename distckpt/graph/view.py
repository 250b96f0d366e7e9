"""The live object graph: a breadth-first walk over objects by identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from distckpt.graph.adapters.base import Adapter, Omission, Problem
from distckpt.graph.adapters.optimizer import Group, Slot, SlotAdapter, like_parameter, parameters_of, stepped_by
from distckpt.graph.adapters.registry import adapter_for
from distckpt.graph.python_value import too_deep
from distckpt.graph.trackable import ShardedVariable
from distckpt.graph.values import Edge, PythonValue, TensorValue, UnsaveableError, Value
from distckpt.layout.keys import child_key, join, slot_key
from distckpt.layout.records import OWN_VALUE

_slot_adapter = SlotAdapter()

#: The children and the slots of nodes that have none, which are most: a dict of its own for each takes longer to make.
_NONE: Mapping[Any, Any] = MappingProxyType({})


class LiveNode(msgspec.Struct):
    """A node of the live graph. A struct, since every walk makes one for each object.

    Attributes:
        obj: The object.
        adapter: Knows how to save and restore the object.
        parent: The node before it on the shortest path from the root; for a slot the optimizer; None for the root.
        name: The local name of the edge from the parent; for a slot the slot name.
        variable: For a slot: the node of its variable; else None.
        children: For each local name: node id of the child, in edge order.
        values: Its own values, by name.
        slots: Of an optimizer: for each variable's node id, the node ids of its slots by slot name.
        parameters: Of a parameter group: node ids of its members.
        buffer: Whether it was reached as a module buffer.
        problem: The reason why it cannot be stored; "" if it can.
        known_key: `key`, once it has been computed.
    """

    obj: object
    adapter: Adapter
    parent: LiveNode | None
    name: str
    variable: LiveNode | None = None
    buffer: bool = False
    children: Mapping[str, int] = _NONE
    values: dict[str, Value] = {}  # each struct gets a copy
    slots: Mapping[int, Mapping[str, int]] = _NONE
    parameters: list[int] | None = None
    problem: str = ""
    known_key: str | None = None

    @property
    def key(self) -> str:
        """Its key, by the shortest path from the root. Computed at the first use, as few are needed."""
        if self.known_key is None:
            for node in reversed(list(self._below_known_key())):  # no recursion: a graph may be deeper than the stack
                node.known_key = node._key_from_parent()
        assert self.known_key is not None
        return self.known_key

    def _below_known_key(self) -> Iterator[LiveNode]:
        """The nodes without a known key, from this one towards the root."""
        node: LiveNode | None = self
        while node is not None and node.known_key is None:
            yield node
            node = node.parent

    def _key_from_parent(self) -> str:
        """Its key, computed from that of its parent."""
        if self.parent is None:
            return ""
        if self.variable is not None:
            return slot_key(self.parent.key, self.variable.key, self.name)
        return child_key(self.parent.key, self.name, per_rank=self.parent.adapter.per_rank)

    def add_child(self, name: str, child: int) -> None:
        """Add an edge, by node id."""
        if not isinstance(self.children, dict):  # the first one
            self.children = {}
        self.children[name] = child

    def attribute_key(self, name: str) -> str:
        """Key of one of its values."""
        return self.key if name == OWN_VALUE and len(self.values) == 1 else join(self.key, name)


@dataclass(slots=True)
class LiveGraph:
    """All objects reachable from a root, each once. Made by `walk`.

    Attributes:
        nodes: The nodes, breadth-first; node 0 is the root, slots come last.
        ids: Node id for the `id()` of each object, without slots; valid while `nodes` keeps the objects alive.
        problems: Reasons why objects cannot be stored, one sentence each, beginning with the key.
        omissions: Objects that are left out, of which the user is warned, in the same form.
        dropped: Waiting values of restores that a save replaces, of which the user is warned, in the same form.
        unowned: Number of optimizer parameters with state that no tracked object leads to; their slots are not saved.
    """

    nodes: list[LiveNode] = field(default_factory=list)
    ids: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    omissions: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unowned: int = 0

    @property
    def n_values(self) -> int:
        """Number of values."""
        return sum([len(node.values) for node in self.nodes])

    def warnings(self) -> list[str]:
        """What a save leaves out, of which the user is warned."""
        if not self.unowned:
            return self.omissions
        unowned = (
            f"{self.unowned} optimizer parameter(s) have state but belong to no tracked object: their state is not "
            "saved. Track the module that owns them."
        )
        return [*self.omissions, unowned]

    def values(self) -> Iterator[tuple[LiveNode, Value]]:
        """All values "in order" (see `layout.records.LocalLayout`)."""
        for node in self.nodes:
            for value in node.values.values():
                yield node, value

    def add(self, node: LiveNode) -> int:
        """Append a node, and register it under its object; returns its id."""
        node_id = self.ids[id(node.obj)] = len(self.nodes)
        self.nodes.append(node)
        if isinstance(node.obj, ShardedVariable):  # an optimizer refers to the tensor inside
            self.ids.setdefault(id(node.obj.tensor), node_id)
        return node_id


def walk(root: object, adapter: Adapter, rank: int) -> LiveGraph:
    """Walk everything reachable from a root. Local; changes nothing.

    Args:
        root: The root object, unwrapped.
        adapter: The adapter of the root.
        rank: This process's rank, which is part of the names of per-rank values.
    """
    graph = LiveGraph()
    graph.add(LiveNode(root, adapter, None, ""))
    with torch.no_grad():
        for node in graph.nodes:  # the list grows during the loop
            _expand(graph, node, rank)
        _add_optimizers(graph, rank)
    return graph


def _expand(graph: LiveGraph, node: LiveNode, rank: int) -> None:
    try:
        for part in node.adapter.parts(node.obj, rank):
            if type(part) is Edge:
                _add_edge(graph, node, part)
            elif type(part) is TensorValue:
                node.values[part.name] = msgspec.structs.replace(part, buffer=True) if node.buffer else part
            elif type(part) is PythonValue:
                node.values[part.name] = part
            elif type(part) is Problem:
                key = join(node.key, part.name) if part.name else node.key or "the root"
                graph.problems.append(f"{key}: {part.text}")
            elif type(part) is Omission:
                graph.omissions.append(f"{join(node.key, part.name)}: {part.text}")
    except UnsaveableError as error:
        node.problem = str(error)
        graph.problems.append(f"{node.key or 'the root'}: {error}")
    except RecursionError as error:
        error.add_note(f"while {node.key or 'the root'} was asked for its state: {too_deep()}")
        raise
    except Exception as error:  # of the user's own methods
        error.add_note(f"while {node.key or 'the root'} was asked for its state")
        raise


def _add_edge(graph: LiveGraph, parent: LiveNode, edge: Edge) -> None:
    target = edge.target
    child_id = graph.ids.get(id(target))
    if child_id is None:
        adapter = adapter_for(target)
        if adapter is None:
            key = child_key(parent.key, edge.name, per_rank=parent.adapter.per_rank)
            graph.problems.append(f"{key}: a {type(target).__qualname__} cannot be checkpointed")
            return
        child_id = graph.add(LiveNode(target, adapter, parent, edge.name, None, edge.buffer))
    parent.add_child(edge.name, child_id)


def _add_optimizers(graph: LiveGraph, rank: int) -> None:
    """Add groups and slots once all nodes are known, since they refer to parameters by node."""
    for node in list(graph.nodes):
        if type(node.obj) is Group:
            members = (graph.ids.get(id(parameter)) for parameter in node.obj.parameters)
            node.parameters = [member for member in members if member is not None]
        elif node.children and isinstance(node.obj, torch.optim.Optimizer):  # most nodes are leaves
            _add_slots(graph, node, node.obj, rank)


def _add_slots(graph: LiveGraph, node: LiveNode, optimizer: torch.optim.Optimizer, rank: int) -> None:
    state: Mapping[torch.Tensor, Mapping[object, object]] = stepped_by(optimizer).state
    node.slots = slots_of = {}
    for parameter in parameters_of(optimizer):
        slots = state.get(parameter)
        if not slots:
            continue
        variable_id = graph.ids.get(id(parameter))
        if variable_id is None:
            graph.unowned += 1
            continue
        variable = graph.nodes[variable_id]
        ids: dict[str, int] = {}
        slots_of[variable_id] = ids
        for name, value in slots.items():
            if not isinstance(name, str):
                graph.problems.append(f"{node.key}: {variable.key} has a slot named {name!r}. Name slots by a str.")
                continue
            slot = LiveNode(Slot(optimizer, parameter, name, value), _slot_adapter, node, name, variable)
            ids[name] = len(graph.nodes)
            graph.nodes.append(slot)
            _expand(graph, slot, rank)
            own, like = slot.values.get(OWN_VALUE), variable.values.get(OWN_VALUE)
            if type(own) is TensorValue and type(like) is TensorValue:
                slot.values[OWN_VALUE] = like_parameter(own, like)
