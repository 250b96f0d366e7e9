"""`PreemptionGuard` on one rank: signals, deadline, margin."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distckpt.cluster import EXIT_CODE, PreemptionGuard
from distckpt.errors import CollectiveError
from tests.bare import bare

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)
MakeGuard = Callable[..., PreemptionGuard]


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISTCKPT_DEADLINE", "SLURM_JOB_END_TIME", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_guard() -> Iterator[MakeGuard]:
    made: list[PreemptionGuard] = []

    def make(**options: Any) -> PreemptionGuard:
        made.append(PreemptionGuard(**options))
        return made[-1]

    yield make
    for guard in reversed(made):
        guard.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_stops_at_the_next_step_and_for_good(make_guard: MakeGuard, number: signal.Signals) -> None:
    guard = make_guard()
    assert not guard.should_stop()
    assert (guard.reason, guard.exit_code) == ("", 0)
    os.kill(os.getpid(), number)
    assert guard.reason == "", "the handler only sets a flag"
    assert guard.should_stop()
    assert guard.should_stop()
    assert (guard.reason, guard.exit_code) == (f"{number.name} on rank 0", EXIT_CODE)


def test_other_signals_are_left_alone_and_close_gives_back_what_was_there() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with PreemptionGuard(signals=[signal.SIGUSR1]):
        assert [signal.getsignal(number) for number in SIGNALS[:2]] == before[:2]
        assert signal.getsignal(signal.SIGUSR1) != before[2]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_close_leaves_a_handler_that_came_later(make_guard: MakeGuard) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    guard = make_guard()
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        guard.close()
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("as_datetime", [False, True])
def test_a_deadline_nearer_than_the_margin_stops(make_guard: MakeGuard, as_datetime: bool) -> None:
    def deadline(seconds: float) -> float | datetime:
        return datetime.now().astimezone() + timedelta(seconds=seconds) if as_datetime else time.time() + seconds

    assert not make_guard(deadline=deadline(100), margin=50).should_stop()
    guard = make_guard(deadline=deadline(100), margin=150)
    assert guard.should_stop()
    assert guard.reason == "100 s left of the job, 150 s needed for a step and a save on rank 0"
    assert guard.exit_code == EXIT_CODE


def test_the_deadline_of_the_environment_counts(make_guard: MakeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCKPT_DEADLINE", str(time.time() + 10))
    guard = make_guard(margin=20)
    assert not guard.should_stop(), "it is looked up at the first call"
    assert guard.should_stop()
    monkeypatch.setenv("DISTCKPT_DEADLINE", "noon")
    with pytest.raises(CollectiveError, match="DISTCKPT_DEADLINE: expected seconds"):
        make_guard().should_stop()


def test_the_margin_is_a_step_and_one_and_a_half_saves(make_guard: MakeGuard) -> None:
    guard = make_guard()
    assert guard.margin == 45.0, "a save is taken for 30 s until one was measured"
    for seconds in (0.3, 0.01, 0.1, 0.01):  # the first step is a warm-up
        guard.should_stop()
        with guard.saving():
            time.sleep(0.04)
        time.sleep(seconds)
    guard.should_stop()
    assert guard.margin == pytest.approx(0.1 + 1.5 * 0.04, abs=0.08)
    assert make_guard(manager=SimpleNamespace(save_seconds=20.0)).margin == 30.0
    assert make_guard(manager=SimpleNamespace(save_seconds=None)).margin == 45.0


def test_a_manager_that_cannot_say_is_an_error_of_all(make_guard: MakeGuard) -> None:
    guard = make_guard(manager=SimpleNamespace(save_seconds="long"), deadline=time.time() + 1000)
    with pytest.raises(CollectiveError, match=r"(?s)should_stop.*save_seconds: expected a number of seconds > 0"):
        guard.should_stop()


@pytest.mark.parametrize("option", ["margin", "timeout"])
def test_bad_options(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected a number of seconds > 0"):
        PreemptionGuard(**{option: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline", ["12:00", float("nan"), True, 3600, -math.inf])
def test_a_deadline_that_is_no_time(deadline: Any) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ValueError, match="deadline: expected seconds since the epoch, a datetime, or None"):
        PreemptionGuard(deadline=deadline)
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize("deadline", [math.inf, np.float64(4e9)])
def test_a_deadline_that_is_far_away(make_guard: MakeGuard, deadline: float) -> None:
    guard = make_guard(deadline=deadline)
    assert [guard.should_stop(), guard.should_stop()] == [False, False]


@pytest.mark.parametrize("signals", [[signal.SIGUSR2, signal.SIGKILL], [signal.SIGUSR2, "SIGTERM"], 15])
def test_a_signal_that_cannot_be_handled_changes_no_handler(signals: Any) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(ValueError, match="signals: expected signals that can be handled"):
        PreemptionGuard(signals=signals)
    assert signal.getsignal(signal.SIGUSR2) == before


AT_EXIT = f"""{bare("distckpt.cluster")}
import atexit, pathlib, signal
from distckpt.cluster.preemption import PreemptionGuard
def ignored():
    mask = int(pathlib.Path("/proc/self/status").read_text().split("SigIgn:")[1].split()[0], 16)
    print([name for name in ("SIGTERM", "SIGUSR2") if mask >> getattr(signal, name) - 1 & 1])
