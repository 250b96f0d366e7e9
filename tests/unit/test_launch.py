"""The parts of the launch scripts that need no MPI: settings, striping, restarts, bad calls; their documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in {".sh", ".sbatch"} and path.name != "env.sh")
README = (LAUNCH / "README.md").read_text()
PATH = "/usr/bin:/bin"


def bash(code: str, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs bash code after env.sh, with only these variables."""
    done = subprocess.run(
        ["bash", "-uc", f'. "{LAUNCH}/env.sh"; {code}', "script", *arguments],
        env={"PATH": PATH, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def stub(directory: Path, name: str, script: str) -> str:
    """A command on a path, which is returned."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"{directory}:{PATH}"


def exported(**env: str) -> dict[str, str]:
    lines = bash("settings 3; env", **{"MPIRUN": "false", **env}).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


def test_threads_and_guards_have_defaults_that_the_user_can_change(tmp_path: Path) -> None:
    found = exported()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HDF5_USE_FILE_LOCKING"] == "BEST_EFFORT"
    assert found["OMPI_MCA_fbtl_posix_write_datasieving"] == found["OMPI_MCA_fbtl_posix_read_datasieving"] == "0"
    assert "OMPI_MCA_fcoll" not in found
    found = exported(THREADS="7", HDF5_USE_FILE_LOCKING="FALSE", OMPI_MCA_fbtl_posix_write_datasieving="1")
    assert found["OMP_NUM_THREADS"] == "7"
    assert (found["HDF5_USE_FILE_LOCKING"], found["OMPI_MCA_fbtl_posix_write_datasieving"]) == ("FALSE", "1")
    stub(tmp_path, "mpirun-4.0.3", 'echo "mpirun (Open MPI) 4.0.3"')
    assert exported(MPIRUN=f"{tmp_path}/mpirun-4.0.3")["OMPI_MCA_fcoll"] == "^vulcan"


@pytest.mark.parametrize(("ranks", "policy"), [("1", "none"), ("2", "none"), ("3", None), ("", None)])
def test_few_ranks_are_not_bound_to_a_core_each(ranks: str, policy: str | None, tmp_path: Path) -> None:
    stub(tmp_path, "mpirun", "true")
    mpirun = f"{tmp_path}/mpirun"
    names = ("OMPI_MCA_hwloc_base_binding_policy", "PRTE_MCA_hwloc_default_binding_policy")
    lines = bash(f"mpirun_command {ranks}; env", MPIRUN=mpirun).stdout.splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert [found.get(name) for name in names] == [policy, policy]
    lines = bash(f"mpirun_command {ranks}; env", MPIRUN=mpirun, **{names[0]: "numa"}).stdout.splitlines()
    assert f"{names[0]}=numa" in lines


@pytest.mark.parametrize(
    ("env", "count"),
    [({"CKPT_GB": "0"}, 1), ({"CKPT_GB": "9"}, 8), ({}, 24), ({"CKPT_GB": "100"}, 72), ({"STRIPE_COUNT": "-1"}, -1)],
)
def test_a_folder_on_lustre_is_striped_by_the_size_of_a_checkpoint(
    env: dict[str, str], count: int, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "a"
    stub(tmp_path, "stat", "echo lustre")
    path = stub(tmp_path, "lfs", 'echo "$@"')
    done = bash("stripe", **{"PATH": path, "CKPT_DIR": str(folder), **env})
    assert done.stdout == f"setstripe --stripe-count {count} --stripe-size 4M {folder}\n"
    assert folder.is_dir()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    path = stub(tmp_path, "lfs", "echo called")
    assert bash("stripe", PATH=path, CKPT_DIR=str(tmp_path)).stdout == ""
    assert bash("stripe", PATH=path).stdout == ""


def test_a_failing_lfs_does_not_stop_the_job(tmp_path: Path) -> None:
    stub(tmp_path, "stat", "echo lustre")
    path = stub(tmp_path, "lfs", "exit 1")
    assert "keep the default striping" in bash("stripe", PATH=path, CKPT_DIR=str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("env", "status", "restarts", "again"),
    [
        ({}, 85, 0, True),
        ({}, 0, 0, False),
        ({}, 1, 0, False),
        ({"REQUEUE": "0"}, 85, 0, False),
        ({"MAX_RESTARTS": "3"}, 85, 2, True),
        ({"MAX_RESTARTS": "3"}, 85, 3, False),
    ],
)
def test_only_a_run_that_has_stopped_early_is_started_again(
    env: dict[str, str], status: int, restarts: int, again: bool
) -> None:
    done = bash(f"status={status}; may_restart {restarts}", check=False, **env)
    assert (done.returncode == 0) == again


def test_the_command_comes_from_the_arguments_or_the_variable() -> None:
    show = 'command_line "$@"; printf "<%s>" "${command[@]}"'
    assert bash(show, "python", "a b.py", TRAIN="other").stdout == "<python><a b.py>"
    assert bash(show, TRAIN="python 'a b.py' --lr 1e-3").stdout == "<python><a b.py><--lr><1e-3>"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_command_each_script_says_how_to_use_it(script: Path, tmp_path: Path) -> None:
    path = stub(tmp_path, "flux", "exit 1")
    env = {"PATH": path, "LAUNCH_DIR": str(LAUNCH)}
    done = subprocess.run(
        ["bash", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert "no command" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_mpirun_each_script_says_so(script: Path, tmp_path: Path) -> None:
    path = stub(tmp_path, "flux", "echo 2")
    env = {"PATH": path, "LAUNCH_DIR": str(LAUNCH), "LAUNCHER": "mpirun", "MPIRUN": "no-such-mpirun"}
    done = subprocess.run(
        ["bash", script, "true"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 69
    assert "no-such-mpirun is not on the path" in done.stderr


def knobs(script: Path) -> set[str]:
    """Names of the variables for which a script has a default."""
    found = re.findall(r'(?:"\$\{|export )([A-Z][A-Z0-9_a-z]+)(?::=|=\$\{\1:-)', script.read_text())
    return set(found) - {"SLURM_WAIT", "OMPI_MCA_orte_default_hostfile"}


@pytest.mark.parametrize("script", [*SCRIPTS, LAUNCH / "env.sh"], ids=lambda path: path.name)
def test_every_knob_is_in_the_table(script: Path) -> None:
    found = knobs(script)
    assert found
    assert [name for name in sorted(found) if f"`{name}`" not in README] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_header_has_usage_knobs_and_exit_codes(script: Path) -> None:
    header = re.match(r"#!/usr/bin/env bash\n((?:#.*\n)+)", script.read_text())
    assert header is not None
    for part in (f"launch/{script.name}", "Knobs", "Exit codes: 0 ", "85 ", "64 ", "69 "):
        assert part in header[1]
    own = knobs(script) - knobs(LAUNCH / "env.sh")
    assert [name for name in sorted(own) if name not in header[1]] == []
