"""A whole run: sets up the process group and a directory, and runs the cases one by one."""

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
    """The outcome of a run.

    Attributes:
        rank: This rank.
        size: Number of ranks.
        results: The measured values, the same on all ranks.
        missing: For each name that could not be measured: the reason; the same on all ranks.
    """

    rank: int
    size: int
    results: tuple[Samples, ...]
    missing: dict[str, str]


def run_session(
    setup: Setup, directory: Path, announce: Callable[[str], None], show: Callable[[Sequence[Samples]], None]
) -> Outcome:
    """Measure all cases of a setup. Collective over MPI's COMM_WORLD.

    Args:
        setup: The setup of the run.
        directory: Directory to write to, made if missing; all files written are deleted at the end.
        announce: Called on rank 0 with the name of each case when it begins.
        show: Called on rank 0 with the measured values of each case when it ends.

    Returns:
        The outcome of the run.

    Raises:
        CollectiveError: The directory, the disk or distckpt failed on a rank. Rivals that fail are left out.
    """
    init_process_group(backend="gloo")
    try:
        # Gloo, as ranks exchange data in host memory, and NCCL would refuse two ranks on one GPU.
        mesh = init_device_mesh(setup.device, (dist.get_world_size(),))
        missing = find_missing(setup)
        there = replace(setup, competitors=tuple(name for name in setup.competitors if name not in missing))
        own = gather(agreed("make the directory", make_directory, there, directory))[0]
        bench = Bench(there, mesh, Path(own))
        results = _run_cases(bench, announce, show)
        return Outcome(dist.get_rank(), dist.get_world_size(), tuple(results), missing | bench.failed)
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
    """Make a new directory for the run, on rank 0. Local.

    Args:
        setup: The setup of the run, which determines the space needed.
        directory: The parent directory, made if missing.

    Returns:
        Path of the new directory; an empty string on ranks other than 0.

    Raises:
        OSError: The directory cannot be made, or there is too little space.
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
