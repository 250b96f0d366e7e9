"""The number of processes in the job, from the environment variables that launchers set for each process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

#: Slurm numbers its batch, interactive and extern steps from here on; their processes were not started by `srun -n`.
_FIRST_RESERVED_STEP_ID = 0xFFFFFFF0


@dataclass(frozen=True, slots=True)
class LauncherSize:
    """The number of processes a launcher says it started.

    Attributes:
        size: Number of processes.
        variable: The environment variable that says so.
        launcher: Name of the launcher, for messages.
    """

    size: int
    variable: str
    launcher: str


@dataclass(frozen=True, slots=True)
class _Variables:
    """The variables of a launcher; `size` is valid only if `process` is set, too.

    Batch scripts see the size of their allocation, but only a process started by the launcher has a rank or task id.
    """

    launcher: str
    size: str
    process: str


# A launcher that runs inside a step of another one comes before it.
_KNOWN = (
    _Variables("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    _Variables("mpiexec", "PMI_SIZE", "PMI_RANK"),
    _Variables("PALS mpiexec", "PALS_SIZE", "PALS_RANKID"),
    _Variables("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    _Variables("torchrun", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    _Variables("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    _Variables("srun", "SLURM_NTASKS", "SLURM_PROCID"),
)


def expected_size(environ: Mapping[str, str] = os.environ) -> LauncherSize | None:
    """The number of processes that were started together with this one, itself included. Local.

    Args:
        environ: Environment variables.

    Returns:
        The size that the innermost known launcher reports; None without one, also in the shell of a batch script.
    """
    for known in _KNOWN:
        size = _positive_int(environ.get(known.size))
        if size is None or known.process not in environ:
            continue
        if known.launcher == "srun" and not _in_srun_step(environ):
            continue
        return LauncherSize(size, known.size, known.launcher)
    return None


def singleton_message(expected: LauncherSize, cause: str) -> str:
    """The message that a process must not save or restore, as it does not see the others started with it.

    Args:
        expected: The size reported by the launcher.
        cause: The reason why this process does not see the others, as a clause.

    Returns:
        The message, with advice.
    """
    return (
        f"{expected.launcher} started {expected.size} processes ({expected.variable}={expected.size}), but {cause}: "
        f"each of them would take itself for the whole job and write the same files. {_cure(expected)} Processes that "
        f"are meant to be independent pass comm=MPI.COMM_SELF. A process that was itself started by a rank inherits "
        f"the variable: start it with `env -u {expected.variable}`."
    )


def _cure(expected: LauncherSize) -> str:
    if expected.launcher == "torchrun":
        return "Start the job with mpirun or srun instead of torchrun."
    rebuild = "build mpi4py with this launcher's mpicc (`pip install --force-reinstall --no-binary=mpi4py mpi4py`)"
    if expected.launcher == "srun":
        return f"Start the job with `srun --mpi=pmix` (see `srun --mpi=list`), or {rebuild}."
    return f"Use the mpirun of the MPI that mpi4py was built with, or {rebuild}; under Slurm try `srun --mpi=pmix`."


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    step = _positive_int(environ.get("SLURM_STEP_ID"), least=0)
    return step is not None and step < _FIRST_RESERVED_STEP_ID


def _positive_int(text: str | None, least: int = 1) -> int | None:
    try:
        value = int(text or "")
    except ValueError:
        return None
    return value if value >= least else None
