"""Many small shards: a few ranks write them for all, in long ranges, into the same file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, CollectiveError, SaveOptions, ShardedVariable, load_variable
from distckpt.coordination import background
from distckpt.exchange import aggregation
from distckpt.exchange.aggregation import Aggregation
from distckpt.layout import aggregation as bins
from distckpt.storage import rawio
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.verify import verify_file
from tests.imitated_gpu import Machine

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(120)]

N_VARIABLES = 120
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


class Program:
    """Small sharded variables of uneven, also empty, shards; between them scalars that all ranks have."""

    def __init__(self, comm: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.full: dict[str, torch.Tensor] = {}
        self.shards: dict[str, torch.Tensor] = {}
        tracked: dict[str, object] = {}
        for number in range(N_VARIABLES):
            rows = 1 + number % 9
            full = (50 * torch.randn(rows, 3, generator=generator)).to(DTYPES[number % len(DTYPES)])
            start, stop = (rows * rank // comm.size for rank in (comm.rank, comm.rank + 1))
            self.full[f"v{number}"] = full
            self.shards[f"v{number}"] = self.placed(full[start:stop])
            tracked[f"v{number}"] = ShardedVariable(self.shards[f"v{number}"], (rows, 3), (start, 0))
            tracked[f"v{number}_step"] = torch.full((), float(seed))
        large = torch.arange(3 * 70_000, dtype=torch.int32).view(3, 70_000) * seed
        self.full["large"], self.shards["large"] = large, large[comm.rank : comm.rank + 1].clone()
        tracked["large"] = ShardedVariable(self.shards["large"], large.shape, (comm.rank, 0))
        self.checkpoint = Checkpoint(comm=comm, **tracked)

    def placed(self, shard: torch.Tensor) -> torch.Tensor:
        """A shard as this program has it in memory."""
        return shard.clone()

    def train(self) -> None:
        """Changes values, not the layout."""
        for tensor in (*self.full.values(), *self.shards.values()):
            tensor += 1

    def equals(self, other: Program) -> bool:
        return all(torch.equal(shard, other.shards[name]) for name, shard in self.shards.items())


class Strided(Program):
    """Shards that are not packed in memory."""

    def placed(self, shard: torch.Tensor) -> torch.Tensor:
        return shard.t().contiguous().t()


def assert_in_file(comm: Any, path: str, program: Program) -> None:
    """The file is whole, and has what the program has."""
    if comm.rank == 0:
        assert verify_file(path) == []
        for name, full in program.full.items():
            assert torch.equal(load_variable(path, name), full), name


def assert_saved(comm: Any, path: str, program: Program) -> None:
    """The same, and a twin can be restored from it."""
    assert_in_file(comm, path, program)
    twin = Program(comm, 9)
    assert not twin.equals(program)
    twin.checkpoint.read(path).assert_consumed()
    assert twin.equals(program)


@contextmanager
def counted_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of this rank's writes of data."""
    writes: list[int] = []
    write_all, write_vector = rawio.write_all, rawio.write_vector

    def count(fd: int, buffer: memoryview, offset: int) -> None:
        writes.append(len(buffer))
        write_all(fd, buffer, offset)

    def count_vector(fd: int, buffers: list[memoryview], offset: int) -> None:
        writes.append(sum(map(len, buffers)))
        write_vector(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(rawio, "write_all", count)
        patch.setattr(rawio, "write_vector", count_vector)
        yield writes


@pytest.mark.parametrize("transport", ["posix", "mpio"])
def test_few_long_writes(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, transport: Any) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    program, options = Program(comm, 1), SaveOptions(durable=False, transport=transport)
    for _ in range(3):
        program.train()
        with counted_writes(monkeypatch) as writes:
            path = program.checkpoint.write(mpi_dir / "x", options=options)
        assert len(writes) < 20  # of hundreds of parts: one for the bin, and what is not small
        assert_saved(comm, path, program)


def test_the_file_is_the_one_that_each_rank_would_write(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    program, options = Program(comm, 1), SaveOptions(durable=False)
    with counted_writes(monkeypatch) as few:
        path = program.checkpoint.write(mpi_dir / "x", options=options)
    monkeypatch.setattr(bins, "MIN_SHARDS", 1 << 30)
    with counted_writes(monkeypatch) as many:
        other = Program(comm, 1).checkpoint.write(mpi_dir / "y", options=options)
    assert len(many) > 5 * len(few)
    if comm.rank == 0:
        files = [open_checkpoint(each) for each in (path, other)]
        first, second = (
            Path(each.path).read_bytes().replace(each.manifest_bytes, b" " * len(each.manifest_bytes)) for each in files
        )
        assert first == second


def test_a_new_layout_is_planned_anew(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    program = Program(comm, 1)
    program.checkpoint.write(mpi_dir / "x")
    del program.checkpoint.v0  # what follows lies elsewhere
    program.full["more"] = program.checkpoint.more = torch.arange(700)
    del program.full["v0"]
    assert_in_file(comm, program.checkpoint.write(mpi_dir / "x"), program)


def test_many_bins_on_several_aggregators(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    monkeypatch.setattr(bins, "BIN_NBYTES", 500)
    monkeypatch.setattr(bins, "MIN_SHARDS", 1)
    program = Program(comm, 1)
    with counted_writes(monkeypatch) as writes:
        path = program.checkpoint.write(mpi_dir / "x", options=SaveOptions(durable=False, transport="posix"))
    assert all(comm.allgather(len([size for size in writes if size <= 1000]) >= 2))
    assert_saved(comm, path, program)


def test_what_is_not_packed_in_memory(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    program = Strided(comm, 1)
    assert not all(shard.is_contiguous() for shard in program.shards.values())
    assert_saved(comm, program.checkpoint.write(mpi_dir / "x"), program)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_what_is_on_gpus(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    machine = Machine(late=late)
    with monkeypatch.context() as patch:
        machine.install(patch)
        program = Program(comm, 1)
        for number in range(0, N_VARIABLES, 2):  # the others stay on the CPU
            machine.put(program.shards[f"v{number}"])
        path = program.checkpoint.write(mpi_dir / "x", options=SaveOptions(durable=False, transport="posix"))
    assert machine.copied >= sum(program.shards[f"v{number}"].nbytes for number in range(0, N_VARIABLES, 2))
    assert_saved(comm, path, program)


@pytest.mark.mpi(min_size=4)
def test_ranks_that_write_nothing_take_part_in_the_background(subcomm: Any, mpi_dir: Path) -> None:
    """Two ranks have all; one of the others writes the save counter, and one not a byte."""
    comm = subcomm(4)
    variables: dict[str, ShardedVariable] = {}
    for number in range(bins.MIN_SHARDS):
        shard = torch.full((2 if comm.rank < 2 else 0,), float(number))
        variables[f"v{number}"] = ShardedVariable(shard, (4,), (min(2 * comm.rank, 4),))
    path = Checkpoint(comm=comm, **variables).save_async(mpi_dir / "x").result()
    if comm.rank == 0:
        assert verify_file(path) == []
        assert torch.equal(load_variable(path, "v3"), torch.full((4,), 3.0))


@pytest.mark.parametrize("speaks", [True, False])
def test_saves_in_the_background(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, speaks: bool) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    monkeypatch.setattr(background, "threads_may_speak", lambda: speaks)
    aggregated: list[int] = []
    run = aggregation._Writing.run
    monkeypatch.setattr(aggregation._Writing, "run", lambda *args: (aggregated.append(1), run(*args)))
    program = Program(comm, 1)
    for _ in range(3):
        handle = program.checkpoint.save_async(mpi_dir / "x")
        expected = copy.deepcopy((program.full, program.shards))
        program.train()
        path = handle.result()
        program.full, shards = expected
        assert_in_file(comm, path, program)
        for name, shard in program.shards.items():
            shard.copy_(shards[name] + 2)
            program.full[name] += 2
    assert len(aggregated) == 3 * speaks


def test_an_error_of_the_disk_names_what_was_written(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(3)
    if comm is None:
        return

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write = aggregation._Writing._write
    program = Program(comm, 1)

    def on_full_disk(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(rawio, "write_all", full)
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(aggregation._Writing, "_write", on_full_disk)
        with pytest.raises(CollectiveError) as raised:
            program.checkpoint.write(mpi_dir / "x")
    (text,) = raised.value.failures.values()
    assert "No space left on device: v0_step and other small variables, " in text
    assert " bytes at byte " in text
    assert_saved(comm, program.checkpoint.write(mpi_dir / "x"), program)


def test_where_there_are_few_nothing_is_asked_again(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(3)
    if comm is None:
        return
    rows = ShardedVariable(torch.full((2, 3), float(comm.rank)), (6, 3), (2 * comm.rank, 0))
    checkpoint = Checkpoint(comm=comm, rows=rows)
    checkpoint.write(mpi_dir / "x")
    asked: list[Aggregation] = []
    monkeypatch.setattr(aggregation, "_agree_on_plan", lambda *_: asked.append(1))
    path = checkpoint.write(mpi_dir / "x")
    assert asked == []
    if comm.rank == 0:
        expected = torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 3)
        assert torch.equal(load_variable(path, "rows"), expected)
