"""Writing one file from several ranks, through parallel HDF5 and without it: the same bytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt.layout.box import Box
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.records import Shard, Variable
from distckpt.storage import creation, hdf5, mpio, rawio
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.reading import read
from distckpt.storage.skeleton import Skeleton
from distckpt.storage.transfer import WriteJob
from distckpt.storage.verify import verify_file
from distckpt.storage.writing import write_posix
from tests.checkpoint_files import (
    Tensors,
    bits,
    make_manifest,
    part,
    placed,
    read_jobs,
    same_bits,
    specs_of,
    twins,
    variables_of,
    write_jobs,
)

pytestmark = pytest.mark.skipif(mpio.why_unavailable() is not None, reason="h5py has no MPI")

MIB = 1 << 20


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """Large and small, one piece and several, whole rows and columns; the same on all ranks."""
    generator = torch.Generator().manual_seed(4)
    return {
        "a/large": torch.randn(3000, 1000, generator=generator),
        "a/small": torch.randn(37, generator=generator),
        "b/bfloat16": torch.randn(2 * MIB, generator=generator).bfloat16(),
        "b/float8": torch.randn(5 * MIB + 1, generator=generator).to(torch.float8_e4m3fn),
        "columns": torch.randn(1200, 900, generator=generator),
        "rank 0 only": torch.randn(1000, 1000, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "flags": torch.rand(3 * MIB, generator=generator) > 0.5,
        "complex": torch.randn(300_000, dtype=torch.complex64, generator=generator),
    }


def columns_of(variable: Variable, size: int) -> Variable:
    """The variable, split along its last dimension."""
    rows, n_columns = variable.shape
    cuts = [n_columns * rank // size for rank in range(size + 1)]
    shards = [Shard(rank, (0, cuts[rank]), (rows, cuts[rank + 1] - cuts[rank])) for rank in range(size)]
    return Variable(variable.key, variable.dtype, variable.shape, -1, shards)


def shared_variables(size: int) -> list[Variable]:
    variables = {variable.key: variable for variable in variables_of(tensors(), size)}
    variables["columns"] = columns_of(variables["columns"], size)
    whole = variables["rank 0 only"]
    variables["rank 0 only"] = Variable(whole.key, whole.dtype, whole.shape, -1, [Shard(0, (0, 0), whole.shape)])
    return list(variables.values())


class Save:
    """One file, written by all ranks of a communicator."""

    def __init__(self, comm: Any, path: Path, values: Tensors | None = None) -> None:
        self.comm = comm
        self.path = str(path)
        self.values = tensors() if values is None else values
        self.variables = shared_variables(comm.size) if values is None else variables_of(values, comm.size)
        self.skeleton = comm.bcast(self._create() if comm.rank == 0 else None)
        self.fd = rawio.open_shared(self.path, self.skeleton.file_nbytes, writable=True)
        self.jobs = write_jobs(self.values, self.variables, self.skeleton, comm.rank)

    def _create(self) -> Skeleton:
        manifest = make_manifest(self.variables, world_size=self.comm.size)
        n_checksums = index_checksums(self.variables).total
        specs = specs_of(self.values)
        skeleton = creation.create_file(self.path, specs, n_checksums, manifests.max_nbytes(manifest))
        fd = os.open(self.path, os.O_RDWR)
        creation.write_manifest(fd, skeleton, manifests.encode(placed(manifest, skeleton)))
        os.close(fd)
        return skeleton

    def posix(self) -> None:
        self.finish(write_posix(self.fd, self.jobs, checksums=True))

    def mpio(self, *, threshold: int = MIB, collective: bool = False, hints: dict[str, str] | None = None) -> None:
        pieces = mpio.split_pieces(self.jobs, threshold)
        n_calls = max(self.comm.allgather(len(pieces.large))) if collective else None
        file = mpio.ParallelFile(self.path, self.comm, hints)
        file.prepare_collective()
        try:
            log = mpio.write_mpio(file, self.fd, pieces, checksums=True, n_collective_calls=n_calls)
        finally:
            file.close()
        self.finish(log)

    def finish(self, log: ChecksumLog) -> None:
        log.write(self.fd, self.skeleton.checksums_offset)
        rawio.fsync(self.fd)
        os.close(self.fd)
        self.comm.Barrier()


@pytest.fixture
def reference(comm: Any, mpi_dir: Path) -> bytes:
    """The file as `pwrite` makes it."""
    save = Save(comm, mpi_dir / "posix.h5")
    save.posix()
    return Path(save.path).read_bytes()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("threshold", [0, 10_000, MIB, 1 << 40])
@pytest.mark.parametrize("collective", [False, True])
def test_both_transports_make_the_same_file(
    comm: Any, mpi_dir: Path, agree: Callable[..., None], reference: bytes, threshold: int, collective: bool
) -> None:
    save = Save(comm, mpi_dir / "mpio.h5")
    save.mpio(threshold=threshold, collective=collective)
    agree(Path(save.path).read_bytes() == reference, "another file")
    agree(comm.rank > 0 or verify_file(save.path) == [])


@pytest.mark.mpi(min_size=2)
def test_hints_are_passed_on(comm: Any, mpi_dir: Path, agree: Callable[..., None], reference: bytes) -> None:
    save = Save(comm, mpi_dir / "mpio.h5")
    save.mpio(collective=True, hints={"cb_nodes": "1", "romio_cb_write": "enable"})
    agree(Path(save.path).read_bytes() == reference)


@pytest.mark.mpi(min_size=2)
def test_another_number_of_ranks_reads(comm: Any, mpi_dir: Path, subcomm: Any, agree: Callable[..., None]) -> None:
    save = Save(comm, mpi_dir / "file.h5")
    save.mpio()
    for size in range(1, comm.size + 1):
        part_comm = subcomm(size)
        opened = hdf5.open_checkpoint(save.path) if comm.rank < size else None
        if part_comm is not None and opened is not None:
            restored = twins(tensors())
            fd = rawio.open_shared(save.path, opened.file_nbytes)
            mine = [job for job in read_jobs(opened, fd, restored) if hash(job.box) % size == part_comm.rank]
            report = read(fd, mine, verify=True)
            os.close(fd)
            agreed = all(torch.equal(bits_of(job.tensor), bits_of(expected(job))) for job in mine)
            complete = report.bytes_verified == sum(job.tensor.nbytes for job in mine)
        agree(part_comm is None or (agreed and complete), f"on {size} ranks")


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(bits(tensor)), dtype=torch.uint8) if tensor.numel() else torch.empty(0)


def expected(job: Any) -> torch.Tensor:
    return part(tensors()[job.key], job.box)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_nothing_to_write(comm: Any, mpi_dir: Path, agree: Callable[..., None]) -> None:
    for collective in (False, True):
        save = Save(comm, mpi_dir / f"{collective}.h5")
        if comm.rank > 0:
            save.jobs = []
        save.mpio(collective=collective)
        with Path(save.path).open("rb") as file:
            file.seek(int(save.skeleton.offsets[5]))
            agree(file.read(4_000_000) == bits(tensors()["rank 0 only"]))


class Broken:
    """A progress callback that fails on one rank, in the middle of the writing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, _: int) -> None:
        self.calls += 1
        if self.calls == 2:
            raise self.error


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [OSError(5, "broken"), KeyboardInterrupt(), MemoryError()], ids=type)
def test_a_rank_that_fails_does_not_hang_the_others(
    comm: Any, mpi_dir: Path, agree: Callable[..., None], collective: bool, failing: int, error: BaseException
) -> None:
    save = Save(comm, mpi_dir / "file.h5")
    pieces = mpio.split_pieces(save.jobs)
    n_calls = max(comm.allgather(len(pieces.large))) if collective else None
    file = mpio.ParallelFile(save.path, comm)
    file.prepare_collective()
    seen: BaseException | None = None
    try:
        progress = Broken(error) if comm.rank == failing else None
        mpio.write_mpio(file, save.fd, pieces, checksums=True, n_collective_calls=n_calls, progress=progress)
    except BaseException as raised:
        seen = raised
    finally:
        file.close()
    os.close(save.fd)
    agree(seen is (error if comm.rank == failing else None), f"raised {seen!r}")
    again = Save(comm, mpi_dir / "again.h5")
    again.mpio(collective=collective)
    agree(comm.rank > 0 or verify_file(again.path) == [])


