"""End-to-end tests: pytest runs once, outside, and starts mpirun. Each job gets a session, which ends with its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Set by a launcher around this process; they would make a job believe that it is part of that launch.
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_LOCAL")
_MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # there are more ranks than GPUs
}


def pytest_configure() -> None:
    # `timeout` ends this process with SIGTERM; as an interrupt it lets the fixtures end the jobs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            # "signal" raises in the test instead of ending the process, so that the fixtures end the jobs.
            item.add_marker(pytest.mark.timeout(600, method="signal"))


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    return {**inherited, **_MPI_SETTINGS, "PYTHONPATH": str(ROOT), **(extra or {})}


def _session_members(session: int) -> list[int]:
    """The processes of a session. mpirun gives each rank a process group of its own, but not a session."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                members.append(int(stat.parent.name))
    return members


class Jobs:
    """`mpirun(ranks, args)` runs Python on `ranks` ranks, 0 for no mpirun, to its end; `mpirun.start` does not wait."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        ranks: int,
        args: str | Path | Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[str]:
        """Starts `mpirun -n ranks python *args`; standard error goes into standard output."""
        arguments = [args] if isinstance(args, str | Path) else args
        launcher = ["mpirun", "-n", str(ranks)] if ranks else []
        job = subprocess.Popen(
            [*launcher, sys.executable, *map(str, arguments)],
            env=_environment(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(job)
        return job

    def __call__(
        self,
        ranks: int,
        args: str | Path | Sequence[str | Path],
        *,
        timeout: float = 240.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Runs the job to its end; fails the test after `timeout` seconds, with what the job had written."""
        job = self.start(ranks, args, env=env, cwd=cwd)
        try:
            output, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill(job)
            output, _ = job.communicate()
            pytest.fail(f"{job.args} did not end in {timeout} s. Its output:\n{output}")
        return subprocess.CompletedProcess(job.args, job.returncode, output, "")

    def kill(self, job: subprocess.Popen[str]) -> None:
        """SIGKILL to mpirun, if it still runs, and to all its ranks."""
        for pid in _session_members(job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills what is still running."""
        for job in self._started:
            self.kill(job)
            job.wait()
            if job.stdout is not None:
                job.stdout.close()


@pytest.fixture
def mpirun() -> Iterator[Jobs]:
    """Starts jobs under mpirun, without the variables of a launcher around pytest. See `Jobs`."""
    jobs = Jobs()
    yield jobs
    jobs.end()
