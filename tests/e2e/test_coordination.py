"""How jobs end: with ranks that never came, with a step that hangs, with MPI that is not running or knows no others."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

from tests.bare import bare

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PREAMBLE = f"""{bare()}
import sys, time
from mpi4py import MPI
from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CheckpointError, RankTimeoutError
rank = MPI.COMM_WORLD.rank
coordinator = Coordinator()
"""

ALONE = """
def arrive_alone():
    try:
        coordinator.arrive("save", 0, 0, 0.2)
    except RankTimeoutError as error:
        print(f"rank {rank} misses {error.absent}", flush=True)
"""


@pytest.mark.parametrize("caller", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_undelivered_messages_do_not_delay_the_end(mpirun: Run, caller: int, first: bool) -> None:
    code = PREAMBLE + ALONE
    code += "" if first else "coordinator.arrive('before', 0, 0, 60.0)\n"
    code += f"for _ in range(3 if rank == {caller} else 0):\n    arrive_alone()\n"
    ended = mpirun(3, ["-c", code], timeout=60.0)
    assert ended.returncode == 0, ended.stdout
    absent = tuple(rank for rank in range(3) if rank != caller)
    assert ended.stdout.count(f"rank {caller} misses {absent}") == 3, ended.stdout


def test_uncaught_timeout_ends_the_job(mpirun: Run) -> None:
    """The rank would otherwise wait in MPI_Finalize for the one that sleeps."""
    code = PREAMBLE + "time.sleep(300.0 if rank == 1 else 0.0)\ncoordinator.arrive('save', 0, 0, 0.2)"
    start = time.monotonic()
    ended = mpirun(2, ["-c", code], timeout=120.0)
    assert time.monotonic() - start < 100.0
    assert ended.returncode != 0
    assert "RankTimeoutError: save: 1 of 2 ranks did not come within 0.2 s: rank 1." in ended.stdout
    assert "nobody caught the RankTimeoutError above" in ended.stdout


@pytest.mark.parametrize("hanging", ["a lost message", "a lost rank"])
def test_watchdog_names_the_step_and_ends_the_job(mpirun: Run, hanging: str) -> None:
    code = PREAMBLE + "coordinator.arrive('save', 0, 0, 60.0)\n"
    if hanging == "a lost message":
        code += "with coordinator.watchdog('close', 1.0):\n    MPI.COMM_WORLD.recv(source=1 - rank)"
    else:
        code += (
            "time.sleep(300.0 * rank)\nwith coordinator.watchdog('close', 1.0), coordinator.step('close'):\n    pass"
        )
    start = time.monotonic()
    ended = mpirun(2, ["-c", code], timeout=120.0)
    assert time.monotonic() - start < 100.0
    assert ended.returncode != 0
    assert "distckpt: rank 0: step 'close' has not ended after 1 s" in ended.stdout
    assert "most recent call first" in ended.stdout, "the stacks of all threads"


def test_watchdog_lets_a_step_that_ends_go_on(mpirun: Run) -> None:
    code = PREAMBLE + "with coordinator.watchdog('close', 0.5):\n    pass\ntime.sleep(1.5)\nprint('went on')"
    ended = mpirun(0, ["-c", code])
    assert ended.returncode == 0, ended.stdout
    assert "went on" in ended.stdout


def test_finalised_mpi(mpirun: Run) -> None:
    code = PREAMBLE + "coordinator.arrive('save', 0, 0, 60.0)\nMPI.Finalize()\n"
    code += "for one in (coordinator, Coordinator()):\n    try:\n        one.arrive('save', 0, 0, 60.0)\n"
    # One write: the ranks share a pipe.
    code += "    except CheckpointError as error:\n        sys.stdout.write(f'refused: {error}\\n')"
    ended = mpirun(2, ["-c", code])
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("refused: MPI is already finalised") == 4, ended.stdout


def test_mpi_that_was_not_initialised(mpirun: Run) -> None:
    code = "import mpi4py\nmpi4py.rc.initialize = False\n" + PREAMBLE.replace("rank = MPI.COMM_WORLD.rank\n", "")
    ended = mpirun(0, ["-c", code + "coordinator.arrive('save', 0, 0, 60.0)"])
    assert ended.returncode != 0
    assert "CheckpointError: MPI is not initialised: call MPI.Init_thread() first" in ended.stdout


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"PMI_SIZE": "4", "PMI_RANK": "2"},
            "mpiexec started 4 processes (PMI_SIZE=4), but in this one MPI_COMM_WORLD has a single rank",
        ),
        (
            {"SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"},
            "Start the job with `srun --mpi=pmix`",
        ),
    ],
)
def test_process_that_knows_none_of_those_started_with_it(mpirun: Run, environ: dict[str, str], message: str) -> None:
    ended = mpirun(0, ["-c", PREAMBLE + "coordinator.arrive('save', 0, 0, 60.0)"], env=environ)
    assert ended.returncode != 0
    assert message in ended.stdout
    assert "each of them would take itself for the whole job" in ended.stdout
    # Said to be independent, it is left alone.
    code = PREAMBLE + "print(Coordinator(MPI.COMM_SELF).arrive('save', 0, 0, 60.0))"
    assert "True" in mpirun(0, ["-c", code], env=environ).stdout
