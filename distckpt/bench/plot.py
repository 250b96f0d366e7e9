"""Plot of the results of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distckpt.bench.report import Row

_WIDTH = 8.0
_BAR = 0.32
_FRAME = 0.9


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per case: medians as bars, smallest and largest values as whiskers. Local.

    Args:
        rows: The rows of all cases.
        path: Path of the picture; its suffix, such as ".png", selects the format.

    Raises:
        OSError: The picture cannot be written.
    """
    panels = [[row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)]
    heights = [_FRAME + _BAR * len(panel) for panel in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for each, panel in zip(axes[:, 0], panels, strict=True):
        _draw(each, panel)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, rows: Sequence[Row]) -> None:
    medians = [row.median for row in rows]
    below = [row.median - row.minimum for row in rows]
    above = [row.maximum - row.median for row in rows]
    colours = ["C0" if row.name.startswith("distckpt") else "0.7" for row in rows]
    bars = axes.barh([row.name for row in rows], medians, xerr=(below, above), color=colours, capsize=3)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0].unit)
    axes.set_title(rows[0].case, loc="left")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
