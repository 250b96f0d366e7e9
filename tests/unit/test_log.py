"""The logger: handlers and filters of the user's that raise separate no rank from the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt import Checkpoint

LOGGER = logging.getLogger("distckpt")


class Full(logging.Handler):
    """A handler that cannot take anything."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(f"no room for a record of {record.filename}")


class Choosy(logging.Filter):
    """A filter that cannot decide."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError(f"no opinion on a record of {record.filename}")


@pytest.fixture(params=["handler", "filter"])
def _broken(request: pytest.FixtureRequest) -> Iterator[None]:
    """A logger that raises whatever it is told."""
    level, handler, choosy = LOGGER.level, Full(), Choosy()
    LOGGER.setLevel(logging.INFO)
    if request.param == "handler":
        LOGGER.addHandler(handler)
    else:
        LOGGER.addFilter(choosy)
    yield
    LOGGER.removeHandler(handler)
    LOGGER.removeFilter(choosy)
    LOGGER.setLevel(level)


@pytest.mark.usefixtures("_broken")
def test_a_logger_that_raises_stops_no_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(step=1)
    path = checkpoint.save(tmp_path / "ckpt")
    assert checkpoint.save_counter == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: no " in shown
    assert "a record of draft.py" in shown
    assert checkpoint.save_async(tmp_path / "ckpt").result(timeout=20).endswith("ckpt-2.h5")
    twin = Checkpoint(step=0)
    twin.restore(path).assert_consumed()
    assert twin.step == 1
    twin.restore(None)
    assert "a record of restorer.py" in capsys.readouterr().err
