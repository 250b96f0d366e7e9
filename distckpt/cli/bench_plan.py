"""`distckpt bench plan`: simulates what agreement and planning cost with many ranks, without MPI."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distckpt.bench.scale.simulation import Cost
    from distckpt.bench.scale.virtual import Job

_WIDTH = 150
_SMALLEST, _FACTOR = 16, 4


def plan(
    ranks: Annotated[int, typer.Option(min=2, help="Virtual ranks.")] = 16384,
    variables: Annotated[int, typer.Option(min=40, help="Tensors over all ranks, optimizer state included.")] = 1000,
    layout: Annotated[str, typer.Option(help="fsdp, hsdp, tp or pp.")] = "fsdp",
    growth: Annotated[bool, typer.Option(help="Also fewer ranks, from 16 on.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the growth; needs matplotlib.")] = None,
) -> None:
    """Simulate a first save, an unchanged save and a restore on half the ranks, in one process, without MPI.

    The merge, the plans and the messages are those of real jobs; no data is written. 16,384 ranks with 1,000 variables
    take two to three minutes and 4 GiB of memory, all smaller sizes included.
    """
    # Torch takes seconds to import, and other commands do not need it.
    from rich.console import Console

    from distckpt.bench.scale.report import describe_growth, make_table, plot
    from distckpt.bench.scale.virtual import LAYOUTS, Job

    if layout not in LAYOUTS:
        raise typer.BadParameter(f"expected one of {', '.join(LAYOUTS)}. Got {layout!r}.", param_hint="--layout")
    if plot_path is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install 'distckpt[report]'.", param_hint="--plot")
    for option, path in (("--json", json_path), ("--plot", plot_path)):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path}: its directory does not exist.", param_hint=option)
    jobs = [Job(count, variables, layout) for count in (_sizes(ranks) if growth else [ranks])]
    costs = list(_simulate(jobs))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        plot(costs, plot_path)
    Console(width=_WIDTH).print(make_table(costs))
    if len(costs) > 1:
        typer.echo(describe_growth(costs))


def _sizes(ranks: int) -> list[int]:
    """Numbers of ranks to simulate: from 16 on, each 4 times the one before, up to and with `ranks`."""
    sizes: list[int] = []
    while (size := _SMALLEST * _FACTOR ** len(sizes)) < ranks:
        sizes.append(size)
    return [*sizes, ranks]


def _simulate(jobs: list[Job]) -> Iterator[Cost]:
    """Simulate each job in a process of its own, so that memory of earlier ones does not count."""
    from distckpt.bench.scale.simulation import simulate

    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for job in jobs:
            yield pool.submit(simulate, job, partial(_announce, job, start)).result()


def _announce(job: Job, start: float, step: str) -> None:
    """Print the step that begins, and the seconds since the start; the clock is the same in all processes."""
    typer.echo(f"{time.monotonic() - start:5.0f} s  {job.layout}, {job.ranks} ranks: {step}", err=True)
