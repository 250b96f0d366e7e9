"""Saved on N ranks, restored on M, for all N and M up to 4: every element bit for bit, and only the bytes needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distckpt import Checkpoint, LayoutError, SaveOptions, ShardedVariable
from distckpt.source import Source
from distckpt.storage import mpio
from distckpt.storage.hdf5 import open_checkpoint

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(120)]

SIZES = (1, 2, 3, 4)
FAST = SaveOptions(durable=False)


def reference(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose elements all differ, as far as the dtype can."""
    return (torch.arange(math.prod(shape)) * 3 + 1).to(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# ---- shards by hand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A rank's block of a tensor; rows and columns as (start, stop)."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[slice(*self.rows), slice(*self.columns)]


def span(total: int, size: int, rank: int) -> tuple[int, int]:
    return total * rank // size, total * (rank + 1) // size


GRIDS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}
#: Where each rank's rows end: uneven, and with empty shards in every place.
UNEVEN = {1: [9], 2: [0, 9], 3: [4, 4, 9], 4: [0, 8, 8, 9]}


def by_rows(shape: tuple[int, int], size: int, rank: int) -> Part:
    return Part(span(shape[0], size, rank), (0, shape[1]))


def by_columns(shape: tuple[int, int], size: int, rank: int) -> Part:
    return Part((0, shape[0]), span(shape[1], size, rank))


