"""The launch scripts from start to end: a training that is told to stop saves, and the script has it started again.

`local.sh` runs as it is. PBS, LSF and Flux are not there: their scripts get the variables of their schedulers, and
stubs in place of `qsub`, `qstat`, `bjobs` and `flux`. Slurm has tests of its own, in tests/slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
JOB = ROOT / "tests" / "launched_job.py"
STEPS = 40
DEADLINE = 200.0  # seconds

FLUX_STUB = """
import os, pathlib, shlex, signal, subprocess, sys
here = pathlib.Path(__file__).parent
match sys.argv[1:]:
    case ["resource", "list", *_]: print(2)
    case ["submit", ranks, cores, *command]:
        assert cores == "--cores-per-task=1"
        (here / "submitted").write_text(shlex.join(["mpirun", "-n", ranks.removeprefix("--ntasks="), *command]))
        print("f1")
    case ["job", "attach", "f1"]:
        del os.environ["FLUX_JOB_ID"]  # an mpirun that believes in it looks for Flux, and crashes
        job = subprocess.Popen(shlex.split((here / "submitted").read_text()))
        (here / "pid").write_text(str(job.pid))
        sys.exit(job.wait())
    case ["job", "kill", "--signal=SIGUSR2", "f1"]: os.kill(int((here / "pid").read_text()), signal.SIGUSR2)
    case ["job", "timeleft"]: print("inf")
    case ["--parent", "batch", *arguments]: (here / "called").write_text(" ".join([*arguments, os.environ["RESTARTS"]]))
    case _: sys.exit(f"flux stub: {sys.argv[1:]}")
