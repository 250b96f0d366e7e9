"""`init_process_group` of a process that is alone."""

from __future__ import annotations

import pytest

from distckpt.cluster import init_process_group
from distckpt.errors import CheckpointError

SRUN_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


def test_singletons_under_a_launcher_are_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "FLUX_JOB_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN_STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CheckpointError, match=r"srun started 4 processes.*srun --mpi=pmix"):
        init_process_group()
