"""The `distckpt` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

import typer

from distckpt.cli.terminal import print_any_text, print_error
from distckpt.errors import CheckpointError

#: Each is the name of a function, or of a group of commands, in `distckpt.cli.<name>`, imported only when needed.
COMMANDS = ("ls", "show", "verify", "doctor", "bench")


def build(commands: Iterable[str]) -> typer.Typer:
    """Make the command line with some of `COMMANDS`."""
    app = typer.Typer(
        name="distckpt",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    # With a callback the name of the command is needed on the command line even if there is only one command.
    app.callback()(distckpt)
    for name in commands:
        command = getattr(importlib.import_module(f"distckpt.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def distckpt() -> None:
    """Looks at checkpoints, and at the machine they are made on."""


def main() -> None:
    """Runs the command in sys.argv; errors of the checkpoint or the file system end in one message and status 1."""
    print_any_text()
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    try:
        build(asked or COMMANDS)()
    except (CheckpointError, OSError) as error:
        print_error(error)
        sys.exit(1)
