"""`RestoreOptions(rename=...)`: move parts of a stored graph before it is matched."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distckpt.layout.keys import child_key, escape, join, unescape
from distckpt.layout.records import Attribute, Child, Node, ObjectGraph

#: Most keys with which an unknown one is compared, which takes about a second.
_MAX_COMPARED = 20_000


@dataclass(frozen=True, slots=True)
class _Taken:
    """The part named by a prefix: a child, or a value of its parent."""

    child: int | None
    checkpoint_key: str | None


def rename(graph: ObjectGraph, prefixes: Mapping[str, str]) -> ObjectGraph:
    """Move parts of a stored graph to other names. Slots follow their variable, since they refer to its node.

    Args:
        graph: The stored graph.
        prefixes: For each saved key prefix: the live one, in whole components. Of nested prefixes the longer wins.

    Raises:
        ValueError: A prefix names nothing in the file, or the new one cannot be a key.
    """
    if not prefixes:
        return graph
    editor = _Editor(graph)
    # All parts are removed, inner ones before outer ones, before any is put back, so that two can change places.
    order = sorted(prefixes, key=lambda prefix: -prefix.count("/"))
    taken = {prefix: editor.take(prefix.strip("/")) for prefix in order}
    for prefix in reversed(order):
        try:
            editor.put(prefixes[prefix].strip("/"), taken[prefix])
        except ValueError as error:
            raise ValueError(
                f"rename: expected a live key for {prefix!r}. Got {prefixes[prefix]!r}: {error}"
            ) from error
    return ObjectGraph([editor.node(node_id) for node_id in range(len(editor.children))])


def names_nothing(option: str, prefix: str, nodes: Sequence[Node]) -> ValueError:
    """The error for an option whose key prefix names nothing in a checkpoint; lists existing keys.

    Args:
        option: Name of the option.
        prefix: The key prefix.
        nodes: The stored graph.
    """
    depth = prefix.count("/") + 1
    keys = (attribute.checkpoint_key for node in nodes for attribute in node.attributes)
    there = sorted({"/".join(key.split("/")[:depth]) for key in keys})
    near = difflib.get_close_matches(prefix, there[:_MAX_COMPARED], n=5)
    hint = f"Similar: {', '.join(near)}." if near else f"There is: {', '.join(there[:10])}."
    return ValueError(f"{option}: nothing in the checkpoint has the key or prefix {prefix!r}. {hint}")


class _Editor:
    """A stored graph whose edges can be moved."""

    def __init__(self, graph: ObjectGraph) -> None:
        self.nodes = graph.nodes
        self.children = [{child.local_name: child.node_id for child in node.children} for node in graph.nodes]
        self.attributes = [{a.name: a.checkpoint_key for a in node.attributes} for node in graph.nodes]

    def take(self, key: str) -> _Taken:
        """Remove and return the part with a key.

        Raises:
            ValueError: There is no such part.
        """
        queue, seen = deque([(0, "")]), {0}
        while queue:
            node_id, path = queue.popleft()
            for name in self.attributes[node_id]:
                if join(path, name) == key:
                    return _Taken(None, self.attributes[node_id].pop(name))
            for name, child in self.children[node_id].items():
                child_path = child_key(path, name, self._per_rank(node_id))
                if child_path == key:
                    return _Taken(self.children[node_id].pop(name), None)
                if child not in seen:
                    seen.add(child)
                    queue.append((child, child_path))
        raise names_nothing("rename", key, self.nodes)

    def put(self, key: str, taken: _Taken) -> None:
        """Attach a part under a new key, in the place of what has it; makes the nodes on the way that are missing."""
        *parents, last = key.split("/")
        node_id = 0
        for component in parents:
            name = unescape(component)
            if name not in self.children[node_id]:
                self.children.append({})
                self.attributes.append({})
                self.children[node_id][name] = len(self.children) - 1
            node_id = self.children[node_id][name]
        if taken.child is not None:
            self.attributes[node_id].pop(last, None)
            self.children[node_id][unescape(last)] = taken.child
        elif taken.checkpoint_key is not None:
            for name in [name for name in self.children[node_id] if escape(name) == last]:
                del self.children[node_id][name]
            self.attributes[node_id][last] = taken.checkpoint_key

    def node(self, node_id: int) -> Node:
        """The record of a node after the moves so far."""
        old = self.nodes[node_id] if node_id < len(self.nodes) else Node()
        return Node(
            children=[Child(child, name) for name, child in self.children[node_id].items()],
            attributes=[Attribute(name, key) for name, key in self.attributes[node_id].items()],
            slot_variables=old.slot_variables,
            parameters=old.parameters,
            per_rank=old.per_rank,
        )

    def _per_rank(self, node_id: int) -> bool:
        return node_id < len(self.nodes) and self.nodes[node_id].per_rank
