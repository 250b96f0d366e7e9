"""FSDP2 on NCCL: one rank per GPU, as many as there are of both. Ranks that share a GPU exchange what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt
from distckpt.cluster import init_process_group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mpi,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(seed: int, comm: Any, device: torch.device) -> distckpt.Checkpoint:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(600, 501), nn.ReLU(), nn.Linear(501, 3)).to(device)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    model(torch.ones(2, 600, device=device)).square().sum().backward()
    optimizer.step()
    return distckpt.Checkpoint(comm=comm, model=model, optimizer=optimizer)


def state(ckpt: distckpt.Checkpoint) -> list[torch.Tensor]:
    tensors = list(ckpt.model.parameters())
    tensors += [slot for parameter in tensors for slot in ckpt.optimizer.state[parameter].values()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


@pytest.mark.parametrize("background", [False, True])
def test_fsdp_on_nccl(mpi_dir: Path, subcomm: Any, agree: Callable[..., None], comm: Any, background: bool) -> None:
    equal = True
    group = subcomm(min(comm.size, torch.cuda.device_count()))
    if group is not None:
        device = init_process_group(group, "nccl")
        try:
            ckpt, twin = make(1, group, device), make(2, group, device)
            expected = state(ckpt)
            different = not any(torch.equal(a, b) for a, b in zip(expected, state(twin), strict=True) if a.dim())
            path = ckpt.save_async(mpi_dir / "ckpt").result() if background else ckpt.save(mpi_dir / "ckpt")
            twin.restore(path).assert_consumed()
            equal = different and all(torch.equal(a, b) for a, b in zip(expected, state(twin), strict=True))
        finally:
            dist.destroy_process_group()
    agree(equal)


def test_strips_and_replicas_are_exchanged(mpi_dir: Path, agree: Callable[..., None], comm: Any) -> None:
    """Columns, narrow enough to be joined with those of other ranks, and what all ranks want; many rounds."""
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    full = torch.arange(5000 * 1024, dtype=torch.float32).reshape(5000, 1024)
    bounds = [1024 * rank // comm.size for rank in range(comm.size + 1)]
    start, stop = bounds[comm.rank : comm.rank + 2]
    strip, replica = full[:, start:stop].to(device), full.to(device)
    shard = distckpt.ShardedVariable(strip, tuple(full.shape), (0, start))
    checkpoint = distckpt.Checkpoint(comm=comm, strip=shard, replica=replica)
    path = checkpoint.write(mpi_dir / "ckpt")
    strip.zero_()
    replica.zero_()
    checkpoint.read(path).assert_consumed()
    agree(torch.equal(strip.cpu(), full[:, start:stop]) and torch.equal(replica.cpu(), full))


@pytest.mark.parametrize("background", [False, True])
def test_many_small_shards_are_aggregated(
    mpi_dir: Path, agree: Callable[..., None], comm: Any, background: bool
) -> None:
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    full = {f"v{number}": torch.arange(64 * comm.size) + 1000.0 * number for number in range(600)}
    shards = {name: tensor.chunk(comm.size)[comm.rank].to(device) for name, tensor in full.items()}
    variables = {
        name: distckpt.ShardedVariable(shard, tuple(full[name].shape), (64 * comm.rank,))
        for name, shard in shards.items()
    }
    checkpoint = distckpt.Checkpoint(comm=comm, variables=variables)
    for _ in range(2):
        if background:
            handle = checkpoint.save_async(mpi_dir / "c")
            for shard in shards.values():
                shard.add_(1)
            path = handle.result()
        else:
            path = checkpoint.save(mpi_dir / "c")
            for shard in shards.values():
                shard.add_(1)
    checkpoint.restore(path).assert_consumed()
    expected = {name: tensor.chunk(comm.size)[comm.rank] + 1 for name, tensor in full.items()}
    agree(all(torch.equal(shard.cpu(), expected[name]) for name, shard in shards.items()))


@pytest.mark.parametrize("background", [False, True])
def test_rows_become_columns(mpi_dir: Path, agree: Callable[..., None], comm: Any, background: bool) -> None:
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    full = torch.randn(3001, 1100, generator=torch.Generator().manual_seed(1))
    rows, columns = ([full.shape[axis] * rank // comm.size for rank in range(comm.size + 1)] for axis in (0, 1))
    row, column = (slice(*bounds[comm.rank : comm.rank + 2]) for bounds in (rows, columns))
    saved = distckpt.ShardedVariable(full[row].to(device), tuple(full.shape), (row.start, 0))
    checkpoint = distckpt.Checkpoint(comm=comm, w=saved)
    path = checkpoint.save_async(mpi_dir / "c").result() if background else checkpoint.save(mpi_dir / "c")
    live = torch.zeros_like(full[:, column], device=device)
    twin = distckpt.Checkpoint(comm=comm, w=distckpt.ShardedVariable(live, tuple(full.shape), (0, column.start)))
    twin.restore(path).assert_consumed()
    agree(torch.equal(live.cpu(), full[:, column]))


def test_a_save_in_the_background_of_what_ranks_share_on_one_gpu(
    mpi_dir: Path, agree: Callable[..., None], comm: Any
) -> None:
    """Replicas, of which each rank writes a part, while the program changes them."""
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    replica = torch.full((9 << 20,), 7.0, device=device)
    checkpoint = distckpt.Checkpoint(comm=comm, replica=replica)
    handle = checkpoint.save_async(mpi_dir / "c")
    replica.zero_()
    path = handle.result()
    agree(bool((replica == 0).all()))
    checkpoint.restore(path).assert_consumed()
    agree(bool((replica == 7).all()))
