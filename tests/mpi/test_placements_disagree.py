"""Meshes and shapes that ranks disagree on, and placements that are no shards: one error on all, before any byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from distckpt import Checkpoint, LayoutError, RestoreMismatchError, SaveOptions, ShardedVariable

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(60), pytest.mark.usefixtures("process_group")]

FAST = SaveOptions(durable=False)


@pytest.fixture(scope="module")
def row(process_group: None) -> DeviceMesh:  # noqa: ARG001  # a mesh needs it
    return DeviceMesh("cpu", [0, 1, 2, 3], mesh_dim_names=("data",))


def own_mesh(ranks: list[int]) -> DeviceMesh:
    """A mesh as one rank sees it; no communication, so ranks may disagree."""
    return DeviceMesh("cpu", ranks, _init_backend=False)


def dtensor(local: torch.Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


def error_of_save(comm: Any, directory: Path, **objects: object) -> str:
    """The text of the error that saving gives on all ranks; nothing is left behind, and the next save works."""
    checkpoint = Checkpoint(comm=comm, **objects)
    with pytest.raises(LayoutError) as error:
        checkpoint.save(directory / "ckpt", options=FAST)
    texts = comm.allgather(str(error.value))
    assert len(set(texts)) == 1, texts
    assert list(directory.iterdir()) == []
    comm.Barrier()
    return texts[0]


def test_half_of_the_ranks_replicate(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    halved = comm.rank < 2
    w = dtensor(torch.ones(2 if halved else 8, 3), row, Shard(0) if halved else Replicate(), (8, 3))
    text = error_of_save(comm, mpi_dir, model={"w": w})
    assert "model/w: the box at offset (0, 0) of shape (2, 3) on rank 0" in text
    assert "on ranks 2-3 overlap" in text
    mesh = "on the mesh [0, 1, 2, 3] ('data',)"
    assert (
        f"It has placements (Shard(dim=0)) {mesh} on ranks 0-1, placements (Replicate()) {mesh} on ranks 2-3." in text
    )


def test_ranks_order_the_mesh_differently(comm: Any, mpi_dir: Path) -> None:
    mesh = own_mesh([0, 1, 2, 3] if comm.rank < 3 else [3, 2, 1, 0])
    text = error_of_save(comm, mpi_dir, w=dtensor(torch.full((2, 3), comm.rank), mesh, Shard(0), (8, 3)))
    assert "w: replicas of the box at offset (0, 0) of shape (2, 3) differ" in text or "are on no rank" in text
    assert "placements (Shard(dim=0)) on the mesh [0, 1, 2, 3] on ranks 0-2" in text
    assert "placements (Shard(dim=0)) on the mesh [3, 2, 1, 0] on rank 3" in text


def test_a_rank_has_a_smaller_mesh(comm: Any, mpi_dir: Path) -> None:
    mesh = own_mesh([0, 1, 2, 3] if comm.rank < 3 else [0, 3])
    w = dtensor(torch.ones(2 if comm.rank < 3 else 4, 3), mesh, Shard(0), (8, 3))
    text = error_of_save(comm, mpi_dir, w=w)
    assert "w: the box" in text
    assert "mesh [0, 1, 2, 3] on ranks 0-2" in text
    assert "mesh [0, 3] on rank 3" in text


def test_a_rank_has_no_placements(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    local = torch.ones(2, 3)
    w = local if comm.rank == 1 else dtensor(local, row, Shard(0), (8, 3))
    text = error_of_save(comm, mpi_dir, w=w)
    assert "w: global shape differs. Expected (8, 3), as on ranks 0, 2-3. Got (2, 3) on rank 1." in text
    assert "It has placements (Shard(dim=0)) on the mesh [0, 1, 2, 3] ('data',) on ranks 0, 2-3" in text
    assert "no placements on rank 1" in text


def test_a_local_tensor_is_not_what_the_placements_say(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    rows = 3 if comm.rank == 2 else 2
    text = error_of_save(comm, mpi_dir, w=dtensor(torch.ones(rows, 3), row, Shard(0), (8, 3)))
    assert "rank 2: w: a DTensor's local shape is (3, 3), which is not what placements (Shard(dim=0))" in text
    assert "ShardedVariable(local, global_shape, offset)" in text


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_a_pending_reduction(comm: Any, mpi_dir: Path, row: DeviceMesh, known: bool) -> None:
    target = mpi_dir / "sub"
    target.mkdir(exist_ok=True)
    good = dtensor(torch.ones(2, 3), row, Shard(0), (8, 3))
    checkpoint = Checkpoint(comm=comm, w=good)
    if known:
        checkpoint.write(mpi_dir / "good", options=FAST)
    checkpoint.w = dtensor(torch.ones(8, 3), row, Partial(), (8, 3)) if comm.rank == 3 else good
    with pytest.raises(LayoutError) as error:
        checkpoint.save(target / "ckpt", options=FAST)
    assert (
        "rank 3: w: Partial(sum) is a pending reduction, not a shard, in placements (Partial(sum)) on the mesh "
        "[0, 1, 2, 3] ('data',). Call redistribute() first." in str(error.value)
    )
    assert len(set(comm.allgather(str(error.value)))) == 1
    assert list(target.iterdir()) == []
    checkpoint.w = good
    checkpoint.save(mpi_dir / "again", options=FAST)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 4)


@pytest.mark.parametrize(
    "spread", [lambda net, _: net, lambda net, row: fully_shard(net, mesh=row)], ids=["whole", "FSDP"]
)
def test_a_rank_whose_module_has_another_shape(
    comm: Any, mpi_dir: Path, row: DeviceMesh, spread: Callable[[Net, DeviceMesh], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = spread(Net(12 if comm.rank == 1 else 8), row)
    text = error_of_save(comm, mpi_dir, model=model)
    assert "model/up/weight: global shape differs. Expected (8, 4), as on ranks 0, 2-3. Got (12, 4) on rank 1." in text
    assert "model/down/weight: global shape differs" in text
    assert ("placements (Shard(dim=0))" in text) == isinstance(model.up.weight, DTensor)


def test_a_rank_whose_module_has_another_shape_restores_nothing(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    path = Checkpoint(comm=comm, model=fully_shard(Net(8), mesh=row)).write(mpi_dir / "good", options=FAST)
    model = fully_shard(Net(12 if comm.rank == 1 else 8), mesh=row)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    with pytest.raises(RestoreMismatchError, match=r"model/up/weight: saved a tensor of shape \(8, 4\)") as error:
        Checkpoint(comm=comm, model=model).read(path)
    assert "live a tensor of shape (12, 4)" in str(error.value)
    assert "(on rank 1)" in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1
    assert all(torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters(), strict=True))


def test_a_pending_reduction_is_not_restored_into(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    path = Checkpoint(comm=comm, v=torch.ones(3), w=torch.ones(8, 3)).write(mpi_dir / "good", options=FAST)
    live = dtensor(torch.zeros(8, 3), row, Partial() if comm.rank == 2 else Replicate(), (8, 3))
    v = torch.zeros(3)
    with pytest.raises(RestoreMismatchError) as error:
        Checkpoint(comm=comm, v=v, w=live).read(path)
    assert "w: saved a tensor, live a DTensor: Partial(sum) is a pending reduction" in str(error.value)
    assert "placements (Partial(sum)) on the mesh [0, 1, 2, 3]" in str(error.value)
    assert "(on rank 2)" in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1
    assert not v.any()
    assert not live.to_local().any()


def error_of_read(comm: Any, path: str, live: DTensor, **more: object) -> str:
    """The text of the error that restoring gives on all ranks; nothing was changed."""
    other = torch.zeros(3)
    with pytest.raises(LayoutError) as error:
        Checkpoint(comm=comm, v=other, w=live, **more).read(path)
    assert len(set(comm.allgather(str(error.value)))) == 1
    assert not other.any()
    assert not live.to_local().any()
    return str(error.value)


def test_ranks_that_disagree_on_the_mesh_restore_nothing(comm: Any, mpi_dir: Path, row: DeviceMesh) -> None:
    path = Checkpoint(comm=comm, v=torch.ones(3), w=torch.ones(8, 3)).write(mpi_dir / "good", options=FAST)
    reordered = own_mesh([0, 1, 2, 3] if comm.rank < 3 else [3, 2, 1, 0])
    text = error_of_read(comm, path, dtensor(torch.zeros(2, 3), reordered, Shard(0), (8, 3)))
    assert "w: the ranks of a mesh disagree on it." in text
    assert "placements (Shard(dim=0)) on the mesh [0, 1, 2, 3] on ranks 0-2" in text
    assert "placements (Shard(dim=0)) on the mesh [3, 2, 1, 0] on rank 3" in text
    smaller = own_mesh([0, 1, 2, 3] if comm.rank < 3 else [0, 3])
    text = error_of_read(comm, path, dtensor(torch.zeros(2 if comm.rank < 3 else 4, 3), smaller, Shard(0), (8, 3)))
    assert "mesh [0, 3] on rank 3" in text
    halved = comm.rank < 2
    live = dtensor(torch.zeros(2 if halved else 8, 3), row, Shard(0) if halved else Replicate(), (8, 3))
    text = error_of_read(comm, path, live)
    assert "(Shard(dim=0)) on the mesh [0, 1, 2, 3] ('data',) on ranks 0-1, placements (Replicate())" in text
    good = dtensor(torch.zeros(2, 3), row, Shard(0), (8, 3))
    Checkpoint(comm=comm, v=torch.zeros(3), w=good).read(path).assert_consumed()
    assert good.to_local().all()


def test_meshes_of_their_own_are_no_disagreement(comm: Any, mpi_dir: Path) -> None:
    """Two replicas of a model, each sharded over its two ranks, one of them otherwise than the other."""
    path = Checkpoint(comm=comm, w=torch.ones(8, 4)).write(mpi_dir / "good", options=FAST)
    mesh = own_mesh([0, 1] if comm.rank < 2 else [2, 3])
    placement = Shard(0) if comm.rank < 2 else Shard(1)
    live = dtensor(torch.zeros((4, 4) if comm.rank < 2 else (8, 2)), mesh, placement, (8, 4))
    Checkpoint(comm=comm, w=live).read(path).assert_consumed()
    assert live.to_local().all()


def test_ranges_that_do_not_follow_each_other(comm: Any, mpi_dir: Path) -> None:
    start = 6 * comm.rank - (comm.rank == 2)
    text = error_of_save(comm, mpi_dir, w=ShardedVariable.flat(torch.ones(6), (4, 6), start))
    assert (
        "w: the box at offset (1, 5) of shape (1, 1) on rank 2 and the box at offset (1, 0) of shape (1, 6)" in text
        or ("on rank 1 and" in text)
    )
    assert "overlap" in text
