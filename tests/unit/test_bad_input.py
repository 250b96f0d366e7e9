"""What a user sees through `Checkpoint` on one rank: permissions, and an MPI that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distckpt import Checkpoint, CheckpointError, CollectiveError, SaveOptions, latest_checkpoint
from tests.unit.unprivileged import unprivileged

ROOT = Path(__file__).resolve().parents[2]
FAST = SaveOptions(durable=False)


def error_of(call: object) -> str:
    with unprivileged(), pytest.raises(CheckpointError) as error:
        call()  # type: ignore[operator]
    return str(error.value)


def test_a_directory_without_write_permission(directory: Path) -> None:
    directory.chmod(0o555)
    checkpoint = Checkpoint(x=torch.zeros(3))
    for path in (directory / "ckpt", directory / "below" / "ckpt"):
        text = error_of(lambda: checkpoint.save(path, options=FAST))  # noqa: B023
        assert "PermissionError" in text
        assert str(path.parent) in text
        assert "choose another one" in text
    assert checkpoint.save_counter == 0
    directory.chmod(0o755)
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint", "ckpt-1.h5"]
    assert checkpoint.save(directory / "ckpt", options=FAST) == str(directory / "ckpt-2.h5")


def test_a_file_without_read_permission(directory: Path) -> None:
    path = directory / "ckpt-1.h5"
    path.chmod(0o200)
    twin = Checkpoint(x=torch.zeros(3))
    text = error_of(lambda: twin.restore(path))
    assert str(path) in text
    assert "Permission denied" in text
    assert torch.equal(twin.x, torch.zeros(3))
    path.chmod(0o644)
    twin.restore(path).assert_consumed()
    assert torch.equal(twin.x, torch.ones(3))


def test_a_directory_that_cannot_be_entered(directory: Path) -> None:
    directory.chmod(0o000)
    twin = Checkpoint(x=torch.zeros(3))
    text = error_of(lambda: twin.restore(directory / "ckpt-1"))
    assert "Permission" in text
    assert str(directory) in text
    assert twin.save_counter == 0
    with unprivileged(), pytest.raises(PermissionError, match="run"):
        latest_checkpoint(directory)


def test_one_clear_error_and_its_cause(directory: Path) -> None:
    (directory / "file").write_text("no directory")
    with pytest.raises(
        CollectiveError, match=r"step 'create' failed on 1 rank\(s\):\n  rank 0: NotADirectory"
    ) as error:
        Checkpoint(x=torch.ones(3)).save(directory / "file" / "ckpt")
    assert isinstance(error.value.__cause__, NotADirectoryError)
    assert error.value.failures.keys() == {0}


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that no launcher started, except what `environ` says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
    settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import torch\nfrom distckpt import *\n{code}"]
    return subprocess.run(
        command, env=inherited | settings | environ, capture_output=True, text=True, timeout=100, check=False
    )


def test_after_mpi_was_finalised(tmp_path: Path) -> None:
    code = f"""
from mpi4py import MPI
used, unused = Checkpoint(x=torch.ones(2)), Checkpoint(x=torch.ones(2))
path = used.save({str(tmp_path / "ckpt")!r})
MPI.Finalize()
for call in (used.save, unused.save, used.restore, unused.restore, used.write, Checkpoint(x=torch.ones(2)).read):
    try:
        call(path)
    except CheckpointError as error:
        print(error)
"""
    ended = run_python(code)
    assert ended.returncode == 0, ended.stderr
    message = "MPI is already finalised: save and restore before MPI.Finalize()."
    assert ended.stdout.splitlines() == [message] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "ckpt-1.h5"]


def test_processes_that_mpirun_started_and_mpi_did_not_join(tmp_path: Path) -> None:
    code = f"Checkpoint(x=torch.ones(2)).save({str(tmp_path / 'ckpt')!r})"
    ended = run_python(code, PMI_SIZE="4", PMI_RANK="2")
    assert ended.returncode == 1
    assert "CheckpointError: mpiexec started 4 processes (PMI_SIZE=4), but in this one" in ended.stderr
    assert "build mpi4py with this launcher's mpicc" in ended.stderr
    assert list(tmp_path.iterdir()) == []
