"""What a restore will do to the live objects: decided in full before anything is read, carried out at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.optim.lr_scheduler import LRScheduler

from distckpt.graph.adapters.optimizer import FLAT_SLOTS, Group, Slot, flat_size, set_slots, steps_on_device
from distckpt.graph.adapters.stateful import unflatten
from distckpt.graph.group_order import GroupOrder, in_live_order, late_values
from distckpt.graph.match import Binding, Match, Mismatch, NewSlots, Surplus, describe, parameter_of
from distckpt.graph.memory import overlaps_itself
from distckpt.graph.python_value import decode, references
from distckpt.graph.sharding import new_like, new_plain
from distckpt.graph.trackable import ShardedVariable
from distckpt.graph.values import PythonValue, TensorValue, dtype_name, is_uninitialised, replicated
from distckpt.graph.view import LiveNode
from distckpt.layout.dtypes import is_castable
from distckpt.layout.keys import join
from distckpt.layout.records import OWN_VALUE, STATE, Manifest
from distckpt.tensor_bytes import torch_dtype
from distckpt.words import listing

_WHOLE_STATE = "an object that takes all of it or nothing (name all of it there)"


class TensorRead(msgspec.Struct, frozen=True):
    """A stored tensor that is read into memory. A struct, since there is one for each tensor.

    Attributes:
        key: Checkpoint key.
        variable: Index in the manifest's variables.
        target: Where this rank's shard goes.
        cast: The live dtype differs: read into a temporary tensor of the stored dtype, then convert.
    """

    key: str
    variable: int
    target: TensorValue
    cast: torch.dtype | None = None


@dataclass(slots=True)
class NodeRestore:
    """Values that go back through a node's adapter.

    Attributes:
        node: The live node.
        values: Attribute name to python value or new tensor.
        surplus: Names of elements to drop from a container.
    """

    node: LiveNode
    values: dict[str, Any] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SlotsRestore:
    """Optimizer state to set, see `NewSlots`.

    Attributes:
        new: Whose state.
        values: Slot name to new tensor or python value.
    """

    new: NewSlots
    values: dict[str, Any]


@dataclass(slots=True)
class Assignment:
    """Everything a restore does on this rank.

    Attributes:
        reads: Tensors to read.
        nodes: Values to hand to adapters after reading.
        slots: Optimizer state to set after reading.
        late: Lists of schedulers that get values for groups which came late, and these.
        mismatches: What does not fit; those values are in none of the above.
        consumed: Keys of all stored values that this rank takes.
        pairs: Keys of the pairs (optimizer, parameter) whose state is set or dropped as a whole, once.
    """

    reads: list[TensorRead] = field(default_factory=list)
    nodes: list[NodeRestore] = field(default_factory=list)
    slots: list[SlotsRestore] = field(default_factory=list)
    late: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)
    pairs: set[str] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum([read.target.tensor.nbytes for read in self.reads])

    def apply(self) -> None:
        """Set everything that is not read in place; the last step of a restore."""
        for restore in self.nodes:
            try:
                restore.node.adapter.restore(restore.node.obj, restore.values)
                if restore.surplus:
                    restore.node.adapter.drop(restore.node.obj, restore.surplus)
            except Exception as error:  # of the user's own methods
                error.add_note(f"while {restore.node.key or 'the root'} was given its saved state")
                raise
        for values, late in self.late:
            values += late
        for slots in self.slots:
            optimizer, parameter = slots.new.optimizer.obj, parameter_of(slots.new.parameter)
            assert isinstance(optimizer, torch.optim.Optimizer)
            set_slots(optimizer, parameter, slots.values)


def assign(
    binding: Binding,
    manifest: Manifest,
    *,
    cast: bool,
    done: Iterable[str] = (),
    skipped: Iterable[str] = (),
    optimizers: Iterable[object] = (),
) -> Assignment:
    """Decide what to read and to set. Local; changes nothing live.

    Args:
        binding: The matched graphs.
        manifest: The file's manifest.
        cast: Convert dtypes of the same kind.
        done: Keys that an earlier assignment of the same restore already took.
        skipped: Those of them that did not fit.
        optimizers: Those whose options it took.
    """
    builder = _Builder(manifest, cast, frozenset(done), frozenset(skipped), binding.group_orders)
    builder.result.mismatches += binding.mismatches
    builder.find_overwritten(binding.matches, optimizers)
    torn = builder.torn(binding.matches)
    for match in binding.matches:
        if not torn or (id(match.node), match.name) not in torn:
            builder.add(match)
    for surplus in binding.surplus:
        builder.add_surplus(surplus)
    for new in binding.new_slots:
        builder.add_slots(new)
    return builder.result


class _Builder:
    """One assignment under construction."""

    def __init__(
        self,
        manifest: Manifest,
        cast: bool,
        done: frozenset[str],
        skipped: frozenset[str],
        orders: Mapping[int, GroupOrder],
    ) -> None:
        self._variables = {variable.key: index for index, variable in enumerate(manifest.variables)}
        self._manifest = manifest
        self._cast = cast
        self._done = done
        self._skipped = skipped
        self._orders = orders
        self._unfit: set[int] = set()  # ids of live objects whose stored value is skipped
        self._on_device: dict[int, frozenset[int]] = {}
        self._overwritten: set[int] = set()  # ids of optimizers whose options are restored again
        self.result = Assignment()
        self._restores: dict[int, NodeRestore] = {}

    def find_overwritten(self, matches: Iterable[Match], restored: Iterable[object]) -> None:
        """Find the optimizers whose scheduler came after their options were restored: its constructor has set some."""
        known = {id(optimizer) for optimizer in restored}
        for match in matches if known else ():
            if match.name == STATE and match.key not in self._done:  # of any class: not all schedulers are torch's
                self._overwritten |= known & {id(getattr(match.node.obj, "optimizer", None))}

    def torn(self, matches: Iterable[Match]) -> set[tuple[int, str]]:
        """The matches, by node and name, of structures of which something is not restored; each is a mismatch."""
        structures: dict[tuple[int, str], list[Match]] = {}
        for match in matches:
            structure = match.node.adapter.structure_of(match.name)
            if structure is not None:
                structures.setdefault((id(match.node), structure), []).append(match)
        torn: set[tuple[int, str]] = set()
        for (node_id, structure), parts in structures.items():
            keys = {match.name: match.key for match in parts}
            missing = [] if self._done.issuperset(keys.values()) else self._missing_from(structure, keys)
            if missing:
                key = join(parts[0].node.key, structure)
                saved = f"a state of which only or rename leaves out {listing(missing, 3)}"
                self.result.mismatches.append(Mismatch(key, saved, _WHOLE_STATE))
                torn.update((node_id, name) for name in keys)
        return torn

    def _missing_from(self, structure: str, keys: Mapping[str, str]) -> list[str]:
        """Names of the values that a structure has in the file beside those of `keys`, which are by name."""
        if structure not in keys:
            return [structure]
        encoded = self._manifest.python_state.get(keys[structure])
        if encoded is None:  # a tensor, which refers to nothing
            return []
        return sorted({*references(decode(bytes(encoded)))} - keys.keys())

    def add(self, match: Match) -> None:
        """One stored value with a live counterpart."""
        key, node, value = match.key, match.node, match.value
        if key in self._skipped:
            self._unfit.add(_identity(node.obj))
        again = key in self._done
        if again and match.name == STATE:
            self._add_late_groups(match)
        if (again and not self._is_overwritten(match)) or (self._unfit and self._follows_unfit(node.obj)):
            return
        index = self._variables.get(key)
        encoded = self._manifest.python_state[key] if index is None else None
        refusal = node.adapter.refusal(node.obj, match.name, encoded)
        if refusal is not None:
            self._add_mismatch(match, refusal)
        elif index is None:
            self._add_python(match)
        elif type(value) is TensorValue and value.in_place:
            self._add_tensor(match, index, value)
        elif isinstance(value, PythonValue):
            self._add_mismatch(match, describe(value))
        elif is_uninitialised(node.obj):
            self._add_lazy(match, index, dtype_name(node.obj.dtype))
        elif type(value) is TensorValue and node.adapter.exact(match.name) and not self._is_alike(index, value):
            self._add_mismatch(match, f"{describe(value)} of a {type(node.obj).__qualname__}")
        else:
            self._values_to_hand(match)[match.name] = self._new_tensor(key, index, value)
        if again:
            self.result.consumed.discard(key)

    def _add_late_groups(self, match: Match) -> None:
        """A scheduler that was restored before: groups that its optimizer has got since bring it their values."""
        encoded = self._manifest.python_state.get(match.key)
        if encoded is not None and isinstance(match.node.obj, LRScheduler) and match.key not in self._skipped:
            self.result.late += late_values(decode(bytes(encoded)), match.node.obj, self._orders)

    def _is_overwritten(self, match: Match) -> bool:
        """Whether a value that was restored before is an option of an optimizer that is restored again."""
        group = match.node.obj
        return isinstance(group, Group) and id(group.optimizer) in self._overwritten and match.key not in self._skipped

    def add_surplus(self, surplus: Surplus) -> None:
        """Elements of a container to drop, where all the stored ones are restored now."""
        restore = self._restores.get(id(surplus.node))
        if restore is not None and len(restore.values) == surplus.n_saved:
            restore.surplus = surplus.names

    def _is_alike(self, index: int, value: TensorValue) -> bool:
        """Whether a stored tensor has the shape and dtype of a live one."""
        saved = self._manifest.variables[index]
        return (saved.shape, saved.dtype, saved.numpy) == (value.global_shape, dtype_name(value.tensor.dtype), False)

    def _add_lazy(self, match: Match, index: int, live_dtype: str) -> None:
        """A stored tensor that initialises a parameter, of whatever shape."""
        saved = self._manifest.variables[index].dtype
        if saved == live_dtype or (self._cast and is_castable(saved, live_dtype)):
            self._values_to_hand(match)[match.name] = self._new_tensor(match.key, index, None)
        else:
            self._add_mismatch(match, f"an uninitialised tensor of dtype {live_dtype}")

    def _follows_unfit(self, obj: object) -> bool:
        """Whether this is a slot of a parameter that is skipped: then the slot is, too."""
        return isinstance(obj, Slot) and id(obj.parameter) in self._unfit

    def _add_python(self, match: Match) -> None:
        """A stored python value."""
        if isinstance(match.value, TensorValue) and match.value.in_place:
            self._add_mismatch(match, describe(match.value))
            return
        value = decode(bytes(self._manifest.python_state[match.key]))
        if match.name == STATE and self._orders:
            in_live_order(value, match.node.obj, self._orders)
        self._values_to_hand(match)[match.name] = value
        self.result.consumed.add(match.key)

    def _add_tensor(self, match: Match, index: int, value: TensorValue) -> None:
        """A stored tensor for a live one."""
        variable = self._manifest.variables[index]
        same_dtype = variable.dtype == dtype_name(value.tensor.dtype)
        if variable.shape != value.global_shape or not (same_dtype or self._converts(variable.dtype, match, value)):
            self._add_mismatch(match, describe(value))
            return
        if overlaps_itself(value.tensor):
            self._add_mismatch(match, f"{describe(value)} whose elements share memory, such as expand()")
            return
        stored = None if same_dtype else torch_dtype(variable.dtype)
        self.result.reads.append(TensorRead(match.key, index, value, stored))
        self.result.consumed.add(match.key)

    def _converts(self, stored: str, match: Match, value: TensorValue) -> bool:
        """Whether a stored tensor of another dtype is converted to that of the live one."""
        is_step = isinstance(match.node.obj, Slot) and match.node.obj.name == "step"
        return self._cast and not is_step and is_castable(stored, dtype_name(value.tensor.dtype))

    def _values_to_hand(self, match: Match) -> dict[str, Any]:
        """The values to hand to the node's adapter."""
        restore = self._restores.get(id(match.node))
        if restore is None:
            restore = self._restores[id(match.node)] = NodeRestore(match.node)
            self.result.nodes.append(restore)
        return restore.values

    def _new_tensor(self, key: str, index: int, value: TensorValue | None) -> Any:
        """A new tensor of the stored shape and dtype, which will be read; sharded as the live one where it is."""
        variable = self._manifest.variables[index]
        dtype = torch_dtype(variable.dtype)
        if value is None or value.holder is None:
            tensor, target = new_plain(variable.shape, dtype)
        else:
            tensor, target = new_like(value.holder, value, variable.shape, dtype)
        self.result.reads.append(TensorRead(key, index, target))
        self.result.consumed.add(key)
        return tensor.numpy() if variable.numpy else tensor

    def add_slots(self, new: NewSlots) -> None:
        """Optimizer state that is to become exactly the stored one."""
        keys, pair = new.keys, new.pair
        if pair in self._done or (keys and self._done.issuperset(keys)):
            return  # training has gone on since: the state is live
        if id(parameter_of(new.parameter)) in self._unfit:
            return
        resharded = self._resharded(new)
        if resharded is not None:
            self.result.mismatches.append(resharded)
            return
        values = {name: self._new_slot(name, attributes, new) for name, attributes in new.slots.items()}
        self.result.slots.append(SlotsRestore(new, values))
        self.result.consumed.update(keys)
        self.result.pairs.add(pair)

    def _resharded(self, new: NewSlots) -> Mismatch | None:
        """The mismatch of opaque state that was stored for other parameters than the live ones; else None."""
        size = flat_size(new.optimizer.obj)
        stored = [new.slots[name].get(OWN_VALUE, "") for name in FLAT_SLOTS if name in new.slots]
        shapes = {self._manifest.variables[self._variables[key]].shape for key in stored if key in self._variables}
        if size is None or shapes <= {(size,)}:
            return None
        shown = ", ".join(map(str, sorted(shapes)))
        saved = f"LBFGS vectors of shape {shown} over all parameters, which cannot be resharded"
        return Mismatch(new.pair, saved, f"parameters of {size} elements on this rank")

    def _new_slot(self, name: str, attributes: Mapping[str, str], new: NewSlots) -> Any:
        """The value of one new slot."""
        values = {attribute: self._new_slot_value(name, key, new) for attribute, key in attributes.items()}
        return values[OWN_VALUE] if OWN_VALUE in values else unflatten(values, STATE)

    def _new_slot_value(self, name: str, key: str, new: NewSlots) -> Any:
        """A python value, or a new tensor that will be read."""
        index = self._variables.get(key)
        if index is None:
            return decode(bytes(self._manifest.python_state[key]))
        variable = self._manifest.variables[index]
        stored = torch_dtype(variable.dtype)
        parameter, like = parameter_of(new.parameter), self._own_value(new.parameter)
        follows = self._cast and variable.shape == like.global_shape and name != "step"
        dtype = parameter.dtype if follows and is_castable(variable.dtype, dtype_name(parameter.dtype)) else stored
        on_cpu = name == "step" and variable.shape == () and id(parameter) not in self._steps_on_device(new.optimizer)
        if on_cpu or variable.numpy:
            tensor, target = new_plain(variable.shape, stored)
        else:
            tensor, target = new_like(parameter, like, variable.shape, dtype)
        self.result.reads.append(TensorRead(key, index, target, None if target.tensor.dtype == stored else stored))
        return tensor.numpy() if variable.numpy else tensor

    def _steps_on_device(self, optimizer: LiveNode) -> frozenset[int]:
        """See `adapters.optimizer.steps_on_device`; asked once per optimizer."""
        known = self._on_device.get(id(optimizer))
        if known is None:
            nodes = [(restore.node.obj, restore.values) for restore in self.result.nodes]
            options = {id(node.group): values for node, values in nodes if isinstance(node, Group)}
            known = self._on_device[id(optimizer)] = steps_on_device(optimizer.obj, options)
        return known

    def _own_value(self, parameter: LiveNode) -> TensorValue:
        """The live value of a parameter, or the one that will initialise it."""
        own = parameter.values.get(OWN_VALUE)
        if own is None:
            own = replicated(self._restores[id(parameter)].values[OWN_VALUE])
        assert isinstance(own, TensorValue)
        return own

    def _add_mismatch(self, match: Match, live: str) -> None:
        """Remember a value that does not fit."""
        self.result.mismatches.append(Mismatch(match.key, self._describe(match.key), live))
        self._unfit.add(_identity(match.node.obj))

    def _describe(self, key: str) -> str:
        """A stored value in words, for messages."""
        index = self._variables.get(key)
        if index is None:
            return describe(PythonValue("", decode(bytes(self._manifest.python_state[key]))))
        variable = self._manifest.variables[index]
        return f"a tensor of shape {variable.shape} and dtype {variable.dtype}"


def _identity(obj: object) -> int:
    """An object by what an optimizer knows of it: the tensor inside a `ShardedVariable`."""
    return id(obj.tensor if isinstance(obj, ShardedVariable) else obj)