"""


class Script:
    """`script(name, env)` starts launch/<name> on 2 ranks, the way a batch system does: a copy, somewhere else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = directory / "runs"
        self.stubs = directory / "stubs"
        for folder in (self.runs, self.stubs):
            folder.mkdir()
        self._started: list[subprocess.Popen[str]] = []

    def stub(self, name: str, text: str, interpreter: str = "/bin/sh") -> None:
        path = self.stubs / name
        path.write_text(f"#!{interpreter}\n{text}\n")
        path.chmod(0o755)

    def __call__(self, name: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        copy = self.directory / "copy" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((LAUNCH / name).read_text())
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PBS_"))}
        settings = {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "RESEND_SECONDS": "2",
            "THREADS": "1",
        }
        script = subprocess.Popen(
            ["bash", LAUNCH / name if name == "local.sh" else copy, *arguments],
            env={**inherited, **settings, **env},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(script)
        return script

    def training(self, pause: float) -> list[str]:
        """The command: without a checkpoint a step takes `pause` seconds."""
        return ["python", "-m", "mpi4py", str(JOB), str(self.runs), str(STEPS), str(pause), "0"]

    def records(self, rank: int = 0) -> list[dict[str, Any]]:
        path = self.runs / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, script: subprocess.Popen[str], step: int) -> None:
        self.wait_until(script, lambda: any(record["step"] >= step for record in self.records()))

    def wait_until(self, script: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert script.poll() is None, script.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> None:
        """Kills what is still running."""
        for script in self._started:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    if int(stat.read_text().rpartition(")")[2].split()[3]) == script.pid:
                        os.kill(int(stat.parent.name), signal.SIGKILL)
            script.wait()
            assert script.stdout is not None
            script.stdout.close()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    scripts = Script(tmp_path)
    yield scripts
    scripts.end()


def finish(script: subprocess.Popen[str], status: int) -> str:
    output, _ = script.communicate(timeout=DEADLINE)
    assert script.returncode == status, output
    return output


def check_stopped_once_and_finished(script: Script, reason: str) -> None:
    """Both ranks stopped at the same step, and the next run went on from there to the end."""
    for rank in (0, 1):
        stops = [record for record in script.records(rank) if "stop" in record]
        assert [record["exit_code"] for record in stops] == [85, 0]
        assert re.search(reason, stops[0]["stop"])
        assert 0 < stops[0]["step"] < STEPS
        assert stops[0]["step"] == next(record["step"] for record in script.records() if "stop" in record)
        steps = [record["step"] for record in script.records(rank) if "loss" in record]
        assert steps == list(range(1, STEPS + 1))


def test_local_stops_at_its_walltime_and_goes_on_when_it_is_called_again(script: Script) -> None:
    # The margin: 30 s for the first save, which nobody has measured, times 1.5.
    finish(script("local.sh", *script.training(0.25), RANKS="2", WALLTIME="50"), 85)
    finish(script("local.sh", *script.training(0.25), RANKS="2"), 0)
    check_stopped_once_and_finished(script, r"s left of the job, 4\d s needed for a step and a save on rank 0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_saves_at_a_signal_that_comes_before_the_ranks_are_ready(script: Script, number: signal.Signals) -> None:
    job = script("local.sh", *script.training(0.25), RANKS="2")
    time.sleep(0.5)
    os.kill(job.pid, number)
    finish(job, 85)
    assert script.records()[-1]["stop"].startswith("SIGUSR2 on rank 0")


def test_pbs_stops_before_its_walltime_and_submits_itself_with_the_same_command(script: Script) -> None:
    script.stub("qstat", '[ "$*" = "-f 7.head" ] && echo "    Walltime.Remaining = 50"')
    called = script.stubs / "called"
    script.stub("qsub", f'printf "%s|" "$@" "$RESTARTS" "$TRAIN" >"{called}"')
    nodes = script.directory / "nodes"
    nodes.write_text("localhost\nlocalhost\n")
    pbs = {"PBS_JOBID": "7.head", "PBS_O_WORKDIR": str(ROOT), "PBS_NODEFILE": str(nodes)}
    train = " ".join(f"'{word}'" for word in script.training(0.25))
    finish(script("pbs.sh", TRAIN=train, QSUB_ARGS="-l walltime=0:10:00", **pbs), 0)
    options, restarts, command = called.read_text().removesuffix("|").rsplit("|", 2)
    assert options == f"-V|-l|walltime=0:10:00|{LAUNCH}/pbs.sh"
    assert restarts == "1"
    script.stub("qstat", 'echo "    Walltime.Remaining = 5000"')
    finish(script("pbs.sh", TRAIN=command, RESTARTS=restarts, **pbs), 0)
    check_stopped_once_and_finished(script, "s left of the job")


def test_lsf_saves_at_the_warning_signal_and_exits_with_the_code_that_lsf_requeues(script: Script) -> None:
    script.stub("bjobs", 'echo "- "')
    lsf = {"LSB_JOBID": "7", "LS_SUBCWD": str(ROOT), "LSB_DJOB_NUMPROC": "2", "TRAIN": " ".join(script.training(0.25))}
    job = script("lsf.sh", **lsf)
    script.wait_for_step(job, 2)
    os.kill(job.pid, signal.SIGUSR2)
    finish(job, 85)
    assert "#BSUB -Q 85\n" in (LAUNCH / "lsf.sh").read_text()
    finish(script("lsf.sh", **lsf), 0)
    check_stopped_once_and_finished(script, "SIGUSR2 on rank 0")


def test_flux_forwards_the_signal_to_its_job_and_submits_itself(script: Script) -> None:
    script.stub("flux", FLUX_STUB, sys.executable)
    flux = {"FLUX_JOB_ID": "f0"}
    job = script("flux.sh", *script.training(0.25), **flux)
    script.wait_for_step(job, 2)
    os.kill(job.pid, signal.SIGUSR2)
    finish(job, 0)
    assert (script.stubs / "called").read_text() == " ".join([f"{LAUNCH}/flux.sh", *script.training(0.25), "1"])
    finish(script("flux.sh", *script.training(0.25), RESTARTS="1", **flux), 0)
    check_stopped_once_and_finished(script, "SIGUSR2 on rank 0")
