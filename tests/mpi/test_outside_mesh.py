"""DTensors whose mesh leaves out ranks that have the object, too: those have no value of it, and take none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from distckpt import Checkpoint, LayoutError, SaveOptions, load_checkpoint

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(60), pytest.mark.usefixtures("process_group")]

FAST = SaveOptions(durable=False)


class Scaled(nn.Module):
    """A matrix and a scale without dimensions, on the ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh, value: float) -> None:
        super().__init__()
        self.weight = on(mesh, torch.full((5, 2), value), Shard(0))
        self.scale = on(mesh, torch.tensor(value), Replicate())


def on(mesh: DeviceMesh, full: torch.Tensor, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(full, mesh, [placement], src_data_rank=None))


def stepped(model: Scaled) -> torch.optim.Optimizer:
    """An optimizer with state, the same on all ranks of the mesh."""
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def locals_of(model: Scaled, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that a rank has of the tensors, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        found[name] = local(parameter)
        found |= {f"{name}.{slot}": local(value) for slot, value in optimizer.state[parameter].items()}
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize("to", [[0, 1], [1, 2], [2]], ids=str)
@pytest.mark.parametrize("members", [[0, 1], [1, 2], [2]], ids=str)
def test_ranks_outside_of_a_mesh_take_part(subcomm: Any, mpi_dir: Path, members: list[int], to: list[int]) -> None:
    saving, restoring = DeviceMesh("cpu", members), DeviceMesh("cpu", to)
    comm = subcomm(3)
    if comm is None:
        return
    model = Scaled(saving, 3.0)
    path = Checkpoint(comm=comm, model=model, optimizer=stepped(model)).write(mpi_dir / "saved", options=FAST)
    twin = Scaled(restoring, 7.0)
    optimizer = stepped(twin)
    Checkpoint(comm=comm, model=twin, optimizer=optimizer).read(path).assert_consumed()
    expected = Scaled(restoring, 3.0)
    assert_same(locals_of(twin, optimizer), locals_of(expected, stepped(expected)))


@pytest.mark.parametrize("members", [[0, 1], [1, 2]], ids=str)
def test_state_is_made_inside_and_outside_of_a_mesh(subcomm: Any, mpi_dir: Path, members: list[int]) -> None:
    mesh = DeviceMesh("cpu", members)
    comm = subcomm(3)
    if comm is None:
        return
    model = Scaled(mesh, 3.0)
    saved = stepped(model)
    path = Checkpoint(comm=comm, model=model, optimizer=saved).write(mpi_dir / "saved", options=FAST)
    twin = Scaled(mesh, 7.0)
    optimizer = torch.optim.Adam(twin.parameters(), foreach=False)
    Checkpoint(comm=comm, model=twin, optimizer=optimizer).read(path).assert_consumed()
    assert_same(locals_of(twin, optimizer), locals_of(model, saved))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("replicas", ["check", "first"])
def test_the_file_has_what_a_member_holds(subcomm: Any, mpi_dir: Path, replicas: str) -> None:
    mesh = DeviceMesh("cpu", [1, 2])
    comm = subcomm(3)
    if comm is None:
        return
    options = SaveOptions(durable=False, replicas=replicas)
    checkpoint = Checkpoint(comm=comm, model=Scaled(mesh, 3.0))
    for _ in range(2):  # the second save goes by the first one's layout
        path = checkpoint.save(mpi_dir / "ckpt", options=options)
    with load_checkpoint(path) as reader:
        assert reader["model/scale"][...] == 3.0
        assert {shard.rank for shard in reader["model/scale"].shards} < {1, 2}


def test_members_that_differ_are_refused(subcomm: Any, mpi_dir: Path) -> None:
    mesh = DeviceMesh("cpu", [1, 2])
    comm = subcomm(3)
    if comm is None:
        return
    checkpoint = Checkpoint(comm=comm, scale=on(mesh, torch.tensor(float(comm.rank)), Replicate()))
    with pytest.raises(
        LayoutError, match=r"scale: replicas differ\. Expected the bytes of rank 1\. Got others on rank 2"
    ):
        checkpoint.save(mpi_dir / "ckpt", options=FAST)


def test_a_value_without_dimensions_on_no_rank_is_refused(subcomm: Any, mpi_dir: Path) -> None:
    mesh = DeviceMesh("cpu", [2])
    comm = subcomm(2)
    if comm is None:
        return
    checkpoint = Checkpoint(comm=comm, scale=on(mesh, torch.tensor(1.0), Replicate()))
    with pytest.raises(LayoutError, match=r"scale: .* are on no rank.* held by none of the ranks"):
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
