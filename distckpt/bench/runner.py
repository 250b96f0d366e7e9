"""Interleaved rounds: each round measures every trial once, in alternating order; the largest rank's value counts."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

from distckpt.bench.memory import peak_nbytes
from distckpt.errors import CollectiveError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Trial(Protocol):
    """An operation to measure repeatedly. Every method is collective over the process group.

    `interleave` calls `prepare`, `run` and `clean` in each round, and measures `run`.
    """

    @property
    def name(self) -> str:
        """Name in the report."""

    @property
    def kind(self) -> str:
        """Distinguishes it from the usual trials of its case, such as "first save"; else empty."""

    @property
    def is_rival(self) -> bool:
        """`Competitor.is_rival` of what it measures."""

    def prepare(self) -> None:
        """Prepare a run, unmeasured."""

    def run(self) -> None:
        """Do the operation that is measured."""

    def clean(self) -> None:
        """Clean up after a run, unmeasured."""


TrialT = TypeVar("TrialT", bound=Trial)
Meter = Callable[[TrialT], float]


def interleave(
    trials: Sequence[TrialT], rounds: int, meter: Meter[TrialT], failed: dict[str, str]
) -> dict[str, list[float]]:
    """Measure every trial once per round, in alternating order. Collective over the process group.

    Args:
        trials: The trials, with different names.
        rounds: Number of rounds.
        meter: Runs a trial and returns the measured value, such as `seconds` or `extra_mib`.
        failed: Names of rivals that have failed, with the reasons; they are left out. Those that fail now are added.

    Returns:
        For each trial's name: its measured values, one per round, the same on all ranks.

    Raises:
        CollectiveError: A trial failed that is no rival's.
    """
    samples: dict[str, list[float]] = {trial.name: [] for trial in trials}
    for number in range(rounds):
        for trial in trials if number % 2 == 0 else reversed(trials):
            if trial.name in failed:
                continue
            with failures_of(trial.name, failed, is_rival=trial.is_rival):
                agreed(f"prepare {trial.name}", trial.prepare)
                gc.collect()
                samples[trial.name].append(meter(trial))
                agreed(f"clean {trial.name}", trial.clean)
    return {name: values for name, values in samples.items() if name not in failed}


@contextmanager
def failures_of(name: str, failed: dict[str, str], *, is_rival: bool) -> Iterator[None]:
    """Go on after the body if it fails and belongs to a rival, which is then among the failed. Local.

    Args:
        name: Name in the report.
        failed: Receives the reason.
        is_rival: `Competitor.is_rival`.
    """
    try:
        yield
    except CollectiveError as error:
        if not is_rival:
            raise
        rank, text = min(error.failures.items())
        failed[name] = f"failed on rank {rank}: {text}"


def seconds(trial: Trial) -> float:
    """Seconds from a barrier to the return of `run` on the slowest rank. Collective over the process group."""
    dist.barrier()
    return over_ranks(agreed(trial.name, _clock, trial), dist.ReduceOp.MAX)


def extra_mib(trial: Trial) -> float:
    """Peak resident memory during a run beyond that before it, in MiB, on the rank with the most. Collective."""
    dist.barrier()
    return over_ranks(agreed(trial.name, peak_nbytes, trial.run), dist.ReduceOp.MAX) / 2**20


def agreed(step: str, action: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run an action; if it raises on any rank, raise one error on all. Collective over the process group.

    Args:
        step: Name of the action, for the error.
        action: The function to run.
        *args: Its arguments.

    Returns:
        The result of the action on this rank.

    Raises:
        CollectiveError: The action raised on at least one rank. The same on all ranks.
    """
    cause = None
    try:
        result = action(*args)
    except Exception as error:  # the other ranks must learn of any exception
        cause = error
    if over_ranks(cause is not None, dist.ReduceOp.MAX):
        texts = gather(f"{type(cause).__name__}: {cause}" if cause else None)
        raise CollectiveError(step, {rank: text for rank, text in enumerate(texts) if text}) from cause
    return result


def settle_disks() -> None:
    """Write all dirty pages to the disks, from one rank per node, so that the disks are idle. Collective."""
    if leads_its_node():
        os.sync()
    dist.barrier()


def finish_device_work() -> None:
    """Wait for the work queued on this rank's GPU, if it has one and has used it. Local."""
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
    """The values of all ranks, in rank order. Collective over the process group."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _clock(trial: Trial) -> float:
    finish_device_work()
    start = time.perf_counter()
    trial.run()
    finish_device_work()
    return time.perf_counter() - start
