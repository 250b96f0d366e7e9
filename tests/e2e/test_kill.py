"""SIGKILL at random moments of repeated saves: a complete checkpoint remains, and the next job goes on from it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from distckpt import latest_checkpoint
from distckpt.storage.latest import is_complete
from distckpt.storage.verify import verify_file

RANKS = 2
KILLS = 10

#: Every element of every tensor is the step, so that a torn checkpoint shows.
JOB = """
import os
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI
from distckpt import Checkpoint, SaveOptions, ShardedVariable, latest_checkpoint

comm, directory, until = MPI.COMM_WORLD, Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
rows = 3 << 17
large, small, replica = torch.zeros(rows), torch.zeros(7), torch.zeros(400, 100)
checkpoint = Checkpoint(
    large=ShardedVariable(large, (comm.size * rows,), (comm.rank * rows,)),
    small=ShardedVariable(small, (comm.size * 7,), (comm.rank * 7,)),
    replica=replica,
    step=0,
)
path = comm.bcast(latest_checkpoint(directory) if comm.rank == 0 else None)
status = checkpoint.restore(path)
if path is not None:
    status.assert_consumed()
    assert path.endswith(f"-{checkpoint.save_counter}.h5"), (path, checkpoint.save_counter)
    assert checkpoint.step == checkpoint.save_counter > 0
    for tensor in (large, small, replica):
        assert (tensor == checkpoint.step).all(), (checkpoint.step, tensor)
pids = comm.gather(os.getpid())
announced = False
while True:
    checkpoint.step += 1
    for tensor in (large, small, replica):
        tensor.fill_(checkpoint.step)
    transport = "mpio" if checkpoint.step % 2 else "posix"
    saved = checkpoint.save(directory / "ckpt", options=SaveOptions(transport=transport))
    if comm.rank == 0:
        for file in directory.glob("ckpt-*.h5"):
            if int(file.stem[5:]) <= checkpoint.step - 3:
                file.unlink()
        stale = [file.name for file in directory.iterdir() if ".tmp" in file.name]
        assert not stale, f"left after the first save: {stale}"
        if not announced:
            print("pids", *pids, flush=True)
            announced = True
    if comm.bcast(time.monotonic() > until):
        break
if comm.rank == 0:
    print("saved", checkpoint.step, flush=True)
"""


def pids_of(job: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks, as soon as they have restored and saved once."""
    assert job.stdout is not None
    output = []
    for line in job.stdout:
        output.append(line)
        if line.startswith("pids "):
            return [int(pid) for pid in line.split()[1:]]
    raise AssertionError("".join(output))


def wait_until_gone(pids: list[int]) -> None:
    """A process that is being killed still runs for a moment, and so long its temporary file is not stale."""
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def assert_complete(directory: Path) -> int:
    """Whatever has a final name is complete and undamaged, in spite of the kill; returns the newest number."""
    files = sorted(directory.glob("*.h5"))
    for file in files:
        assert is_complete(file) is None
    latest = latest_checkpoint(directory)
    if latest is None:
        assert files == []
        return 0
    assert verify_file(latest) == []
    number = max(int(file.stem.rpartition("-")[2]) for file in files)
    assert latest == str(directory / f"ckpt-{number}.h5")
    return number


@pytest.mark.timeout(400, method="signal")
def test_kills_at_random_moments(mpirun: Any, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    script = tmp_path / "job.py"
    script.write_text(JOB)
    directory = tmp_path / "run"
    newest = 0
    for attempt in range(KILLS):
        job = mpirun.start(RANKS, ["-m", "mpi4py", script, directory, 60])
        pids = pids_of(job)
        time.sleep(dice.uniform(0, 0.3))
        if attempt % 2:
            mpirun.kill(job)
        else:
            os.kill(dice.choice(pids), signal.SIGKILL)  # mpirun ends the others
        output, _ = job.communicate(timeout=60)
        assert "Error" not in output, output
        assert job.returncode != 0
        wait_until_gone(pids)
        found = assert_complete(directory)
        assert found > newest, "a committed checkpoint is gone"
        newest = found
    ended = mpirun(RANKS, ["-m", "mpi4py", script, directory, 0])
    assert ended.returncode == 0, ended.stdout
    assert f"saved {newest + 1}" in ended.stdout
    assert assert_complete(directory) == newest + 1
    names = {path.name for path in directory.iterdir()}
    assert names == {"checkpoint", *(f"ckpt-{number}.h5" for number in range(max(1, newest - 1), newest + 2))}
