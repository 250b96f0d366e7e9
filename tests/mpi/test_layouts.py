"""Saved in each layout and restored in each other one: parameters, optimizer and scheduler, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import torch.distributed as dist

from distckpt import Checkpoint, SaveOptions
from distckpt.cluster.process_group import init_process_group
from tests.mpi.layouts import Layout, all_layouts, filled, reference

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(120)]

FAST = SaveOptions(durable=False)


@pytest.fixture(scope="module")
def layouts() -> Iterator[list[Layout]]:
    init_process_group(MPI.COMM_WORLD, "gloo")
    yield all_layouts()
    MPI.COMM_WORLD.Barrier()
    dist.destroy_process_group()


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
