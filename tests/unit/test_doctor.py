"""`distckpt doctor`: every finding, from facts made up; and the real machine once."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from distckpt.cli import main
from distckpt.cluster import environment, probe
from distckpt.cluster.environment import MPI_IO_BUGS, Check, Report
from distckpt.cluster.file_system import Space, existing_parent, file_system_type, space
from distckpt.cluster.probe import Facts, MPIFacts
from distckpt.coordination.launcher import LauncherSize
from distckpt.storage.hdf5_build import HDF5Build, hdf5_build

GIB = 1 << 30
MPIRUN = LauncherSize(4, "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun")


def open_mpi(*version: int, size: int = 4, threads: str = "multiple") -> MPIFacts:
    return MPIFacts("Open MPI", version, size, 0, threads)


def build(*hdf5: int, mpi: bool = True) -> HDF5Build:
    return HDF5Build("3.16.0", (hdf5[0], hdf5[1], hdf5[2]), mpi)


@pytest.mark.parametrize(
    ("size", "expected", "ok", "found"),
    [
        (4, MPIRUN, True, "Open MPI 4.1.4, 4 ranks, as Open MPI's mpirun says"),
        (1, None, True, "1 rank, started without a launcher"),
        (1, MPIRUN, False, "1 rank, but Open MPI's mpirun started 4 processes (OMPI_COMM_WORLD_SIZE)"),
    ],
)
def test_ranks_are_held_against_the_launcher(size: int, expected: LauncherSize | None, ok: bool, found: str) -> None:
    check = environment.check_size(open_mpi(4, 1, 4, size=size), expected)
    assert check.ok is ok
    assert found in check.found
    assert ("srun --mpi=pmix" in check.cure) is not ok


def test_threads_must_be_able_to_use_mpi() -> None:
    assert environment.check_threads(open_mpi(4, 1, 4)).ok
    serialized = environment.check_threads(open_mpi(4, 1, 4, threads="serialized"))
    assert not serialized.ok
    assert "MPI_THREAD_MULTIPLE" in serialized.cure


@pytest.mark.parametrize(
    ("node_size", "bound", "cores", "cure"),
    [
        (2, 16, 16, ""),  # not bound
        (8, 16, 128, ""),  # to cores of its own
        (2, 1, 16, "--map-by slot:PE=8"),  # what Open MPI does with two ranks
        (1, 1, 64, "--cpus-per-task=64"),
        (4, 1, 4, ""),  # there is one each
        (4, 1, 2, ""),
    ],
)
def test_a_rank_must_not_be_kept_on_one_of_many_cores(node_size: int, bound: int, cores: int, cure: str) -> None:
    check = environment.check_cores(node_size, bound, cores)
    assert check.ok is (not cure)
    assert cure in check.cure
    assert f"{bound} of the node's {cores} cores" in check.found


@pytest.mark.parametrize(
    ("version", "ok", "found"),
    [
        ((3, 0, 3), False, "may come out wrong (ompi#6285, mended in 3.0.4)"),
        ((3, 0, 4), True, "not known to corrupt"),
        ((3, 1, 3), False, "mended in 3.1.4"),
        ((3, 1, 6), True, "not known to corrupt"),
        ((4, 0, 0), False, "mended in 4.0.1"),
        ((4, 0, 3), True, "collective writes may hang"),
        ((4, 0, 7), True, "not known to corrupt"),
        ((4, 1, 4), True, "strided writes may come out wrong (ompi#12718, mended in 4.1.7)"),
        ((4, 1, 7), True, "not known to corrupt"),
        ((5, 0, 5), True, "mended in 5.0.6"),
        ((5, 0, 6), True, "not known to corrupt"),
    ],
)
def test_open_mpi_versions_with_broken_files_are_named(version: tuple[int, ...], ok: bool, found: str) -> None:
    check = environment.check_mpi_io(open_mpi(*version), {})
    assert check.ok is ok
    assert found in check.found
    assert bool(check.cure) is not ok


@pytest.mark.parametrize(
    ("setting", "affected"), [("^ompio", False), ("romio321", False), ("ompio", True), ("^romio321", True)]
)
def test_the_bugs_are_those_of_open_mpis_own_mpi_io(setting: str, affected: bool) -> None:
    check = environment.check_mpi_io(open_mpi(4, 0, 0), {"OMPI_MCA_io": setting})
    assert check.ok is not affected


def test_other_mpis_do_not_have_open_mpis_bugs() -> None:
    assert environment.check_mpi_io(MPIFacts("MPICH", (4, 0, 0), 4, 0, "multiple"), {}).ok


def test_no_version_is_in_two_rows_of_the_table() -> None:
    bugs = sorted(MPI_IO_BUGS, key=lambda bug: bug.first)
    assert all(bug.first < bug.fixed for bug in bugs)
    assert all(bug.fixed <= later.first for bug, later in itertools.pairwise(bugs))


def by_subject(checks: list[Check]) -> dict[str, Check]:
    return {check.subject: check for check in checks}


def test_mpi_that_does_not_start_says_why() -> None:
    checks = by_subject(environment.mpi_checks(Facts(mpi_problem="libmpi.so: not found"), {}))
    assert list(checks) == ["MPI"]
    assert not checks["MPI"].ok
    assert "libmpi.so" in checks["MPI"].found
    assert "module load" in checks["MPI"].cure


def test_h5py_with_mpi_is_fine() -> None:
    facts = Facts(build(1, 10, 8), "", open_mpi(4, 1, 4), "", ("/usr/lib/libmpi.so.40",))
    checks = by_subject(environment.hdf5_checks(facts))
    assert list(checks) == ["HDF5", "h5py", "h5py's MPI"]
    assert all(check.ok and not check.cure for check in checks.values())


def test_serial_h5py_says_what_it_costs() -> None:
    facts = Facts(build(1, 14, 6, mpi=False), "", open_mpi(4, 1, 4), "", ("/usr/lib/libmpi.so.40",))
    checks = by_subject(environment.hdf5_checks(facts))
    assert list(checks) == ["HDF5", "h5py"]
    assert not checks["h5py"].ok
    assert 'the same files, but transport="posix" only' in checks["h5py"].found
    assert "HDF5_MPI=ON" in checks["h5py"].cure


def test_two_mpi_libraries_in_one_process_are_told() -> None:
    check = environment.check_same_mpi(("/a/libmpi.so.40", "/b/libmpich.so.12"))
    assert not check.ok
    assert "/a/libmpi.so.40 and /b/libmpich.so.12" in check.found
    assert "rebuild h5py" in check.cure


def test_old_hdf5_and_missing_h5py_are_told() -> None:
    old = by_subject(environment.hdf5_checks(Facts(build(1, 8, 23))))
    assert not old["HDF5"].ok
    missing = environment.hdf5_checks(Facts(hdf5_problem="No module named 'h5py'"))
    assert [(check.ok, check.found) for check in missing] == [(False, "No module named 'h5py'")]


@pytest.mark.parametrize(
    ("kind", "ok", "found"),
    [
        ("lustre", True, "a parallel file system"),
        ("ext4", True, "ranks on one node"),
        ("nfs4", False, "lose each other's bytes"),
        ("tmpfs", False, "memory"),
        ("overlay", False, "container"),
        ("fuse.strange", True, "fuse.strange, unknown here"),
    ],
)
def test_file_systems_are_judged(kind: str, ok: bool, found: str) -> None:
    check = environment.check_file_system(Path("runs"), kind)
    assert check.ok is ok
    assert found in check.found
    assert check.found.startswith("runs is on ")
    assert bool(check.cure) is not ok


@pytest.mark.parametrize(
    ("room", "writable", "ok", "found"),
    [
        (Space(80 * GIB, 250 * GIB, None), True, True, "80.0 GiB of 250.0 GiB free"),
        (Space(GIB // 2, 250 * GIB, None), True, False, "0.5 GiB of 250.0 GiB free"),
        (Space(80 * GIB, 250 * GIB, None), False, False, "cannot be written to"),
        (Space(80 * GIB, 250 * GIB, GIB // 4), True, False, "RLIMIT_FSIZE"),
        (Space(80 * GIB, 250 * GIB, 20 * GIB), True, True, "free"),
        (Space(None, 0, None), True, True, "does not say"),
    ],
)
def test_space_is_judged(room: Space, writable: bool, ok: bool, found: str) -> None:
    check = environment.check_space(Path("runs"), room, writable=writable)
    assert check.ok is ok
    assert found in check.found
    assert bool(check.cure) is not ok


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        check = environment.directory_checks(directory)[-1]
        assert (check.subject, check.ok) == ("space", False)
        assert check.found == f"{tmp_path / 'file'} is no directory"
        assert check.cure
    assert environment.directory_checks(tmp_path / "new" / "below")[-1].ok


MOUNTS = r"""
1 0 8:1 / / rw - overlay overlay rw
2 1 8:2 / /scratch rw shared:1 - lustre mds:/s rw
3 1 8:3 / /scratch/my\040runs rw - nfs4 server:/r rw
4 1 8:4 / /mnt rw - ext4 /dev/a rw
5 1 8:5 / /mnt rw - xfs /dev/b rw
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/home/me", "overlay"),
        ("/scratch", "lustre"),
        ("/scratch/a/b", "lustre"),
        ("/scratchy", "overlay"),
        ("/scratch/my runs/a", "nfs4"),
        ("/mnt/a", "xfs"),
    ],
)
def test_the_innermost_and_latest_mount_counts(directory: str, kind: str) -> None:
    assert file_system_type(Path(directory), MOUNTS.strip()) == kind


