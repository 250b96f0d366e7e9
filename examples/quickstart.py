"""Train, save, stop; start again on any number of ranks and go on: mpirun -n 4 python examples/quickstart.py."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.cluster import init_process_group

device = init_process_group()  # torch's ranks are MPI's
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
torch.manual_seed(dist.get_rank())

ckpt = distckpt.Checkpoint(model=model, optimizer=optimizer, rng=distckpt.RNGState(), step=0)
ckpt.restore(distckpt.latest_checkpoint("runs/quickstart"))  # None on a fresh start: restores nothing

for _ in range(100):
    x = torch.randn(32, 64, device=device)
    loss = (model(x) - x.mean(dim=1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ckpt.step += 1

path = ckpt.save("runs/quickstart/ckpt")  # one HDF5 file, written by all ranks
if dist.get_rank() == 0:
    print(f"step {ckpt.step}: loss {loss.item():.4f}, saved {path}")
dist.destroy_process_group()
