"""From a live object to its adapter. A new kind of object needs one module here and one line in `_adapters`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
    from distckpt.graph.adapters.tensor import ArrayAdapter, ShardedVariableAdapter, TensorAdapter
    from distckpt.graph.adapters.trackable import TrackableAdapter

    return (
        TensorAdapter(),
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
    if cls not in _adapter_of_class:
        _adapter_of_class[cls] = next((adapter for adapter in _adapters() if adapter.handles(cls)), None)
    return _adapter_of_class[cls]


def refusal(obj: object) -> str | None:
    """Why an object cannot be saved, and what to do.

    None for what can be: python values, objects with an adapter, and containers with such parts.
    """
    try:
        if is_python_value(obj) or _is_node(obj):
            return None
        remedy = (
            ". Pass a tensor, module, optimizer, an object with state_dict() and load_state_dict(), or python values."
        )
    except RecursionError:
        remedy = f": {too_deep()}, or keep it out with NoDependency."
    return f"a {type(obj).__module__}.{type(obj).__qualname__} cannot be checkpointed{remedy}"


def is_too_deep(obj: object) -> bool:
    """Whether Python's stack is too short to look into a container."""
    try:
        is_python_value(obj) or _is_node(obj)
    except RecursionError:
        return True
    return False


def _is_node(obj: object) -> bool:
    obj = unwrap(obj)
    adapter = adapter_for(obj)
    if adapter is None:
        return False
    return not adapter.is_container or _any_checkpointable(adapter.elements(obj))


def _any_checkpointable(elements: Iterable[object]) -> bool:
    items = [element for element in elements if not isinstance(element, NoDependency)]
    # One trackable part makes the whole a node: its other parts are then reported instead of silently left out.
    return all(is_python_value(item) for item in items) or any(_is_node(item) for item in items)
