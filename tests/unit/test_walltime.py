"""When the job must end: the variables of the schedulers, and what their commands print (recorded forms)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from distckpt.cluster.walltime import find_deadline, parse_flux, parse_lsf, parse_pbs, parse_slurm

OPENPBS = """\
Job Id: 12.head
    Job_Name = train
    resources_used.walltime = 00:10:00
    Resource_List.select = 2:ncpus=4:mpiprocs=4
    Resource_List.walltime = 01:30:00
    stime = Sun Nov 22 08:00:00 2026
"""
TORQUE = "Job Id: 12.head\n    Resource_List.walltime = 02:00:00\n    Walltime.Remaining = 4200\n"


def local(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("parse", "text", "deadline"),
    [
        (parse_slurm, "2026-11-22T08:55:45\n", local("2026-11-22T08:55:45")),
        (parse_slurm, "N/A\n", None),
        (parse_slurm, "", None),
        (parse_pbs, OPENPBS, local("2026-11-22T09:30:00")),
        (parse_pbs, OPENPBS.replace("stime", "start_time"), local("2026-11-22T09:30:00")),
        (parse_pbs, OPENPBS.replace("01:30:00", "1:00:00:00"), local("2026-11-23T08:00:00")),
        (parse_pbs, OPENPBS.replace("Resource_List.walltime", "Resource_List.cput"), None),
        (parse_pbs, TORQUE, 5200.0),
        (parse_lsf, "1:05 L\n", 1000.0 + 3900 - 60),
        (parse_lsf, "-\n", None),
        (parse_flux, "3599.5\n", 4599.5),
        (parse_flux, "inf\n", None),
    ],
)
def test_what_is_printed(parse: Callable[[str, float], float | None], text: str, deadline: float | None) -> None:
    assert parse(text, 1000.0) == deadline


def test_variables_come_before_commands() -> None:
    job = {"SLURM_JOB_ID": "1", "PATH": "/nonexistent"}
    assert find_deadline({**job, "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert (
        find_deadline({**job, "SLURM_JOB_END_TIME": "1700000000", "DISTCKPT_DEADLINE": "1600000000.5"}) == 1.6e9 + 0.5
    )
    assert find_deadline({}) is None
    for nothing in ("0", "soon", "\N{SUPERSCRIPT TWO}"):
        assert find_deadline({**job, "SLURM_JOB_END_TIME": nothing}) is None


@pytest.mark.parametrize(
    ("command", "variable", "script", "left"),
    [
        ("squeue", "SLURM_JOB_ID", '[ "$*" = "-h -j 7 -o %e" ] && date -d "+90 seconds" +%Y-%m-%dT%H:%M:%S', 90),
        ("qstat", "PBS_JOBID", '[ "$*" = "-f 7" ] && echo "    Walltime.Remaining = 90"', 90),
        ("bjobs", "LSB_JOBID", '[ "$*" = "-noheader -o time_left 7" ] && echo "0:02 L"', 60),
        ("flux", "FLUX_JOB_ID", '[ "$*" = "job timeleft" ] && echo 90.0', 90),
    ],
)
def test_the_scheduler_is_asked(command: str, variable: str, script: str, left: float, tmp_path: Path) -> None:
    stub = tmp_path / command
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    deadline = find_deadline({variable: "7", "PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert deadline is not None
    assert deadline - time.time() == pytest.approx(left, abs=5)


def test_the_forms_and_filters_of_the_user_do_not_count(tmp_path: Path) -> None:
    stub = tmp_path / "squeue"
    stub.write_text(
        '#!/bin/sh\n[ "$SLURM_TIME_FORMAT" = standard ] || { echo Tomorr 08:55; exit; }\n'
        '[ -n "$SQUEUE_STATES" ] || echo 2026-11-22T08:55:45\n'
    )
    stub.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    preferences = {"SLURM_TIME_FORMAT": "relative", "SQUEUE_STATES": "PENDING"}
    assert find_deadline({**job, **preferences}) == local("2026-11-22T08:55:45")


@pytest.mark.parametrize(
    ("command", "environ", "job"),
    [
        ("squeue", {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0"}, "9_0"),
        ("squeue", {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "0"}, "8"),
        ("bjobs", {"LSB_JOBID": "9", "LSB_JOBINDEX": "3"}, "9[3]"),
        ("bjobs", {"LSB_JOBID": "9", "LSB_JOBINDEX": "0"}, "9"),
    ],
)
def test_only_this_job_of_an_array_is_asked_for(
    command: str, environ: dict[str, str], job: str, tmp_path: Path
) -> None:
    stub = tmp_path / command
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    stub.chmod(0o755)
    assert find_deadline({**environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}) is None
    assert job in (tmp_path / "asked").read_text().split()


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "exec /nonexistent"])
def test_a_scheduler_that_does_not_answer_stops_nobody(
    script: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub = tmp_path / "squeue"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    with caplog.at_level(logging.WARNING, "distckpt"):
        assert find_deadline({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) is None
    assert "Set DISTCKPT_DEADLINE" in caplog.text


@pytest.mark.parametrize("bad", ["soon", "nan", "inf", "3600", "-5"])
def test_a_bad_deadline(bad: str) -> None:
    with pytest.raises(ValueError, match=f"DISTCKPT_DEADLINE: expected seconds since the epoch.*{bad}"):
        find_deadline({"DISTCKPT_DEADLINE": bad})
