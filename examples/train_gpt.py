"""Train a small GPT with FSDP2, checkpoint as it goes, and resume on any number of ranks.

    mpirun -n 4 python examples/train_gpt.py --dir runs/gpt --steps 200
    mpirun -n 2 python examples/train_gpt.py --dir runs/gpt --steps 400     # goes on at step 200, on 2 ranks
    sbatch launch/slurm.sbatch python -m mpi4py examples/train_gpt.py       # saves and requeues itself before its limit

The text comes with Python (`pydoc_data.topics`, 0.5 MB of English), its bytes are the tokens. The global batch does not
depend on the number of ranks, so the loss curves of different numbers of ranks can be laid over each other; they differ
by the dropout masks only. On the same number of ranks a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.cluster import PreemptionGuard, init_process_group

VOCABULARY = 256  # a token is a byte


class Block(nn.Module):
    """Pre-LN transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, context, width) to the same shape."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        queries, keys, values = qkv.chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).flatten(2)))
        change: Tensor = self.dropout(self.mlp(self.norm_mlp(x)))
        return x + change


class GPT(nn.Module):
    """Decoder-only transformer; the embedding of the tokens is also the output head."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the next tokens; both arguments have the shape (batch, context)."""
        x = self.dropout(self.tokens(inputs) + self.positions.weight[: inputs.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Batches:
    """Windows of a text in one shuffled order for all ranks.

    The position counts windows over all ranks, so that any number of ranks goes on with the right next ones.
    """

    def __init__(self, text: Tensor, context: int, batch: int, seed: int) -> None:
        self.windows = text[: (len(text) - 1) // context * context + 1].unfold(0, context + 1, context)
        self.per_epoch = len(self.windows) // batch * batch
        self.batch, self.seed, self.position = batch, seed, 0

    def next(self, rank: int, size: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the next global batch: inputs and targets."""
        epoch, start = divmod(self.position, self.per_epoch)
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.seed + epoch))
        mine = self.windows[order[start : start + self.batch].chunk(size)[rank]]
        self.position += self.batch
        return mine[:, :-1], mine[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def load_text(device: torch.device) -> tuple[Tensor, Tensor]:
    """The bytes of the Python language reference: nine tenths to train on, one tenth to validate."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    tokens = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long().to(device)
    return tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]


def warmup_then_cosine(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: up in a straight line, then down to a tenth along a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of this rank's part without dropout. Collective, as every forward of a sharded model."""
    model.eval()
    loss: Tensor = model(inputs, targets)
    model.train()
    return loss


def mean(comm: MPI.Intracomm, loss: Tensor) -> float:
    """The mean over the ranks. Collective over the communicator."""
    total: float = comm.allreduce(loss.item())
    return total / comm.size


class Log:
    """JSON lines, which outlive a killed job. Rank 0 writes, the others do nothing."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank

    def append(self, **record: float) -> None:
        if self.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/gpt"), help="checkpoints and loss.jsonl (%(default)s)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over all ranks")
    parser.add_argument("--context", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.batch % MPI.COMM_WORLD.size:
        parser.error(f"--batch {args.batch} cannot be split evenly over {MPI.COMM_WORLD.size} ranks")
    return args


def main() -> None:
    guard = PreemptionGuard()  # before what takes time: a signal without a handler ends the process
    args = parse_arguments()
    comm = MPI.COMM_WORLD
    device = init_process_group(comm)  # torch's ranks are MPI's

    torch.manual_seed(args.seed)  # the same model on all ranks ...
    model = GPT(args.layers, args.width, args.heads, args.context, args.dropout).to(device)
    mesh = init_device_mesh(device.type, (comm.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: warmup_then_cosine(n, 10, args.steps))
    torch.manual_seed(args.seed + comm.rank)  # ... with other dropout masks on each

    train_text, test_text = load_text(device)
    data = Batches(train_text, args.context, args.batch, args.seed)
    test_batch = Batches(test_text, args.context, args.batch, args.seed).next(comm.rank, comm.size)

    ckpt = distckpt.Checkpoint(
        model=model, optimizer=optimizer, scheduler=scheduler, data=data, rng=distckpt.RNGState(), step=0
    )
    latest = distckpt.latest_checkpoint(args.dir)
    status = ckpt.restore(latest)  # None on a fresh start: restores nothing
    if latest:
        status.assert_existing_objects_matched()

    if comm.rank == 0:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        origin = f"resumed from {latest} at step {ckpt.step}" if latest else "from the start"
        print(f"{millions:.1f} M parameters on {comm.size} ranks ({device.type}), {origin}", flush=True)

    log = Log(args.dir / "loss.jsonl", comm.rank)
    while ckpt.step < args.steps and not guard.should_stop():
        if ckpt.step % args.save_every == 0:
            log.append(step=ckpt.step, ranks=comm.size, test_loss=mean(comm, evaluate(model, *test_batch)))
        loss = model(*data.next(comm.rank, comm.size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ckpt.step += 1
        global_loss, lr = mean(comm, loss), optimizer.param_groups[0]["lr"]
        log.append(step=ckpt.step, ranks=comm.size, loss=global_loss, lr=lr)
        if ckpt.step % args.save_every == 0:
            with guard.saving():
                path = ckpt.save(args.dir / "ckpt")
            if comm.rank == 0:
                print(f"step {ckpt.step}: loss {global_loss:.3f}, saved {path}", flush=True)
    if guard.reason:  # all ranks are at the same step
        path = ckpt.save(args.dir / "ckpt")
        if comm.rank == 0:
            print(f"step {ckpt.step}: {guard.reason}, saved {path}", flush=True)
    dist.destroy_process_group()
    sys.exit(guard.exit_code)


if __name__ == "__main__":
    main()
