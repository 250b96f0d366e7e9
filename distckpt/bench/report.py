"""Report of a run: rows with medians and ratios, as tables and as JSON."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from distckpt.bench.cases import OVERHEAD
from distckpt.bench.samples import Samples
from distckpt.bench.setting import Setup
from distckpt.cluster.file_system import existing_parent, file_system_type

_PACKAGES = ("distckpt", "torch", "numpy", "h5py", "mpi4py", "safetensors", "torchsnapshot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One competitor in one case.

    Attributes:
        case: Name of the case.
        name: Name of the trial: the competitor and, after a comma, the kind of trial.
        kind: Distinguishes the trial from the usual ones of its case, such as "first save"; else empty.
        unit: Unit of the values: "s", "s lost" or "MiB".
        nbytes: Bytes of the state over all ranks.
        median: The median of the values.
        minimum: The smallest value.
        maximum: The largest value.
        values: All values, one per round.
        gigabytes_per_second: Bytes of the state divided by the median time.
        of_raw: Speed as a fraction of the raw limit, which is the fastest raw median.
        against_distckpt: Median as a multiple of distckpt's.
        best_dcp_against: Median of the fastest DCP setting in trials of the same kind, as a multiple of this one.
        beyond_raw: In the case "overhead", the median minus that of the raw limit.
    """

    case: str
    name: str
    kind: str
    unit: str
    nbytes: int
    median: float
    minimum: float
    maximum: float
    values: tuple[float, ...]
    gigabytes_per_second: float | None
    of_raw: float | None
    against_distckpt: float | None
    best_dcp_against: float | None
    beyond_raw: float | None


def make_rows(results: Sequence[Samples]) -> list[Row]:
    """Make rows with ratios; each ratio is between medians of one case.

    Args:
        results: The measured values of all cases.

    Returns:
        One row for each of the results, in their order.
    """
    return [_row(samples, [other for other in results if other.case == samples.case]) for samples in results]


def make_tables(rows: Sequence[Row]) -> list[Table]:
    """Make one table per case, for the terminal.

    Args:
        rows: The rows of all cases.

    Returns:
        The tables, in the order of the cases.
    """
    return [_table(case, [row for row in rows if row.case == case]) for case in dict.fromkeys(row.case for row in rows)]


def make_document(
    rows: Iterable[Row], setup: Setup, size: int, directory: Path, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Make a JSON document of a run: its environment, setup and results.

    Args:
        rows: The rows of all cases.
        setup: The setup of the run.
        size: Number of ranks.
        directory: The directory on the measured file system.
        missing: For each name that could not be measured: the reason.

    Returns:
        A document of plain values.
    """
    return {
        "environment": _environment(directory),
        "setup": {**asdict(setup), "ranks": size, "directory": str(directory)},
        "missing": dict(missing),
        "results": [asdict(row) for row in rows],
    }


def describe_missing(missing: Mapping[str, str]) -> str:
    """One line about competitors that could not be measured; empty without any.

    Args:
        missing: For each name that could not be measured: the reason.
    """
    names = ", ".join(f"{name} ({reason})" for name, reason in missing.items())
    return f"not measured here: {names}" if names else ""


def _row(samples: Samples, case: Sequence[Samples]) -> Row:
    raw = min((other.median for other in case if other.name.startswith("raw")), default=None)
    own = next((other.median for other in case if other.name == "distckpt"), None)
    best = min((other.median for other in case if _is_dcp(other) and other.kind == samples.kind), default=None)
    timed = samples.unit == "s"
    return Row(
        case=samples.case,
        name=samples.name,
        kind=samples.kind,
        unit=samples.unit,
        nbytes=samples.nbytes,
        median=samples.median,
        minimum=min(samples.values),
        maximum=max(samples.values),
        values=samples.values,
        gigabytes_per_second=samples.nbytes / samples.median / 1e9 if timed else None,
        of_raw=raw / samples.median if raw is not None else None,
        against_distckpt=samples.median / own if own is not None and own > 0 else None,
        best_dcp_against=best / samples.median if best is not None and samples.median > 0 else None,
        beyond_raw=samples.median - raw if raw is not None and samples.case.startswith(OVERHEAD) else None,
    )


def _is_dcp(samples: Samples) -> bool:
    return samples.name.startswith("DCP")


def _table(case: str, rows: Sequence[Row]) -> Table:
    """The table of one case, with the columns that have values in it."""
    title = f"{case}: {_size(rows[0].nbytes)}, {len(rows[0].values)} rounds"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    columns = {name: cells for name, cells in _columns(rows).items() if any(cells)}
    for name in columns:
        table.add_column(name, justify="right")
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(row.name, *cells)
    return table


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    unit = rows[0].unit
    digits = 1 if unit == "MiB" else 4
    return {
        f"median {unit}": [_number(row.median, digits) for row in rows],
        "min": [_number(row.minimum, digits) for row in rows],
        "max": [_number(row.maximum, digits) for row in rows],
        "GB/s": [_number(row.gigabytes_per_second, 2) for row in rows],
        "of raw limit": [_number(row.of_raw, 2) for row in rows],
        "beyond raw s": [_number(row.beyond_raw, 4) for row in rows],
        "this / distckpt": [_number(row.against_distckpt, 2) for row in rows],
        "best DCP / this": [_number(row.best_dcp_against, 2) for row in rows],
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.2f} GiB"


def _environment(directory: Path) -> dict[str, Any]:
    """Facts about rank 0's host on which the numbers depend."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_system": file_system_type(existing_parent(directory)),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
