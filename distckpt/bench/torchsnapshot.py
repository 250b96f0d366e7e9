"""The rival torchsnapshot: it batches writes of small tensors and saves in the background, but flushes no files."""

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
    """Saves each rank's shards as ordinary tensors. Restores only onto the same ranks and shards.

    Of a replicated state, which is declared to it as replicated, each rank writes a part.
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
    """`Snapshot.async_take`, which returns when the tensors have been copied."""

    def __init__(self, state: State) -> None:
        super().__init__(_NAME, state)

    def start(self, stem: Path) -> TorchsnapshotPending:
        """Start a snapshot."""
        snapshot = Snapshot.async_take(str(stem), _app_state(self.state), replicated=_replicated(self.state))
        return TorchsnapshotPending(snapshot, stem)


class TorchsnapshotPending:
    """A save in progress, with a thread that waits for it and flushes its files."""

    def __init__(self, snapshot: PendingSnapshot, path: Path) -> None:
        self._snapshot = snapshot
        self._path = path
        self._flushed = threading.Thread(target=self._finish)
        self._error: BaseException | None = None
        self._flushed.start()

    def wait_staged(self) -> None:
        """Do nothing: the tensors may change as soon as `start` has returned."""

    def is_done(self) -> bool:
        """Whether the save of this rank has ended. Local."""
        return not self._flushed.is_alive()

    def result(self) -> Path:
        """Wait until the snapshot is complete and flushed."""
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
    """Flush this rank's share of the files, whichever rank wrote them, and all directories. Local."""
    rank, size = dist.get_rank(), dist.get_world_size()
    flush_files(files_of(stem)[rank::size])
    for directory, _, _ in os.walk(stem):
        flush_directory(Path(directory))
