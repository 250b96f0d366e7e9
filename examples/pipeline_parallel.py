"""Pipeline parallelism: each rank holds other layers; go on with the layers dealt to another number of ranks.

    mpirun -n 4 python examples/pipeline_parallel.py     # 6 layers on 4 ranks: 1, 2, 1, 2
    mpirun -n 2 python examples/pipeline_parallel.py     # goes on with 3 layers on each of 2 ranks
    python examples/pipeline_parallel.py                 # goes on in one process

A layer has the same name on whichever rank it is, so the checkpoint holds the union of what the ranks have: layers and
their optimizer state move between stages without a line about it.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import distckpt
from distckpt.cluster import init_process_group

LAYERS, WIDTH, BATCH, MICROBATCHES = 6, 32, 16, 4


class Stage(nn.Module):
    """Layers `first` to `last` - 1, under the names that they have in the whole model."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for n in range(LAYERS)})
        for n in {*range(LAYERS)} - {*range(first, last)}:
            del self.layers[str(n)]  # made all the same, so that every number of ranks draws the same random numbers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Pipeline:
    """A GPipe schedule over the ranks; in one process there is nothing to schedule."""

    def __init__(self, stage: Stage, rank: int, size: int, device: torch.device) -> None:
        self.stage, self.rank, self.size, self.device = stage, rank, size, device
        if size > 1:
            pipelined = PipelineStage(stage, rank, size, device)
            self.schedule = ScheduleGPipe(pipelined, MICROBATCHES, loss_fn=F.mse_loss)

    def step(self, x: Tensor, target: Tensor) -> float:
        """Forward and backward of one batch; the loss, on all ranks. Collective."""
        if self.size == 1:
            loss = F.mse_loss(self.stage(x), target)
            torch.autograd.backward(loss)
            return loss.item()
        losses: list[Any] = []
        if self.rank == 0:
            self.schedule.step(x)
        elif self.rank == self.size - 1:
            self.schedule.step(target=target, losses=losses)
        else:
            self.schedule.step()
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=self.device)
        dist.broadcast(mean, src=self.size - 1)
        return mean.item()


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same on all ranks."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step)).to(device)
    return x, torch.tanh(x.roll(1, dims=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", default="runs/pipeline_parallel")
    parser.add_argument("--steps", type=int, default=20, help="steps of this run (%(default)s)")
    args = parser.parse_args()
    device = init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    first, last = rank * LAYERS // size, (rank + 1) * LAYERS // size
    stage = Stage(first, last).to(device)
    pipeline = Pipeline(stage, rank, size, device)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)

    ckpt = distckpt.Checkpoint(model=stage, optimizer=optimizer, step=0)
    latest = distckpt.latest_checkpoint(args.dir)
    status = ckpt.restore(latest)
    if latest:
        status.assert_consumed()  # each layer of the file is on some rank, and each layer of a rank in the file
        loss = pipeline.step(*batch(0, device))
        optimizer.zero_grad()
        if rank == 0:
            print(f"restored step {ckpt.step}: loss {loss:.5f} on {size} ranks, layers 0 to {last - 1} on the first")

    for _ in range(args.steps):
        pipeline.step(*batch(ckpt.step, device))
        optimizer.step()
        optimizer.zero_grad()
        ckpt.step += 1
    loss = pipeline.step(*batch(0, device))
    path = ckpt.save(f"{args.dir}/ckpt")
    if rank == 0:
        print(f"saved step {ckpt.step}: loss {loss:.5f} on {size} ranks, layers 0 to {last - 1} on the first, {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
