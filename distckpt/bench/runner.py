"""Interleaved rounds: every trial once per round, in alternating order; the slowest or largest rank counts."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

from distckpt.bench.memory import peak_nbytes
from distckpt.errors import CollectiveError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Trial(Protocol):
    """Something to measure again and again. Every method is collective over the process group."""

    @property
    def name(self) -> str:
        """How the report calls it."""

    @property
    def kind(self) -> str:
        """What sets it apart from the usual trials of its case, such as "first save"; else empty."""

    def prepare(self) -> None:
        """What must be done before, unmeasured."""

    def run(self) -> None:
        """What is measured."""

    def clean(self) -> None:
        """What must be done after, unmeasured."""


TrialT = TypeVar("TrialT", bound=Trial)
Meter = Callable[[TrialT], float]


def interleave(trials: Sequence[TrialT], rounds: int, meter: Meter[TrialT]) -> dict[str, list[float]]:
    """Measure every trial once per round, in alternating order. Collective over the process group.

    Args:
        trials: What to measure; their names differ.
        rounds: How often.
        meter: What to measure of a run, such as `seconds` or `extra_mib`.

    Returns:
        Name of a trial to its measured values, one per round, the same on all ranks.
    """
    samples: dict[str, list[float]] = {trial.name: [] for trial in trials}
    for number in range(rounds):
        for trial in trials if number % 2 == 0 else reversed(trials):
            agreed(f"prepare {trial.name}", trial.prepare)
            gc.collect()
            samples[trial.name].append(meter(trial))
            agreed(f"clean {trial.name}", trial.clean)
    return samples


def seconds(trial: Trial) -> float:
    """From a barrier to the return on the slowest rank. Collective over the process group."""
    dist.barrier()
    return over_ranks(agreed(trial.name, _clock, trial), dist.ReduceOp.MAX)


def extra_mib(trial: Trial) -> float:
    """Peak resident memory during the run beyond that before it, in MiB, of the rank with the most. Collective."""
    dist.barrier()
    return over_ranks(agreed(trial.name, peak_nbytes, trial.run), dist.ReduceOp.MAX) / 2**20


def agreed(step: str, action: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run an action; where it raises on any rank, raise one error on all. Collective over the process group.

    Args:
        step: What the error calls it.
        action: What to run.
        *args: Its arguments.

    Returns:
        What the action returns on this rank.

    Raises:
        CollectiveError: The action raised on at least one rank. The same on all ranks.
    """
    cause = None
    try:
        result = action(*args)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        cause = error
    if over_ranks(cause is not None, dist.ReduceOp.MAX):
        texts = gather(f"{type(cause).__name__}: {cause}" if cause else None)
        raise CollectiveError(step, {rank: text for rank, text in enumerate(texts) if text}) from cause
    return result


def settle_disks() -> None:
    """Have everything on the disks, so that they are at rest: one rank per node sees to it. Collective."""
    if leads_its_node():
        os.sync()
    dist.barrier()


def finish_device_work() -> None:
    """Wait for what this rank's GPU has to do; where it has none, or was not used yet, for nothing. Local."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def leads_its_node() -> bool:
    """Whether this is the first rank of its machine. Collective over the process group."""
    return gather(platform.node()).index(platform.node()) == dist.get_rank()


def over_ranks(value: float, op: dist.ReduceOp.RedOpType) -> float:
    """Reduce one number over the ranks. Collective over the process group."""
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total, op)
    return float(total.item())


def gather(value: T) -> list[T]:
    """The value of every rank, in their order. Collective over the process group."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _clock(trial: Trial) -> float:
    finish_device_work()
    start = time.perf_counter()
    trial.run()
    finish_device_work()
    return time.perf_counter() - start
