"""Where commands print: a terminal, a pipe or a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator, Sequence

from rich.console import Console
from rich.text import Text

#: Columns when the output is no terminal: rich would wrap and cut lines at 80.
_FILE_WIDTH = 1000


def console() -> Console:
    """A console on stdout, as wide as the terminal, or wide enough for every line of a table or tree."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None: it was closed
    return Console(highlight=False, soft_wrap=True, width=None if is_terminal else _FILE_WIDTH)


def print_any_text() -> None:
    """Let stdout print, escaped, what its encoding lacks: names of files may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in {"strict", "surrogateescape"}:
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A text for one line, whatever names are in it: characters that would act on the terminal are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(error: BaseException) -> None:
    """Print why a command, or a part of it, failed, to stderr."""
    lines = (printable(line) for line in f"distckpt: {error}".split("\n"))
    print("\n".join(lines), file=sys.stderr)


def table_lines(rows: Sequence[Sequence[Text]], right: Collection[int]) -> Iterator[Text]:
    """The lines of a table with two spaces between its columns: one for each row, which a narrow terminal wraps.

    Args:
        rows: Cells, equally many in each row.
        right: Columns that are aligned to the right.
    """
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = Text()
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell.cell_len)
            line.append(space if index in right else "").append_text(cell).append("" if index in right else space)
            line.append("  ")
        line.rstrip()
        yield line
