"""Writes the file of this format version: `mpirun -n 2 python tests/data/make.py`, once when the version changes."""

from __future__ import annotations

from pathlib import Path

import torch
from mpi4py import MPI

from distckpt import Checkpoint, PerRank, ShardedVariable
from distckpt.layout.records import FORMAT_VERSION


def program(comm: MPI.Intracomm | None, value: float) -> Checkpoint:
    """The objects, filled with a value: what the test restores into."""
    rank, size = (comm.rank, comm.size) if comm is not None else (0, 1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    optimizer = torch.optim.Adam(model.parameters(), lr=value / 8)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    rows = ShardedVariable(torch.full((4 // size, 5), value), (4, 5), (rank * (4 // size), 0))
    return Checkpoint(
        comm=comm,
        model=model,
        optimizer=optimizer,
        rows=rows,
        half=torch.full((3,), value, dtype=torch.bfloat16),
        step=int(value),
        names={"a.b/c": [value, None], 7: b"bytes"},
        seen=PerRank(int(value) + rank),
    )


if __name__ == "__main__":
    program(MPI.COMM_WORLD, 2.0).write(Path(__file__).parent / f"format-{FORMAT_VERSION}")
