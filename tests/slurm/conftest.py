"""Tests under a real Slurm, which is started once and always stopped; skipped where it is not installed."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.private_slurm import COMMANDS, PATH, Slurm, private_slurm


def pytest_configure() -> None:
    # `timeout` ends this process with SIGTERM; as an interrupt it lets the fixtures stop the daemons.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.timeout(230, method="signal"))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two idle nodes; stopped after the last test, with all jobs."""
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip(f"the name of this host, {socket.gethostname()}, does not resolve")
    with private_slurm() as cluster:
        yield cluster
