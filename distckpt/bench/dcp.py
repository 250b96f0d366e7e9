"""The rival torch brings: `torch.distributed.checkpoint`, with everything flushed and its fastest settings."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.state import State


class Dcp(Competitor):
    """torch.distributed.checkpoint (DCP) into one directory per checkpoint."""

    def __init__(self, state: State) -> None:
        super().__init__("DCP", state)

    def save(self, stem: Path) -> Path:
        """Save with `sync_files`, one file per rank and two writer threads."""
        save(dict(self.state.tensors), storage_writer=_writer(stem))
        return stem

    def restore(self, path: Path) -> None:
        """Load in place."""
        load(dict(self.state.tensors), storage_reader=FileSystemReader(path))


class DcpAsync(BackgroundCompetitor):
    """DCP's `async_save` with a thread.

    The copy that training waits for goes into buffers that are kept from save to save, which is several times faster
    here than what DCP makes by default. In the background it can only copy with its own `DefaultStager`.
    """

    def __init__(self, state: State, *, overlap: bool) -> None:
        """Make a process group of its own. Collective over the process group.

        Args:
            state: What is saved.
            overlap: Copy the state in the background, too.
        """
        super().__init__("DCP", state)
        self._stager = _background_stager() if overlap else _ReusingStager(cache_staged_state_dict=True)
        # Its thread communicates, while training does so through the group that all share.
        self._group = dist.new_group(backend="gloo")

    def start(self, stem: Path) -> DcpPending:
        """Save with the settings of `Dcp`."""
        going_on = async_save(
            dict(self.state.tensors),
            storage_writer=_writer(stem),
            async_stager=self._stager,
            process_group=self._group,
        )
        return DcpPending(stem, going_on)


class DcpPending:
    """A save that goes on."""

    def __init__(self, path: Path, going_on: Future[Any] | AsyncSaveResponse) -> None:
        self._path = path
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any]
        if isinstance(going_on, AsyncSaveResponse):
            self._staged, self._uploaded = going_on.staging_completion, going_on.upload_completion
        else:
            self._uploaded = going_on

    def wait_staged(self) -> None:
        """Wait for the copy. Local."""
        if self._staged is not None:
            self._staged.result()

    def is_done(self) -> bool:
        """Whether this rank has ended. Local."""
        return self._uploaded.done()

    def result(self) -> Path:
        """Wait for the files and their metadata."""
        self._uploaded.result()
        return self._path


class _ReusingStager(BlockingAsyncStager):
    """DCP's stager that keeps its buffers, but in ordinary memory: the pinned memory it would take needs a device."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy into the buffers, made by the first call."""
        if self.state_dict_cache is None:
            self.state_dict_cache = {name: torch.empty_like(tensor) for name, tensor in state_dict.items()}
        return super().stage(state_dict)


def _background_stager() -> DefaultStager:
    """Pinned memory and copies that do not block need a device; shared memory serves DCP's mode with a process."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
        )
    )


def _writer(stem: Path) -> FileSystemWriter:
    return FileSystemWriter(stem, single_file_per_rank=True, sync_files=True, thread_count=2)
