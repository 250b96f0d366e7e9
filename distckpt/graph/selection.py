"""`RestoreOptions(only=..., skip_slots=...)`: the part of a stored graph that is to be restored."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from distckpt.graph.rename import names_nothing
from distckpt.layout.aliases import find_nodes
from distckpt.layout.records import Node, ObjectGraph


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a stored graph that is to be restored.

    Attributes:
        graph: The stored graph without all other parts; node ids stay the same.
        keys: Checkpoint keys of the selected values.
        partial: Ids of nodes that are selected in part, so that the parts they lack mean nothing.
        slots: Whether optimizer state is selected.
        scopes: Key prefixes of the live values that are to be restored; None for all.
    """

    graph: ObjectGraph
    keys: frozenset[str]
    partial: frozenset[int]
    slots: bool
    scopes: tuple[str, ...] | None

    def covers(self, live_key: str) -> bool:
        """Whether the live value with a key belongs to the restore."""
        return self.scopes is None or any(_is_below(live_key, scope) for scope in self.scopes)


def select(
    graph: ObjectGraph,
    renamed: ObjectGraph,
    *,
    only: Iterable[str] | None,
    skip_slots: bool,
    rename: Mapping[str, str],
) -> Selection:
    """Select the part of a stored graph that is to be restored.

    Args:
        graph: The stored graph.
        renamed: The stored graph after `rename`.
        only: Key prefixes of the parts to select, in whole components; None for everything.
        skip_slots: Leave optimizer state out.
        rename: For each saved key prefix: the live one.

    Raises:
        ValueError: A prefix names nothing in the file, or only some of the slots of a parameter.
    """
    if only is None and not skip_slots:
        keys = frozenset([attribute.checkpoint_key for node in graph.nodes for attribute in node.attributes])
        return Selection(renamed, keys, frozenset(), slots=True, scopes=None)
    prefixes = None if only is None else tuple(prefix.strip("/") for prefix in only)
    whole = frozenset(range(len(graph.nodes))) if prefixes is None else _whole_nodes(graph, prefixes)
    keys = frozenset(_selected_keys(graph, whole, prefixes or ()))
    _require_whole_pairs(graph, keys)
    if skip_slots:
        keys -= {
            attribute.checkpoint_key for slot in _slot_ids(graph.nodes) for attribute in graph.nodes[slot].attributes
        }
    return Selection(
        graph=_pruned(renamed, keys, whole),
        keys=keys,
        partial=frozenset() if prefixes is None else frozenset(range(len(renamed.nodes))) - whole,
        slots=not skip_slots,
        scopes=None if prefixes is None else tuple(_live_scopes(prefixes, rename)),
    )


def _is_below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def _slot_ids(nodes: Iterable[Node]) -> Iterator[int]:
    return (slot.slot_variable_node_id for node in nodes for slot in node.slot_variables)


def _whole_nodes(graph: ObjectGraph, prefixes: Sequence[str]) -> frozenset[int]:
    """Nodes to which a path with one of the prefixes leads, including the slots of optimizers among them."""
    whole: set[int] = set()
    for prefix in prefixes:
        path = find_nodes(graph, prefix)
        if path:
            whole |= _below(graph, path[-1], ancestors=set(path[:-1]))
        elif not any(_is_below(a.checkpoint_key, prefix) for node in graph.nodes for a in node.attributes):
            raise names_nothing("only", prefix, graph.nodes)
    return frozenset(whole)


def _below(graph: ObjectGraph, node_id: int, ancestors: set[int]) -> set[int]:
    """A node and all nodes that it leads to, except its ancestors, as a child may refer to its parent."""
    seen, stack = {node_id}, [node_id]
    while stack:
        node = graph.nodes[stack.pop()]
        found = {child.node_id for child in node.children} | set(_slot_ids((node,)))
        stack += found - seen - ancestors
        seen |= found - ancestors
    return seen


def _selected_keys(graph: ObjectGraph, whole: frozenset[int], prefixes: Sequence[str]) -> Iterator[str]:
    """Keys of the values of whole nodes, and keys below one of the prefixes."""
    for node_id, node in enumerate(graph.nodes):
        for attribute in node.attributes:
            key = attribute.checkpoint_key
            if node_id in whole or any(_is_below(key, prefix) for prefix in prefixes):
                yield key


def _require_whole_pairs(graph: ObjectGraph, keys: frozenset[str]) -> None:
    """Check that all slots of a parameter are selected, or none: with only some an optimizer could not step."""
    pairs: dict[tuple[int, int], list[str]] = {}
    for node_id, node in enumerate(graph.nodes):
        for slot in node.slot_variables:
            attributes = graph.nodes[slot.slot_variable_node_id].attributes
            pair = pairs.setdefault((node_id, slot.original_variable_node_id), [])
            pair += [attribute.checkpoint_key for attribute in attributes]
    for pair in pairs.values():
        named = sorted(keys.intersection(pair))
        if 0 < len(named) < len(pair):
            raise ValueError(
                f"only: expected all of an optimizer's state of a parameter, or none. Got {named[0]!r}. Pass "
                f"{posixpath.commonpath(pair)!r}."
            )


def _pruned(graph: ObjectGraph, keys: frozenset[str], whole: frozenset[int]) -> ObjectGraph:
    """The graph with only the values of `keys`, and the edges that lead to them or to nodes that they refer to."""
    needed = set(whole)
    for node_id, node in enumerate(graph.nodes):
        if any(attribute.checkpoint_key in keys for attribute in node.attributes):
            needed |= {node_id, *(node.parameters or ())}
    for node_id, node in enumerate(graph.nodes):
        slots = [slot for slot in node.slot_variables if slot.slot_variable_node_id in needed]
        if slots:
            needed |= {node_id, *(slot.original_variable_node_id for slot in slots)}
    leading = _leading_to(graph, needed)
    return ObjectGraph([_pruned_node(graph, node, keys, leading) for node in graph.nodes])


def _leading_to(graph: ObjectGraph, needed: set[int]) -> set[int]:
    """The needed nodes, and all nodes from which edges lead to them."""
    parents: dict[int, list[int]] = {}
    for node_id, node in enumerate(graph.nodes):
        for child in node.children:
            parents.setdefault(child.node_id, []).append(node_id)
    found, stack = set(needed), list(needed)
    while stack:
        above = set(parents.get(stack.pop(), ())) - found
        stack += above
        found |= above
    return found


def _pruned_node(graph: ObjectGraph, node: Node, keys: frozenset[str], leading: set[int]) -> Node:
    slots = [
        slot
        for slot in node.slot_variables
        if any(attribute.checkpoint_key in keys for attribute in graph.nodes[slot.slot_variable_node_id].attributes)
    ]
    return msgspec.structs.replace(
        node,
        children=[child for child in node.children if child.node_id in leading],
        attributes=[attribute for attribute in node.attributes if attribute.checkpoint_key in keys],
        slot_variables=slots,
    )


def _live_scopes(prefixes: Sequence[str], rename: Mapping[str, str]) -> Iterator[str]:
    """The live prefixes of saved ones: each one as renamed, and the new prefixes of parts that a rename moves out."""
    moves = sorted(((old.strip("/"), new.strip("/")) for old, new in rename.items()), key=lambda move: -len(move[0]))
    for prefix in prefixes:
        yield next((new + prefix[len(old) :] for old, new in moves if old and _is_below(prefix, old)), prefix)
        yield from (new for old, new in moves if _is_below(old, prefix))
