"""Matching a stored object graph with a live one.

The rules are those of TensorFlow's object-based checkpoints. Each is in one place:

    restore, bind_object                        node_matching
    two references, different objects           node_matching: bind_pair
    deferred dependencies                       node_matching: _defer; value_matching: _defer
    attributes, objects combined                value_matching: match_attributes
    slot restorations, whichever comes first    slot_matching
    update_uid: the newest call wins            claims
    what assertions count as unmatched          here: missing_values
"""

from __future__ import annotations

import re
from collections.abc import Container

from distckpt.graph.adapters.optimizer import Group
from distckpt.graph.match import Binding, is_hollow
from distckpt.graph.node_matching import NodeMatcher
from distckpt.graph.selection import Selection
from distckpt.graph.slot_matching import SlotMatcher
from distckpt.graph.value_matching import ValueMatcher
from distckpt.graph.view import LiveGraph


def bind(selection: Selection, live: LiveGraph, hollow: Container[str] = ()) -> Binding:
    """Match a stored graph with a live one. Local; changes nothing.

    Args:
        selection: The stored graph, or the part of it that is to be restored.
        live: A fresh walk.
        hollow: Keys of stored containers without any value inside.
    """
    nodes = NodeMatcher(selection, live.nodes)
    values = ValueMatcher(nodes, hollow)
    slots = SlotMatcher(nodes, values, with_slots=selection.slots)
    nodes.match()
    values.find_ready()
    slots.match_groups()  # binds further nodes, once those of the parameters are bound
    values.match()
    slots.match_slots()
    return nodes.result


_PER_RANK = re.compile(r"(?:^|/)\.rank/(\d+)(?:/|$)")


def is_of_other_rank(key: str, size: int) -> bool:
    """Whether a key is that of a per-rank value of a rank that a job of `size` ranks does not have."""
    found = _PER_RANK.search(key)
    return found is not None and int(found[1]) >= size


def missing_values(live: LiveGraph, binding: Binding) -> list[str]:
    """Keys of live values without a stored one. Parameter-group entries keep their value and do not count."""
    matched = binding.matched
    unmatched: dict[int, list[str]] = {}  # by node id
    for node_id, node in enumerate(live.nodes):
        for name in node.values:
            if (node_id, name) not in matched:
                unmatched.setdefault(node_id, []).append(name)
    missing = []
    for node_id, names in unmatched.items():
        node = live.nodes[node_id]
        names = [name for name in names if (node_id, name) not in binding.excused and not is_hollow(node.values[name])]
        in_part = node.adapter.takes_all and len(names) < len(node.values)
        if not (isinstance(node.obj, Group) or in_part):
            missing += [node.attribute_key(name) for name in names]
    return missing
