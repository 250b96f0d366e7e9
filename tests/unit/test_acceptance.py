"""tests/ACCEPTANCE.md is whole and true: every row is there, every test it names exists."""

from __future__ import annotations

import ast
import functools

import pytest

from tests.acceptance import TESTS, Row, rows

_ROWS = rows()


@functools.cache
def _functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_row_is_there_once() -> None:
    assert [row.number for row in _ROWS] == list(range(1, 204))
    assert all(row.name for row in _ROWS)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row.number)
def test_a_row_names_tests_or_a_reason(row: Row) -> None:
    if not row.tests:
        assert row.text.endswith("."), "a sentence"
        assert not row.any_ranks
    for file, test in row.tests:
        assert (TESTS / file).is_file(), file
        assert test in _functions(file), f"{file}::{test}"


def test_most_rows_are_shown_on_any_number_of_ranks() -> None:
    """Rows about one process alone (readers, files, plans) and those that state their ranks are fewer."""
    shown = [row for row in _ROWS if row.tests]
    assert len([row for row in shown if row.any_ranks]) > 2 * len([row for row in shown if not row.any_ranks])
