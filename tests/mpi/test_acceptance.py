"""The tests of tests/ACCEPTANCE.md that hold on any number of ranks, on more than one: every rank does the same.

They are those of tests/unit, with one directory for all ranks.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import rows
from tests.unit.conftest import keys_of, manifest_of, open_files, seeded, without_collector  # noqa: F401  # fixtures of those tests

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*nothing but the save counter matched"),
]


def _take_tests() -> None:
    named = dict.fromkeys(test for row in rows() if row.any_ranks for test in row.tests)
    for file, name in named:
        if file.startswith("unit/"):
            module = importlib.import_module(f"tests.unit.{Path(file).stem}")
            globals()[name] = getattr(module, name)


_take_tests()


@pytest.fixture
def tmp_path(mpi_dir: Path) -> Path:
    """The same directory on all ranks."""
    return mpi_dir


@pytest.fixture
def path(mpi_dir: Path) -> str:
    """Where a test writes its file."""
    return str(mpi_dir / "state")


@contextmanager
def _no_warnings(*_: Any, **__: Any) -> Iterator[list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield []


@pytest.fixture(autouse=True)
def _warned_on_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test expects a warning, the other ranks get none."""
    if MPI.COMM_WORLD.rank:
        monkeypatch.setattr(pytest, "warns", _no_warnings)
