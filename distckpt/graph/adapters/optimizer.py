"""`torch.optim.Optimizer`: parameter groups by their members, state by the identity of its parameter.

Nothing here calls `step()` or `zero_grad()`, and `state_dict()` only where it is not that of every optimizer, to find
what it adds: saving and restoring leave training as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import msgspec
import torch

from distckpt.graph.adapters.base import Adapter, Part, Problem
from distckpt.graph.adapters.containers import assign_python_value
from distckpt.graph.adapters.stateful import flatten, state_dict_or_none, unflatten
from distckpt.graph.claims import Claim
from distckpt.graph.python_value import is_python_value, resolve
from distckpt.graph.sharding import tensor_value
from distckpt.graph.values import Edge, PythonValue, TensorValue, UnsaveableError, Value
from distckpt.layout.keys import escape, unescape
from distckpt.layout.records import OWN_VALUE, STATE
from distckpt.words import listing

#: The entries of a param group that say which parameters it has: the list itself, and what the program calls them.
_MEMBERS = ("params", "param_names")


class Groups:
    """Stands for an optimizer's list of parameter groups as a node of the graph."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Group:
    """Stands for one parameter group as a node of the graph."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.group = group

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The members."""
        members: list[torch.Tensor] = self.group["params"]
        return members


class OptimizerAdapter(Adapter):
    """Edges lead to the groups and to optimizers inside. The walk adds the slots once it knows which parameters are
    nodes.
    """

    def handles(self, cls: type) -> bool:
        """Optimizers of every class."""
        return issubclass(cls, torch.optim.Optimizer)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """The parameter groups, optimizers inside, and state that belongs to no parameter.

        Raises:
            UnsaveableError: Its `state_dict()` has numbers or tensors beside those.
        """
        assert isinstance(obj, torch.optim.Optimizer)
        stepped = stepped_by(obj)
        if stepped is obj:
            _require_parts(obj)
        yield Edge("param_groups", Groups(obj))
        for name, value in vars(obj).items():  # those like SAM step another one, which has state of its own
            if isinstance(value, torch.optim.Optimizer) and value is not stepped and value.state is not obj.state:
                yield Edge(name, value)
        if getattr(obj, "_overlap_with_ddp", False):
            yield Problem(
                "", "a ZeroRedundancyOptimizer with overlap_with_ddp=True. Make it with overlap_with_ddp=False."
            )
            return
        keys: Iterable[object] = stepped.state.keys()  # typed as tensors, but nothing enforces it
        for key in keys:
            if not isinstance(key, torch.Tensor):
                yield Problem(
                    STATE,
                    f"optimizer state under {key!r} belongs to no parameter and cannot be stored. Keep it as an entry "
                    "of a param group, such as optimizer.param_groups[0]['name'], or track it as an object of its own.",
                )


