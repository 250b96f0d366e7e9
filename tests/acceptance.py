"""Reads tests/ACCEPTANCE.md: which test shows which of TensorFlow's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
#: In the column "ranks": on one rank without MPI, and on 2 and 4 ranks.
ANY_RANKS = "1-4"

_ROW = re.compile(r"\| (\d+) \| (.*?) \| (.*?) \| (.*?) ?\|")
_TEST = re.compile(r"[\w/]+\.py::\w+")


@dataclass(frozen=True, slots=True)
class Row:
    """One of TensorFlow's tests.

    Attributes:
        number: From 1.
        name: In TensorFlow.
        text: What shows it, or why it does not apply.
        tests: (file below tests/, function) of those that the text names.
        any_ranks: They run on 1 rank, and those in unit/ on 2 and 4 ranks, too.
    """

    number: int
    name: str
    text: str
    tests: tuple[tuple[str, str], ...]
    any_ranks: bool


def rows() -> list[Row]:
    """All rows, in order."""
    found = []
    for line in (TESTS / "ACCEPTANCE.md").read_text().splitlines():
        match = _ROW.fullmatch(line)
        if match:
            number, name, text, ranks = match.groups()
            tests = tuple((file, test) for file, _, test in (t.partition("::") for t in _TEST.findall(text)))
            found.append(Row(int(number), name, text, tests, ranks == ANY_RANKS))
    return found