@pytest.mark.mpi(min_size=2)
def test_a_tensor_that_cannot_be_read_fails_before_its_transfer(
    comm: Any, mpi_dir: Path, agree: Callable[..., None]
) -> None:
    """The transfer that was promised to the others is made without data."""
    save = Save(comm, mpi_dir / "file.h5")
    if comm.rank == 1:
        first = next(job for job in save.jobs if job.key == "a/large")
        bad = torch.empty(first.box.shape, device="meta")
        save.jobs = [
            WriteJob(job.key, job.dataset_offset, job.global_shape, job.box, bad, job.checksum) if job is first else job
            for job in save.jobs
        ]
    pieces = mpio.split_pieces(save.jobs)
    n_calls = max(comm.allgather(len(pieces.large)))
    file = mpio.ParallelFile(save.path, comm)
    file.prepare_collective()
    failed = False
    try:
        mpio.write_mpio(file, save.fd, pieces, checksums=True, n_collective_calls=n_calls)
    except (NotImplementedError, RuntimeError):
        failed = True
    finally:
        file.close()
    os.close(save.fd)
    agree(failed == (comm.rank == 1))


@pytest.mark.mpi(min_size=2)
def test_closing_changes_neither_length_nor_bytes(comm: Any, mpi_dir: Path, agree: Callable[..., None]) -> None:
    save = Save(comm, mpi_dir / "file.h5")
    before = Path(save.path).read_bytes()
    comm.Barrier()
    mpio.ParallelFile(save.path, comm).close()
    comm.Barrier()
    agree(Path(save.path).read_bytes() == before)
    os.close(save.fd)


