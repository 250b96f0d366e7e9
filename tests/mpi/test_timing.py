"""How long steps took on each rank: the slow one is named, on all ranks alike, and nothing else changes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distckpt.restoring.restoration
import distckpt.restoring.restorer
import distckpt.saving.background_save
import distckpt.saving.saver
import distckpt.saving.writer
from distckpt import Checkpoint, CollectiveError, SaveOptions, ShardedVariable
from distckpt.coordination import background
from distckpt.source import Source
from distckpt.storage import mpio
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.timing import AGREE, SAVE_STEPS, Timing

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

PAUSE = 0.2
SLOW = 1
POSIX = SaveOptions(transport="posix")
Agree = Callable[..., None]


@pytest.fixture(autouse=True)
def disk_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that others keep busy would make another step, or rank, the slowest."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def checkpoint(comm: Any) -> Checkpoint:
    rows = torch.full((200, 3), float(comm.rank))
    return Checkpoint(
        comm=comm, rows=ShardedVariable(rows, (200 * comm.size, 3), (200 * comm.rank, 0)), copy=torch.ones(9), step=1
    )


def slow_down(monkeypatch: pytest.MonkeyPatch, comm: Any, owner: Any, name: str) -> None:
    """One rank pauses each time before it calls a function."""
    function = getattr(owner, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    if comm.rank == SLOW:
        monkeypatch.setattr(owner, name, slowed)


def assert_slow(comm: Any, timing: Timing | None, step: str) -> None:
    """All ranks know that one of them was slow, in this step."""
    assert timing is not None
    shared = comm.allgather((timing.seconds, timing.steps))
    assert all(other == shared[0] for other in shared)
    found = timing.steps[step]
    assert found.slowest_rank == SLOW
    assert found.min < PAUSE <= found.max <= timing.seconds
    assert (timing.own[step] >= PAUSE) == (comm.rank == SLOW)


# ---- saves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "step", "transport"),
    [
        (distckpt.saving.saver, "capture", "digest", "posix"),
        (distckpt.saving.saver, "decode_reply", "plan", "posix"),
        (distckpt.saving.writer, "write_posix", "write", "posix"),
        (mpio, "write_mpio", "write", "mpio"),
        (distckpt.saving.writer, "fsync", "fsync", "posix"),
    ],
)
def test_the_slow_rank_of_a_save_is_named(
    comm: Any,
    mpi_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    step: str,
    transport: Any,
) -> None:
    saved = checkpoint(comm)
    slow_down(monkeypatch, comm, owner, name)
    with caplog.at_level(logging.INFO, "distckpt"):
        path = saved.save(mpi_dir / "ckpt", options=SaveOptions(transport=transport))
    assert_slow(comm, saved.save_timing, step)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("saved ")]
    assert len(lines) == (comm.rank == 0)
    assert all(line.startswith(f"saved {path}: ") and f"(slowest: rank {SLOW})" in line for line in lines)
    stored = open_checkpoint(path).manifest.timing
    assert stored is not None
    assert set(stored.steps) == {*SAVE_STEPS} - {"stage"}
    assert step == "fsync" or stored.steps[step].slowest_rank == SLOW


def test_the_rank_that_comes_late_is_named(comm: Any, mpi_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = checkpoint(comm)
    saved.save(mpi_dir / "ckpt")
    if comm.rank == SLOW:
        time.sleep(PAUSE)
    with caplog.at_level(logging.INFO, "distckpt"):
        saved.save(mpi_dir / "ckpt")
    timing = saved.save_timing
    assert timing is not None
    assert timing.steps[AGREE].slowest_rank == SLOW
    assert timing.steps[AGREE].min < PAUSE / 2 < timing.steps[AGREE].max
    if comm.rank == 0:
        assert f"(last: rank {SLOW})" in caplog.text


def test_an_unchanged_save_still_compares_digests_only(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ranks measured is nothing that they must agree on."""
    saved = checkpoint(comm)
    saved.save(mpi_dir / "ckpt")
    with monkeypatch.context() as patch:
        slow_down(patch, comm, distckpt.saving.saver, "capture")
        patch.setattr(distckpt.saving.saver, "encode_message", _fail)
        saved.save(mpi_dir / "ckpt")
    assert saved.save_timing is not None
    assert not {"merge", "plan"} & saved.save_timing.steps.keys()


@pytest.mark.parametrize("level", ["multiple", "serialized"])
@pytest.mark.parametrize(("name", "step"), [("write_posix", "write"), ("fsync", "fsync"), ("open_shared", "open")])
def test_the_slow_rank_of_a_save_in_the_background_is_named(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, level: str, name: str, step: str
) -> None:
    if level == "serialized":
        monkeypatch.setattr(background, "threads_may_speak", lambda: False)
    saved = checkpoint(comm)
    slow_down(monkeypatch, comm, distckpt.saving.writer, name)
    handle = saved.save_async(mpi_dir / "ckpt")
    assert handle.timing is None
    path = handle.result()
    assert_slow(comm, handle.timing, step)
    assert saved.save_timing is handle.timing
    stored = open_checkpoint(path).manifest.timing
    assert stored is not None
    assert stored.steps[step].slowest_rank == SLOW


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("failing", "name"), [(1, "write_posix"), (0, "fsync"), (1, "fsync")])
def test_a_rank_that_fails_in_a_step_fails_the_save_as_ever(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, agree: Agree, failing: int, name: str, background: bool
) -> None:
    saved = checkpoint(comm)
    saved.save(mpi_dir / "ckpt")
    before = saved.save_timing
    with monkeypatch.context() as patch:
        if comm.rank == failing:
            patch.setattr(distckpt.saving.writer, name, _fail)
        with pytest.raises(CollectiveError) as error:
            saved.save_async(mpi_dir / "ckpt").result() if background else saved.save(mpi_dir / "ckpt", options=POSIX)
    agree(list(error.value.failures) == [failing])
    agree(saved.save_timing is before)
    agree(saved.save(mpi_dir / "ckpt") == str(mpi_dir / "ckpt-2.h5"))
    agree(saved.save_timing is not before)


def _fail(*_: object, **__: object) -> None:
    raise OSError("injected")


# ---- restores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (distckpt.source, "open_shared", "open"),
        (distckpt.restoring.restoration, "bind", "plan"),
        (Source, "read", "read"),
        (distckpt.restoring.restorer.Assignment, "apply", "assign"),
    ],
)
def test_the_slow_rank_of_a_restore_is_named(
    comm: Any,
    mpi_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    step: str,
) -> None:
    path, twin = checkpoint(comm).save(mpi_dir / "ckpt"), checkpoint(comm)
    twin.rows.tensor.zero_().sub_(1)
    slow_down(monkeypatch, comm, owner, name)
    with caplog.at_level(logging.INFO, "distckpt"):
        status = twin.restore(path)
    assert np.all(twin.rows.tensor.numpy() == comm.rank)
    assert_slow(comm, status.timing, step)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("restored ")]
    assert len(lines) == (comm.rank == 0)
    assert all(f"{step} " in line and f"(slowest: rank {SLOW})" in line for line in lines)
