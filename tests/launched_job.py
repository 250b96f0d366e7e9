"""What the tests of the launch scripts run: a small training that stops when it is told to, and goes on when restarted.

    mpirun -n 2 python -m mpi4py tests/launched_job.py DIR STEPS FIRST_PAUSE PAUSE [MARGIN]

Each rank appends JSON lines to DIR/rank-<rank>.jsonl: what it starts from, each step with its loss, and why it stops. A
step takes FIRST_PAUSE seconds as long as there is no checkpoint, then PAUSE.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distckpt
from distckpt.cluster import PreemptionGuard, init_process_group


def main(directory: Path, steps: int, first_pause: float, pause: float, margin: float | None = None) -> int:
    guard = PreemptionGuard(margin=margin)
    init_process_group(backend="gloo")  # its ranks may be more than there are GPUs
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer, step=0)
    latest = distckpt.latest_checkpoint(directory)
    checkpoint.restore(latest)

    log = (directory / f"rank-{rank}.jsonl").open("a", buffering=1)

    def write(**record: Any) -> None:
        print(json.dumps({"step": checkpoint.step, **record}), file=log)

    write(start=latest and Path(latest).name, size=size, node=os.environ.get("SLURMD_NODENAME"), pid=os.getpid())
    while checkpoint.step < steps and not guard.should_stop():
        generator = torch.Generator().manual_seed(1000 * checkpoint.step + rank)
        x = torch.randn(8, 16, generator=generator)
        loss = (model(x) - x.mean(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        checkpoint.step += 1
        write(loss=loss.item())
        time.sleep(first_pause if latest is None else pause)
    with guard.saving():
        checkpoint.save(directory / "ckpt")
    write(stop=guard.reason, exit_code=guard.exit_code)
    dist.barrier()  # `-m mpi4py` ends all ranks as soon as one of them exits with another code than 0
    dist.destroy_process_group()
    return guard.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])))