def by_blocks(shape: tuple[int, int], size: int, rank: int) -> Part:
    rows, columns = GRIDS[size]
    return Part(span(shape[0], rows, rank // columns), span(shape[1], columns, rank % columns))


def unevenly(shape: tuple[int, int], size: int, rank: int) -> Part:
    stops = [0, *UNEVEN[size]]
    return Part((stops[rank], stops[rank + 1]), (0, shape[1]))


def wholly(shape: tuple[int, int], _size: int, _rank: int) -> Part:
    return Part((0, shape[0]), (0, shape[1]))


@dataclass(frozen=True)
class Kind:
    """One variable of the test."""

    shape: tuple[int, int]
    dtype: torch.dtype
    part: Callable[[tuple[int, int], int, int], Part]


KINDS = {
    "rows": Kind((11, 3), torch.float32, by_rows),
    "few_rows": Kind((2, 5), torch.float64, by_rows),  # more ranks than rows
    "columns": Kind((5, 9), torch.bfloat16, by_columns),
    "blocks": Kind((7, 6), torch.int64, by_blocks),
    "uneven": Kind((9, 2), torch.int16, unevenly),
    "replica": Kind((3, 3), torch.float16, wholly),
    "nothing": Kind((0, 4), torch.float32, by_rows),
}
#: What becomes of each variable's sharding at restore, besides staying as it is.
SWAPPED = {"rows": by_columns, "columns": by_blocks, "blocks": by_rows, "uneven": wholly, "replica": by_columns}


class Program:
    """The variables of one rank; `blank` ones are all zero."""

    def __init__(self, comm: Any, *, blank: bool, swapped: bool = False) -> None:
        self.expected: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        variables: dict[str, object] = {}
        for name, kind in KINDS.items():
            cut = SWAPPED.get(name, kind.part) if swapped else kind.part
            part = cut(kind.shape, comm.size, comm.rank)
            self.expected[name] = part.of(reference(kind.shape, kind.dtype)).contiguous()
            tensor = torch.zeros_like(self.expected[name]) if blank else self.expected[name].clone()
            self.tensors[name] = tensor
            variables[name] = ShardedVariable(tensor, kind.shape, (part.rows[0], part.columns[0]))
        variables["plain"] = self.plain = torch.zeros(6) if blank else reference((6,), torch.float32)
        variables["scalar"] = self.scalar = torch.tensor(0.0 if blank else 2.5)
        self.variables = variables
        self.checkpoint = Checkpoint(comm=comm, **variables)

    def assert_restored(self) -> None:
        for name, expected in self.expected.items():
            assert same_bits(self.tensors[name], expected), name
        assert same_bits(self.plain, reference((6,), torch.float32))
        assert self.scalar.item() == 2.5

    @property
    def nbytes(self) -> int:
        """Bytes of all variables, and of the save counter."""
        sharded = sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in KINDS.values())
        return sharded + self.plain.nbytes + self.scalar.nbytes + 8


@pytest.mark.parametrize("swapped", [False, True], ids=["same", "swapped"])
@pytest.mark.parametrize("saved_on", SIZES)
def test_saved_on_n_restored_on_m(
    subcomm: Any, mpi_dir: Path, sources: list[Source], saved_on: int, swapped: bool
) -> None:
    comms = {size: subcomm(size) for size in SIZES}
    if comms[saved_on] is not None:
        Program(comms[saved_on], blank=False).checkpoint.save(mpi_dir / "ckpt", options=FAST)
    MPI.COMM_WORLD.Barrier()
    for comm in comms.values():
        if comm is None:
            continue
        twin = Program(comm, blank=True, swapped=swapped)
        with pytest.raises(AssertionError):
            twin.assert_restored()
        sources.clear()
        twin.checkpoint.restore(mpi_dir / "ckpt-1").assert_consumed()
        twin.assert_restored()
        assert twin.checkpoint.save_counter == 1
        # Each byte once, whichever ranks want it.
        assert comm.allreduce(sum(source.bytes_read for source in sources)) == twin.nbytes


def test_blocks_that_are_not_contiguous_in_memory(subcomm: Any, mpi_dir: Path) -> None:
    full = reference((16, 3), torch.float32)
    for size in (2, 4):
        comm = subcomm(size)
        if comm is None:
            continue
        rows = 16 // size
        own = full[rows * comm.rank : rows * (comm.rank + 1)]
        saved = own.t().contiguous().t()
        assert not saved.is_contiguous()
        path = Checkpoint(comm=comm, x=ShardedVariable(saved, (16, 3), (rows * comm.rank, 0))).write(
            mpi_dir / f"from-{size}", options=FAST
        )
        live = torch.zeros(3, rows).t()
        twin = Checkpoint(comm=comm, x=ShardedVariable(live, (16, 3), (rows * comm.rank, 0)))
        twin.read(path).assert_consumed()
        assert torch.equal(live, own)


def test_narrow_columns_are_read_once(comm: Any, mpi_dir: Path, sources: list[Source]) -> None:
    shape = (200, 8192)
    kind = Kind(shape, torch.int32, by_columns)
    full = reference(kind.shape, kind.dtype)
    rows = by_rows(shape, comm.size, comm.rank)
    path = Checkpoint(comm=comm, x=ShardedVariable(rows.of(full), shape, (rows.rows[0], 0))).write(mpi_dir / "x")
    columns = by_columns(shape, comm.size, comm.rank)
    live = torch.zeros_like(columns.of(full))
    Checkpoint(comm=comm, x=ShardedVariable(live, shape, (0, columns.columns[0]))).read(path).assert_consumed()
    assert torch.equal(live, columns.of(full))
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == comm.allreduce(source.bytes_verified) == full.nbytes


def test_replicas_are_written_once_and_by_all_ranks_in_equal_parts(comm: Any, mpi_dir: Path) -> None:
    weights = {f"w{i}": torch.full((512, 256), float(i)) for i in range(6)}
    path = Checkpoint(comm=comm, **weights).write(mpi_dir / "model", options=FAST)
    written = [0] * comm.size
    for variable in open_checkpoint(path).manifest.variables:
        assert sum(math.prod(shard.shape) for shard in variable.shards) == 512 * 256  # once, not once per rank
        for shard in variable.shards:
            written[shard.rank] += math.prod(shard.shape)
    assert max(written) / (sum(written) / comm.size) <= 1.1


# ---- transports --------------------------------------------------------------------------------------------------

#: What may differ between files of one state.
_OF_THE_SAVE = ("manifest_checksum", "save_id", "time", "host", "transport", "timing")


@dataclass(frozen=True)
class Contents:
    """A file: every object's type, position and size; all bytes but the manifest; and the manifest without the save."""

    objects: dict[str, tuple[object, ...]]
    data: bytes
    manifest: dict[str, Any]

    @classmethod
    def of(cls, path: str) -> Contents:
        objects: dict[str, tuple[object, ...]] = {}
        data = bytearray(Path(path).read_bytes())
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: objects.update({name: _describe(item)}))
            stored = file[".manifest"]
            manifest = json.loads(bytes(stored[()]))
            start = stored.id.get_offset()
            data[start : start + stored.id.get_storage_size()] = bytes(stored.id.get_storage_size())
        for name in _OF_THE_SAVE:
            del manifest[name]
        return cls(objects, bytes(data), manifest)


