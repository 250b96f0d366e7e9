"""Which stored value goes into which live one: TensorFlow's attributes.

A stored value without a live one is deferred: it waits on its parent for the name. A live value without a stored one
keeps what it has. A value whose kind changed is a mismatch, which is ours.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from distckpt.graph.match import WHOLE_IN_WORDS, Match, Mismatch, refused
from distckpt.graph.node_matching import NodeMatcher, is_one_value
from distckpt.graph.values import is_meta, is_uninitialised
from distckpt.graph.view import LiveNode
from distckpt.layout.keys import PER_RANK, escape, join
from distckpt.layout.records import OWN_VALUE, WHOLE, Node


class ValueMatcher:
    """The values of one matching.

    Attributes:
        ready: Live nodes that are uninitialised parameters which the file can initialise.
    """

    def __init__(self, nodes: NodeMatcher, hollow: Container[str]) -> None:
        self._nodes = nodes
        self._saved = nodes.saved
        self._live = nodes.live
        self._result = nodes.result
        self._hollow = hollow
        self.ready: set[int] = set()

    def find_ready(self) -> None:
        """Uninitialised parameters and buffers of lazy modules: initialised together or not at all, since the first
        forward of a module in between fails.
        """
        for live_id in self._nodes.saved_of:
            node = self._live[live_id]
            if node.children and isinstance(node.obj, torch.nn.Module):  # most nodes are leaves
                lazy = [n for n in node.children.values() if is_uninitialised(self._live[n].obj)]
                if all(map(self._has_saved_value, lazy)):
                    self.ready.update(lazy)

    def _has_saved_value(self, live_id: int) -> bool:
        """Whether the file has a tensor for a live node."""
        saved_id = self._nodes.saved_of.get(live_id)
        return saved_id is not None and any(found.name == OWN_VALUE for found in self._saved[saved_id].attributes)

    def match(self) -> None:
        """Match the attributes of every bound node."""
        for saved_id, live_id in self._nodes.live_of.items():
            self.match_attributes(self._saved[saved_id], live_id)

    def match_attributes(self, saved: Node, live_id: int) -> None:
        """Match the attributes of one pair of nodes; of several saved values for a live one the first counts."""
        node, result = self._live[live_id], self._result
        if node.adapter.needs is not None and _is_foreign(saved, node.adapter.needs):
            found = Mismatch(node.key, "an object of another kind", f"a {type(node.obj).__qualname__}")
            result.mismatches.append(found)
            return
        for attribute in saved.attributes:
            name, key = attribute.name, attribute.checkpoint_key
            value, place = node.values.get(name), (live_id, name)
            if place in result.matched:
                result.combined.append((result.matched[place], key, node.attribute_key(name)))
            elif value is not None or self._takes(saved, live_id, name):
                result.matched[place] = key
                result.matches.append(Match(key, name, node, value))
            else:
                self._defer(key, name, node)

    def _takes(self, saved: Node, live_id: int, name: str) -> bool:
        """Whether a live node takes a stored value for which it has none of that name."""
        node = self._live[live_id]
        return live_id in self.ready or node.adapter.takes(name, node.values) or is_one_value(saved, node)

    def _defer(self, key: str, name: str, node: LiveNode) -> None:
        """The live node has no value of that name: an object has the name, or it may come later."""
        if name == OWN_VALUE and is_meta(node.obj):
            self._result.awaited.add(node.key.rpartition("/")[2])  # or for another object of that name
            self._result.pending.setdefault(key, (node.key, "the memory (to_empty())"))
            return
        if name in WHOLE and not is_uninitialised(node.obj):  # no attribute ever has such a name
            self._result.mismatches.append(Mismatch(key, WHOLE_IN_WORDS[name], refused(node)))
            return
        for local_name in node.children:
            if name == (join(PER_RANK, local_name) if node.adapter.per_rank else escape(local_name)):
                if key in self._hollow:  # the live container has got elements since
                    return
                live = self._live[node.children[local_name]]
                self._result.mismatches.append(Mismatch(key, "a python value", f"a {type(live.obj).__qualname__}"))
                return
        if not name.startswith(f"{PER_RANK}/"):  # what another rank saved for itself waits for nothing
            self._result.awaited.add(name)
            self._result.pending.setdefault(key, (node.key, f"attribute {name!r}"))


def _is_foreign(saved: Node, needed: str) -> bool:
    """Whether a stored node has something, but not what the live object's adapter cannot do without."""
    if not (saved.attributes or saved.children):
        return False
    return all(attribute.name != needed for attribute in saved.attributes)
