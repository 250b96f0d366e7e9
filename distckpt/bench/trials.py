"""Trials of competitors: save and delete, or restore."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from distckpt.bench.competitor import Competitor
from distckpt.bench.runner import leads_its_node, settle_disks
from distckpt.bench.state import State

_READ_STEP = 16 << 20
_PAGE = mmap.PAGESIZE

#: `Trial.kind` of saves by a competitor that has not saved before.
FIRST = "first save"


class SaveTrial:
    """Save under a new name, with the same competitor in all rounds; deletes the file afterwards.

    Attributes:
        name: Name in the report.
        kind: Distinguishes it from the other saves of its case.
        is_rival: As in `Competitor`.
    """

    def __init__(self, competitor: Competitor, directory: Path, kind: str = "") -> None:
        self.name = called(competitor.name, kind)
        self.kind = kind
        self.is_rival = competitor.is_rival
        self._competitor = competitor
        self._directory = directory
        self._count = 0
        self._path = directory

    def prepare(self) -> None:
        """Change the values as training would, and let the disk come to rest."""
        self._count += 1
        self._competitor.state.advance()
        settle_disks()
        make_resident(self._competitor.state.local_nbytes)

    def run(self) -> None:
        """Save the state."""
        self._path = self._competitor.save(self._directory / f"{self.name.replace(' ', '-')}-{self._count}")

    def clean(self) -> None:
        """Delete the checkpoint."""
        delete(self._path)


class FirstSaveTrial(SaveTrial):
    """Save with a new competitor each time, which has no caches from earlier saves."""

    def __init__(self, build: Callable[[State], Competitor], state: State, directory: Path) -> None:
        super().__init__(build(state), directory, FIRST)
        self._build = build

    def prepare(self) -> None:
        """Prepare as `SaveTrial`, and make a new competitor."""
        super().prepare()
        self._competitor = self._build(self._competitor.state)


class RestoreTrial:
    """Restore from a file that the page cache holds.

    Attributes:
        name: Name in the report.
        kind: Distinguishes it from the other restores of its case.
        is_rival: As in `Competitor`.
        competitor: The competitor that restores.
        path: The file or directory that its `save` returned.
    """

    def __init__(self, competitor: Competitor, path: Path, kind: str = "") -> None:
        self.name = called(competitor.name, kind)
        self.kind = kind
        self.is_rival = competitor.is_rival
        self.competitor = competitor
        self.path = path

    def prepare(self) -> None:
        """Read the file on rank 0, in case the page cache does not hold it any more."""
        if dist.get_rank() == 0:
            _read_through(self.path)
        make_resident(self.competitor.state.local_nbytes)

    def run(self) -> None:
        """Restore the state."""
        self.competitor.restore(self.path)

    def clean(self) -> None:
        """Do nothing."""


class ColdRestoreTrial(RestoreTrial):
    """Restore from a file of which the page cache holds nothing."""

    def prepare(self) -> None:
        """Drop the file from the page cache of every node."""
        make_resident(self.competitor.state.local_nbytes)
        settle_disks()
        if leads_its_node():
            _forget(self.path)


def called(name: str, kind: str) -> str:
    """Name in the report of a trial, from the competitor's name and the kind of the trial."""
    return f"{name}, {kind}" if kind else name


def check_restore(trial: RestoreTrial) -> None:
    """Scramble the state, restore it, and compare every bit with the saved values.

    Args:
        trial: A trial whose state was saved with the values of `State.fill`.

    Raises:
        ValueError: Some values differ on this rank.
    """
    trial.competitor.state.scramble()
    trial.run()
    trial.competitor.show()
    wrong = trial.competitor.state.wrong()
    if wrong:
        raise ValueError(f"{len(wrong)} variables of {trial.path} were restored wrongly, first {wrong[0]!r}.")


def make_resident(nbytes: int) -> None:
    """Touch free memory, so that the next run gets it at full speed. Collective over the process group.

    Many virtual machines give free memory back to their host after two seconds. Getting it again takes seconds per GiB,
    at random, and only for competitors that write through the page cache.

    Args:
        nbytes: Bytes that this rank is going to use; a quarter is added.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    nbytes = max(_PAGE, min(nbytes * 5 // 4, free // (2 * dist.get_world_size())))
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        # Freed large pages go back to the pool that the page cache allocates from; small ones stay with a core.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::_PAGE] = bytes(-(-nbytes // _PAGE))
        # Wait, or another rank would only get memory that this one has already given back.
        dist.barrier()


def delete(path: Path) -> None:
    """Delete a file or a directory on rank 0, after a barrier. Collective over the process group."""
    dist.barrier()
    if dist.get_rank() != 0:
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below a directory, sorted."""
    return [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else [path]


def _forget(path: Path) -> None:
    """Drop a file, or all files of a directory, from the page cache. They must have been written to disk."""
    for each in files_of(path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_through(path: Path) -> None:
    """Read a file, or all files of a directory, into the page cache."""
    buffer = bytearray(_READ_STEP)
    for each in files_of(path):
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
