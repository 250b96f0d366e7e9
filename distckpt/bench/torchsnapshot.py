"""The rival torchsnapshot: batched writes of small tensors, saves in the background; it flushes nothing itself."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch.distributed as dist
from torchsnapshot import Snapshot, StateDict
from torchsnapshot.snapshot import PendingSnapshot

from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.per_rank import flush_files, shards_by_name
from distckpt.bench.raw import flush_directory
from distckpt.bench.state import State
from distckpt.bench.trials import files_of

_NAME = "torchsnapshot"


class Torchsnapshot(Competitor):
    """Each rank's shards as its own tensors. Restores onto the same ranks and shards only.

    Of a state that all ranks hold, each writes a part, as it says that everything is replicated.
    """

    def __init__(self, state: State) -> None:
        super().__init__(_NAME, state)

    def save(self, stem: Path) -> Path:
        """Take a snapshot, and flush it."""
        Snapshot.take(str(stem), _app_state(self.state), replicated=_replicated(self.state))
        _flush(stem)
        return stem

    def restore(self, path: Path) -> None:
        """Load in place."""
        Snapshot(str(path)).restore(_app_state(self.state))


class TorchsnapshotAsync(BackgroundCompetitor):
    """`Snapshot.async_take`; training goes on when the tensors have been copied."""

    def __init__(self, state: State) -> None:
        super().__init__(_NAME, state)

    def start(self, stem: Path) -> TorchsnapshotPending:
        """Take a snapshot."""
        snapshot = Snapshot.async_take(str(stem), _app_state(self.state), replicated=_replicated(self.state))
        return TorchsnapshotPending(snapshot, stem)


class TorchsnapshotPending:
    """A save that goes on, with a thread that flushes what it wrote."""

    def __init__(self, snapshot: PendingSnapshot, path: Path) -> None:
        self._snapshot = snapshot
        self._path = path
        self._flushed = threading.Thread(target=self._finish)
        self._error: BaseException | None = None
        self._flushed.start()

    def wait_staged(self) -> None:
        """The tensors may change as soon as the save has begun."""

    def is_done(self) -> bool:
        """Whether this rank has ended. Local."""
        return not self._flushed.is_alive()

    def result(self) -> Path:
        """Wait for the snapshot."""
        self._flushed.join()
        if self._error is not None:
            raise self._error
        return self._path

    def _finish(self) -> None:
        try:
            self._snapshot.wait()
            _flush(self._path)
        except Exception as error:  # `result` raises it
            self._error = error


def _app_state(state: State) -> dict[str, StateDict]:
    return {"state": StateDict(**shards_by_name(state))}


def _replicated(state: State) -> list[str]:
    return ["**"] if state.is_replicated else []


def _flush(stem: Path) -> None:
    """Flush a share of the files, whoever wrote them: all ranks together flush all. Local."""
    rank, size = dist.get_rank(), dist.get_world_size()
    flush_files(files_of(stem)[rank::size])
    for directory, _, _ in os.walk(stem):
        flush_directory(Path(directory))
