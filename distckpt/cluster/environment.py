"""Check of the environment: whether MPI, HDF5 and the file system are what a checkpoint needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distckpt.cluster.file_system import Space, existing_parent, file_system_type, space
from distckpt.cluster.probe import Facts, MPIFacts, probe
from distckpt.coordination.launcher import LauncherSize, expected_size

Version = tuple[int, ...]

#: Free bytes below which a file system counts as full.
LEAST_SPACE = 1 << 30
_OLDEST_HDF5 = (1, 10)
_GIB = 1 << 30

_PARALLEL = {"beegfs", "ceph", "cvfs", "daos", "fuse.dfuse", "gpfs", "lustre", "panfs", "pvfs2", "wekafs"}
_LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "xfs", "zfs"}
_MEMORY = {"ramfs", "tmpfs"}
_NETWORK = {"9p", "afs", "cifs", "fuse.sshfs", "nfs", "nfs4", "smb3"}


@dataclass(frozen=True, slots=True)
class Check:
    """The result for one subject: one line of the report.

    Attributes:
        subject: What was checked, such as "MPI threads".
        ok: Whether checkpoints can rely on it.
        found: What was found, and what that means.
        cure: What to do about it; empty if it is ok.
    """

    subject: str
    ok: bool
    found: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class MPIIOBug:
    """A bug of Open MPI's MPI-IO that corrupts files or hangs.

    Attributes:
        first: First version that has it.
        fixed: First version after that without it.
        effect: What happens, as a clause.
        everywhere: Whether it affects what distckpt does by default: independent writes of contiguous pieces.
        report: Issue that describes it.
    """

    first: Version
    fixed: Version
    effect: str
    everywhere: bool
    report: str


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all checks.

    Attributes:
        rank: Rank of this process in COMM_WORLD; 0 if MPI does not start.
        checks: The checks, in the order in which to cure them.
    """

    rank: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing needs a cure."""
        return all(check.ok for check in self.checks)


MPI_IO_BUGS = (
    MPIIOBug((0,), (3, 0, 4), "parallel HDF5 files may come out wrong", everywhere=True, report="ompi#6285"),
    MPIIOBug((3, 1, 0), (3, 1, 4), "parallel HDF5 files may come out wrong", everywhere=True, report="ompi#6285"),
    MPIIOBug((4, 0, 0), (4, 0, 1), "parallel HDF5 files may come out wrong", everywhere=True, report="ompi#6285"),
    MPIIOBug((4, 0, 2), (4, 0, 4), "collective writes may hang", everywhere=False, report="ompi#7109"),
    MPIIOBug((4, 1, 0), (4, 1, 7), "strided writes may come out wrong", everywhere=False, report="ompi#12718"),
    MPIIOBug((5, 0, 0), (5, 0, 6), "strided writes may come out wrong", everywhere=False, report="ompi#12718"),
)


def check_environment(directory: Path, environ: Mapping[str, str] = os.environ) -> Report:
    """Check MPI, HDF5 and the file system of a directory.

    Under a launcher: collective over the launched processes.

    Args:
        directory: Directory for checkpoints; need not exist.
        environ: Environment variables.
    """
    facts = probe()
    rank = facts.mpi.rank if facts.mpi is not None else 0
    return Report(rank, (*mpi_checks(facts, environ), *hdf5_checks(facts), *directory_checks(directory)))


def directory_checks(directory: Path) -> list[Check]:
    """Check the file system and the free space of a directory, which need not exist."""
    parent = existing_parent(directory)
    writable = os.access(parent, os.W_OK | os.X_OK)
    there = next(path for path in (directory.resolve(), *directory.resolve().parents) if path.exists())
    if there.is_dir():
        room = check_space(directory, space(parent), writable=writable)
    else:
        room = Check("space", ok=False, found=f"{there} is no directory", cure="another directory")
    return [check_file_system(directory, file_system_type(parent)), room]


def mpi_checks(facts: Facts, environ: Mapping[str, str]) -> list[Check]:
    """Check the MPI library and size, its thread level, the cores of this rank, and MPI-IO."""
    if facts.mpi is None:
        cure = "load your site's MPI (module load openmpi) and pip install mpi4py"
        return [Check("MPI", ok=False, found=facts.mpi_problem, cure=cure)]
    return [
        check_size(facts.mpi, expected_size(environ)),
        check_threads(facts.mpi),
        check_cores(facts.mpi.node_size, len(os.sched_getaffinity(0)), os.cpu_count() or 1),
        check_mpi_io(facts.mpi, environ),
    ]


def check_size(mpi: MPIFacts, expected: LauncherSize | None) -> Check:
    """Check that MPI has as many ranks as the launcher started processes."""
    ranks = f"{mpi}, {mpi.size} rank{'s' if mpi.size != 1 else ''}"
    if expected is None:
        return Check("MPI", ok=True, found=f"{ranks}, started without a launcher")
    if expected.size == mpi.size:
        return Check("MPI", ok=True, found=f"{ranks}, as {expected.launcher} says")
    found = f"{ranks}, but {expected.launcher} started {expected.size} processes ({expected.variable})"
    cure = "use the launcher of the MPI that mpi4py finds; under Slurm srun --mpi=pmix"
    return Check("MPI", ok=False, found=found, cure=cure)


def check_threads(mpi: MPIFacts) -> Check:
    """Check that threads other than the main one may call MPI."""
    if mpi.threads == "multiple":
        return Check("MPI threads", ok=True, found="multiple: threads may use MPI")
    found = f'{mpi.threads}: the watchdog thread may be unable to end a job that hangs in "mpio"'
    cure = 'an MPI built for MPI_THREAD_MULTIPLE, and mpi4py.rc.thread_level left alone; or transport="posix"'
    return Check("MPI threads", ok=False, found=found, cure=cure)


def check_cores(node_size: int, bound: int, cores: int) -> Check:
    """Check that the launcher does not bind a rank to one core where its share of the node is larger.

    Args:
        node_size: Ranks on the node.
        bound: Cores that this rank may use.
        cores: Cores of the node.
    """
    share = max(1, cores // node_size)
    found = f"this rank may use {bound} of the node's {cores} cores, for {node_size} rank{'s' * (node_size != 1)}"
    if bound > 1 or share == 1:
        return Check("cores", ok=True, found=found)
    found += ": training, a save in the background and data loaders share it"
    cure = f"mpirun --bind-to none (or --map-by slot:PE={share}), srun --cpus-per-task={share}"
    return Check("cores", ok=False, found=found, cure=cure)


def check_mpi_io(mpi: MPIFacts, environ: Mapping[str, str]) -> Check:
    """Check whether this MPI is known to corrupt files, in a way that affects distckpt."""
    bugs = [bug for bug in MPI_IO_BUGS if mpi.vendor == "Open MPI" and bug.first <= mpi.version < bug.fixed]
    if not bugs:
        return Check("MPI-IO", ok=True, found=f"{mpi} is not known to corrupt files")
    bug = bugs[0]
    known = f"{mpi}: {bug.effect} ({bug.report}, mended in {'.'.join(map(str, bug.fixed))})"
    if not _uses_ompio(environ):
        return Check("MPI-IO", ok=True, found=f"{known}; not with OMPI_MCA_io={environ['OMPI_MCA_io']}")
    if bug.everywhere:
        return Check("MPI-IO", ok=False, found=known, cure='a newer Open MPI, or transport="posix"')
    safe = "distckpt writes contiguous pieces only (set OMPI_MCA_io=^ompio for collective=True)"
    return Check("MPI-IO", ok=True, found=f"{known}; {safe}")


def _uses_ompio(environ: Mapping[str, str]) -> bool:
    """Whether Open MPI uses OMPIO, its own MPI-IO, which has the bugs, and not ROMIO."""
    setting = environ.get("OMPI_MCA_io", "ompio")
    return ("ompio" in setting.removeprefix("^").split(",")) != setting.startswith("^")


def hdf5_checks(facts: Facts) -> list[Check]:
    """Check the version of HDF5, and that h5py uses MPI, the same as mpi4py."""
    if facts.hdf5 is None:
        return [Check("h5py", ok=False, found=facts.hdf5_problem, cure="make install, or pip install h5py")]
    version = ".".join(map(str, facts.hdf5.hdf5))
    old = facts.hdf5.hdf5 < _OLDEST_HDF5
    checks = [Check("HDF5", not old, version, cure="HDF5 1.10 or newer, and h5py rebuilt with it" if old else "")]
    if not facts.hdf5.mpi:
        found = (
            f'{facts.hdf5.h5py} without MPI: the same files, but transport="posix" only (no collective writes or hints)'
        )
        cure = "make install, or HDF5_MPI=ON CC=mpicc pip install --no-binary=h5py h5py"
        return [*checks, Check("h5py", ok=False, found=found, cure=cure)]
    checks.append(Check("h5py", ok=True, found=f"{facts.hdf5.h5py} with MPI"))
    return [*checks, check_same_mpi(facts.mpi_libraries)] if facts.mpi is not None else checks


def check_same_mpi(libraries: tuple[str, ...]) -> Check:
    """Check that h5py and mpi4py use the same MPI library."""
    if len(libraries) <= 1:
        return Check("h5py's MPI", ok=True, found=f"mpi4py's: {', '.join(libraries) or 'one library'}")
    cure = 'rebuild h5py with the mpicc of mpi4py\'s MPI (rm -rf .venv, make install); until then transport="posix"'
    return Check("h5py's MPI", ok=False, found=f"not mpi4py's: {' and '.join(libraries)}", cure=cure)


def check_file_system(directory: Path, kind: str) -> Check:
    """Check that files written by several ranks are safe there, and outlive the job."""
    subject = "file system"
    if kind in _PARALLEL:
        return Check(subject, ok=True, found=f"{directory} is on {kind}, a parallel file system")
    if kind in _LOCAL:
        return Check(subject, ok=True, found=f"{directory} is on {kind}, a disk of this node: for ranks on one node")
    if kind in _MEMORY:
        return Check(subject, ok=False, found=f"{directory} is on {kind}: memory", cure="save to a disk")
    if kind == "overlay":
        found = f"{directory} is on overlay: it ends with this container"
        return Check(subject, ok=False, found=found, cure="save to a mounted volume")
    if kind in _NETWORK:
        found = f"{directory} is on {kind}: nodes that write one file there may lose each other's bytes"
        cure = "save to a parallel file system (Lustre, GPFS, BeeGFS), or keep all ranks on one node"
        return Check(subject, ok=False, found=found, cure=cure)
    return Check(subject, ok=True, found=f"{directory} is on {kind or 'a file system without a name'}, unknown here")


def check_space(directory: Path, room: Space, *, writable: bool) -> Check:
    """Check that a file of at least `LEAST_SPACE` bytes can be written there."""
    if not writable:
        return Check("space", ok=False, found=f"{directory} cannot be written to", cure="another directory, or chmod")
    if room.largest_file is not None and room.largest_file < LEAST_SPACE:
        found = f"files may have {_gib(room.largest_file)} at most (RLIMIT_FSIZE)"
        return Check("space", ok=False, found=found, cure="ulimit -f unlimited")
    if room.free is None:
        return Check("space", ok=True, found=f"the file system of {directory} does not say how much is free")
    found = f"{_gib(room.free)} of {_gib(room.total)} free in {directory}"
    full = room.free < LEAST_SPACE
    return Check("space", not full, found, cure="delete old checkpoints, or save elsewhere" if full else "")


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.1f} GiB"
