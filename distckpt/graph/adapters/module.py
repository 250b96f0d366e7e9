"""`nn.Module`: children, parameters, persistent buffers, extra state."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import torch

from distckpt.graph.adapters.base import Adapter, Part
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
        if type(obj).get_extra_state is not torch.nn.Module.get_extra_state:
            yield from flatten(obj.get_extra_state(), _EXTRA_STATE, _EXTRA_STATE)

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """Extra state is restored as a whole: the file decides which tensors it has."""
        return _EXTRA_STATE in live and name.startswith(f"{_EXTRA_STATE}/")

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Hand the extra state back."""
        assert isinstance(obj, torch.nn.Module)
        obj.set_extra_state(unflatten(saved, _EXTRA_STATE))


def _reshard(module: torch.nn.Module) -> None:
    """Free what a module of `fully_shard` has gathered, as torch's own state_dict() does.

    After a forward without backward its parameters are the gathered ones: others than the optimizer's, and copies of
    what a restore writes.
    """
    # Whoever has such a module has loaded its class; loading it here would take a second.
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if cls is not None and isinstance(module, cls):
        module.reshard()
