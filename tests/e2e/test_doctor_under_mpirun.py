"""`distckpt doctor` as started by a launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_answer_is_given_once(mpirun: Any, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, ["-m", "distckpt", "doctor", tmp_path])
    lines = [
        line for line in done.stdout.splitlines() if "Open MPI's mpirun says" in line or "without a launcher" in line
    ]
    assert len(lines) == 1, done.stdout
    assert f"{ranks or 1} rank" in lines[0]
    assert "FAIL" not in lines[0]


def test_ranks_that_do_not_know_of_each_other_are_told(mpirun: Any, tmp_path: Path) -> None:
    environment = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    done = mpirun(0, ["-m", "distckpt", "doctor", tmp_path], env=environment)
    assert done.returncode == 1
    assert "1 rank, but Open MPI's mpirun started 4 processes (OMPI_COMM_WORLD_SIZE)" in done.stdout
