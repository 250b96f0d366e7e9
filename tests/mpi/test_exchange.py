"""Ranks of a node read and write together: each byte once, all of it verified, in long ranges."""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import (
    Checkpoint,
    CollectiveError,
    CorruptCheckpointError,
    RestoreOptions,
    SaveOptions,
    ShardedVariable,
    load_variable,
)
from distckpt.coordination import shared_memory
from distckpt.exchange import across, node, reading, taking, writing
from distckpt.exchange.node import UNIT_NBYTES
from distckpt.source import Source
from distckpt.storage import rawio
from distckpt.storage import writing as storage_writing
from distckpt.storage.verify import verify_file
from tests.imitated_gpu import Machine

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(120)]

POSIX = SaveOptions(durable=False, transport="posix")
SHAPE = (64, 4096)
FULL = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int32).reshape(SHAPE)


def saved(comm: Any, directory: Path) -> str:
    """Row shards, a replicated tensor and many small ones."""
    rows = SHAPE[0] // comm.size
    own = ShardedVariable(FULL[rows * comm.rank : rows * (comm.rank + 1)].clone(), SHAPE, (rows * comm.rank, 0))
    small = {f"bias{i}": torch.full((7,), float(i)) for i in range(50)}
    checkpoint = Checkpoint(comm=comm, x=own, replica=FULL.clone(), **small)
    return checkpoint.write(directory / "x", options=SaveOptions(durable=False))


class Twin:
    """Column shards of what was saved by rows; all zero."""

    def __init__(self, comm: Any) -> None:
        columns = SHAPE[1] // comm.size
        self.expected = FULL[:, columns * comm.rank : columns * (comm.rank + 1)]
        self.x = torch.zeros_like(self.expected)
        self.replica = torch.zeros_like(FULL)
        self.small = {f"bias{i}": torch.full((7,), -1.0) for i in range(50)}
        sharded = ShardedVariable(self.x, SHAPE, (0, columns * comm.rank))
        self.checkpoint = Checkpoint(comm=comm, x=sharded, replica=self.replica, **self.small)

    def is_restored(self) -> bool:
        small = all(torch.equal(self.small[f"bias{i}"], torch.full((7,), float(i))) for i in range(50))
        return torch.equal(self.x, self.expected) and torch.equal(self.replica, FULL) and small


NBYTES = 2 * FULL.nbytes + 50 * 7 * 4


@pytest.fixture
def many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, so that all threads have something to do, and few bytes are worth a thread."""
    for module in (node, taking, writing, across):
        monkeypatch.setattr(module, "UNIT_NBYTES", 40_000)
    monkeypatch.setattr(reading, "SHARE_NBYTES", 1)


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest) -> RestoreOptions:
    """Options with a number of threads."""
    request.getfixturevalue("many_rounds")
    return RestoreOptions(threads=request.param)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that have read units."""
    names: list[str] = []
    read = taking.Taking.read

    def logged(*args: Any) -> None:
        names.append(threading.current_thread().name)
        time.sleep(0.001)  # so that the others come in
        read(*args)

    monkeypatch.setattr(taking.Taking, "read", logged)
    return names


def test_threads_read_each_byte_once_and_verify_it(
    comm: Any, mpi_dir: Path, sources: list[Source], threads: RestoreOptions, readers: list[str]
) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    assert not twin.is_restored()
    twin.checkpoint.read(path, options=threads).assert_consumed()
    assert twin.is_restored()
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == comm.allreduce(source.bytes_verified) == NBYTES
    assert (len(set(readers)) > 1) == (threads.threads == 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("distckpt-team")]


def test_of_tensors_that_share_memory_the_last_one_wins(comm: Any, mpi_dir: Path, threads: RestoreOptions) -> None:
    """An exchange moves them in several rounds, and would leave parts of each."""
    first, last = FULL + 1, FULL + 2
    path = Checkpoint(comm=comm, first=first, last=last, x=FULL).write(mpi_dir / "x", options=POSIX)
    memory = torch.zeros_like(FULL)
    live = Checkpoint(comm=comm, first=memory, last=memory.view_as(memory), x=torch.zeros_like(FULL))
    live.read(path, options=threads).assert_consumed()
    assert torch.equal(memory, last)
    assert torch.equal(live.x, FULL)


