"""The rival from torch, `torch.distributed.checkpoint` (DCP), with all files flushed and in several settings.

The fastest setting depends on the case and the machine, so all are measured, and the report compares with the best.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.runner import gather
from distckpt.bench.state import State

#: Numbers of writer threads of a rank to measure; each thread writes one file.
THREAD_COUNTS = (1, 2)

_serial_number = itertools.count()


class Dcp(Competitor):
    """DCP with one directory per checkpoint, and its plan cache enabled."""

    def __init__(self, state: State, *, threads: int | None = None) -> None:
        """Make a competitor with a plan cache of its own. Local.

        Args:
            state: The state that is saved, or restored into.
            threads: Writer threads of each rank; None if the number does not matter, as in a restore.
        """
        super().__init__("DCP" if threads is None else f"DCP, {threads} thread{'s' * (threads > 1)}", state)
        self._threads = threads or 1
        self._plans = _plans_of_its_own()

    def save(self, stem: Path) -> Path:
        """Save with `sync_files` and one file per thread."""
        writer = _writer(stem, self._threads)
        save(dict(self.state.tensors), storage_writer=writer, planner=_Planner(self._plans))
        return stem

    def restore(self, path: Path) -> None:
        """Load in place."""
        load(dict(self.state.tensors), storage_reader=FileSystemReader(path))


class DcpAsync(BackgroundCompetitor):
    """DCP's `async_save`, which writes in a thread or in a separate process."""

    def __init__(self, state: State, mode: str, *, overlap: bool) -> None:
        """Make a competitor with a process group of its own. Collective over the process group.

        Args:
            state: The state that is saved.
            mode: One of the `modes` for the state's device.
            overlap: Copy the state in the background, too.
        """
        super().__init__(f"DCP in a {mode}", state)
        self._stager = _stager(mode, state.device, overlap=overlap)
        self._type = AsyncCheckpointerType.PROCESS if mode == _PROCESS else AsyncCheckpointerType.THREAD
        if len(set(gather(platform.node()))) == 1:
            # DCP's process would use the name of the host, which not every machine can resolve.
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # DCP's thread communicates while training does so over the default group.
        self._group = dist.new_group(backend="gloo")
        self._plans = _plans_of_its_own()

    def start(self, stem: Path) -> DcpPending:
        """Start a save with the settings of `Dcp`."""
        going_on = async_save(
            dict(self.state.tensors),
            storage_writer=_writer(stem, max(THREAD_COUNTS)),
            planner=_Planner(self._plans),
            async_stager=self._stager,
            async_checkpointer_type=self._type,
            process_group=self._group,
        )
        return DcpPending(stem, going_on)


class DcpPending:
    """A save in progress."""

    def __init__(self, path: Path, going_on: Future[Any] | AsyncSaveResponse) -> None:
        self._path = path
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any]
        if isinstance(going_on, AsyncSaveResponse):
            self._staged, self._uploaded = going_on.staging_completion, going_on.upload_completion
        else:
            self._uploaded = going_on

    def wait_staged(self) -> None:
        """Wait for the copy of the state. Local."""
        if self._staged is not None:
            self._staged.result()

    def is_done(self) -> bool:
        """Whether the save of this rank has ended. Local."""
        return self._uploaded.done()

    def result(self) -> Path:
        """Wait for the files and their metadata."""
        self._uploaded.result()
        return self._path


def modes(device: torch.device) -> tuple[str, ...]:
    """The modes of `async_save` for a state on a device: a thread or a process, and the kind of memory. Local."""
    return (_PINNED if device.type == "cuda" else _THREAD, _PROCESS)


class _ReusingStager(BlockingAsyncStager):
    """DCP's stager that keeps its buffers, but in ordinary memory, since DCP's own pinned memory needs a GPU.

    It is several times faster than `DefaultStager`, and a process gets the buffers without another copy.
    """

    def __init__(self, *, shared: bool) -> None:
        super().__init__(cache_staged_state_dict=True)
        self._shared = shared

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy into the buffers, which the first call allocates."""
        if self.state_dict_cache is None:
            self.state_dict_cache = {name: torch.empty_like(tensor) for name, tensor in state_dict.items()}
            for tensor in self.state_dict_cache.values() if self._shared else ():
                tensor.to_local().share_memory_()
        return super().stage(state_dict)


_THREAD, _PINNED, _PROCESS = "thread", "thread, pinned", "process"


def _stager(mode: str, device: torch.device, *, overlap: bool) -> AsyncStager:
    """The fastest stager that DCP has for a mode.

    Only `DefaultStager` copies in the background, or to pinned memory that processes share. Nonblocking copies need
    pinned memory, and that needs a GPU.
    """
    pinned, shared = device.type == "cuda", mode == _PROCESS
    if overlap or (pinned and shared):
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=shared,
                use_async_staging=overlap,
                use_non_blocking_copy=pinned,
            )
        )
    return BlockingAsyncStager(cache_staged_state_dict=True) if pinned else _ReusingStager(shared=shared)


def _plans_of_its_own() -> str:
    """A new cache key for the plans of one competitor: DCP has one cache for the whole process, by key."""
    return f"distckpt bench {next(_serial_number)}"


class _Planner(DefaultSavePlanner):
    """DCP's planner with its cache enabled, under a key of its own."""

    def __init__(self, plans: str) -> None:
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = plans

    def __reduce__(self) -> tuple[Callable[[str], _Planner], tuple[str]]:
        """Pickle for the process that saves."""
        return _quiet_planner, (self._cached_plans_key,)


def _quiet_planner(plans: str) -> _Planner:
    """Make the planner in the process that saves, and silence that, as it would log four lines for each save."""
    logging.getLogger().setLevel(logging.WARNING)
    return _Planner(plans)


def _writer(stem: Path, threads: int) -> FileSystemWriter:
    return FileSystemWriter(stem, single_file_per_rank=True, sync_files=True, thread_count=threads)