def test_the_real_file_systems_have_names() -> None:
    assert file_system_type(Path("/proc")) == "proc"
    assert file_system_type(Path.cwd())


def test_a_directory_to_be_made_is_judged_by_its_parent(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    assert existing_parent(tmp_path / "link" / "a" / "b") == (tmp_path / "real").resolve()
    found = space(existing_parent(tmp_path / "new"))
    assert found.free is None or 0 <= found.free <= found.total


def test_a_probe_that_hangs_is_given_up() -> None:
    facts = probe.probe(patience=0.01)
    assert facts.hdf5 is None
    assert "did not end in" in facts.hdf5_problem
    assert "did not end in" in facts.mpi_problem


def test_what_was_found_before_mpi_ended_the_process_is_kept() -> None:
    first = probe.Facts(build(1, 10, 8))
    output = f"noise\n{msgspec.json.encode(first).decode()}\n"
    facts = probe._last_facts(output, "PMIX ERROR")
    assert facts.hdf5 == first.hdf5
    assert facts.mpi_problem == "PMIX ERROR"


@pytest.mark.parametrize(
    ("path", "is_mpi"),
    [
        ("/usr/lib/x86_64-linux-gnu/libmpi.so.40.30.4", True),
        ("/opt/mpich/lib/libmpich.so.12", True),
        ("/opt/cray/lib/libmpi_cray.so.12", True),
        ("/usr/lib/libmpi_cxx.so.40", False),
        ("/usr/lib/libmpi_mpifh.so.40", False),
        ("/venv/mpi4py/MPI.openmpi.cpython-311-x86_64-linux-gnu.so", False),
    ],
)
def test_mpi_libraries_are_recognised(path: str, is_mpi: bool) -> None:
    assert bool(probe._MPI_LIBRARY.search(path)) is is_mpi


def fake_report(monkeypatch: pytest.MonkeyPatch, rank: int, *checks: Check) -> None:
    monkeypatch.setattr(environment, "check_environment", lambda _: Report(rank, checks))


GOOD = Check("HDF5", ok=True, found="1.10.8")
BAD = Check("h5py", ok=False, found="3.16.0 without MPI", cure="make install")


def test_one_line_each_and_status_1_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_report(monkeypatch, 0, GOOD, BAD)
    result = CliRunner().invoke(main.build(["doctor"]), ["doctor"])
    assert result.output.splitlines() == [
        "ok    HDF5         1.10.8",
        "FAIL  h5py         3.16.0 without MPI. Cure: make install",
    ]
    assert result.exit_code == 1


def test_no_name_acts_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_report(monkeypatch, 0, Check("space", ok=True, found="1 GiB free in a\x1b[2J\nb"))
    result = CliRunner().invoke(main.build(["doctor"]), ["doctor"])
    assert result.output == "ok    space        1 GiB free in a\\x1b[2J\\nb\n"


def test_status_0_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_report(monkeypatch, 0, GOOD)
    assert CliRunner().invoke(main.build(["doctor"]), ["doctor"]).exit_code == 0


def test_rank_0_answers_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_report(monkeypatch, 1, GOOD, BAD)
    result = CliRunner().invoke(main.build(["doctor"]), ["doctor"])
    assert (result.output, result.exit_code) == ("", 0)


def test_the_real_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distckpt", "doctor", str(tmp_path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=100, check=False)
    lines = {line[6:19].strip(): line for line in done.stdout.splitlines()}
    assert list(lines) == [
        "MPI",
        "MPI threads",
        "cores",
        "MPI-IO",
        "HDF5",
        "h5py",
        "h5py's MPI",
        "file system",
        "space",
    ]
    assert lines["MPI"].startswith("ok ")
    assert lines["h5py's MPI"].startswith("ok ")
    assert done.returncode == int(any(line.startswith("FAIL") for line in lines.values()))
    assert not done.stderr


def test_the_build_is_that_of_the_h5py_here() -> None:
    import h5py

    found = hdf5_build()
    assert (found.h5py, found.mpi) == (h5py.__version__, h5py.get_config().mpi)
    assert ".".join(map(str, found.hdf5)) == h5py.version.hdf5_version