def _describe(item: Any) -> tuple[object, ...]:
    if isinstance(item, h5py.Group):
        return ("group",)
    return (item.shape, item.id.get_type().encode(), item.id.get_offset(), item.id.get_storage_size())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_transports_make_the_same_file(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    comm = subcomm(size)
    if comm is None:
        return
    shape = (96 * size, 4096)  # row shards of 1.5 MiB
    full = reference(shape, torch.float32)
    rows, columns = by_rows(shape, size, comm.rank), by_columns(shape, size, comm.rank)
    variables = {
        **Program(comm, blank=False).variables,
        "large": ShardedVariable(rows.of(full).clone(), shape, (rows.rows[0], 0)),
        "wide": ShardedVariable(columns.of(full).clone(), shape, (0, columns.columns[0])),
        "replica_of_all": full.clone(),
        "metadata": {"epoch": 3},
    }
    checkpoint = Checkpoint(comm=comm, **variables)
    files: list[str] = []
    for transport, collective, threshold in [
        ("posix", False, None),
        ("mpio", False, None),
        ("mpio", True, None),
        ("mpio", False, 0),
        ("mpio", True, 0),
        ("posix", False, None),
    ]:
        options = SaveOptions(durable=False, transport=transport, collective=collective)
        with monkeypatch.context() as patch:
            if threshold is not None:
                patch.setattr(mpio.split_pieces, "__defaults__", (threshold,))
            files.append(checkpoint.write(mpi_dir / f"{len(files)}", options=options))
    # A Checkpoint of its own knows no layout yet: its file is made through HDF5 and not from the skeleton.
    files.append(Checkpoint(comm=comm, **variables).write(mpi_dir / "fresh", options=FAST))
    if comm.rank == 0:
        first, *others = [Contents.of(path) for path in files]
        assert len(first.objects) == len(KINDS) + 2 + 3 + 2  # /.manifest and /.checksums
        for path, other in zip(files[1:], others, strict=True):
            assert other.objects == first.objects, path
            assert other.manifest == first.manifest, path
            assert other.data == first.data, path


# ---- DTensor -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meshes(process_group: None) -> dict[tuple[int, ...], DeviceMesh]:  # noqa: ARG001  # meshes need it
    """Meshes by shape, over the first ranks of one process group."""
    made = {(size,): DeviceMesh("cpu", list(range(size))) for size in SIZES}
    made[2, 2] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "model"))
    return made


@dataclass(frozen=True)
class Spec:
    """A mesh and what its dimensions do."""

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    def distribute(self, full: torch.Tensor, meshes: dict[tuple[int, ...], DeviceMesh]) -> DTensor:
        return distribute_tensor(full, meshes[self.mesh], self.placements, src_data_rank=None)


ONE_DIMENSION = [Spec((size,), (placement,)) for size in SIZES for placement in (Shard(0), Shard(1), Replicate())]
TWO_DIMENSIONS = [
    Spec((2, 2), placements)
    for placements in [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (Replicate(), Replicate()),
    ]
]
SPECS = [*ONE_DIMENSION, *TWO_DIMENSIONS]


@pytest.mark.parametrize("shape", [(8, 4), (5, 7), (3, 2)], ids=str)
def test_every_sharding_restores_into_every_other(
    comm: Any, mpi_dir: Path, meshes: dict[tuple[int, ...], DeviceMesh], shape: tuple[int, ...]
) -> None:
    """Variable i is saved with sharding i and restored with sharding i + shift."""
    fulls = [reference(shape, torch.float32) + 100 * i for i in range(len(SPECS))]
    saved = {f"x{i}": spec.distribute(fulls[i], meshes) for i, spec in enumerate(SPECS)}
    path = Checkpoint(comm=comm, **saved).write(mpi_dir / "saved", options=FAST)
    if comm.rank == 0:
        with h5py.File(path, "r") as file:
            for i, full in enumerate(fulls):
                assert (file[f"x{i}"][()] == full.numpy()).all()
    for shift in range(len(SPECS)):
        specs = SPECS[shift:] + SPECS[:shift]
        live = {f"x{i}": spec.distribute(torch.zeros(shape), meshes) for i, spec in enumerate(specs)}
        Checkpoint(comm=comm, **live).read(path).assert_consumed()
        for i, spec in enumerate(specs):
            expected = spec.distribute(fulls[i], meshes).to_local()
            assert same_bits(live[f"x{i}"].to_local(), expected), (SPECS[i], spec)


