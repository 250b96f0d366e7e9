"""Which stored optimizer state belongs to which live optimizer and variable: TensorFlow's slot restorations.

A slot is a relation of three: optimizer, variable, name. Whichever of the two objects comes first, the slots wait for
the other. Two rules are ours: groups match by their members, and the slots of a pair are restored all or none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distckpt.graph.adapters.optimizer import Group, stepped_elsewhere
from distckpt.graph.group_order import GroupOrder, kept_by_position
from distckpt.graph.match import Mismatch, NewSlots
from distckpt.graph.node_matching import NodeMatcher
from distckpt.graph.value_matching import ValueMatcher
from distckpt.graph.values import PythonValue
from distckpt.graph.view import LiveNode
from distckpt.layout.keys import slots_key
from distckpt.layout.records import OWN_VALUE, STATE, Node
from distckpt.words import listing


class SlotMatcher:
    """The parameter groups and the slots of one matching."""

    def __init__(self, nodes: NodeMatcher, values: ValueMatcher, *, with_slots: bool) -> None:
        self._nodes = nodes
        self._saved = nodes.saved
        self._live = nodes.live
        self._result = nodes.result
        self._values = values
        self._with_slots = with_slots

    # ---- parameter groups ----

    def match_groups(self) -> None:
        """Match groups by their set of parameters, in any order; failing that by their order."""
        for saved_id, live_id in self._nodes.groups:
            saved_groups = [child.node_id for child in self._saved[saved_id].children]
            live_groups = list(self._live[live_id].children.values())
            self._match_groups(saved_groups, live_groups, self._live[live_id].key)

    def _match_groups(self, saved_groups: list[int], live_groups: list[int], key: str) -> None:
        """Bind the groups of one optimizer."""
        twins: dict[int, int] = {}  # live group to saved one
        left = []
        for saved_id in saved_groups:
            # Of a pipeline's group every rank holds only some members, maybe none.
            members = {self._nodes.live_of.get(member) for member in self._saved[saved_id].parameters or ()} - {None}
            free = (n for n in live_groups if n not in twins and members == set(self._live[n].parameters or ()))
            twin = next(free, None)
            if twin is None:
                left.append(saved_id)
            else:
                twins[twin] = saved_id
        if left and len(saved_groups) != len(live_groups):
            self._result.warnings.append(
                f"{key}: {len(left)} saved parameter group(s) have no live group with the same parameters; "
                "the live groups keep their options"
            )
        elif left:
            if any(self._saved[saved_id].parameters for saved_id in left):
                self._result.warnings.append(f"{key}: parameter groups have other members than saved; matched by index")
            free_groups = [n for n in live_groups if n not in twins]
            twins |= dict(zip(free_groups, left, strict=True))
        for live_id, saved_id in twins.items():
            self._bind_group(saved_id, live_id, key)
        self._note_order(saved_groups, live_groups, twins)

    def _note_order(self, saved_groups: list[int], live_groups: list[int], twins: dict[int, int]) -> None:
        """Remember which saved groups those of an optimizer are: its schedulers have a value for each."""
        position = {saved_id: index for index, saved_id in enumerate(saved_groups)}
        saved_of = [position[twins[live_id]] if live_id in twins else None for live_id in live_groups]
        order = GroupOrder(len(saved_groups), saved_of)
        group = self._live[live_groups[0]].obj if live_groups else None
        if not isinstance(group, Group):
            return
        self._result.group_orders[id(group.optimizer)] = order
        for node in () if order.is_as_saved else self._live:
            state = node.values.get(STATE)
            held = state.value if isinstance(state, PythonValue) else None
            names = kept_by_position(node.obj, held, group.optimizer, len(live_groups))
            if names:
                self._result.warnings.append(
                    f"{node.key}: the groups of its optimizer are not those saved, in their order. Values per group in "
                    f"{listing(names, 3)} are restored as saved: set them anew if they belong to other groups now"
                )

    def _bind_group(self, saved_id: int, live_id: int, key: str) -> None:
        """Bind a group, and warn where the optimizer that saved it seems to be of another kind.

        It is if it lacks an option of the live one and has another: a later version may just add options, and programs
        and schedulers add their own, which are no defaults.
        """
        self._nodes.bind_pair(saved_id, live_id)
        node = self._live[live_id]
        if not self._with_slots or saved_id in self._nodes.partial or not isinstance(node.obj, Group):
            return
        saved = {attribute.name for attribute in self._saved[saved_id].attributes}
        defaults = getattr(node.obj.optimizer, "defaults", {})  # those that wrap another one may have none
        added, absent = saved - node.values.keys(), (defaults.keys() & node.values.keys()) - saved
        if added and absent:
            text = (
                f"{key}: saved with the options {listing(sorted(added), 3)}, and without {listing(sorted(absent), 3)}, "
                "as by another kind of optimizer; the live one gets them"
            )
            self._result.warnings += [text] if text not in self._result.warnings else []

    # ---- slots ----

    def match_slots(self) -> None:
        """Match the slots of every bound optimizer, pair by pair."""
        for saved_id, live_id in list(self._nodes.live_of.items()):
            node = self._live[live_id]
            if not node.children:  # most nodes are leaves
                continue
            if isinstance(node.obj, torch.optim.Optimizer) and self._nodes.saved_of[live_id] == saved_id:
                self._match_optimizer(saved_id, node)

    def _match_optimizer(self, saved_id: int, node: LiveNode) -> None:
        """Match all slots of one optimizer."""
        if not self._with_slots:
            self._leave_slots(node, node.slots)
            return
        saved = self._saved[saved_id]
        stored: dict[int, dict[str, int]] = {}
        for slot in saved.slot_variables:
            stored.setdefault(slot.original_variable_node_id, {})[slot.slot_name] = slot.slot_variable_node_id
        is_ordered = stored and isinstance(node.obj, torch.optim.LBFGS)
        if is_ordered and not self._is_in_order(saved, next(iter(stored)), node):
            self._leave_slots(node, node.slots)
            return
        elsewhere = stepped_elsewhere(node.obj)
        for parameter_id in self._parameters_of(node):
            variable_id = self._nodes.saved_of.get(parameter_id)
            if variable_id is None:
                continue
            slots = stored.pop(variable_id, {})
            if id(self._live[parameter_id].obj) in elsewhere:
                continue
            if OWN_VALUE not in self._live[parameter_id].values and parameter_id not in self._values.ready:
                self._defer(node, variable_id, slots)
            elif slots or saved_id not in self._nodes.partial:
                self._match_pair(node, parameter_id, slots)
            else:  # the file may have slots of the pair, outside of what is restored
                self._leave_slots(node, (parameter_id,))
        for variable_id, slots in stored.items():
            first = self._nodes.saved_of.get(self._nodes.live_of.get(variable_id, -1))
            if first is None or first == variable_id:  # no such parameter in this optimizer yet
                self._defer(node, variable_id, slots)
            else:
                self._combine(saved, node, first, slots)

    def _is_in_order(self, saved: Node, variable_id: int, node: LiveNode) -> bool:
        """Whether an LBFGS optimizer has its parameters in the order saved; if not, that is a mismatch."""
        lists = [self._saved[child.node_id] for child in saved.children if child.local_name == "param_groups"]
        groups = [self._saved[child.node_id] for found in lists for child in found.children]
        live_of, live = self._nodes.live_of, self._parameters_of(node)
        before = [live_of[member] for group in groups for member in group.parameters or () if member in live_of]
        if not groups or variable_id not in live_of or before == live:
            return True
        key = slots_key(node.key, self._live[live_of[variable_id]].key)
        was, now = (listing([self._live[member].key for member in members], 3) for members in (before, live))
        text = f"LBFGS vectors over {was}, which cannot be brought into another order"
        self._result.mismatches.append(Mismatch(key, text, f"parameters in the order {now}"))
        return False

    def _combine(self, saved: Node, node: LiveNode, first_id: int, slots: dict[str, int]) -> None:
        """Two saved parameters are one live one, as after a pipeline whose end stages share an embedding."""
        kept = {
            (slot.slot_name, attribute.name): attribute.checkpoint_key
            for slot in saved.slot_variables
            if slot.original_variable_node_id == first_id
            for attribute in self._saved[slot.slot_variable_node_id].attributes
        }
        for slot_name, slot_id in slots.items():
            for attribute in self._saved[slot_id].attributes:
                first = kept.get((slot_name, attribute.name))
                if first is not None:
                    live = f"{slot_name} of {self._live[self._nodes.live_of[first_id]].key} in {node.key}"
                    self._result.combined.append((first, attribute.checkpoint_key, live))

    def _leave_slots(self, node: LiveNode, parameter_ids: Iterable[int]) -> None:
        """Say that live slots are not expected to be in the file."""
        for parameter_id in parameter_ids:
            for slot_id in node.slots.get(parameter_id, {}).values():
                self._result.excused.update((slot_id, name) for name in self._live[slot_id].values)

    def _defer(self, node: LiveNode, variable_id: int, slots: dict[str, int]) -> None:
        """The optimizer has no such parameter, or one that has no values yet; both may come later."""
        for slot_id in slots.values():
            for attribute in self._saved[slot_id].attributes:
                waits_for = f"parameter {self._nodes.any_key(variable_id)}"
                self._result.pending.setdefault(attribute.checkpoint_key, (node.key, waits_for))

    def _parameters_of(self, node: LiveNode) -> list[int]:
        """Live node ids of an optimizer's parameters."""
        groups = self._live[node.children["param_groups"]].children.values()
        return [parameter for group in groups for parameter in self._live[group].parameters or ()]

    def _match_pair(self, node: LiveNode, parameter_id: int, stored: dict[str, int]) -> None:
        """All slots of a pair or none; those of LBFGS, which change in number and kind at some steps, as new ones."""
        live = {} if isinstance(node.obj, torch.optim.LBFGS) else node.slots.get(parameter_id, {})
        if live and live.keys() == stored.keys():
            for name, slot_id in live.items():
                self._values.match_attributes(self._saved[stored[name]], slot_id)
            return
        if live and stored:
            key = slots_key(node.key, self._live[parameter_id].key)
            self._result.mismatches.append(Mismatch(key, f"slots {sorted(stored)}", f"slots {sorted(live)}"))
            return
        self._leave_slots(node, (parameter_id,))  # the file says: no state; so the live one is not "missing" from it
        slots = {
            name: {attribute.name: attribute.checkpoint_key for attribute in self._saved[slot_id].attributes}
            for name, slot_id in stored.items()
        }
        self._result.new_slots.append(NewSlots(node, self._live[parameter_id], slots))
