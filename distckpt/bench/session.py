"""A whole run: process group, directory, the cases one after the other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distckpt.bench.cases import run_case
from distckpt.bench.rivals import find_missing
from distckpt.bench.runner import agreed, gather
from distckpt.bench.samples import Samples
from distckpt.bench.setting import Bench, Setup
from distckpt.cluster.process_group import init_process_group

_SPARE = 64 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found, and who asks.

    Attributes:
        rank: This rank.
        size: Ranks of the job.
        results: What was measured, the same on all ranks.
        missing: What could not be measured, and why; the same on all ranks.
    """

    rank: int
    size: int
    results: tuple[Samples, ...]
    missing: dict[str, str]


def run_session(
    setup: Setup, directory: Path, announce: Callable[[str], None], show: Callable[[Sequence[Samples]], None]
) -> Outcome:
    """Measure everything that was asked for. Collective over MPI's COMM_WORLD.

    Args:
        setup: What to measure.
        directory: Where to write, made if missing; everything written is deleted at the end.
        announce: Called on rank 0 with the name of each case as it begins.
        show: Called on rank 0 with what was measured in each case as it ends.

    Returns:
        What was measured.

    Raises:
        CollectiveError: Something failed on a rank: the directory, the disk, or a competitor.
    """
    init_process_group(backend="gloo")
    try:
        # What ranks tell each other is in host memory; NCCL would also refuse two ranks on one GPU.
        mesh = init_device_mesh(setup.device, (dist.get_world_size(),))
        missing = find_missing(setup)
        there = replace(setup, competitors=tuple(name for name in setup.competitors if name not in missing))
        own = gather(agreed("make the directory", make_directory, there, directory))[0]
        results = _run_cases(Bench(there, mesh, Path(own)), announce, show)
        return Outcome(dist.get_rank(), dist.get_world_size(), tuple(results), missing)
    finally:
        dist.destroy_process_group()


def _run_cases(
    bench: Bench, announce: Callable[[str], None], show: Callable[[Sequence[Samples]], None]
) -> list[Samples]:
    results = []
    try:
        for case in bench.setup.cases:
            if dist.get_rank() == 0:
                announce(case)
            measured = run_case(bench, case)
            if dist.get_rank() == 0:
                show(measured)
            results += measured
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(bench.directory, ignore_errors=True)
    return results


def make_directory(setup: Setup, directory: Path) -> str:
    """Make a directory of our own, on rank 0. Local.

    Args:
        setup: What is going to be written there.
        directory: Where, made if missing.

    Returns:
        The new directory; on other ranks than 0 an empty text.

    Raises:
        OSError: It cannot be made, or there is too little space.
    """
    if dist.get_rank() != 0:
        return ""
    directory.mkdir(parents=True, exist_ok=True)
    # Restores keep one file of each competitor.
    needed = setup.nbytes * (1 + len(setup.competitors)) + _SPARE
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    if free < needed:
        raise OSError(f"{directory}: expected {needed >> 20} MiB free. Got {free >> 20}. Choose a smaller size.")
    return tempfile.mkdtemp(prefix="distckpt-bench-", dir=directory)
