"""Where commands print: a terminal, a pipe or a file."""

from __future__ import annotations

import io
import sys

from rich.console import Console

#: Columns when the output is no terminal: rich would wrap and cut lines at 80.
_FILE_WIDTH = 1000


def console() -> Console:
    """A console on stdout, as wide as the terminal, or wide enough for every line of a table or tree."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def print_any_text() -> None:
    """Let stdout print, escaped, what its encoding lacks: names of files may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
