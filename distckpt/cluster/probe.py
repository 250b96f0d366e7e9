"""Probe of the environment: `python -m distckpt.cluster.probe` loads h5py, starts MPI and prints the facts as JSON.

It runs in a process of its own, because starting a broken MPI may end the process or never return.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec

from distckpt.storage.hdf5_build import HDF5Build, hdf5_build

#: Seconds to wait for the probe. MPI starts in one second, on a busy file system in ten.
PATIENCE = 60.0

# The library itself, not its C++ and Fortran companions: libmpi.so.40, libmpich.so.12, libmpi_cray.so.12, ...
_MPI_LIBRARY = re.compile(r"/libmpi(?:ch)?(?:_(?:abi|amd|aocc|cray|gnu|gtl|intel|nvidia)\w*)?\.so[.\d]*$")


class MPIFacts(msgspec.Struct, frozen=True):
    """The MPI that mpi4py started.

    Attributes:
        vendor: Name of the implementation, such as "Open MPI".
        version: Version of the implementation.
        size: Ranks in COMM_WORLD.
        rank: This process's rank in COMM_WORLD.
        threads: Thread level that MPI provides: "single", "funneled", "serialized" or "multiple".
        node_size: Ranks on this process's node.
    """

    vendor: str
    version: tuple[int, ...]
    size: int
    rank: int
    threads: str
    node_size: int = 1

    def __str__(self) -> str:
        return f"{self.vendor} {'.'.join(map(str, self.version))}"


class Facts(msgspec.Struct, frozen=True):
    """The findings of the probe.

    Attributes:
        hdf5: The HDF5 of h5py; None if h5py cannot be imported.
        hdf5_problem: Why h5py cannot be imported; empty if it can.
        mpi: The MPI of mpi4py; None if it cannot be started.
        mpi_problem: Why MPI cannot be started; empty if it can.
        mpi_libraries: MPI libraries that the process has loaded; more than one cannot work.
    """

    hdf5: HDF5Build | None = None
    hdf5_problem: str = ""
    mpi: MPIFacts | None = None
    mpi_problem: str = ""
    mpi_libraries: tuple[str, ...] = ()


def probe(patience: float = PATIENCE) -> Facts:
    """Run the probe in a new process. Under a launcher: collective over the launched processes, as starting MPI is."""
    command = [sys.executable, "-m", "distckpt.cluster.probe"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else ""
        return _last_facts(output, f"starting MPI did not end in {patience:.0f} s")
    return _last_facts(done.stdout, _last_line(done.stderr) or f"starting MPI ended the process ({done.returncode})")


def _last_facts(output: str, problem: str) -> Facts:
    """The last record that the probe printed; with `problem` if the probe ended before the record with MPI."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    facts = msgspec.json.decode(lines[-1], type=Facts) if lines else Facts(hdf5_problem=problem)
    if facts.mpi is None and not facts.mpi_problem:
        return msgspec.structs.replace(facts, mpi_problem=problem)
    return facts


def _last_line(text: str) -> str:
    """The last line with a word in it: launchers frame their messages with dashes."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""


def _find_hdf5() -> Facts:
    try:
        return Facts(hdf5=hdf5_build())
    except ImportError as error:
        return Facts(hdf5_problem=str(error))


def _find_mpi(facts: Facts) -> Facts:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        return msgspec.structs.replace(facts, mpi_problem=str(error))
    vendor, version = MPI.get_vendor()
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    mpi = MPIFacts(vendor, version, world.size, world.rank, levels[MPI.Query_thread()], node.size)
    node.Free()
    return msgspec.structs.replace(facts, mpi=mpi, mpi_libraries=_loaded_mpi_libraries())


def _loaded_mpi_libraries() -> tuple[str, ...]:
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return tuple(sorted(path for path in mapped if _MPI_LIBRARY.search(path)))


def _print(facts: Facts) -> None:
    print(msgspec.json.encode(facts).decode(), flush=True)


def main() -> None:
    """Print the facts known before MPI starts, then all of them."""
    facts = _find_hdf5()
    _print(facts)
    _print(_find_mpi(facts))


if __name__ == "__main__":
    main()
