"""Which stored node is which live object: TensorFlow's `restore` and `bind_object`.

Matching walks edges breadth-first from the root, by parent and local name; it never compares keys or classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping, MutableSequence

from distckpt.graph.adapters.optimizer import Groups
from distckpt.graph.match import Binding, Mismatch, Surplus, describe, is_hollow, refused
from distckpt.graph.selection import Selection
from distckpt.graph.view import LiveNode
from distckpt.layout.keys import PER_RANK, escape, join, unescape
from distckpt.layout.records import OWN_VALUE, WHOLE, Node


class NodeMatcher:
    """The nodes of one matching.

    Attributes:
        saved: The stored nodes.
        live: The live ones.
        partial: Stored nodes of which only a part is to be restored.
        result: What is found.
        live_of: Stored node to the live one that it is bound to.
        saved_of: Live node to the first stored one that is bound to it.
        groups: Pairs (stored, live) of optimizers' lists of parameter groups.
    """

    def __init__(self, selection: Selection, live: list[LiveNode]) -> None:
        self.saved: list[Node] = selection.graph.nodes
        self.live = live
        self.partial = selection.partial
        self.result = Binding()
        self.live_of: dict[int, int] = {}
        self.saved_of: dict[int, int] = {}
        self.groups: list[tuple[int, int]] = []
        self._queue: deque[tuple[int, int]] = deque()

    def match(self) -> None:
        """Breadth-first from the roots along edges of the same name."""
        if not self.saved or not self.live:
            return
        self.bind_pair(0, 0)
        while self._queue:
            saved_id, live_id = self._queue.popleft()
            saved, node = self.saved[saved_id], self.live[live_id]
            if type(node.obj) is Groups:
                self.groups.append((saved_id, live_id))
                continue
            if saved.children and not self._may_have_children(node):
                continue
            if node.adapter.is_container and saved_id not in self.partial:
                self._compare_elements(saved, live_id)
            for child in saved.children:
                target = node.children.get(child.local_name)
                if target is None:
                    self._defer(child.node_id, live_id, child.local_name)
                else:
                    self.bind_pair(child.node_id, target)

    def _may_have_children(self, node: LiveNode) -> bool:
        """Whether a live node can have those of a stored one; if not, that is a mismatch."""
        if node.problem:
            found = refused(node)
        elif OWN_VALUE in node.values:
            found = describe(node.values[OWN_VALUE])
        else:
            return True
        self.result.mismatches.append(Mismatch(node.key, "an object with parts of its own", found))
        return False

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
        self._queue.append((saved_id, live_id))

    def _compare_elements(self, saved: Node, live_id: int) -> None:
        """Warn of a list, tuple or dict that has another number of elements than saved, and cannot get as many."""
        node = self.live[live_id]
        names = {attribute.name for attribute in saved.attributes}
        if names and is_one_value(saved, node):
            surplus = [name for name in node.values if name not in names]
            if surplus:
                self.result.surplus.append(Surplus(node, surplus, len(names)))
                self.result.excused.update((live_id, name) for name in surplus)
            return
        before, now = len(saved.children) + len(saved.attributes), len(node.children) + len(node.values)
        if before != now and names.isdisjoint(WHOLE):
            kind = type(node.obj).__qualname__
            self.result.warnings.append(f"{node.key}: a {kind} of {now} element(s), saved with {before}")

    def _defer(self, saved_id: int, live_id: int, name: str) -> None:
        """The live parent has no child of that name: another kind of value has the name, or it may come later."""
        node = self.live[live_id]
        value = node.values.get(join(PER_RANK, name) if node.adapter.per_rank else escape(name))
        if value is not None and not is_hollow(value):
            self.result.mismatches.append(
                Mismatch(node.attribute_key(value.name), "an object or tensor", describe(value))
            )
            return
        if not node.adapter.per_rank:  # what another rank saved for itself waits for nothing
            self.result.awaited.add(name)
            for key in self.keys_below(saved_id):
                self.result.pending.setdefault(key, (node.key, f"attribute {name!r}"))

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


def is_one_value(saved: Node, node: LiveNode) -> bool:
    """Whether a live container gets exactly the stored elements, as a list or dict of python values does.

    It does where it and the stored one have python values only. It is a node because of its class: a deque, or a
    subclass of dict such as defaultdict.
    """
    if saved.children or node.children or not node.adapter.is_container:
        return False
    if not isinstance(node.obj, MutableMapping | MutableSequence) or len(node.values) != len(node.obj):
        return False  # an element that is no value opts out
    names = [attribute.name for attribute in saved.attributes]
    if isinstance(node.obj, MutableSequence):
        return names == [str(index) for index in range(len(names))]
    return all(map(_is_key, names))


def _is_key(component: str) -> bool:
    """Whether an attribute's name may be an element's of a dict: it is none of this package's own."""
    try:
        unescape(component)
    except ValueError:
        return False
    return True
