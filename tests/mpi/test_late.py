"""Objects that come late, or in another form, on some ranks or on all: deferred reads need nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint, RestoreOptions, SaveOptions, ShardedVariable

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60), pytest.mark.usefixtures("process_group")]

Agree = Callable[..., None]
FAST = SaveOptions(durable=False)
PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def block(comm: Any, value: float) -> ShardedVariable:
    return ShardedVariable(full(value), (2 * comm.size,), (2 * comm.rank,))


def test_ranks_attach_at_different_times(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    """One after the other, in no common order, the last rank never; nobody waits for anybody."""
    saved = Checkpoint(comm=comm, here=1, own=block(comm, comm.rank + 1), shared=full(7), late=full(9))
    file = saved.save(mpi_dir / "ckpt", options=FAST)
    live = Checkpoint(comm=comm, here=0)
    status = live.restore(file, options=PARTIAL)
    comm.Barrier()
    if comm.rank == 0:
        Path(file).unlink()  # as retention does
    comm.Barrier()
    for turn in range(comm.size):
        if turn == comm.rank:
            live.own = block(comm, 0)
            assert live.own.tensor.tolist() == [comm.rank + 1] * 2
        if turn == comm.size - 1 - comm.rank and comm.rank < comm.size - 1:
            live.shared = full(0)
            assert live.shared.tolist() == [7, 7]
        comm.Barrier()
    assert status.pending == ("late", "own", "shared")  # as agreed at the restore
    with pytest.raises(AssertionError, match=r"1 saved values .*:\s+late \(pending: waits for attribute 'late'"):
        status.assert_consumed()
    if comm.rank == 1:
        live.late = full(0)
    status.assert_consumed()  # some rank took each value
    agree(status.pending == ())
    agree(comm.rank != 1 or live.late.tolist() == [9, 9])


def test_a_late_value_that_does_not_fit_on_one_rank(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    file = Checkpoint(comm=comm, here=1, late=full(9)).save(mpi_dir / "ckpt", options=FAST)
    live = Checkpoint(comm=comm, here=0)
    status = live.restore(file, options=PARTIAL)
    wrong = torch.zeros(3 if comm.rank == 1 else 2)
    try:
        live.late = wrong
        raised = False
    except ValueError:
        raised = True
    agree(raised == (comm.rank == 1))
    if raised:
        live.late = full(0)  # one that fits
    status.assert_consumed()
    agree(live.late.tolist() == [9, 9])


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.linspace(0, 1, 12).view(2, 6)).square().sum().backward()
    optimizer.step()


def values(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = list(module.parameters())
    tensors = [*parameters, *(slot for p in parameters for slot in optimizer.state[p].values()), *module.buffers()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("when", ["before the restore", "after it"])
def test_fully_shard_after_construction(when: str, device: str, comm: Any, mpi_dir: Path, agree: Agree) -> None:
    """The Checkpoint knew the plain modules; their parameters have been replaced since."""
    source = model(1)
    optimizer = torch.optim.AdamW(source.parameters())
    train(source, optimizer)
    file = Checkpoint(comm=comm, model=source, optimizer=optimizer, step=1).save(mpi_dir / "ckpt", options=FAST)
    with torch.device(device):
        live = model(2)
    checkpoint = Checkpoint(comm=comm, model=live, step=0)
    if when == "before the restore":
        fully_shard(live)
        if device == "meta":
            live.to_empty(device="cpu")
        checkpoint.optimizer = torch.optim.AdamW(live.parameters())
        checkpoint.restore(file).assert_consumed()
    else:
        status = checkpoint.restore(file, options=PARTIAL)
        fully_shard(live)
        if device == "meta":
            live.to_empty(device="cpu")
        checkpoint.optimizer = torch.optim.AdamW(live.parameters())
        if device == "meta":
            status.assert_consumed()
        else:  # it had been restored, then its parameters were replaced by shards of the same values
            with pytest.raises(AssertionError, match="reassigned"):
                status.assert_consumed()
    agree(isinstance(live[0].weight, DTensor))
    agree(equal(values(live, checkpoint.optimizer), values(source, optimizer)))
    train(live, checkpoint.optimizer)


@pytest.mark.parametrize("wrapped", ["saved", "restored"])
def test_ddp_on_one_side_only(wrapped: str, comm: Any, mpi_dir: Path, agree: Agree) -> None:
    source, live = model(1), model(2)
    outer = {"saved": (DistributedDataParallel(source), live), "restored": (source, DistributedDataParallel(live))}
    saved, target = outer[wrapped]
    optimizer, twin = torch.optim.AdamW(source.parameters()), torch.optim.AdamW(live.parameters())
    train(saved, optimizer)
    file = Checkpoint(comm=comm, model=saved, optimizer=optimizer).save(mpi_dir / "ckpt", options=FAST)
    agree(not equal(values(source, optimizer)[:6], list(live.parameters())))
    Checkpoint(comm=comm, model=target, optimizer=twin).restore(file).assert_consumed()
    agree(equal(values(live, twin), values(source, optimizer)))