def test_columns_of_one_buffer_are_exchanged(
    comm: Any, mpi_dir: Path, sources: list[Source], threads: RestoreOptions
) -> None:
    path = Checkpoint(comm=comm, a=FULL + 1, b=FULL + 2).write(mpi_dir / "x", options=POSIX)
    buffer = torch.zeros(SHAPE[0], 2, SHAPE[1], dtype=FULL.dtype)
    Checkpoint(comm=comm, a=buffer[:, 0], b=buffer[:, 1]).read(path, options=threads).assert_consumed()
    assert torch.equal(buffer[:, 0], FULL + 1)
    assert torch.equal(buffer[:, 1], FULL + 2)
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == 2 * FULL.nbytes


@pytest.mark.usefixtures("many_rounds")
def test_as_many_threads_as_the_rank_with_the_fewest_can_use(
    comm: Any, mpi_dir: Path, readers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "threads_of_rank", lambda _: 1 if comm.rank == 1 else 3)
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    assert not twin.is_restored()
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()
    assert set(readers) == {threading.main_thread().name}


def test_where_memory_for_several_threads_is_missing_one_reads(
    comm: Any, mpi_dir: Path, threads: RestoreOptions, readers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    assert not twin.is_restored()
    allocate = shared_memory._allocate

    def little(ranks: Any, nbytes: int) -> Any:
        return allocate(ranks, nbytes) if nbytes <= 2 * 40_000 else None

    monkeypatch.setattr(shared_memory, "_allocate", little)
    twin.checkpoint.read(path, options=threads).assert_consumed()
    assert twin.is_restored()
    assert set(readers) == {threading.main_thread().name}


def test_an_error_in_a_thread_is_one_error_on_all_ranks(
    comm: Any, mpi_dir: Path, threads: RestoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    take, calls = taking.Taking.take, itertools.count()

    def failing(*args: Any) -> None:
        if comm.rank == 1 and next(calls) == 9:
            raise OSError("no luck")
        take(*args)

    with monkeypatch.context() as patch:
        patch.setattr(taking.Taking, "take", failing)
        with pytest.raises(CollectiveError, match="rank 1: OSError: no luck") as raised:
            twin.checkpoint.read(path, options=threads)
    assert len(set(comm.allgather(str(raised.value)))) == 1
    twin.checkpoint.read(path, options=threads).assert_consumed()
    assert twin.is_restored()


def test_each_byte_is_read_once_and_verified(comm: Any, mpi_dir: Path, sources: list[Source]) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    assert not twin.is_restored()
    versions = twin.x._version, twin.replica._version
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()
    assert twin.x._version > versions[0]  # so that autograd notices
    assert twin.replica._version > versions[1]
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == comm.allreduce(source.bytes_verified) == NBYTES


@pytest.mark.parametrize("damaged", [0, 1, 2, 3])
def test_damage_is_one_error_on_all_ranks(
    comm: Any, mpi_dir: Path, sources: list[Source], threads: RestoreOptions, damaged: int
) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    twin.checkpoint.read(path, options=threads)
    assert twin.is_restored()
    (source,) = sources
    index = next(i for i, variable in enumerate(source.manifest.variables) if variable.key == "x")
    if comm.rank == 0:
        with Path(path).open("r+b") as file:  # in the rows of rank `damaged`, read by any rank
            file.seek(source.in_file(index).offset + damaged * FULL.nbytes // 4 + 12)
            file.write(b"\xff")
    comm.Barrier()
    with pytest.raises(CorruptCheckpointError, match=r"x: the .* damaged") as raised:
        Twin(comm).checkpoint.read(path, options=threads)
    assert len(set(comm.allgather(str(raised.value)))) == 1


def test_without_shared_memory_everything_goes_by_messages(
    comm: Any,
    mpi_dir: Path,
    sources: list[Source],
    threads: RestoreOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    assert not twin.is_restored()
    window = None if comm.rank == 2 else object()  # one rank without is enough
    allocate = shared_memory._allocate
    monkeypatch.setattr(shared_memory, "_allocate", lambda of, nbytes: allocate(of, nbytes) if of.size == 1 else window)
    twin.checkpoint.read(path, options=threads).assert_consumed()
    assert twin.is_restored()
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == NBYTES
    assert ("of this node cannot share" in caplog.text) == (comm.rank == 0)


def test_narrow_strips_are_written_as_long_ranges(comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write_all = rawio.write_all

    def count(fd: int, buffer: memoryview, offset: int) -> None:
        writes.append(len(buffer))
        write_all(fd, buffer, offset)

    columns = SHAPE[1] // comm.size
    start = columns * comm.rank
    # Not contiguous in memory, and of every size of element.
    own = {dtype: FULL.to(dtype)[:, start : start + columns] for dtype in (torch.int32, torch.int16, torch.float64)}
    shards = {f"x{dtype.itemsize}": ShardedVariable(shard, SHAPE, (0, start)) for dtype, shard in own.items()}
    with monkeypatch.context() as patch:
        patch.setattr(rawio, "write_all", count)
        path = Checkpoint(comm=comm, **shards).write(mpi_dir / "x", options=SaveOptions(durable=False))
    nbytes = sum(FULL.numel() * dtype.itemsize for dtype in own)
    large = [size for size in writes if size >= 1 << 16]
    assert comm.allreduce(sum(large)) == nbytes
    assert comm.allreduce(len(large)) <= nbytes // UNIT_NBYTES + comm.size * len(own)
    if comm.rank == 0:
        assert verify_file(path) == []
        for dtype in own:
            assert torch.equal(load_variable(path, f"x{dtype.itemsize}"), FULL.to(dtype))


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_tensors_on_gpus_go_through_pinned_memory(
    comm: Any, mpi_dir: Path, threads: RestoreOptions, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    machine = Machine(late=late)
    machine.install(monkeypatch)
    columns = SHAPE[1] // comm.size
    expected = FULL[:, columns * comm.rank : columns * (comm.rank + 1)]
    own = machine.put(expected.clone())
    shard = ShardedVariable(own, SHAPE, (0, columns * comm.rank))
    path = Checkpoint(comm=comm, x=shard, y=machine.put(FULL.clone(), 1)).write(mpi_dir / "x", options=POSIX)
    assert machine.copied >= 2 * own.nbytes  # for the checksums, and into the shared memory
    if comm.rank == 0:
        assert verify_file(path) == []
        assert torch.equal(load_variable(path, "x"), FULL)
    comm.Barrier()
    own.zero_()
    replica, machine.copied, machine.buffers = machine.put(torch.zeros_like(FULL), 1), 0, []
    Checkpoint(comm=comm, x=shard, y=replica).read(path, options=threads).assert_consumed()
    assert torch.equal(own, expected)
    assert torch.equal(replica, FULL)
    assert machine.copied == own.nbytes + replica.nbytes
    assert 1 <= len(machine.buffers) <= threads.threads  # all of it fits
    assert len(machine.of("start")) == len(machine.of("wait"))


@pytest.mark.parametrize("operation", ["write", "read"])
def test_a_gpu_that_fails_is_one_error_on_all_ranks(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    machine = Machine(late=True)
    machine.install(monkeypatch)
    columns = SHAPE[1] // comm.size
    own = machine.put(FULL[:, columns * comm.rank : columns * (comm.rank + 1)].clone())
    checkpoint = Checkpoint(comm=comm, x=ShardedVariable(own, SHAPE, (0, columns * comm.rank)))
    path = checkpoint.write(mpi_dir / "x", options=POSIX)
    for ahead in (0, 1):
        if comm.rank == 1:
            machine.fails_at = next(machine.n_starts) + 1 + ahead
        with pytest.raises(CollectiveError, match="out of memory") if reaches(operation, ahead) else nullcontext():
            checkpoint.write(mpi_dir / "y", options=POSIX) if operation == "write" else checkpoint.read(path)
        assert len(machine.of("start")) == len(machine.of("wait"))
    machine.fails_at = -1
    checkpoint.write(mpi_dir / "y", options=POSIX)
    checkpoint.read(path).assert_consumed()


@pytest.mark.usefixtures("many_rounds")
@pytest.mark.parametrize("failing", [0, 2])
def test_a_save_that_fails_elsewhere_leaves_no_copy_from_a_gpu_on_the_way(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    machine = Machine(late=True)
    machine.install(monkeypatch)
    columns = SHAPE[1] // comm.size
    own = FULL[:, columns * comm.rank : columns * (comm.rank + 1)]
    monkeypatch.setattr(storage_writing, "PINNED_NBYTES", own.nbytes)  # the next piece comes while one is hashed
    shards = {f"x{i}": ShardedVariable(machine.put(own.clone()), SHAPE, (0, columns * comm.rank)) for i in range(3)}
    write_unit, calls = writing.write_unit, itertools.count()

    def failing_later(*args: Any) -> None:
        if comm.rank == failing and next(calls) == 12:
            raise OSError("no luck")
        write_unit(*args)

    monkeypatch.setattr(writing, "write_unit", failing_later)
    with pytest.raises(CollectiveError, match=f"rank {failing}: OSError: no luck"):
        Checkpoint(comm=comm, **shards).write(mpi_dir / "x", options=POSIX)
    assert len(machine.of("start")) == len(machine.of("wait"))


def test_the_first_error_in_the_rounds_is_the_one_that_is_raised(
    comm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "UNIT_NBYTES", 40_000)
    monkeypatch.setattr(writing, "UNIT_NBYTES", 40_000)
    columns = SHAPE[1] // comm.size
    own = FULL[:, columns * comm.rank : columns * (comm.rank + 1)]
    failed: list[str] = []

    def fail(name: str, *_: Any) -> None:
        failed.append(name)
        raise OSError(f"no luck in {name}")

    put = writing._Writing._put
    if comm.rank == 1:
        monkeypatch.setattr(writing, "write_unit", lambda *_: fail("write"))
        monkeypatch.setattr(writing._Writing, "_put", lambda *args: fail("put") if failed else put(*args))
    with pytest.raises(CollectiveError, match="rank 1: OSError: no luck in write"):
        Checkpoint(comm=comm, x=ShardedVariable(own, SHAPE, (0, columns * comm.rank))).write(
            mpi_dir / "x", options=POSIX
        )
    assert failed == ["write"] * (comm.rank == 1)


def reaches(operation: str, ahead: int) -> bool:
    """Whether so many batches of copies come before another one: a save has one for checksums and one for the rest."""
    return operation == "write" or ahead == 0


def test_two_variables_restored_into_the_same_memory(comm: Any, mpi_dir: Path, threads: RestoreOptions) -> None:
    """Each is what the file says when it comes; it is no damage that the second one takes its place."""
    shape, width = (16, 1024), 1024 // comm.size

    def shards(tensors: list[torch.Tensor]) -> dict[str, ShardedVariable]:
        return {f"x{i}": ShardedVariable(tensor, shape, (0, width * comm.rank)) for i, tensor in enumerate(tensors)}

    saved_values = [torch.full((16, width), float(i)) for i in range(2 * comm.size)]
    path = Checkpoint(comm=comm, **shards(saved_values)).write(mpi_dir / "x", options=POSIX)
    memory = [torch.full((16, width), -1.0) for _ in range(comm.size)]
    live = [memory[i // 2].view(16, width) for i in range(2 * comm.size)]
    Checkpoint(comm=comm, **shards(live)).read(path, options=threads)
    assert all(torch.equal(tensor, saved_values[2 * i + 1]) for i, tensor in enumerate(memory))


def test_many_restores_leave_nothing_behind(comm: Any, mpi_dir: Path) -> None:
    path = saved(comm, mpi_dir)
    twin = Twin(comm)
    twin.checkpoint.read(path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        twin.checkpoint.read(path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
