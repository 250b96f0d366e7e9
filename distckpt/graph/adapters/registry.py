"""From a live object to its adapter. A new kind of object needs one module here and one line in `_adapters`."""

from __future__ import annotations

import functools
from typing import Any

from distckpt.graph.adapters.base import Adapter
from distckpt.graph.python_value import is_python_value, too_deep
from distckpt.graph.trackable import NoDependency

#: Classes that only wrap a module, and where they keep it: (module, class) to attribute. By name, because importing
#: torch._dynamo to test for OptimizedModule takes seconds.
_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
    ): "_checkpoint_wrapped_module",
}


_FSDP1_ATTRIBUTE = "_fsdp_wrapped_module"


@functools.cache
def _adapters() -> tuple[Adapter, ...]:
    # Imported here because adapters ask the registry about the parts of their objects.
    from distckpt.graph.adapters.containers import MappingAdapter, SequenceAdapter
    from distckpt.graph.adapters.module import ModuleAdapter
    from distckpt.graph.adapters.optimizer import GroupAdapter, GroupsAdapter, OptimizerAdapter
    from distckpt.graph.adapters.rng import GeneratorAdapter, PerRankAdapter, RNGStateAdapter
    from distckpt.graph.adapters.stateful import PythonStateAdapter, StatefulAdapter
    from distckpt.graph.adapters.tensor import (
        ArrayAdapter,
        ShardedVariableAdapter,
        TensorAdapter,
        UninitialisedAdapter,
    )
    from distckpt.graph.adapters.trackable import TrackableAdapter

    return (
        UninitialisedAdapter(),
        TensorAdapter(),  # its objects are tensors, too
        ModuleAdapter(),
        TrackableAdapter(),
        ShardedVariableAdapter(),
        PerRankAdapter(),
        RNGStateAdapter(),
        GeneratorAdapter(),
        ArrayAdapter(),
        OptimizerAdapter(),
        GroupsAdapter(),
        GroupAdapter(),
        PythonStateAdapter(),
        MappingAdapter(),
        SequenceAdapter(),
        StatefulAdapter(),  # last: it takes whatever has state_dict and load_state_dict
    )


_adapter_of_class: dict[type, Adapter | None] = {}
_wrapped_attribute: dict[type, str | None] = {}


def _find_wrapped_attribute(cls: type) -> str | None:
    names = ((base.__module__, base.__qualname__) for base in cls.__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def unwrap(obj: Any) -> Any:
    """The object inside any number of transparent wrappers (DDP, `torch.compile`, activation checkpointing).

    A `FullyShardedDataParallel` that shards is none: what is inside has parts of flattened parameters.
    """
    while True:
        cls = type(obj)
        if cls not in _wrapped_attribute:
            _wrapped_attribute[cls] = _find_wrapped_attribute(cls)
        attribute = _wrapped_attribute[cls]
        if attribute is None or (attribute == _FSDP1_ATTRIBUTE and is_flattened(obj)):
            return obj
        obj = getattr(obj, attribute)


def is_flattened(wrapper: Any) -> bool:
    """Whether a `FullyShardedDataParallel` keeps parameters as parts of a flat one, which no module shows whole."""
    handle = wrapper._handle
    return handle is not None and (handle.uses_sharded_strategy or not handle._use_orig_params)


def adapter_for(obj: object) -> Adapter | None:
    """The adapter of an unwrapped object; None when it can be no node of the graph."""
    cls = type(obj)
    try:
        return _adapter_of_class[cls]
    except KeyError:
        found = _adapter_of_class[cls] = next((adapter for adapter in _adapters() if adapter.handles(cls)), None)
        return found


def refusal(obj: object) -> str | None:
    """Why an object cannot be saved, and what to do.

    None for what can be: python values, objects with an adapter, and containers with such parts.
    """
    try:
        if is_python_value(obj) or _is_node(obj):
            return None
        part = _culprit(obj)
        remedy = (
            f"{part}. Pass a tensor, module, optimizer, an object with state_dict() and load_state_dict(), or python "
            f"values{', or keep it out with NoDependency' if part else ''}."
        )
    except RecursionError:
        remedy = f": {too_deep()}, or keep it out with NoDependency."
    return f"a {_kind(obj)} cannot be checkpointed{remedy}"


def _culprit(obj: object) -> str:
    """Which part of a container that cannot be saved is in the way; empty where it is the object itself."""
    path, part = "", obj
    while True:
        found = next((item for item in _items(part) if not is_python_value(item[1])), None)
        if found is None:
            return f", for {path} in it is a {_kind(part)}" if path else ""
        path, part = f"{path}[{found[0]!r:.60}]", found[1]


def _kind(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def is_missed(obj: object) -> bool:
    """Whether the user should hear that an object which cannot be saved is left out: it is a container that also has
    python values, or too many levels to look into.
    """
    try:
        return any(is_python_value(element) or is_missed(element) for _, element in _items(obj))
    except RecursionError:
        return True


def _is_node(obj: object) -> bool:
    obj = unwrap(obj)
    adapter = adapter_for(obj)
    if adapter is None:
        return False
    if not adapter.is_container:
        return True
    elements = [element for _, element in _items(obj)]
    # One trackable part makes the whole a node: its other parts are then reported instead of silently left out.
    return all(map(is_python_value, elements)) or any(map(_is_node, elements))


def _items(obj: object) -> list[tuple[object, object]]:
    """What a container holds, by key or index, but for what opts out; nothing for other objects."""
    adapter = adapter_for(obj)
    if adapter is None or not adapter.is_container:
        return []
    return [item for item in adapter.elements(obj) if not isinstance(item[1], NoDependency)]
