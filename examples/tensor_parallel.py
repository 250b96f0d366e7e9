"""Tensor parallelism with data parallelism: save on one mesh, go on with another one.

    mpirun -n 4 python examples/tensor_parallel.py --tp 2     # 2 replicas, each split over 2 ranks
    mpirun -n 3 python examples/tensor_parallel.py --tp 3     # goes on with one, split over 3 ranks
    python examples/tensor_parallel.py                        # goes on in one process, without DTensors

The checkpoint's code knows nothing of layouts: each weight is one dataset of its global shape in the file, and every
run reads the part that its own placements want.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt
from distckpt.cluster import init_process_group

VOCABULARY, WIDTH, BLOCKS = 64, 48, 2  # the width of a split layer must be a multiple of the ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + change


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def split(model: Model, mesh: DeviceMesh) -> None:
    """Tensor parallelism within the rows of the mesh, FSDP across them."""
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


def loss_at(step: int, model: Model, device: torch.device) -> Tensor:
    """Loss of the batch of a step, the same on all ranks: the next token is three times the present one."""
    tokens = torch.randint(VOCABULARY, (64,), generator=torch.Generator().manual_seed(step)).to(device)
    return F.cross_entropy(model(tokens), tokens * 3 % VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=1, help="ranks over which a layer is split (%(default)s)")
    parser.add_argument("--dir", default="runs/tensor_parallel")
    parser.add_argument("--steps", type=int, default=20, help="steps of this run (%(default)s)")
    args = parser.parse_args()
    device = init_process_group()
    size, first = dist.get_world_size(), dist.get_rank() == 0
    if size % args.tp:
        parser.error(f"--tp {args.tp} does not divide {size} ranks")

    torch.manual_seed(0)  # the same start on all ranks
    model = Model().to(device)
    if size > 1:
        split(model, init_device_mesh(device.type, (size // args.tp, args.tp), mesh_dim_names=("dp", "tp")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    ckpt = distckpt.Checkpoint(model=model, optimizer=optimizer, scheduler=scheduler, step=0)
    latest = distckpt.latest_checkpoint(args.dir)
    status = ckpt.restore(latest)
    if latest:
        status.assert_consumed()  # every saved value found its place, and every place its value
        with torch.no_grad():
            loss = loss_at(0, model, device)
        if first:
            print(f"restored step {ckpt.step}: loss {loss.item():.5f} on {size} ranks, {args.tp} of them per layer")

    for _ in range(args.steps):
        torch.autograd.backward(loss_at(ckpt.step, model, device))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ckpt.step += 1
    with torch.no_grad():
        loss = loss_at(0, model, device)
    path = ckpt.save(f"{args.dir}/ckpt")
    if first:
        print(f"saved step {ckpt.step}: loss {loss.item():.5f} on {size} ranks, {args.tp} of them per layer, {path}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