@pytest.mark.mpi(min_size=2)
def test_strided_tensors(comm: Any, mpi_dir: Path, agree: Callable[..., None]) -> None:
    """Memory that is not packed is staged, for both ways of writing."""
    wide = torch.randn(2_000_000, 2, generator=torch.Generator().manual_seed(5))
    values = {"x": wide[:, 1], "y": wide.T, "z": wide[:5000, 0]}
    files = []
    for transport in ("posix", "mpio"):
        save = Save(comm, mpi_dir / f"{transport}.h5", values)
        save.posix() if transport == "posix" else save.mpio()
        files.append(Path(save.path).read_bytes())
    agree(files[0] == files[1])
    opened = hdf5.open_checkpoint(save.path)
    restored = {key: torch.zeros(tensor.shape) for key, tensor in values.items()}
    fd = os.open(save.path, os.O_RDONLY)
    read(fd, read_jobs(opened, fd, restored), verify=True)
    os.close(fd)
    agree(all(same_bits(restored[key], tensor.contiguous()) for key, tensor in values.items()))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    # MPI keeps a few of its own from the first use of a communicator.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8


def test_split_pieces() -> None:
    rows = WriteJob("rows", 100, (9, 1000), Box((2, 0), (5, 1000)), torch.zeros(5, 1000), 0)
    columns = WriteJob("columns", 100, (9, 1000), Box((2, 0), (5, 999)), torch.zeros(5, 999), 1)
    large = WriteJob("large", 100, (5 * MIB,), Box((0,), (5 * MIB,)), torch.zeros(5 * MIB), 2)
    split = mpio.split_pieces([rows, columns, large], 20_000)
    assert [(piece.job.key, piece.checksum) for piece in split.large] == [
        ("rows", 0),
        ("large", 2),
        ("large", 3),
        ("large", 4),
    ]
    assert [(piece.job.key, piece.checksum) for piece in split.small] == [("columns", 1)]
    assert [piece.job.key for piece in mpio.split_pieces([rows, large], 20_001).small] == ["rows"]