@pytest.mark.parametrize("saved_on", SIZES)
def test_dtensors_saved_on_n_restored_on_m(
    subcomm: Any, mpi_dir: Path, meshes: dict[tuple[int, ...], DeviceMesh], saved_on: int
) -> None:
    comms = {size: subcomm(size) for size in SIZES}
    placements: list[Placement] = [Shard(0), Shard(1), Replicate()]
    full = reference((6, 5), torch.bfloat16)
    if comms[saved_on] is not None:
        saved = {
            f"x{i}": Spec((saved_on,), (placement,)).distribute(full, meshes) for i, placement in enumerate(placements)
        }
        Checkpoint(comm=comms[saved_on], **saved).save(mpi_dir / "ckpt", options=FAST)
    MPI.COMM_WORLD.Barrier()
    for size, comm in comms.items():
        if comm is None:
            continue
        for shift in range(3):
            specs = [Spec((size,), (placement,)) for placement in placements[shift:] + placements[:shift]]
            live = {f"x{i}": spec.distribute(torch.zeros_like(full), meshes) for i, spec in enumerate(specs)}
            Checkpoint(comm=comm, **live).restore(mpi_dir / "ckpt-1").assert_consumed()
            for i, spec in enumerate(specs):
                assert same_bits(live[f"x{i}"].to_local(), spec.distribute(full, meshes).to_local())


def test_a_pending_reduction_is_refused_on_all_ranks(
    comm: Any, mpi_dir: Path, meshes: dict[tuple[int, ...], DeviceMesh]
) -> None:
    partial = DTensor.from_local(torch.ones(3), meshes[4,], [Partial()], run_check=False)
    with pytest.raises(LayoutError, match=r"(?s)ranks 0-3: grad: Partial\(sum\) is .*redistribute\(\)"):
        Checkpoint(comm=comm, grad=partial).save(mpi_dir / "ckpt")
    assert list(mpi_dir.iterdir()) == []


class Mlp(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).clone()  # fully_shard warns of views


class Training:
    """A model and Adam, after a step with the same data on all ranks, or before it."""

    def __init__(self, comm: Any, seed: int, shard: Callable[[Mlp], object], *, step: bool) -> None:
        self.model = Mlp(seed)
        shard(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        if step:
            self.model(torch.ones(2, 6)).sum().backward()
            self.optimizer.step()
        self.checkpoint = Checkpoint(comm=comm, model=self.model, optimizer=self.optimizer)

    def full(self) -> dict[str, torch.Tensor]:
        """All tensors, whole. Collective where they are sharded."""
        named = dict(self.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                named[f"{name}/{slot}"] = value
        return {name: whole(tensor.detach()) for name, tensor in named.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def tensor_and_data_parallel(meshes: dict[tuple[int, ...], DeviceMesh]) -> Callable[[Mlp], object]:
    """FSDP over tensor parallelism: parameters sharded twice along one dimension, the inner cut first."""
    mesh = meshes[2, 2]

    def shard(model: Mlp) -> None:
        parallelize_module(model, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])

    return shard


def test_fsdp_over_tensor_parallelism_to_plain_fsdp_and_to_one_rank(
    comm: Any, subcomm: Any, mpi_dir: Path, meshes: dict[tuple[int, ...], DeviceMesh]
) -> None:
    training = Training(comm, 1, tensor_and_data_parallel(meshes), step=True)
    placements = {str(placement) for parameter in training.model.parameters() for placement in parameter.placements}
    assert any("Strided" in placement or placement.startswith("_S") for placement in placements), placements
    expected = training.full()
    path = training.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    for size in (4, 2, 1):
        small = subcomm(size)
        if small is None:
            continue
        twin = Training(small, 7, lambda model: fully_shard(model, mesh=meshes[(size,)]), step=False)  # noqa: B023
        assert twin.optimizer.state == {}
        twin.checkpoint.restore(path).assert_consumed()
        found = twin.full()
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
        moments = [twin.optimizer.state[parameter]["exp_avg"] for parameter in twin.model.parameters()]
        assert all(isinstance(moment, DTensor) for moment in moments)


def test_one_rank_to_fsdp_over_tensor_parallelism(
    comm: Any, subcomm: Any, mpi_dir: Path, meshes: dict[tuple[int, ...], DeviceMesh]
) -> None:
    alone = subcomm(1)
    expected = None
    if alone is not None:
        training = Training(alone, 1, lambda _: None, step=True)
        expected = training.full()
        training.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    expected = comm.bcast(expected)
    twin = Training(comm, 7, tensor_and_data_parallel(meshes), step=True)
    twin.checkpoint.restore(mpi_dir / "ckpt-1").assert_consumed()
    found = twin.full()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    twin.model(torch.ones(2, 6)).sum().backward()
    twin.optimizer.step()  # the restored state has the sharding that the step expects
