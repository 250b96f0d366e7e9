"""`PreemptionGuard`: one signal, one clock, and all ranks stop at the same step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from distckpt.cluster import PreemptionGuard
from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CollectiveError, LayoutError, RankTimeoutError

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISTCKPT_DEADLINE", "SLURM_JOB_END_TIME", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def steps_until_stop(guard: PreemptionGuard, limit: int, step: Callable[[int], None]) -> int:
    for number in range(limit):
        step(number)
        if guard.should_stop():
            return number
    return limit


@pytest.mark.parametrize("signalled", [0, -1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(comm: Any, agree: Callable[..., None], signalled: int) -> None:
    last = signalled % comm.size

    def step(number: int) -> None:
        if comm.rank == last and number == 5:
            os.kill(os.getpid(), signal.SIGUSR2)

    with PreemptionGuard(comm) as guard:
        agree(steps_until_stop(guard, 20, step) == 5)
        agree((guard.reason, guard.exit_code) == (f"SIGUSR2 on rank {last}", 85), guard.reason)


def test_a_signal_that_comes_at_any_moment_stops_all_at_the_same_step(comm: Any, agree: Callable[..., None]) -> None:
    with PreemptionGuard(comm, signals=[signal.SIGALRM]) as guard:
        if comm.rank == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        stopped = steps_until_stop(guard, 1_000_000, lambda _: None)
        agree(len(set(comm.allgather(stopped))) == 1)
        agree(0 < stopped < 1_000_000)


def test_different_signals_are_all_named(comm: Any, agree: Callable[..., None]) -> None:
    with PreemptionGuard(comm) as guard:
        os.kill(os.getpid(), signal.SIGTERM if comm.rank == 0 else signal.SIGUSR2)
        assert guard.should_stop()
        agree(guard.reason == "SIGTERM on rank 0; SIGUSR2 on rank 1", guard.reason)


def test_only_the_clock_of_rank_0_counts(comm: Any, agree: Callable[..., None]) -> None:
    soon, late = time.time() + 10, time.time() + 10_000
    with PreemptionGuard(comm, deadline=late if comm.rank == 0 else soon, margin=60) as guard:
        agree(not guard.should_stop())
    with PreemptionGuard(comm, deadline=soon if comm.rank == 0 else late, margin=60) as guard:
        agree(guard.should_stop())
        agree("s left of the job, 60 s needed for a step and a save on rank 0" in guard.reason, guard.reason)


@pytest.mark.parametrize("given", [0, 1])
def test_a_deadline_given_on_some_ranks_keeps_the_ranks_together(
    comm: Any, agree: Callable[..., None], given: int
) -> None:
    deadline = time.time() + 10_000 if comm.rank == given else None
    with PreemptionGuard(comm, deadline=deadline, margin=60, timeout=2) as guard:
        agree([guard.should_stop() for _ in range(3)] == [False] * 3)


def test_a_deadline_of_the_environment_that_is_none_is_the_same_error_on_all(
    comm: Any, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCKPT_DEADLINE", "noon")
    with (
        PreemptionGuard(comm) as guard,
        pytest.raises(CollectiveError, match="rank 0: ValueError: DISTCKPT_DEADLINE") as error,
    ):
        guard.should_stop()
    agree(len(set(comm.allgather(str(error.value)))) == 1)


def test_a_failure_on_one_rank_is_the_same_error_on_all(comm: Any, agree: Callable[..., None]) -> None:
    broken = SimpleNamespace(save_seconds=-1.0)
    with (
        PreemptionGuard(comm, deadline=time.time() + 1000, manager=broken) as guard,
        pytest.raises(CollectiveError, match="rank 0: ValueError: save_seconds") as error,
    ):
        guard.should_stop()
    agree(error.value.failures.keys() == {0})


def test_a_rank_that_does_not_come_is_named(comm: Any, agree: Callable[..., None]) -> None:
    last = comm.size - 1
    with PreemptionGuard(comm, timeout=0.5) as guard:
        agree(not guard.should_stop())
        if comm.rank == last:
            comm.Barrier()
            with pytest.raises(RankTimeoutError):  # the others gave up
                guard.should_stop()
        else:
            with pytest.raises(RankTimeoutError, match=f"should_stop: 1 of {comm.size} ranks did not come") as error:
                guard.should_stop()
            assert error.value.absent == (last,)
            comm.Barrier()
        comm.Barrier()
        agree(not guard.should_stop(), "the next call in which all take part works")


def test_a_rank_in_another_call_is_an_error_on_all(comm: Any, agree: Callable[..., None]) -> None:
    with PreemptionGuard(comm) as guard:
        agree(not guard.should_stop())
        coordinator = Coordinator(comm)
        call = (lambda: coordinator.arrive("save", 0, 0, 60.0)) if comm.rank == 0 else guard.should_stop
        with pytest.raises(LayoutError, match="different calls: save on rank 0; should_stop on rank 1"):
            call()
