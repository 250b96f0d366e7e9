"""Saved in each layout and restored in each other one: parameters, optimizer and scheduler, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, LayoutError, RestoreMismatchError, SaveOptions
from tests.mpi.layouts import Layout, all_layouts, filled, reference, trained_layouts

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(120)]

FAST = SaveOptions(durable=False)


@pytest.fixture(scope="module")
def layouts(process_group: None) -> list[Layout]:  # noqa: ARG001  # meshes need it
    return all_layouts()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_layout_restores_into_each_other(layouts: list[Layout], subcomm: Any, mpi_dir: Path) -> None:
    comms = {size: subcomm(size) for size in (1, 2, 3, 4)}
    states = {}
    for number, layout in enumerate(layouts):
        comm = comms[layout.size]
        if comm is not None:
            states[layout.name] = layout.build(comm.rank, "reference")
            Checkpoint(comm=comm, **states[layout.name].objects).write(mpi_dir / str(number), options=FAST)
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 0:
        for number, layout in enumerate(layouts):
            assert_file_holds_the_reference(mpi_dir / f"{number}.h5", layout)
    for turn, layout in enumerate(layouts):
        comm = comms[layout.size]
        if comm is None:
            continue
        expected = states[layout.name]
        twin = layout.build(comm.rank, "")
        checkpoint = Checkpoint(comm=comm, **twin.objects)
        for number, source in enumerate(layouts):
            twin.clear(with_slots=(turn + number) % 2 == 0)
            checkpoint.step = 0
            twin.objects["step"] = 0
            assert not same_bits(twin.tensors(), expected.tensors())
            status = checkpoint.read(mpi_dir / str(number))
            assert (status.missing, status.unexpected, status.mismatched) == ((), (), ()), (source.name, layout.name)
            twin.objects["step"] = checkpoint.step
            assert same_bits(twin.tensors(), expected.tensors()), (source.name, layout.name)
            assert twin.options() == expected.options(), (source.name, layout.name)
        status.assert_consumed()
        assert len(open_files(mpi_dir)) <= 1  # a stage waits for other stages' layers, but in the newest file only
        status.close()


def open_files(directory: Path) -> list[Path]:
    """This process's open files below a directory."""
    # The descriptor that lists the descriptors is closed by now.
    links = [link.readlink() for link in list(Path("/proc/self/fd").iterdir()) if link.is_symlink()]
    return [path for path in links if path.is_relative_to(directory.resolve())]


def assert_file_holds_the_reference(path: Path, layout: Layout) -> None:
    whole = filled("weight")
    with h5py.File(path, "r") as file:
        for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
            key = name.replace(".", "/")
            found = torch.from_numpy(file[f"model/{key}"][()])
            assert torch.equal(found, reference("weight", name, tensor.shape)), (layout.name, name)
        for name, tensor in whole.named_parameters():
            for slot in ("exp_avg", "exp_avg_sq"):
                key = f"optimizer/.slots/model/{name.replace('.', '/')}/{slot}"
                expected = reference(slot, name, tensor.shape)
                assert torch.equal(torch.from_numpy(file[key][()]), expected), (layout.name, key)


# ---- training goes on --------------------------------------------------------------------------------------------


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step with the same data on all ranks, so that every layout does what one process does."""
    optimizer.zero_grad()
    model(torch.tensor([[1, 4, 7, 10], [0, 3, 6, 9]])).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("source", ["pipeline of 2", "ZeRO ranges on 3", "FSDP over tensor parallel"])
def test_training_goes_on_as_on_one_rank(layouts: list[Layout], subcomm: Any, mpi_dir: Path, source: str) -> None:
    by_name = {layout.name: layout for layout in layouts}
    comms = {size: subcomm(size) for size in (1, 2, 3, 4)}
    saved = by_name[source]
    if comms[saved.size] is not None:
        state = saved.build(comms[saved.size].rank, "reference")
        Checkpoint(comm=comms[saved.size], **state.objects).write(mpi_dir / "saved", options=FAST)
    MPI.COMM_WORLD.Barrier()
    alone = by_name["one rank"].build(0, "reference")
    before = alone.tensors()["head.weight"].clone()
    train(alone.objects["model"], alone.objects["optimizer"])
    assert not torch.equal(alone.tensors()["head.weight"], before)
    for layout in trained_layouts():
        comm = comms[layout.size]
        if comm is None:
            continue
        twin = layout.build(comm.rank, "")
        twin.optimizer.state.clear()
        Checkpoint(comm=comm, **twin.objects).read(mpi_dir / "saved").assert_consumed()
        train(twin.objects["model"], twin.objects["optimizer"])
        for key, parameter in twin.parameters.items():
            found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(found.detach(), alone.parameters[key].detach(), msg=f"{layout.name}: {key}")


def test_a_rank_of_zero_redundancy_has_the_state_of_its_own_parameters(
    layouts: list[Layout], comm: Any, mpi_dir: Path
) -> None:
    by_name = {layout.name: layout for layout in layouts}
    path = Checkpoint(comm=comm, **by_name["HSDP"].build(comm.rank, "reference").objects).write(mpi_dir / "saved")
    twin = by_name["DDP with ZeroRedundancyOptimizer on 4"].build(comm.rank, "")
    own = {id(parameter) for group in twin.optimizer.param_groups for parameter in group["params"]}
    assert 0 < len(own) < len(twin.parameters)
    twin.optimizer.state.clear()
    Checkpoint(comm=comm, **twin.objects).read(path).assert_consumed()
    assert {id(parameter) for parameter in twin.optimizer.state} == own
    assert not twin.objects["optimizer"].state


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_parameters", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_flattened_fsdp_is_refused_with_the_way_out(
    process_group: None,  # noqa: ARG001
    comm: Any,
    mpi_dir: Path,
    keeps_parameters: bool,
) -> None:
    model = FullyShardedDataParallel(
        torch.nn.Linear(5, 3), device_id=torch.device("cpu"), use_orig_params=keeps_parameters
    )
    with pytest.raises(LayoutError, match=r"ranks 0-3: model: FullyShardedDataParallel .* Use fully_shard\(\)"):
        Checkpoint(comm=comm, model=model).save(mpi_dir / "ckpt")
    assert list(mpi_dir.iterdir()) == []
    comm.Barrier()
    path = Checkpoint(comm=comm, model=torch.nn.utils.skip_init(torch.nn.Linear, 5, 3)).write(
        mpi_dir / "whole", options=SaveOptions(durable=False, replicas="first")
    )
    with pytest.raises(RestoreMismatchError, match=r"model: saved an object .* Use fully_shard\(\)"):
        Checkpoint(comm=comm, model=model).read(path)


@pytest.mark.filterwarnings("ignore")
def test_unsharded_fsdp_is_transparent(process_group: None, comm: Any, mpi_dir: Path) -> None:  # noqa: ARG001
    def make(value: float) -> Any:
        inner = torch.nn.Linear(5, 3)
        torch.nn.init.constant_(inner.weight, value)
        torch.nn.init.constant_(inner.bias, value)
        return FullyShardedDataParallel(
            inner,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )

    path = Checkpoint(comm=comm, model=make(2.0)).write(mpi_dir / "saved", options=FAST)
    plain = torch.nn.Linear(5, 3)
    Checkpoint(comm=comm, model=plain).read(path).assert_consumed()
    assert (plain.weight == 2.0).all()
    twin = make(3.0)
    Checkpoint(comm=comm, model=twin).read(path).assert_consumed()
    assert all((parameter == 2.0).all() for parameter in twin.parameters())
