"""What the launchers' variables say about the size of the job."""

from __future__ import annotations

import pytest

from distckpt.coordination.launcher import LauncherSize, expected_size, singleton_message

SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("environ", "size", "variable"),
    [
        (MPIRUN, 8, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "6", "PMI_RANK": "0"}, 6, "PMI_SIZE"),
        ({"PALS_SIZE": "5", "PALS_RANKID": "1"}, 5, "PALS_SIZE"),
        ({"FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "1"}, 3, "FLUX_JOB_SIZE"),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 2, "WORLD_SIZE"),
        (SRUN, 4, "SLURM_STEP_NUM_TASKS"),
        ({**SBATCH, "SLURM_STEP_ID": "3"}, 4, "SLURM_NTASKS"),
        # mpirun within a batch job counts its own ranks; on other nodes it starts them through an srun of its own.
        ({**SBATCH, **MPIRUN}, 8, "OMPI_COMM_WORLD_SIZE"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **MPIRUN}, 8, "OMPI_COMM_WORLD_SIZE"),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 1, "OMPI_COMM_WORLD_SIZE"),
        # one task of a step within a larger allocation
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, 1, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_launched_process(environ: dict[str, str], size: int, variable: str) -> None:
    expected = expected_size(environ)
    assert expected is not None
    assert (expected.size, expected.variable) == (size, variable)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HOME": "/root", "WORLD_SIZE": "4"},  # exported by a user's script, not by torchrun
        SBATCH,  # the shell of a batch script
        {**SRUN, "SLURM_STEP_ID": "4294967290"},  # the interactive step of salloc
        {**SRUN, "SLURM_STEP_ID": "4294967291"},  # the batch step
        {"OMPI_COMM_WORLD_SIZE": "8"},
        {"PMI_SIZE": "", "PMI_RANK": "0"},
        {"PMI_SIZE": "many", "PMI_RANK": "0"},
        {"PMI_SIZE": "-1", "PMI_RANK": "0"},
    ],
)
def test_not_launched(environ: dict[str, str]) -> None:
    assert expected_size(environ) is None


@pytest.mark.parametrize(
    ("launcher", "variable", "cure"),
    [
        ("srun", "SLURM_NTASKS", "srun --mpi=pmix"),
        ("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "Use the mpirun of the MPI that mpi4py was built with"),
        ("torchrun", "WORLD_SIZE", "mpirun or srun instead of torchrun"),
    ],
)
def test_message_names_launcher_and_cure(launcher: str, variable: str, cure: str) -> None:
    message = singleton_message(LauncherSize(4, variable, launcher), "mpi4py is not installed")
    for part in (launcher, f"{variable}=4", "mpi4py is not installed", cure, f"env -u {variable}", "MPI.COMM_SELF"):
        assert part in message
