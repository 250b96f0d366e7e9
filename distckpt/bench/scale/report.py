"""Report of simulations, as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from distckpt.bench.scale.simulation import Cost

_GIB, _MIB, _KIB = 2**30, 2**20, 2**10


def make_table(costs: Sequence[Cost]) -> Table:
    """Make a table with one row for each number of ranks.

    Args:
        costs: Costs for one layout and number of variables; at least one.
    """
    title = f"{costs[0].layout}, {costs[0].variables} variables"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for column in _columns(costs[0]):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(*_columns(cost).values())
    return table


def describe_growth(costs: Sequence[Cost]) -> str:
    """One line about the growth of a first save's cost, from the two largest sizes; empty for a single size.

    Args:
        costs: Costs for one layout and number of variables, by ascending number of ranks.
    """
    if len(costs) < 2:
        return ""
    before, after = costs[-2:]
    scale = math.log(after.ranks / before.ranks)
    time = math.log(after.merge_seconds / before.merge_seconds) / scale
    memory = math.log(max(after.merge_nbytes, 1) / max(before.merge_nbytes, 1)) / scale
    return (
        f"From {before.ranks} to {after.ranks} ranks the time of a first save grows as ranks ^ {time:.2f}, "
        f"its memory as ranks ^ {memory:.2f}."
    )


def _columns(cost: Cost) -> dict[str, str]:
    """Cells by heading. Byte counts are per rank, except the memory of rank 0 and the manifest."""
    return {
        "ranks": f"{cost.ranks}",
        "shards": f"{cost.shards}",
        "first save\nmerge, plan s": f"{cost.merge_seconds:.2f}",
        "rank 0\nGiB": f"{cost.merge_nbytes / _GIB:.2f}",
        "out\nKiB": f"{cost.sent_nbytes / _KIB:.1f}",
        "in\nKiB": f"{cost.received_nbytes / _KIB:.1f}",
        "unchanged\nbytes": f"{cost.unchanged_nbytes:.0f}",
        "arrival\ns": f"{cost.unchanged_seconds:.4f}",
        "restore on\nranks": f"{cost.restore_ranks}",
        "manifest\nMiB": f"{cost.manifest_nbytes / _MIB:.2f}",
        "in\nMiB": f"{cost.broadcast_nbytes / _MIB:.2f}",
        "rank 0\ncheck s": f"{cost.open_seconds:.2f}",
        "a rank\nplan s": f"{cost.plan_seconds:.2f}",
        "a rank\nMiB": f"{cost.plan_nbytes / _MIB:.0f}",
    }


def plot(costs: Sequence[Cost], path: Path) -> None:
    """Draw the growth of times and bytes with the ranks.

    Args:
        costs: Costs for one layout and number of variables.
        path: File to write; its suffix selects the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    ranks = [cost.ranks for cost in costs]
    figure = Figure(figsize=(10, 5), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    times.plot(ranks, [cost.merge_seconds for cost in costs], "o-", label="first save: merge and plan, rank 0")
    times.plot(ranks, [cost.unchanged_seconds for cost in costs], "o-", label="unchanged save: arrival")
    times.plot(ranks, [cost.open_seconds for cost in costs], "o-", label="restore: check, rank 0")
    times.plot(ranks, [cost.plan_seconds for cost in costs], "o-", label="restore: plan, each rank")
    times.set_ylabel("seconds")
    sizes.plot(ranks, [cost.merge_nbytes for cost in costs], "o-", label="first save: memory of rank 0")
    sizes.plot(ranks, [cost.sent_nbytes for cost in costs], "o-", label="first save: sent per rank")
    sizes.plot(ranks, [cost.unchanged_nbytes for cost in costs], "o-", label="unchanged save: per rank")
    sizes.plot(ranks, [cost.broadcast_nbytes for cost in costs], "o-", label="restore: received per rank")
    sizes.set_ylabel("bytes")
    for axes in (times, sizes):
        axes.set(xscale="log", yscale="log", xlabel="ranks")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.suptitle(f"{costs[0].layout}, {costs[0].variables} variables")
    figure.savefig(path)
