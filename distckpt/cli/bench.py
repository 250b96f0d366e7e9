"""`distckpt bench`: measures distckpt on this machine, against the raw disk and other checkpointers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distckpt.cli.bench_plan import plan

if TYPE_CHECKING:
    from distckpt.bench.samples import Samples
    from distckpt.bench.session import Outcome
    from distckpt.bench.setting import Setup

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_WIDTH = 130
_PICTURES = (".png", ".svg", ".pdf")
_CASES = "save, restore, cold, reshard, memory, overhead, async, overlap, replicated, columns, small, repeat."
_AGAINST = "Rivals, where installed: raw, dcp, torchsnapshot, torch.save, safetensors."


bench = typer.Typer(invoke_without_command=True)
bench.command("plan")(plan)


@bench.callback()
def measure(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Directory on the file system to measure.", show_default="required")
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes of the state over all ranks, as in 64MiB.")] = "1GiB",
    against: Annotated[str, typer.Option(help=_AGAINST)] = "raw,dcp,torchsnapshot,torch.save,safetensors",
    cases: Annotated[str, typer.Option(help=_CASES)] = "save,restore,reshard",
    device: Annotated[str, typer.Option(help="Where the state is: cpu or cuda, which ranks may share.")] = "cpu",
    layout: Annotated[str, typer.Option(help="How the state is split: rows or columns.")] = "rows",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each case.")] = 5,
    variables: Annotated[str, typer.Option(help="Numbers of 1 KiB variables, for overhead.")] = "1000,10000",
    small: Annotated[int, typer.Option(min=1, help="Number of 1 KiB variables, for small.")] = 20_000,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the model; else one that suits the size.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this file, a PNG, SVG or PDF.")
    ] = None,
) -> None:
    """Measure durable saves and warm restores of a GPT-like state. Run it under mpirun."""
    if context.invoked_subcommand is not None:
        return
    if directory is None:
        raise typer.BadParameter("expected a directory on the file system to measure. Got none.", param_hint="--dir")
    # Torch takes seconds to import, and other commands do not need it.
    from distckpt.bench.builders import COMPETITORS
    from distckpt.bench.cases import CASES
    from distckpt.bench.setting import DEVICES, LAYOUTS, Setup

    setup = Setup(
        nbytes=parse_size(size),
        hidden=hidden,
        device=parse_choice("--device", device, DEVICES),
        layout=parse_choice("--layout", layout, tuple(LAYOUTS)),
        variables=tuple(parse_number(word) for word in variables.split(",")),
        small=small,
        competitors=("distckpt", *parse_choices("--against", against, COMPETITORS[1:])),
        cases=parse_choices("--cases", cases, tuple(CASES)),
        rounds=rounds,
    )
    _require_device(device)
    _require_directory("--json", json_path)
    _require_directory("--plot", plot_path)
    _require_plotting(plot_path)
    outcome = _measure(setup, directory)
    if outcome.rank == 0:
        _report(outcome, setup, directory, json_path, plot_path)


def parse_size(text: str) -> int:
    """Parse a size such as "1GiB", "500 MB" or "4096".

    Args:
        text: A number, with or without a unit.

    Returns:
        The number of bytes.

    Raises:
        typer.BadParameter: The text is not a size, or the size is zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    nbytes = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if nbytes <= 0:
        raise typer.BadParameter(f"expected a size such as 64MiB or 1GiB. Got {text!r}.", param_hint="--size")
    return nbytes


def parse_number(text: str) -> int:
    """Parse a number of variables.

    Args:
        text: Its digits.

    Returns:
        The number.

    Raises:
        typer.BadParameter: The text is not an integer above zero.
    """
    if not text.strip().isdecimal() or int(text) == 0:
        raise typer.BadParameter(f"expected numbers such as 1000,10000. Got {text!r}.", param_hint="--variables")
    return int(text)


def parse_choices(option: str, text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Parse a list of choices, separated by commas; an empty text chooses none.

    Args:
        option: Name of the option, for the error.
        text: Value of the option.
        choices: The possible choices.

    Returns:
        The choices made, each once, in the user's order.

    Raises:
        typer.BadParameter: A word is not among the choices.
    """
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in choices]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(choices)}. Got {unknown[0]!r}.", param_hint=option)
    return words


def parse_choice(option: str, text: str, choices: tuple[str, ...]) -> str:
    """Check a single choice.

    Args:
        option: Name of the option, for the error.
        text: Value of the option.
        choices: The possible choices.

    Returns:
        The choice made.

    Raises:
        typer.BadParameter: The text is not among the choices.
    """
    if text not in choices:
        raise typer.BadParameter(f"expected {' or '.join(choices)}. Got {text!r}.", param_hint=option)
    return text


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA device, or torch none to use it.", param_hint="--device")


def _require_directory(option: str, path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: its directory does not exist.", param_hint=option)


def _require_plotting(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise typer.BadParameter(
            f"expected a name that ends in {', '.join(_PICTURES)}. Got {path}.", param_hint="--plot"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("it needs matplotlib: pip install 'distckpt[report]'.", param_hint="--plot")


def _measure(setup: Setup, directory: Path) -> Outcome:
    from distckpt.bench.session import run_session
    from distckpt.errors import CheckpointError

    try:
        return run_session(setup, directory, _announce, _show)
    except CheckpointError:
        raise
    except Exception:
        # The other ranks wait for this one, and MPI would wait for them at exit. Exit at once: the launcher ends them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _announce(case: str) -> None:
    typer.echo(f"measuring: {case}", err=True)


def _show(measured: Sequence[Samples]) -> None:
    """Print the tables of a case as soon as it ends, since later cases take long, and may fail."""
    from rich.console import Console

    from distckpt.bench.report import make_rows, make_tables

    # mpirun gives every rank a terminal of its own, whose colours and width are not those of the user's.
    console = Console(force_terminal=False, width=_WIDTH)
    for table in make_tables(make_rows(measured)):
        console.print(table)
    sys.stdout.flush()


def _report(outcome: Outcome, setup: Setup, directory: Path, json_path: Path | None, plot_path: Path | None) -> None:
    from distckpt.bench.report import describe_missing, make_document, make_rows

    rows = make_rows(outcome.results)
    if json_path is not None:
        document = make_document(rows, setup, outcome.size, directory, outcome.missing)
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        from distckpt.bench.plot import plot_rows

        plot_rows(rows, plot_path)
    if outcome.missing:
        typer.echo(describe_missing(outcome.missing))
