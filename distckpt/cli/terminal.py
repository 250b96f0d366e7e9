"""Output of the commands, to a terminal, a pipe or a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterator, Sequence

from rich.console import Console
from rich.text import Text

#: Columns if the output is not a terminal, as rich would wrap and cut lines at 80.
_FILE_WIDTH = 1000


def console() -> Console:
    """A console on stdout, as wide as the terminal, or else wide enough for every line of a table or tree."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None if it was closed
    return Console(highlight=False, soft_wrap=True, width=None if is_terminal else _FILE_WIDTH)


def print_any_text() -> None:
    """Make stdout escape characters that its encoding lacks, since file names may have any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in {"strict", "surrogateescape"}:
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Escape characters of a text that would act on the terminal, so that it can be printed in one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_error(error: BaseException) -> None:
    """Print to stderr why a command, or a part of it, failed."""
    lines = (printable(line) for line in f"distckpt: {error}".split("\n"))
    print("\n".join(lines), file=sys.stderr)


def table_lines(rows: Sequence[Sequence[Text]], right: Collection[int]) -> Iterator[Text]:
    """The lines of a table, one for each row, with two spaces between columns. A narrow terminal wraps them.

    Args:
        rows: The cells, the same number in each row.
        right: Indices of the columns that are aligned to the right.
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
