"""Merge the object graphs of all ranks into one.

Nodes are identified by their path from the root: nodes of two ranks are the same node if one path leads to both. Ranks
may hold different parts of the graph (pipeline and expert parallelism). Ranks whose encoded graphs are equal are
handled once, as a `RankGroup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from distckpt.layout.keys import child_key, slot_key
from distckpt.layout.records import Child, LocalLayout, LocalNode, SlotVariable
from distckpt.words import rank_list


@dataclass(slots=True)
class RankGroup:
    """Ranks whose object graphs are the same.

    Attributes:
        ranks: The ranks, ascending.
        nodes: The graph, with local ids.
        node_ids: For each local node: its node in the merged graph, -1 if no path leads to it. Set by `unify`.
    """

    ranks: list[int]
    nodes: list[LocalNode]
    node_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class UnifiedGraph:
    """The merged graph without its values; node 0 is the root.

    Attributes:
        keys: For each node: the path by which it was found first; "" for the root.
        children: For each node: its edges, in the order of the ranks and then in each rank's order.
        slots: For each optimizer's node: its slot variables.
        parameters: For each parameter group's node: its members on all ranks.
        per_rank: Nodes of `PerRank` objects.
    """

    keys: list[str] = field(default_factory=list)
    children: list[list[Child]] = field(default_factory=list)
    slots: dict[int, list[SlotVariable]] = field(default_factory=dict)
    parameters: dict[int, list[int]] = field(default_factory=dict)
    per_rank: set[int] = field(default_factory=set)

    def add(self, key: str) -> int:
        """Append a node; returns its id."""
        self.keys.append(key)
        self.children.append([])
        return len(self.keys) - 1


def group_ranks(layouts: Sequence[LocalLayout]) -> list[RankGroup]:
    """Group ranks with equal graphs, in order of their lowest rank; each different graph is decoded once."""
    ranks_of: dict[bytes, list[int]] = {}
    for rank, layout in enumerate(layouts):
        ranks_of.setdefault(layout.graph, []).append(rank)
    decode = msgspec.msgpack.Decoder(list[LocalNode]).decode
    return [RankGroup(ranks, decode(graph)) for graph, ranks in ranks_of.items()]


def unify(groups: Sequence[RankGroup], problems: list[str]) -> UnifiedGraph:
    """Merge the groups' graphs: nodes breadth-first, slots after all others; fills `RankGroup.node_ids`.

    Args:
        groups: The graphs.
        problems: Receives messages on nodes that are a `PerRank` on some ranks only, or that no path leads to, and on
            parameters that ranks have in different groups.
    """
    classes = _Classes()
    members = [classes.add_edges(group.nodes) for group in groups]
    for group, of_local in zip(groups, members, strict=True):
        classes.add_slots(group.nodes, of_local)
    graph = UnifiedGraph()
    ids = classes.number(graph)
    for group, of_local in zip(groups, members, strict=True):
        group.node_ids = [ids[c] if c >= 0 else -1 for c in of_local]
    _add_parameters(groups, graph)
    _check_parameters(groups, graph, problems)
    _check_unreachable(groups, problems)
    _check_per_rank(groups, graph, problems)
    return graph


class _Classes:
    """Classes of local nodes that are the same node, closed under "equal parents and equal edge names".

    If two paths lead to one object on some rank, the classes of both paths are joined, and so are the targets of their
    edges of the same name (congruence closure with union-find). `unify` calls `add_edges` for each graph, then
    `add_slots` for each, then `number` once.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._edges: list[dict[str, int]] = []
        self._slots: dict[int, dict[tuple[int, str], int]] = {}
        self._per_rank: set[int] = set()
        self._new()

    def _new(self) -> int:
        self._parent.append(len(self._parent))
        self._edges.append({})
        return len(self._parent) - 1

    def _find(self, member: int) -> int:
        parent = self._parent
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    def _join(self, a: int, b: int) -> None:
        pending = [(a, b)]
        while pending:
            a, b = sorted(map(self._find, pending.pop()))
            if a == b:
                continue
            self._parent[b] = a
            if b in self._per_rank:
                self._per_rank.add(a)
            for name, target in self._edges[b].items():
                pending.append((self._edges[a].setdefault(name, target), target))
            for slot, target in self._slots.pop(b, {}).items():
                pending.append((self._slots.setdefault(a, {}).setdefault(slot, target), target))

    def add_edges(self, nodes: Sequence[LocalNode]) -> list[int]:
        """Add the edges of a graph; returns the class of each local node, -1 if no path leads to it."""
        of_local = [-1] * len(nodes)
        of_local[0] = 0
        self._follow(nodes, of_local, 0)
        return of_local

    def _follow(self, nodes: Sequence[LocalNode], of_local: list[int], start: int) -> None:
        """Give classes to all nodes reachable from a local node that has one, breadth-first."""
        queue = [start]
        for local in queue:
            node = nodes[local]
            source = self._find(of_local[local])
            if node.per_rank:
                self._per_rank.add(source)
            edges = self._edges[source]
            for child, name in node.children:
                known = of_local[child]
                target = edges.get(name)
                if known < 0:
                    queue.append(child)
                    of_local[child] = known = self._new() if target is None else target
                if target is None:
                    edges[name] = known
                elif target != known:
                    self._join(target, known)
                    edges = self._edges[self._find(source)]

    def add_slots(self, nodes: Sequence[LocalNode], of_local: list[int]) -> None:
        """Add the slots of a graph, after the edges of all graphs."""
        for local, node in enumerate(nodes):
            if not node.slots or of_local[local] < 0:
                continue
            for variable, name, slot in node.slots:
                if of_local[variable] < 0:
                    continue
                slots = self._slots.setdefault(self._find(of_local[local]), {})
                slot_of = (self._find(of_local[variable]), name)
                known = of_local[slot]
                target = slots.get(slot_of)
                if known < 0:
                    of_local[slot] = known = self._new() if target is None else target
                    self._follow(nodes, of_local, slot)
                if target is None:
                    slots[slot_of] = known
                elif target != known:
                    self._join(target, known)

    def number(self, graph: UnifiedGraph) -> list[int]:
        """Append the merged nodes to `graph`, breadth-first, then slots by optimizer; returns each class's node."""
        ids = [-1] * len(self._parent)
        order = self._number_from(0, "", graph, ids)
        for source in [found for found in order if found in self._slots]:
            slots = graph.slots[ids[source]] = []
            for (variable, name), slot in self._slots[source].items():
                variable_id = ids[self._find(variable)]
                slot_class = self._find(slot)
                if ids[slot_class] < 0:
                    key = slot_key(graph.keys[ids[source]], graph.keys[variable_id], name)
                    self._number_from(slot_class, key, graph, ids)
                slots.append(SlotVariable(variable_id, name, ids[slot_class]))
        graph.per_rank.update(ids[self._find(member)] for member in self._per_rank)
        return [ids[self._find(member)] for member in range(len(ids))]

    def _number_from(self, start: int, key: str, graph: UnifiedGraph, ids: list[int]) -> list[int]:
        """Number the classes reachable from `start` that are not numbered yet; returns them in order."""
        parent, queue = self._parent, [start]
        ids[start] = graph.add(key)
        for source in queue:
            children, per_rank = graph.children[ids[source]], source in self._per_rank
            key = graph.keys[ids[source]]
            for name, target in self._edges[source].items():
                found = target if parent[target] == target else self._find(target)
                if ids[found] < 0:
                    ids[found] = graph.add(child_key(key, name, per_rank))
                    queue.append(found)
                children.append(Child(ids[found], name))
        return queue


