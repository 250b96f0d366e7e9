"""`nn.Module`: children, parameters, persistent buffers, extra state."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from distckpt.graph.adapters.base import Adapter, Part, Problem
from distckpt.graph.adapters.registry import unwrap
from distckpt.graph.adapters.stateful import flatten, unflatten
from distckpt.graph.values import Edge, UnsaveableError, Value

_EXTRA_STATE = ".extra_state"


class ModuleAdapter(Adapter):
    """The parts that `state_dict()` would list, by the same names."""

    def handles(self, cls: type) -> bool:
        """Modules of every class."""
        return issubclass(cls, torch.nn.Module)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Children, then parameters, then persistent buffers, then extra state.

        Raises:
            UnsaveableError: It is a FullyShardedDataParallel that shards.
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
        if type(obj)._save_to_state_dict is not torch.nn.Module._save_to_state_dict:
            yield from _beyond(obj)
        if type(obj).get_extra_state is not torch.nn.Module.get_extra_state:
            yield from flatten(obj.get_extra_state(), _EXTRA_STATE, _EXTRA_STATE)

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """Extra state is restored as a whole: the file decides which tensors it has."""
        return _EXTRA_STATE in live and name.startswith(f"{_EXTRA_STATE}/")

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand the extra state back."""
        assert isinstance(obj, torch.nn.Module)
        obj.set_extra_state(unflatten(saved, _EXTRA_STATE))


def _beyond(module: torch.nn.Module) -> Iterable[Problem]:
    """What a module with a `state_dict()` of its own making has in it beside the parts above, as quantized ones do."""
    own: Any = OrderedDict()
    own._metadata = OrderedDict()
    module._save_to_state_dict(own, "", True)
    known = {*module._parameters, *module._buffers, "_extra_state"} - module._non_persistent_buffers_set
    lost = [name for name in own if name not in known and name.partition(".")[0] not in module._modules]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        yield Problem(
            "",
            f"the state_dict() of this {type(module).__qualname__} also has {lost[0]!r}{more}, which is neither a "
            "parameter nor a persistent buffer and would be lost. Give the class get_extra_state() and "
            "set_extra_state(), or leave the module out and track those beside it one by one.",
        )


def _reshard(module: torch.nn.Module) -> None:
    """Free what a module of `fully_shard` has gathered, as torch's own state_dict() does.

    After a forward without backward its parameters are the gathered ones: others than the optimizer's, and copies of
    what a restore writes.
    """
    # Whoever has such a module has loaded its class; loading it here would take a second.
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if cls is not None and isinstance(module, cls):
        module.reshard()
