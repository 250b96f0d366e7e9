"""Tied values: two paths lead to one object on every rank that has both, or on none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.layout.keys import child_key, slot_key
from distckpt.layout.records import LocalNode
from distckpt.layout.unify import RankGroup
from distckpt.words import rank_list


@dataclass(frozen=True, slots=True)
class _Torn:
    """Two objects of one group of ranks that are one node of the merged graph, by their local ids."""

    group: int
    first: int
    second: int


def check_ties(groups: Sequence[RankGroup], problems: list[str]) -> None:
    """A node of the merged graph is at most one object on each rank.

    Args:
        groups: The graphs of all ranks, unified.
        problems: Receives ties that ranks disagree on.
    """
    torn = [found for index in range(len(groups)) for found in _torn(groups, index)]
    if torn:
        paths = [_Paths(group.nodes) for group in groups]
        problems += dict.fromkeys(_describe(groups, paths, found) for found in torn)


def _torn(groups: Sequence[RankGroup], index: int) -> list[_Torn]:
    node_ids = groups[index].node_ids
    if len(set(node_ids)) == len(node_ids):
        return []
    first: dict[int, int] = {}
    pairs = [(first.setdefault(node_id, local), local) for local, node_id in enumerate(node_ids) if node_id >= 0]
    return [_Torn(index, a, b) for a, b in pairs if a != b]


class _Paths:
    """Every edge and slot of one graph as a key, and where it leads."""

    def __init__(self, nodes: Sequence[LocalNode]) -> None:
        self.target = {"": 0}
        self._first = {0: ""}
        self._follow(nodes, 0)
        for optimizer, node in enumerate(nodes):
            for variable, name, slot in node.slots:
                if optimizer in self._first and variable in self._first:
                    self._add(slot_key(self._first[optimizer], self._first[variable], name), slot)
                    self._follow(nodes, slot)

    def _add(self, key: str, local: int) -> bool:
        """Add a path; returns whether it is the first to the node."""
        self.target[key] = local
        return self._first.setdefault(local, key) == key

    def _follow(self, nodes: Sequence[LocalNode], start: int) -> None:
        queue = [start]
        for local in queue:
            for child, name in nodes[local].children:
                if self._add(child_key(self._first[local], name, nodes[local].per_rank), child):
                    queue.append(child)

    def to(self, local: int) -> list[str]:
        """The keys that lead to a local node."""
        return [path for path, target in self.target.items() if target == local]


def _describe(groups: Sequence[RankGroup], paths: Sequence[_Paths], torn: _Torn) -> str:
    here = paths[torn.group]
    for p in here.to(torn.first):
        for q in here.to(torn.second):
            ends = [(group.ranks, of.target.get(p), of.target.get(q)) for group, of in zip(groups, paths, strict=True)]
            tied = [rank for ranks, x, y in ends if x is not None and x == y for rank in ranks]
            apart = [rank for ranks, x, y in ends if x is not None and y is not None and x != y for rank in ranks]
            if tied:
                return _sentence(p, q, f"one object on {rank_list(tied)}, but two objects on {rank_list(apart)}")
    # No rank ties these two directly: a third path is tied to the one on some ranks and to the other on others.
    p, q = here.to(torn.first)[0], here.to(torn.second)[0]
    return _sentence(p, q, f"two objects on {rank_list(groups[torn.group].ranks)}, but tied to the same on others")


def _sentence(first: str, second: str, what: str) -> str:
    return f"{first} and {second}: {what}. Tie them on every rank that holds both, or on none."
