"""The deadline of a job, from the environment or its scheduler."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from distckpt.log import log

#: Seconds since the epoch at which the job ends; the launch scripts set it, and so may the user.
DEADLINE = "DISTCKPT_DEADLINE"
#: Seconds that a scheduler's command may take: the controller of a large cluster can be busy.
_PATIENCE = 30.0
#: Seconds since the epoch before which no job can end: a smaller number is a duration, or means nothing.
_LONG_AGO = 1e9


@dataclass(frozen=True, slots=True)
class _Scheduler:
    """How to ask a scheduler for the deadline of a job.

    Attributes:
        name: Name for messages.
        job: Environment variable that holds the job's id.
        element: From the environment, the id of this job within a job array; None if it is in none.
        command: Command to run; "{job}" stands for the id.
        parse: From its output and the current time, the deadline in seconds since the epoch; None without one.
    """

    name: str
    job: str
    element: Callable[[Mapping[str, str]], str | None]
    command: tuple[str, ...]
    parse: Callable[[str, float], float | None]


def find_deadline(environ: Mapping[str, str] = os.environ) -> float | None:
    """When this job must end, in seconds since the epoch; None if unknown. Local; may ask the scheduler.

    Args:
        environ: Environment variables: DISTCKPT_DEADLINE, else SLURM_JOB_END_TIME (Slurm 23.02 and newer), else those
            of Slurm, PBS, LSF and Flux that name the job.

    Raises:
        ValueError: DISTCKPT_DEADLINE is not a point in time.
    """
    if environ.get(DEADLINE):
        return _explicit(environ[DEADLINE])
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal() and not is_long_ago(float(end)):
        return float(end)
    for scheduler in _SCHEDULERS:
        if environ.get(scheduler.job):
            return _ask(scheduler, environ)
    return None


def _explicit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or is_long_ago(value):
        raise ValueError(f"{DEADLINE}: expected seconds since the epoch, as `date +%s` prints them. Got {text!r}.")
    return value


def is_long_ago(seconds: float) -> bool:
    """Whether a number of seconds cannot be a point in time since the epoch: it is probably a duration."""
    return seconds < _LONG_AGO


def _ask(scheduler: _Scheduler, environ: Mapping[str, str]) -> float | None:
    job = scheduler.element(environ) or environ[scheduler.job]
    command = [part.format(job=job) for part in scheduler.command]
    try:
        done = subprocess.run(
            command,
            env=_without_preferences(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
        )
        deadline = scheduler.parse(done.stdout, time.time())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        # No reason to stop training: checkpoints are still saved at their interval.
        log.warning("%s does not say when the job ends (%s). Set %s.", scheduler.name, error, DEADLINE)
        return None
    log.info("%s ends the job at %s", scheduler.name, deadline)
    return deadline


def _without_preferences(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the user's own output formats and filters for the scheduler's commands."""
    kept = {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}
    return {**kept, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


# ---- arrays of jobs ----------------------------------------------------------------------------------------------


def _no_element(_environ: Mapping[str, str]) -> str | None:
    return None


def _slurm_element(environ: Mapping[str, str]) -> str | None:
    """<array>_<task>, for the one job of an array whose own number is that of the whole array; None for others."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if task and array == environ["SLURM_JOB_ID"] else None


def _lsf_element(environ: Mapping[str, str]) -> str | None:
    """<number>[<index>], since all jobs of an array have the same number; None for jobs in no array (index 0)."""
    index = environ.get("LSB_JOBINDEX") or "0"
    return None if index == "0" else f"{environ['LSB_JOBID']}[{index}]"


# ---- output of the schedulers' commands --------------------------------------------------------------------------


def parse_slurm(text: str, _now: float) -> float | None:
    """Deadline from `squeue -o %e`: local time such as 2026-11-22T08:55:45, or N/A.

    Raises:
        ValueError: It is neither.
    """
    found = text.strip()
    return None if found in {"", "N/A", "NONE", "Unknown"} else datetime.fromisoformat(found).timestamp()


def parse_pbs(text: str, now: float) -> float | None:
    """Deadline from `qstat -f`: Torque's Walltime.Remaining, or stime (or start_time) and Resource_List.walltime.

    Raises:
        ValueError: A time has an unknown form.
    """
    fields = dict(re.findall(r"^\s*([\w.]+) = (.*)$", text, re.MULTILINE))
    if "Walltime.Remaining" in fields:
        return now + float(fields["Walltime.Remaining"])
    start, walltime = fields.get("stime") or fields.get("start_time"), fields.get("Resource_List.walltime")
    if not start or not walltime:
        return None
    return datetime.strptime(start.strip(), "%a %b %d %H:%M:%S %Y").timestamp() + _clock_seconds(walltime)


def parse_lsf(text: str, now: float) -> float | None:
    """Deadline from `bjobs -o time_left`: hours:minutes and a letter, such as "1:05 L"; "-" without a limit.

    Raises:
        ValueError: A time has an unknown form.
    """
    found = text.split()
    # LSF prints rounded minutes: the job may have up to one minute less.
    return None if not found or found[0] == "-" else now + _clock_seconds(f"{found[0]}:00") - 60


def parse_flux(text: str, now: float) -> float | None:
    """Deadline from `flux job timeleft`: seconds, "inf" without a limit.

    Raises:
        ValueError: It is not a number.
    """
    left = float(text)
    return now + left if math.isfinite(left) else None


def _clock_seconds(text: str) -> float:
    """Seconds from [[days:]hours:]minutes:seconds, or from plain seconds."""
    units = (1, 60, 3600, 86400)
    parts = [int(part) for part in reversed(text.strip().split(":"))]
    return float(sum(part * unit for part, unit in zip(parts, units, strict=False)))


_SCHEDULERS = (
    _Scheduler("Slurm", "SLURM_JOB_ID", _slurm_element, ("squeue", "-h", "-j", "{job}", "-o", "%e"), parse_slurm),
    _Scheduler("PBS", "PBS_JOBID", _no_element, ("qstat", "-f", "{job}"), parse_pbs),
    _Scheduler("LSF", "LSB_JOBID", _lsf_element, ("bjobs", "-noheader", "-o", "time_left", "{job}"), parse_lsf),
    _Scheduler("Flux", "FLUX_JOB_ID", _no_element, ("flux", "job", "timeleft"), parse_flux),
)
