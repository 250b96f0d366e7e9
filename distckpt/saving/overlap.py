"""`SaveOptions(overlap=True)`: which tensors are copied after the call, and how optimizer steps wait for the copies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.graph.adapters.optimizer import Slot
from distckpt.graph.trackable import ShardedVariable
from distckpt.graph.values import TensorValue
from distckpt.graph.view import LiveGraph, LiveNode
from distckpt.storage.snapshot import Snapshot, Watch


@dataclass(slots=True)
class Deferral:
    """Which tensors may be copied after the call.

    Attributes:
        later: For each tensor of this rank, in order, whether it may.
        watch: Finds changes of those tensors.
    """

    later: list[bool] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)


def deferral_of(graph: LiveGraph, keys: Sequence[str], *, overlap: bool) -> Deferral:
    """Parameters of the tracked optimizers, and their slots, may be copied later: nothing but a step changes them.

    Parameters that no optimizer knows may be anything, such as averages that the program updates when it likes.

    Args:
        graph: What is saved.
        keys: Checkpoint key of each tensor in order.
        overlap: As `SaveOptions.overlap`; without it nothing may be copied later.
    """
    if not overlap:
        return Deferral([False] * len(keys))
    deferral = Deferral()
    later, watch = deferral.later, deferral.watch
    owned = {member for node in graph.nodes for member in node.parameters or ()}
    for number, node in enumerate(graph.nodes):
        live = _live_tensor(node, number in owned)
        for value in node.values.values():
            if type(value) is TensorValue:
                later.append(live is not None and _begin_watch(watch, keys[len(later)], live, value.tensor))
    return deferral


def _live_tensor(node: LiveNode, owned: bool) -> torch.Tensor | None:
    """The tensor of a parameter or slot as the program knows it; None for a slot that is a structure."""
    live = node.obj
    if type(live) is Slot:
        live = live.value
    elif not owned:
        return None
    elif isinstance(live, ShardedVariable):
        live = live.tensor
    return live if isinstance(live, torch.Tensor) else None


def _begin_watch(watch: Watch, key: str, live: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether torch counts the changes of a tensor, which is watched from now on."""
    try:
        watch.add(key, live)
        if held is not live:
            watch.add(key, held)
    except RuntimeError:  # of an inference tensor it does not
        return False
    return True


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
        """Copy what is left. The thread in the background may be short of cores, so this one helps.

        Ctrl-C is held meanwhile: the thread would wait for ever for a part that was taken and not copied.
        """
        if self._incomplete:
            with INTERRUPTS.held():
                for snapshot in self._incomplete:
                    snapshot.complete()
            self._incomplete = self._still_incomplete()

    def _still_incomplete(self) -> list[Snapshot]:
        return [snapshot for snapshot in self._incomplete if not snapshot.is_complete]

    def forget(self) -> None:
        """Let no step wait any more."""
        self._incomplete = []


_PROTECTOR = _Protector()
# A forked process has neither the thread that copies nor the memory that is copied into.
os.register_at_fork(after_in_child=_PROTECTOR.forget)


def protect(snapshot: Snapshot) -> None:
    """Let the next optimizer step wait until a snapshot is complete. Main thread; raises nothing foreseeable."""
    _PROTECTOR.add(snapshot)