def _add_parameters(groups: Sequence[RankGroup], graph: UnifiedGraph) -> None:
    """Join the members of each parameter group over all ranks: pipeline stages hold different ones."""
    for group in groups:
        for node_id, local in zip(group.node_ids, group.nodes, strict=True):
            if local.parameters is not None and node_id >= 0:
                known = graph.parameters.get(node_id, ())
                members = (*known, *(group.node_ids[member] for member in local.parameters))
                graph.parameters[node_id] = list(dict.fromkeys(members))


def _check_parameters(groups: Sequence[RankGroup], graph: UnifiedGraph, problems: list[str]) -> None:
    """A parameter is in the same group of its optimizer on all ranks: its options are stored with the group."""
    for key, children in zip(graph.keys, graph.children, strict=True):
        group_of: dict[int, Child] = {}
        for child in children:
            for member in graph.parameters.get(child.node_id, ()):
                first = group_of.setdefault(member, child)
                if first is not child:
                    problems += _torn_parameter(key, groups, graph.keys[member], member, (first, child))
                    break  # of each group one parameter tells enough


def _torn_parameter(
    key: str, groups: Sequence[RankGroup], name: str, member: int, places: tuple[Child, Child]
) -> list[str]:
    """What is wrong with a parameter in two groups, unless a rank has it in both."""
    one, other = ([rank for group in groups if _has(group, place, member) for rank in group.ranks] for place in places)
    if not {*one}.isdisjoint(other):
        return []
    first, second = (place.local_name for place in places)
    where = f"in group {first} on {rank_list(one)} and in group {second} on {rank_list(other)}"
    return [f"{key}: {name} is {where}. Give every rank the same groups in the same order, empty ones too."]


def _has(group: RankGroup, place: Child, member: int) -> bool:
    """Whether ranks have a parameter in a parameter group."""
    found = (local for node_id, local in zip(group.node_ids, group.nodes, strict=True) if node_id == place.node_id)
    return any(group.node_ids[parameter] == member for local in found for parameter in local.parameters or ())


def _check_unreachable(groups: Sequence[RankGroup], problems: list[str]) -> None:
    for group in groups:
        lost = group.node_ids.count(-1)
        if lost:
            problems.append(
                f"{lost} captured objects have no path from the root on {rank_list(group.ranks)}. "
                "This is a bug in distckpt, please report it."
            )


def _check_per_rank(groups: Sequence[RankGroup], graph: UnifiedGraph, problems: list[str]) -> None:
    if not graph.per_rank:
        return
    plain: dict[str, list[int]] = {}
    for group in groups:
        for node_id, local in zip(group.node_ids, group.nodes, strict=True):
            if node_id in graph.per_rank and not local.per_rank:
                plain.setdefault(graph.keys[node_id], []).extend(group.ranks)
    problems += [
        f"{key}: PerRank on some ranks, but not on {rank_list(ranks)}. Wrap the object in PerRank on every rank."
        for key, ranks in plain.items()
    ]