atexit.register(ignored)  # runs after the guard's
guard = PreemptionGuard()
ignored()
"""


@pytest.mark.parametrize(("end", "at_exit"), [("", "['SIGUSR2']"), ("guard.close()", "[]")])
def test_a_signal_that_comes_while_python_ends_is_ignored(end: str, at_exit: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT + end], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", at_exit]


FORKED = """
import os, signal, time
from distckpt.cluster import PreemptionGuard
outer, inner = PreemptionGuard(signals=[signal.SIGTERM]), PreemptionGuard(signals=[signal.SIGTERM])
ready, done = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(10)
    os.write(done, b".")
    while True:
        time.sleep(1)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
print(inner.should_stop(), outer.should_stop())
"""


def test_a_signal_ends_a_forked_child_as_without_a_guard() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["True", "True False"]


WARNED = """
import os, signal, time
from distckpt.cluster import PreemptionGuard
guard = PreemptionGuard()
ready, done = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(10)
    os.write(done, b".")
    time.sleep(0.5)
    os._exit(7)
os.read(ready, 1)
os.killpg(0, signal.SIGUSR2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), guard.should_stop())
"""


def test_the_warning_to_a_whole_process_group_ends_no_worker_that_the_last_step_needs() -> None:
    """mpirun forwards a signal to the process group of each rank, workers of its data loaders included."""
    done = subprocess.run(
        [sys.executable, "-c", WARNED], capture_output=True, text=True, timeout=60, check=True, start_new_session=True
    )
    assert done.stdout == "7 True\n"


OUT_OF_ORDER = """
import signal
from distckpt.cluster import PreemptionGuard
outer, inner = PreemptionGuard(signals=[signal.SIGTERM]), PreemptionGuard(signals=[signal.SIGTERM])
outer.close()
inner.close()
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_ends_the_process_once_all_guards_are_closed_in_whatever_order() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_ORDER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


def test_a_handler_of_the_users_is_called_again_once_all_guards_are_closed() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: called.append(number))
    try:
        outer, inner = PreemptionGuard(), PreemptionGuard()
        outer.close()
        inner.close()
        signal.raise_signal(signal.SIGUSR2)
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_that_is_listed_twice_is_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    PreemptionGuard(signals=[signal.SIGUSR2, signal.SIGUSR2]).close()
    assert signal.getsignal(signal.SIGUSR2) == before


def test_another_thread_cannot_make_one_that_handles_signals() -> None:
    errors: list[BaseException] = []

    def make() -> None:
        try:
            PreemptionGuard()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
