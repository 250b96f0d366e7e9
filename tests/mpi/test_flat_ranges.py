"""Flat ranges as ZeRO keeps them: any partition into any other, few boxes, no byte read twice, replicas compared."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from distckpt import Checkpoint, LayoutError, RestoreOptions, SaveOptions, ShardedVariable
from distckpt.restoring import restorer
from distckpt.source import Source
from distckpt.storage.hdf5 import open_checkpoint

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)
SHAPES = {"v": (13,), "m": (5, 7), "t": (3, 4, 5), "q": (2, 3, 2, 3), "thin": (1, 9, 1)}
#: Where the ranges of each rank end, as parts of the whole; empty ones in every place.
PARTITIONS = {
    1: [[1.0]],
    2: [[0.5, 1.0], [0.0, 1.0], [0.37, 1.0]],
    3: [[0.3, 0.31, 1.0], [0.5, 0.5, 1.0]],
    4: [[0.1, 0.45, 0.8, 1.0], [0.9, 0.9, 0.9, 1.0]],
}


def whole(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = SHAPES[name]
    return (torch.arange(math.prod(shape)) + len(name)).to(dtype).reshape(shape)


def ranges(comm: Any, ends: list[float], *, blank: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        bounds = [0, *(round(math.prod(shape) * end) for end in ends)]
        start, stop = bounds[comm.rank], bounds[comm.rank + 1]
        part = whole(name, dtype).view(-1)[start:stop].clone()
        made[name] = ShardedVariable.flat(torch.zeros_like(part) if blank else part, shape, start)
    return made


def test_every_partition_restores_into_every_other(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Source] = []
    open_source = restorer.open_source
    monkeypatch.setattr(restorer, "open_source", lambda *a: opened.append(open_source(*a)) or opened[-1])
    comms = {size: subcomm(size) for size in PARTITIONS}
    partitions = [(size, ends) for size, several in PARTITIONS.items() for ends in several]
    for number, (size, ends) in enumerate(partitions):
        if comms[size] is not None:
            path = Checkpoint(comm=comms[size], **ranges(comms[size], ends, blank=False)).write(
                mpi_dir / str(number), options=FAST
            )
            if comms[size].rank == 0:
                check_file(path)
    MPI.COMM_WORLD.Barrier()
    for size, ends in partitions:
        comm = comms[size]
        if comm is None:
            continue
        expected = ranges(comm, ends, blank=False)
        for number in range(len(partitions)):
            twin = ranges(comm, ends, blank=True)
            opened.clear()
            Checkpoint(comm=comm, **twin).read(mpi_dir / str(number)).assert_consumed()
            assert all(torch.equal(twin[name].tensor, expected[name].tensor) for name in SHAPES)
            assert sum(source.bytes_read for source in opened) == 4 * sum(v.tensor.numel() for v in twin.values())


def check_file(path: str) -> None:
    """The whole tensors are there, and no rank wrote one in more than 2 * ndim - 1 boxes."""
    with h5py.File(path, "r") as file:
        for name in SHAPES:
            assert torch.equal(torch.from_numpy(file[name][()]), whole(name))
    for variable in open_checkpoint(path).manifest.variables:
        written = Counter(shard.rank for shard in variable.shards)
        assert max(written.values()) <= max(1, 2 * len(variable.shape) - 1)
        assert all(a.offset < b.offset for a, b in pairwise(variable.shards))


def test_ranges_restore_from_blocks_and_replicas_and_with_another_dtype(comm: Any, mpi_dir: Path) -> None:
    rows = {name: shape[0] * comm.rank // 4 for name, shape in SHAPES.items()}
    stops = {name: shape[0] * (comm.rank + 1) // 4 for name, shape in SHAPES.items()}
    blocks = {
        name: ShardedVariable(whole(name)[rows[name] : stops[name]], shape, (rows[name], *[0] * (len(shape) - 1)))
        for name, shape in SHAPES.items()
    }
    files = [
        Checkpoint(comm=comm, **blocks).write(mpi_dir / "blocks", options=FAST),
        Checkpoint(comm=comm, **{name: whole(name) for name in SHAPES}).write(mpi_dir / "replicas", options=FAST),
    ]
    for path in files:
        twin = ranges(comm, [0.1, 0.45, 0.8, 1.0], blank=True, dtype=torch.float64)
        expected = ranges(comm, [0.1, 0.45, 0.8, 1.0], blank=False, dtype=torch.float64)
        Checkpoint(comm=comm, **twin).read(path, options=RestoreOptions(cast=True)).assert_consumed()
        assert all(torch.equal(twin[name].tensor, expected[name].tensor) for name in SHAPES)


def test_replicas_of_ranges_are_written_once_and_compared(comm: Any, mpi_dir: Path) -> None:
    """ZeRO in two groups, as under hybrid sharding: ranks 0 and 2 have the first half, 1 and 3 the second."""
    half = comm.rank % 2
    part = whole("t").view(-1)[30 * half : 30 * half + 30].clone()
    checkpoint = Checkpoint(comm=comm, t=ShardedVariable.flat(part, SHAPES["t"], 30 * half))
    path = checkpoint.write(mpi_dir / "saved", options=FAST)
    if comm.rank == 0:
        with h5py.File(path, "r") as file:
            assert torch.equal(torch.from_numpy(file["t"][()]), whole("t"))
        (variable,) = open_checkpoint(path).manifest.variables
        assert sum(math.prod(shard.shape) for shard in variable.shards) == 60
    if comm.rank == 3:
        part[7] += 1
    with pytest.raises(
        LayoutError, match=r"t: replicas of the box at offset .* differ.* rank 1\. Got others on rank 3"
    ):
        checkpoint.write(mpi_dir / "again", options=FAST)
    if comm.rank == 3:
        part[7] -= 1
    checkpoint.write(mpi_dir / "again", options=FAST)


def test_a_range_that_covers_all_is_a_replica_of_the_plain_tensor(comm: Any, mpi_dir: Path) -> None:
    full = whole("m")
    m = ShardedVariable.flat(full.view(-1), SHAPES["m"], 0) if comm.rank == 2 else full
    checkpoint = Checkpoint(comm=comm, m=m)
    checkpoint.write(mpi_dir / "saved", options=FAST)
    if comm.rank == 2:
        full[0, 0] += 1
    with pytest.raises(
        LayoutError, match=r"m: replicas differ. Expected the bytes of ranks 0-1, 3. Got others on rank 2"
    ):
        checkpoint.write(mpi_dir / "again", options=FAST)


def test_ranges_that_share_a_box_but_are_not_equal_are_refused(comm: Any, mpi_dir: Path) -> None:
    bounds = {0: (0, 14), 1: (7, 14), 2: (14, 35), 3: (35, 35)}[comm.rank]
    part = whole("m").view(-1)[slice(*bounds)].clone()
    with pytest.raises(LayoutError, match=r"m: the box .* on rank 0 and the box .* on rank 1 overlap"):
        Checkpoint(comm=comm, m=ShardedVariable.flat(part, SHAPES["m"], bounds[0])).write(mpi_dir / "saved")


def test_a_gap_between_ranges_is_refused(comm: Any, mpi_dir: Path) -> None:
    part = torch.ones(8 if comm.rank < 3 else 10)
    with pytest.raises(LayoutError, match=r"m: 1 of the elements of the global shape \(5, 7\) are on no rank"):
        Checkpoint(comm=comm, m=ShardedVariable.flat(part, (5, 7), 8 * comm.rank)).write(mpi_dir / "saved")
    assert list(mpi_dir.iterdir()) == []
