"""Snapshots that are completed while the program computes: what may wait, and the optimizer step that waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.graph.adapters.optimizer import Slot, parameters_of
from distckpt.graph.trackable import ShardedVariable
from distckpt.graph.values import TensorValue
from distckpt.graph.view import Capture, LiveGraph, LiveNode
from distckpt.layout.records import SavePlan
from distckpt.storage.snapshot import Snapshot, Watch


def watches_of(captured: Capture, plan: SavePlan) -> list[Watch | None]:
    """For each box that this rank writes: how to see that it changed, where it may be copied later; else None.

    Those are the parameters of the tracked optimizers, and their slots: nothing but a step changes them. Parameters
    that no optimizer knows may be anything, such as averages that the program updates when it likes.
    """
    graph = captured.graph
    owned = _owned(graph)
    keys = captured.tensor_keys(plan.keys)
    nodes = [node for node, value in graph.values() if type(value) is TensorValue]
    watches: dict[int, Watch | None] = {}
    for item in plan.items:
        index = item.tensor
        if index not in watches:
            live = _live_tensor(nodes[index], owned)
            watches[index] = _watch(keys[index], live, captured.tensors[index].tensor)
    return [watches[item.tensor] for item in plan.items]


def _owned(graph: LiveGraph) -> set[int]:
    """`id()` of the objects that are parameters of tracked optimizers."""
    optimizers = [node.obj for node in graph.nodes if isinstance(node.obj, torch.optim.Optimizer)]
    return {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}


def _live_tensor(node: LiveNode, owned: set[int]) -> torch.Tensor | None:
    """The tensor of a node that only an optimizer step changes; None for any other node."""
    if isinstance(node.obj, Slot):
        state: Any = node.obj.optimizer.state
        slot = state[node.obj.parameter][node.obj.name]
        return slot if isinstance(slot, torch.Tensor) else None
    tensor = node.obj.tensor if isinstance(node.obj, ShardedVariable) else node.obj
    return tensor if isinstance(tensor, torch.Tensor) and id(tensor) in owned else None


def _watch(key: str, live: torch.Tensor | None, held: torch.Tensor) -> Watch | None:
    if live is None or live.is_inference() or held.is_inference():  # torch does not count changes of these
        return None
    return Watch.of(key, live, held)


# ---- the step waits ----------------------------------------------------------------------------------------------


class _Protector:
    """Snapshots that optimizer steps wait for."""

    def __init__(self) -> None:
        self._incomplete: list[Snapshot] = []
        self._hook: Any = None

    def add(self, snapshot: Snapshot) -> None:
        """Let the next step of any optimizer wait for the snapshot. Main thread."""
        if snapshot.is_complete:
            return
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._before_step)
        self._incomplete = [*self._still_incomplete(), snapshot]

    def _before_step(self, *_: Any) -> None:
        """Copy what is left. The thread in the background may be short of cores, so this one helps."""
        if self._incomplete:
            for snapshot in self._incomplete:
                snapshot.complete()
            self._incomplete = self._still_incomplete()

    def _still_incomplete(self) -> list[Snapshot]:
        return [snapshot for snapshot in self._incomplete if not snapshot.is_complete]


_PROTECTOR = _Protector()


def protect(snapshot: Snapshot) -> None:
    """Let the next optimizer step wait until a snapshot is complete. Main thread; raises nothing foreseeable."""
    _PROTECTOR.add(snapshot)
