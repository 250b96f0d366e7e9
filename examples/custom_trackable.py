"""Objects of your own in a checkpoint: what to derive from, and what comes back on another number of ranks.

    mpirun -n 3 python examples/custom_trackable.py
    mpirun -n 2 python examples/custom_trackable.py     # goes on: the rows of 3 ranks, dealt to 2

`Trackable` saves its attributes, `PythonState` what it turns into text, any other object its `state_dict()`;
`ShardedVariable` is one rank's block of a larger tensor, `PerRank` a value that every rank has for itself.
"""

import argparse
import json
from collections import Counter

import torch
from mpi4py import MPI
from torch import Tensor, nn

import distckpt

ROWS, WIDTH = 12, 4


class Average(distckpt.Trackable):
    """Exponential moving average of a module's parameters: the tensors are tracked because they are attributes."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, value in module.named_parameters():
            self.values[name].lerp_(value, 1 - self.decay)


class Vocabulary(distckpt.PythonState):
    """Counts words; stored as text."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def serialize(self) -> str:
        return json.dumps(self.counts, sort_keys=True)

    def deserialize(self, value: str | bytes) -> None:
        self.counts = Counter(json.loads(value))


class Curriculum:
    """An object that knows nothing of distckpt: two methods are enough, and ranks must agree on what they return."""

    def __init__(self) -> None:
        self.level = 1

    def advance(self, loss: float) -> None:
        self.level += loss < 1 / self.level

    def state_dict(self) -> dict[str, int]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.level = state["level"]


class Table(distckpt.Trackable):
    """A table whose rows are dealt to the ranks; restored on another number of them, each reads its new rows."""

    def __init__(self, rank: int, size: int) -> None:
        first, last = rank * ROWS // size, (rank + 1) * ROWS // size
        self.block = distckpt.ShardedVariable(torch.zeros(last - first, WIDTH), (ROWS, WIDTH), (first, 0))

    def add(self, gradient: Tensor) -> None:
        """Row n gets n times the gradient."""
        first, rows = self.block.offset[0], self.block.tensor
        rows += torch.arange(first, first + len(rows))[:, None] * gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", default="runs/custom_trackable")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD

    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    average, vocabulary, curriculum = Average(model, 0.9), Vocabulary(), Curriculum()
    table, seen = Table(comm.rank, comm.size), distckpt.PerRank(0)
    ckpt = distckpt.Checkpoint(
        model=model, average=average, vocabulary=vocabulary, curriculum=curriculum, table=table, seen=seen, step=0
    )
    latest = distckpt.latest_checkpoint(args.dir)
    status = ckpt.restore(latest)
    if latest:
        status.assert_existing_objects_matched()

    for _ in range(10):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(ckpt.step))
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        with torch.no_grad():
            model.weight -= 0.05 * gradient
        average.update(model)
        vocabulary.counts.update(["step", "even" if ckpt.step % 2 == 0 else "odd"])
        curriculum.advance(loss.item())
        table.add(gradient)
        seen.value += 1
        ckpt.step += 1

    path = ckpt.save(f"{args.dir}/ckpt")
    total = comm.allreduce(table.block.tensor.double().sum().item())
    if comm.rank == 0:
        print(
            f"step {ckpt.step} on {comm.size} ranks: level {curriculum.level}, {dict(vocabulary.counts)}, "
            f"average {average.values['weight'].sum():.4f}, table {total:.3f}, seen here {seen.value}, {path}"
        )


if __name__ == "__main__":
    main()
