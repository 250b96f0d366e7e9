"""The end of a program with a save in the background: complete and committed, or absent; never half, and no hang."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from distckpt import latest_checkpoint
from distckpt.storage.latest import is_complete
from distckpt.storage.verify import verify_file

RANKS = 2

#: Saves once, then does what a test adds. `slow`: seconds that fsync takes a rank from then on.
JOB = """
import os, signal, sys, time
from pathlib import Path
import mpi4py
mpi4py.rc.thread_level = sys.argv[2]
from mpi4py import MPI
import torch
import distckpt.saving.background_save, distckpt.saving.writer
from distckpt import Checkpoint, SaveOptions, ShardedVariable

comm, directory, slow = MPI.COMM_WORLD, Path(sys.argv[1]), 0.0
assert (MPI.Query_thread() == MPI.THREAD_MULTIPLE) == (sys.argv[2] == "multiple")
fsync = distckpt.saving.writer.fsync

def slow_fsync(fd):
    time.sleep(slow)
    fsync(fd)

distckpt.saving.writer.fsync = slow_fsync
rows = torch.zeros(1 << 16)
checkpoint = Checkpoint(rows=ShardedVariable(rows, (comm.size << 16,), (comm.rank << 16,)), step=0)

def save(**options):
    rows.fill_(checkpoint.step + 1)
    checkpoint.step += 1
    return checkpoint.save_async(directory / "ckpt", options=SaveOptions(**options))

first = save()
rows.fill_(-1)
assert first.is_local == (sys.argv[2] == "multiple")
assert Path(first.result()).exists()
slow = 0.3
"""


def job_of(tmp_path: Path, ending: str) -> Path:
    script = tmp_path / "job.py"
    script.write_text(JOB + textwrap.dedent(ending))
    return script


def assert_complete(directory: Path, number: int) -> None:
    latest = latest_checkpoint(directory)
    assert latest == str(directory / f"ckpt-{number}.h5")
    assert verify_file(latest) == []
    assert sorted(os.listdir(directory)) == ["checkpoint", *(f"ckpt-{n + 1}.h5" for n in range(number))]  # noqa: PTH208


ENDINGS = {
    "exit": "save()",
    "finalize": "save()\nMPI.Finalize()\nassert Path(directory / 'ckpt-2.h5').exists()",
    "one rank raises": "save()\nif comm.rank == 1:\n    raise ValueError('training diverged')",
    "sigterm": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\nsave()\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    ),
}
CASES = [(ending, level) for ending in ENDINGS for level in ("multiple", "serialized")][:-1]
#: Without THREAD_MULTIPLE it is made in the call.
CASES.append(("exit before there is a file", "multiple"))
ENDINGS["exit before there is a file"] = """
import distckpt.saving.draft
make = distckpt.saving.draft.create_like

def slow_make(*args):
    time.sleep(0.3)
    make(*args)

distckpt.saving.draft.create_like = slow_make
save(overlap=True)
"""


@pytest.mark.parametrize(("ending", "level"), CASES)
def test_an_end_completes_the_save(mpirun: Any, tmp_path: Path, ending: str, level: str) -> None:
    directory = tmp_path / "run"
    ended = mpirun(RANKS, [job_of(tmp_path, ENDINGS[ending]), directory, level])
    assert ("Traceback" in ended.stdout) == (ending == "one rank raises"), ended.stdout
    assert (ended.returncode == 0) == (ending not in ("one rank raises", "sigterm")), ended.stdout
    assert_complete(directory, 2)


def test_an_end_is_bounded_by_the_timeout(mpirun: Any, tmp_path: Path) -> None:
    ending = "slow = 600 if comm.rank == 1 else 0\nsave(timeout=1)"
    directory = tmp_path / "run"
    start = time.monotonic()
    ended = mpirun(RANKS, [job_of(tmp_path, ending), directory, "multiple"], timeout=120)
    assert time.monotonic() - start < 100
    assert "the save did not end within 1 s of the exit" in ended.stdout
    assert latest_checkpoint(directory) == str(directory / "ckpt-1.h5")


def test_a_failure_that_nobody_asked_for_is_logged_at_exit(mpirun: Any, tmp_path: Path) -> None:
    ending = """
    def broken(fd):
        raise OSError(28, "no quota")
    distckpt.saving.writer.fsync = broken if comm.rank == 1 else fsync
    save()
    """
    directory = tmp_path / "run"
    ended = mpirun(RANKS, [job_of(tmp_path, ending), directory, "multiple"])
    assert ended.stdout.count("the save failed, and nobody asked for its result: step 'write' failed") == 1, (
        ended.stdout
    )
    assert "rank 1: OSError: [Errno 28] no quota" in ended.stdout
    assert_complete(directory, 1)


def test_a_kill_leaves_no_half_checkpoint(mpirun: Any, tmp_path: Path) -> None:
    ending = """
    slow = 0.01
    print("pids", *comm.gather(os.getpid()) or (), flush=True) if comm.rank == 0 else comm.gather(os.getpid())
    while True:
        save(max_in_flight=2)
    """
    directory = tmp_path / "run"
    script = job_of(tmp_path, ending)
    newest = 0
    for attempt in range(2):
        job = mpirun.start(RANKS, ["-m", "mpi4py", script, directory, "multiple"])
        assert job.stdout is not None
        line = next(line for line in job.stdout if line.startswith("pids "))
        pids = [int(pid) for pid in line.split()[1:]]
        time.sleep(0.1 + 0.07 * attempt)
        os.kill(pids[attempt % RANKS], signal.SIGKILL)
        job.communicate(timeout=60)
        assert job.returncode != 0
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.01)
        for file in directory.glob("*.h5"):
            assert is_complete(file) is None
        latest = latest_checkpoint(directory)
        assert latest is not None
        assert verify_file(latest) == []
        found = int(Path(latest).stem.rpartition("-")[2])
        assert found > newest
        newest = found
        for file in directory.glob("ckpt-*.h5"):
            if file != Path(latest):
                file.unlink()
    ended = mpirun(RANKS, [job_of(tmp_path, "save()"), directory, "multiple"])
    assert ended.returncode == 0, ended.stdout
    assert [path.name for path in directory.iterdir() if ".tmp" in path.name] == []
    assert latest_checkpoint(directory) == str(directory / f"ckpt-{newest + 2}.h5")
