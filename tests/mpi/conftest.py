"""Tests under mpirun: fixtures, and a harness that keeps the ranks in step and names the rank that failed.

A test that fails on one rank leaves the others in a collective call. So after each test the ranks exchange verdicts: a
failure anywhere is a failure everywhere, and a rank that failed while others do not come shows its failure and ends the
job.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import distckpt.restoring.restorer
from distckpt.source import Source

_FAILURE = pytest.StashKey[str]()
#: Seconds that a rank which failed waits for the others to end the same test.
_PATIENCE = 30.0


def _world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


@cache
def _harness_comm() -> Any:
    """A communicator that no test speaks on. Collective over COMM_WORLD at the first call."""
    return _world().Dup()


def _stated_size(item: pytest.Item) -> int | None:
    sizes = [mark.kwargs["min_size"] for mark in item.iter_markers("mpi") if "min_size" in mark.kwargs]
    return max(sizes, default=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stated-size-only",
        action="store_true",
        help="MPI tests: run those only whose min_size is the number of ranks.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--stated-size-only", default=False):
        return
    size = _world().size
    left_out = [item for item in items if _stated_size(item) != size]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if _stated_size(item) == size]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash.setdefault(_FAILURE, report.longreprtext)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    failed = _failed_ranks(item) if item.config.getoption("--with-mpi") else []
    result = yield
    if failed and _FAILURE not in item.stash:
        pytest.fail(f"this test failed on rank(s) {failed}, not on this one", pytrace=False)
    return result


def _failed_ranks(item: pytest.Item) -> list[int]:
    """The ranks on which the test failed. Collective over COMM_WORLD; if others do not come, a failed rank aborts."""
    comm = _harness_comm()
    verdicts = bytearray(comm.size)
    request = comm.Iallgather(bytearray([_FAILURE in item.stash]), verdicts)
    deadline = time.monotonic() + _PATIENCE
    while not request.Test():
        if _FAILURE in item.stash and time.monotonic() > deadline:
            _end_job(item)
        time.sleep(0.001)
    return [rank for rank, failed in enumerate(verdicts) if failed]


def _end_job(item: pytest.Item) -> None:
    comm = _harness_comm()
    terminal = item.config.get_terminal_writer()
    terminal.line(
        f"\n{item.nodeid} failed on rank {comm.rank}, and the other ranks wait for it:\n{item.stash[_FAILURE]}"
    )
    terminal.flush()
    comm.Abort(1)


@pytest.fixture
def comm() -> Iterator[Any]:
    """A duplicate of COMM_WORLD, freed after the test."""
    duplicate = _world().Dup()
    yield duplicate
    _free(duplicate)


def _free(comm: Any) -> None:
    # A test may have freed it itself; a null communicator is false.
    if comm:
        comm.Free()


@pytest.fixture
def mpi_dir() -> Iterator[Path]:
    """An empty directory, the same on all ranks; removed after the test."""
    world = _world()
    path = Path(world.bcast(tempfile.mkdtemp(prefix="distckpt-test-") if world.rank == 0 else None))
    yield path
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def agree() -> Callable[..., None]:
    """`agree(condition, message="")`: an assertion that fails on all ranks where it fails on one."""
    return _agree


def _agree(condition: object, message: str = "") -> None:
    verdicts = _world().allgather("" if condition else message or "not so")
    failures = {rank: text for rank, text in enumerate(verdicts) if text}
    assert not failures, f"by rank: {failures}"


class SubComms:
    """`subcomm(size)`: a communicator of the first `size` ranks; None on the others. Collective over COMM_WORLD."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def __call__(self, size: int) -> Any:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        assert size <= world.size, f"subcomm({size}) on {world.size} ranks: mark the test with mpi(min_size={size})"
        made = world.Split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
        if made == MPI.COMM_NULL:
            return None
        self._made.append(made)
        return made

    def free(self) -> None:
        """Frees all communicators made."""
        for comm in self._made:
            _free(comm)


@pytest.fixture
def subcomm() -> Iterator[SubComms]:
    """Communicators of the first n ranks, so that one run on 4 ranks tests 1, 2, 3 and 4."""
    comms = SubComms()
    yield comms
    comms.free()


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """torch's process group with the ranks of MPI, one for all tests of a module."""
    import torch.distributed as dist

    from distckpt.cluster.process_group import init_process_group

    init_process_group(_world(), "gloo")
    yield
    _world().Barrier()
    dist.destroy_process_group()
    _forget_meshes()


def _forget_meshes() -> None:
    """torch remembers meshes with their groups, and a mesh of the same ranks in a later group is equal to it."""
    from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """All files opened by restores of this test; they count what they read."""
    opened: list[Source] = []
    open_source = distckpt.restoring.restorer.open_source

    def record(*args: Any) -> Source:
        opened.append(open_source(*args))
        return opened[-1]

    monkeypatch.setattr(distckpt.restoring.restorer, "open_source", record)
    return opened