def _require_parts(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose hooks, or `state_dict()` of its own, add what groups and slots do not have."""
    cls = type(optimizer)
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)  # those that wrap another one may have none
    if cls.state_dict is torch.optim.Optimizer.state_dict and not hooks:
        return
    state = state_dict_or_none(optimizer)
    if not isinstance(state, dict):
        return
    # Dicts and lists are the states of optimizers inside, or of parameters in a form of its own.
    lost = [repr(name) for name, value in state.items() if not isinstance(value, dict | list)]
    if lost:
        raise UnsaveableError(
            f"the state_dict() of this {cls.__qualname__} also has {listing(lost, 3)}, which is in no param group and "
            "would be lost. Keep it as an entry of a param group, or track the optimizer inside and what is beside it "
            "one by one."
        )


class GroupsAdapter(Adapter):
    """The list of groups; edges by index."""

    def handles(self, cls: type) -> bool:
        """`Groups`."""
        return cls is Groups

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """The groups."""
        assert isinstance(obj, Groups)
        for index, group in enumerate(obj.optimizer.param_groups):
            yield Edge(str(index), Group(obj.optimizer, group))


class GroupAdapter(Adapter):
    """One group: everything but its parameters and their names."""

    takes_all = True

    def handles(self, cls: type) -> bool:
        """`Group`."""
        return cls is Group

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Options such as "lr", python values or tensors."""
        assert isinstance(obj, Group)
        entries: Iterable[tuple[object, Any]] = obj.group.items()  # named by str, but nothing enforces it
        for name, value in entries:
            if name in _MEMBERS:
                continue
            if not isinstance(name, str):
                yield Problem("", f"a param-group entry named {name!r} cannot be stored. Use str as its name.")
            elif isinstance(value, torch.Tensor):
                yield tensor_value(value, escape(name))
            elif is_python_value(value):
                yield PythonValue(escape(name), value)
            elif type(value) in (tuple, list):  # as betas are that Adam takes as tensors
                yield from flatten(value, escape(name), escape(name))
            else:
                kind = type(value).__qualname__
                yield Problem(
                    escape(name), f"a param-group entry of type {kind} cannot be stored. Use numbers or tensors."
                )

    def structure_of(self, name: str) -> str | None:
        """The entry: a tuple or list refers to the tensors in it, any other entry is alone."""
        return name.partition("/")[0]

    def claim(self, obj: object, name: str) -> Claim:
        """An entry of the optimizer: the stand-in for the group lives as long as the walk."""
        assert isinstance(obj, Group)
        return obj.optimizer, f"group {id(obj.group)}: {self.structure_of(name)}"

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set the stored options, new ones too; what else the live group has keeps its value."""
        assert isinstance(obj, Group)
        for escaped, stored in saved.items():
            if "/" in escaped:  # a tensor in a tuple or list, which refers to it
                continue
            name, value = unescape(escaped), resolve(stored, dict(saved))
            if not assign_python_value(obj.group.get(name), value):
                obj.group[name] = value


class Slot(msgspec.Struct, eq=False):
    """Stands for one entry of `optimizer.state[parameter]` as a node of the graph.

    Attributes:
        optimizer: The optimizer that the program knows.
        parameter: The parameter.
        name: Name of the entry.
        value: What the entry held when it was walked.
    """

    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    name: str
    value: object


class SlotAdapter(Adapter):
    """One slot; not in the registry, since only an optimizer's walk makes them."""

    def handles(self, cls: type) -> bool:
        """`Slot`."""
        return cls is Slot

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """The slot's tensor or python value; for a structure (LBFGS) its tensors and the rest."""
        assert isinstance(obj, Slot)
        value = obj.value
        if isinstance(value, torch.Tensor):
            return (tensor_value(value),)
        if is_python_value(value):
            return (PythonValue(OWN_VALUE, value),)
        return flatten(value, "", STATE)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set a python slot, or a structure."""
        assert isinstance(obj, Slot)
        value = saved[OWN_VALUE] if OWN_VALUE in saved else unflatten(saved, STATE)
        stepped_by(obj.optimizer).state[obj.parameter][obj.name] = value

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """A structure is restored as a whole: the file decides which tensors it has."""
        return STATE in live and name != OWN_VALUE

    def claim(self, obj: object, name: str) -> Claim:
        """The whole state of the pair: its slots belong together."""
        assert isinstance(obj, Slot)
        return claim_of_pair(obj.optimizer, obj.parameter)


def claim_of_pair(optimizer: object, parameter: object) -> Claim:
    """The state that an optimizer has for a parameter."""
    return parameter, f"slots of {id(optimizer)}"


def stepped_by(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has the state: for a `ZeroRedundancyOptimizer`, the one over this rank's share of parameters.

    Its groups are those of the outer one, which sets the inner one's options at each step.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        inner: torch.optim.Optimizer = optimizer.optim
        return inner
    return optimizer


def stepped_elsewhere(optimizer: object) -> frozenset[int]:
    """`id()` of the parameters that other ranks update, so that this rank has no state for them."""
    assert isinstance(optimizer, torch.optim.Optimizer)
    inner = stepped_by(optimizer)
    if inner is optimizer:
        return frozenset()
    own = {id(parameter) for parameter in parameters_of(inner)}
    return frozenset(id(parameter) for parameter in parameters_of(optimizer) if id(parameter) not in own)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All parameters, in order of the groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def flat_size(optimizer: object) -> int | None:
    """Length of the state vectors of LBFGS, which span all parameters of this rank; None for other optimizers.

    Such state does not say which part of it belongs to which parameter, so it cannot be resharded.
    """
    if not isinstance(optimizer, torch.optim.LBFGS):
        return None
    return sum(parameter.numel() for parameter in parameters_of(optimizer))


#: The slots of LBFGS that are state vectors.
FLAT_SLOTS = ("d", "prev_flat_grad")


def steps_on_device(optimizer: object, restored: Mapping[int, Mapping[str, object]]) -> frozenset[int]:
    """`id()` of the parameters whose step count is on their own device; by default an optimizer has it on the CPU.

    Args:
        optimizer: The optimizer.
        restored: By `id()` of a parameter group, the options that it is about to get.
    """
    assert isinstance(optimizer, torch.optim.Optimizer)
    options = [(group, {**group, **restored.get(id(group), {})}) for group in optimizer.param_groups]
    groups = [group for group, now in options if now.get("capturable") or now.get("fused")]
    return frozenset(id(parameter) for group in groups for parameter in group["params"])


def like_parameter(value: TensorValue, parameter: TensorValue) -> TensorValue:
    """The value of a slot; with the local shape of a parameter in a `ShardedVariable` it is sharded alike."""
    if value.boxes == parameter.boxes and value.global_shape == parameter.global_shape:
        return value
    if value.tensor.shape != parameter.tensor.shape:
        return value
    return TensorValue(value.name, value.tensor, parameter.global_shape, parameter.boxes, value.in_place)


def set_slots(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, slots: Mapping[str, object]) -> None:
    """Give a parameter exactly these slots; none means that its state is absent, as before the first step."""
    state: MutableMapping[torch.Tensor, object] = stepped_by(optimizer).state
    if slots:
        state[parameter] = dict(slots)
    else:
        state.pop(parameter, None)
