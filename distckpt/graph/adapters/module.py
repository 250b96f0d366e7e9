"""`nn.Module`: children, parameters, persistent buffers, extra state."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from distckpt.graph.adapters.base import Adapter, Part
from distckpt.graph.adapters.registry import unwrap
from distckpt.graph.adapters.stateful import flatten, state_dict_or_none, unflatten
from distckpt.graph.claims import Claim
from distckpt.graph.values import Edge, UnsaveableError, Value
from distckpt.tensor_bytes import PLAIN_CLASSES

_EXTRA_STATE = ".extra_state"


class ModuleAdapter(Adapter):
    """The parts that `state_dict()` would list, by the same names."""

    def handles(self, cls: type) -> bool:
        """Modules of every class."""
        return issubclass(cls, torch.nn.Module)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Children, then parameters, then persistent buffers, then extra state.

        Raises:
            UnsaveableError: It is a FullyShardedDataParallel that shards, or its own `state_dict()` has more.
        """
        assert isinstance(obj, torch.nn.Module)
        _reshard(obj)
        if "_fsdp_wrapped_module" in obj._modules:  # where it is transparent, the walk passes over it
            raise UnsaveableError(
                "FullyShardedDataParallel keeps its parameters in flat parts. Use fully_shard() (FSDP2) instead, or "
                "sharding_strategy=NO_SHARD with use_orig_params=True."
            )
        for name, module in obj._modules.items():
            if module is not None:
                yield Edge(name, unwrap(module))
        for name, parameter in obj._parameters.items():
            if parameter is not None:
                yield Edge(name, parameter)
        transient = obj._non_persistent_buffers_set
        for name, buffer in obj._buffers.items():
            if buffer is not None and name not in transient:
                yield Edge(name, buffer, buffer=True)
        _require_parts(obj)
        if type(obj).get_extra_state is not torch.nn.Module.get_extra_state:
            yield from flatten(obj.get_extra_state(), _EXTRA_STATE, _EXTRA_STATE)

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """Extra state is restored as a whole: the file decides which tensors it has."""
        return _EXTRA_STATE in live and name.startswith(f"{_EXTRA_STATE}/")

    def structure_of(self, name: str) -> str | None:
        """The extra state."""
        return _EXTRA_STATE if name.partition("/")[0] == _EXTRA_STATE else None

    def claim(self, obj: object, name: str) -> Claim:
        """The whole extra state: a module has no other values of its own."""
        return obj, _EXTRA_STATE

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand the extra state back."""
        assert isinstance(obj, torch.nn.Module)
        obj.set_extra_state(unflatten(saved, _EXTRA_STATE))


def _require_parts(module: torch.nn.Module) -> None:
    """Refuse a module of whose `state_dict()` the parts would lose something."""
    cls, found = type(module), list[str]()
    if cls._save_to_state_dict is not torch.nn.Module._save_to_state_dict:
        found += _beyond_parts(module)
    if module._state_dict_hooks or cls.state_dict is not torch.nn.Module.state_dict:
        found += _beyond_tree(module)
    lost = list(dict.fromkeys(found))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UnsaveableError(
            f"the state_dict() of this {cls.__qualname__} also has {lost[0]!r}{more}, which is neither a "
            "parameter nor a persistent buffer and would be lost. Give the class get_extra_state() and "
            "set_extra_state(), or leave the module out and track those beside it one by one."
        )


def _beyond_parts(module: torch.nn.Module) -> list[str]:
    """What a module's own `_save_to_state_dict` adds to the parts, as that of quantized ones does."""
    own: Any = OrderedDict()
    own._metadata = OrderedDict()
    try:
        module._save_to_state_dict(own, "", True)
    except Exception:  # as in `state_dict_or_none`
        return []
    known = {*module._parameters, *module._buffers, "_extra_state"} - module._non_persistent_buffers_set
    return [name for name in own if name not in known and name.partition(".")[0] not in module._modules]


def _beyond_tree(module: torch.nn.Module) -> list[str]:
    """What hooks of `state_dict()`, or a `state_dict()` of the module's own, add to the parts of it and its children.

    They may also rename, convert and leave out: what is known by its name or its memory is no addition, nor are
    tensors that stand for as many that are gone.
    """
    state = state_dict_or_none(module)
    if not isinstance(state, Mapping):  # one of the module's own making
        return []
    known = dict(_persistent(module))
    places = {_place(tensor) for tensor in known.values()}
    new = [
        name
        for name, value in state.items()
        if name not in known and _place(value) not in places and str(name).rpartition(".")[2] != "_extra_state"
    ]
    tensors = [name for name in new if isinstance(state[name], torch.Tensor)]
    left = {_place(value) for value in state.values()}
    gone = [name for name, tensor in known.items() if name not in state and _place(tensor) not in left]
    return new if len(tensors) > len(gone) else [name for name in new if name not in tensors]


def _persistent(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of a module and its children, by their names in `state_dict()`."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is not None and name not in child._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _place(value: object) -> object:
    """Identifies the memory of a tensor, of which `state_dict()` gives another object; other values by identity."""
    local: Any = getattr(value, "_local_tensor", value)
    if type(local) not in PLAIN_CLASSES or local.is_meta:
        return id(value)
    return local.device, local.data_ptr(), local.shape


def _reshard(module: torch.nn.Module) -> None:
    """Free what a module of `fully_shard` has gathered, as torch's own state_dict() does.

    After a forward without backward its parameters are the gathered ones: others than the optimizer's, and copies of
    what a restore writes.
    """
    # Whoever has such a module has loaded its class; loading it here would take a second.
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if cls is not None and isinstance(module, cls):
        module.reshard()
