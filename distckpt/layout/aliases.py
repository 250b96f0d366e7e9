"""From any path in a stored object graph to the key of the value there."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.layout.keys import PER_RANK, SLOTS, escape
from distckpt.layout.records import OWN_VALUE, Node, ObjectGraph


def find_key(graph: ObjectGraph, path: str) -> str | None:
    """The checkpoint key of the value at a path; None when there is none.

    A shared object has one key, after the first path that leads to it; this finds it by its other paths too.

    Args:
        graph: The stored graph.
        path: Escaped components, as in a key. A slot goes by any path of its parameter.
    """
    return _find(graph.nodes, 0, path.split("/")) if graph.nodes else None


def find_nodes(graph: ObjectGraph, path: str) -> list[int]:
    """The nodes on a path, from the root to the one that it names; empty when it names none.

    Args:
        graph: The stored graph.
        path: Escaped components, as in a key; empty for the root.
    """
    found, components = [0], path.split("/") if path else []
    while components and graph.nodes:
        node = graph.nodes[found[-1]]
        child = _child(node, components)
        if child is None:
            return []
        found.append(child)
        components = components[_width(node) :]
    return found if graph.nodes else []


def _find(nodes: Sequence[Node], node_id: int, components: Sequence[str]) -> str | None:
    node = nodes[node_id]
    name = "/".join(components) or OWN_VALUE
    own = next((attribute.checkpoint_key for attribute in node.attributes if attribute.name == name), None)
    if own is not None or not components:
        return own
    if components[0] == SLOTS:
        return _find_slot(nodes, node, 0, components[1:])
    child = _child(node, components)
    return None if child is None else _find(nodes, child, components[_width(node) :])


def _find_slot(nodes: Sequence[Node], optimizer: Node, node_id: int, components: Sequence[str]) -> str | None:
    """The value of a slot; the components lead from a node to the parameter, then to the slot by its name."""
    if not components:
        return None
    for slot in optimizer.slot_variables:
        if slot.original_variable_node_id == node_id and escape(slot.slot_name) == components[0]:
            return _find(nodes, slot.slot_variable_node_id, components[1:])
    child = _child(nodes[node_id], components)
    return None if child is None else _find_slot(nodes, optimizer, child, components[_width(nodes[node_id]) :])


def _child(node: Node, components: Sequence[str]) -> int | None:
    """The child that the first components name."""
    width = _width(node)
    if len(components) < width or (node.per_rank and components[0] != PER_RANK):
        return None
    edges = (child.node_id for child in node.children if escape(child.local_name) == components[width - 1])
    return next(edges, None)


def _width(node: Node) -> int:
    """Number of components of an edge from a node: those of a `PerRank` are named ".rank/<r>"."""
    return 2 if node.per_rank else 1
