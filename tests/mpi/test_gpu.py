"""FSDP2 on NCCL: one rank per GPU, as many as there are of both."""

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
