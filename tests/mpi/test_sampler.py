"""`ElasticSampler` in a Checkpoint: saved on some ranks, restored on others, every sample once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distckpt
from distckpt import ElasticSampler

MPI = pytest.importorskip("mpi4py.MPI")
SAMPLES, BATCH = 60, 8


def train(comm: Any, sampler: ElasticSampler, steps: int) -> list[int]:
    """The samples of the next steps over all ranks, in order. Collective over the communicator."""
    seen = []
    for _, part in zip(range(steps), sampler, strict=False):
        seen += [index for parts in comm.allgather(part) for index in parts]
    return seen


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 3), (2, 1)])
def test_another_number_of_ranks_sees_the_rest_once(
    subcomm: Any, mpi_dir: Path, agree: Callable[..., None], before: int, after: int
) -> None:
    seen: list[int] = []
    for size, steps in ((before, 3), (after, 99)):
        comm = subcomm(size)
        if comm is not None:
            sampler = ElasticSampler(range(SAMPLES), BATCH, seed=size, comm=comm)
            checkpoint = distckpt.Checkpoint(sampler=sampler, comm=comm)
            if steps == 99:
                assert sampler.position == 0
                checkpoint.read(mpi_dir / "a").assert_consumed()
                assert sampler.position == 3 * BATCH
            seen += train(comm, sampler, steps)
            checkpoint.write(mpi_dir / ("b" if steps == 99 else "a"))
        MPI.COMM_WORLD.Barrier()
    agree(MPI.COMM_WORLD.rank != 0 or sorted(seen) == list(range(SAMPLES)), str(seen))
    whole = ElasticSampler(range(SAMPLES), BATCH, seed=before, rank=0, size=1)
    agree(MPI.COMM_WORLD.rank != 0 or seen == [index for batch in whole for index in batch])


@pytest.mark.mpi(min_size=2)
def test_ranks_at_different_positions_are_an_error_on_all(comm: Any, mpi_dir: Path) -> None:
    sampler = ElasticSampler(range(SAMPLES), BATCH, comm=comm)
    for _ in zip(range(1 + (comm.rank == 1)), sampler, strict=False):
        pass
    with pytest.raises(distckpt.LayoutError, match="sampler"):
        distckpt.Checkpoint(sampler=sampler, comm=comm).write(mpi_dir / "a")
