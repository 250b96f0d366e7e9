"""DTensors cut twice or more along one dimension: what is stored is what `full_tensor()` says, and comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt import Checkpoint, SaveOptions
from distckpt.graph.sharding import tensor_value

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)


@pytest.fixture(scope="module")
def square(process_group: None) -> DeviceMesh:  # noqa: ARG001  # a mesh needs it
    return DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "model"))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1


PLACEMENTS: list[tuple[Placement, Placement]] = [
    (_StridedShard(0, split_factor=2), Shard(0)),  # the inner cut first, as FSDP over tensor parallelism
    (_StridedShard(1, split_factor=2), Shard(1)),
    (Shard(0), _StridedShard(0, split_factor=2)),  # two intervals on each rank
    (_StridedShard(0, split_factor=2), Replicate()),
    (_StridedShard(0, split_factor=4), _StridedShard(1, split_factor=2)),  # a grid of intervals
    (_StridedShard(0, split_factor=3), Shard(1)),
    (Shard(1), Shard(1)),
]


@pytest.mark.parametrize("shape", [(8, 4), (9, 7), (5, 3)], ids=str)
def test_strided_shards_are_stored_where_torch_has_them(
    comm: Any, mpi_dir: Path, square: DeviceMesh, shape: tuple[int, ...]
) -> None:
    full = numbered(shape)
    saved = {
        f"x{i}": distribute_tensor(full + i, square, placements, src_data_rank=None)
        for i, placements in enumerate(PLACEMENTS)
    }
    gathered = {name: tensor.full_tensor() for name, tensor in saved.items()}
    path = Checkpoint(comm=comm, **saved).write(mpi_dir / "saved", options=FAST)
    if comm.rank == 0:
        with h5py.File(path, "r") as file:
            for i, (name, whole) in enumerate(gathered.items()):
                assert torch.equal(torch.from_numpy(file[name][()]), whole), PLACEMENTS[i]
                assert torch.equal(whole, full + i)
    for shift in range(1, len(PLACEMENTS)):
        placed = PLACEMENTS[shift:] + PLACEMENTS[:shift]
        live = {
            f"x{i}": distribute_tensor(torch.zeros(shape), square, placements, src_data_rank=None)
            for i, placements in enumerate(placed)
        }
        assert not any(torch.equal(tensor.full_tensor(), full + i) for i, tensor in enumerate(live.values()))
        Checkpoint(comm=comm, **live).read(path).assert_consumed()
        for i, tensor in enumerate(live.values()):
            assert torch.equal(tensor.full_tensor(), full + i), placed[i]


def test_a_new_slot_is_sharded_as_its_strided_parameter(comm: Any, mpi_dir: Path, square: DeviceMesh) -> None:
    def make(value: float, placements: tuple[Placement, ...]) -> tuple[DTensor, torch.optim.Optimizer]:
        whole = numbered((8, 4)) * value
        parameter = nn.Parameter(distribute_tensor(whole, square, placements, src_data_rank=None))
        return parameter, torch.optim.SGD([parameter], lr=0.1, momentum=0.9, foreach=False)

    parameter, optimizer = make(1.0, (Shard(0), _StridedShard(0, split_factor=2)))
    optimizer.state[parameter]["momentum_buffer"] = parameter.detach() * 3
    path = Checkpoint(comm=comm, w=parameter, optimizer=optimizer).write(mpi_dir / "saved", options=FAST)
    live, twin = make(0.0, (Shard(1), _StridedShard(0, split_factor=4)))
    Checkpoint(comm=comm, w=live, optimizer=twin).read(path).assert_consumed()
    restored = twin.state[live]["momentum_buffer"]
    assert restored.placements == live.placements
    assert torch.equal(restored.full_tensor(), numbered((8, 4)) * 3)


@pytest.mark.parametrize("rows", [8, 7, 5, 3, 2, 1])
def test_fsdp_over_tensor_parallelism_of_any_size(comm: Any, mpi_dir: Path, square: DeviceMesh, rows: int) -> None:
    """Against the rows that torch's own chunking, in the real order, gives each rank; sizes need not divide."""
    layer = nn.Linear(3, rows)
    with torch.no_grad():
        layer.weight.copy_(numbered((rows, 3)))
        layer.bias.copy_(numbered((rows,)))
    model = parallelize_module(layer, square["model"], ColwiseParallel())
    fully_shard(model, mesh=square["data"])
    weight = model.weight
    assert any(isinstance(placement, _StridedShard) for placement in weight.placements)
    local = weight.to_local()
    boxes = tensor_value(weight).boxes
    assert len(boxes) == 1
    assert boxes[0].shape == tuple(local.shape)
    if local.numel():
        assert torch.equal(numbered((rows, 3))[boxes[0].offset[0] :][: boxes[0].shape[0]], local)
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        if rows % 4 == 0:  # torch's helper knows the even case
            assert (boxes[0].offset, boxes[0].shape) == (tuple(offset), tuple(shape))
    path = Checkpoint(comm=comm, model=model).write(mpi_dir / "saved", options=FAST)
    whole = nn.Linear(3, rows)
    Checkpoint(comm=comm, model=whole).read(path).assert_consumed()
    assert torch.equal(whole.weight, numbered((rows, 3)))
    assert torch.equal(whole.bias, numbered((rows,)))
