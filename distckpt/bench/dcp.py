"""The rival torch brings: `torch.distributed.checkpoint`, with everything flushed and its fastest settings."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distckpt.bench.competitor import Competitor
from distckpt.bench.state import State


class Dcp(Competitor):
    """torch.distributed.checkpoint (DCP) into one directory per checkpoint."""

    def __init__(self, state: State) -> None:
        super().__init__("DCP", state)

    def save(self, stem: Path) -> Path:
        """Save with `sync_files`, one file per rank and two writer threads."""
        writer = FileSystemWriter(stem, single_file_per_rank=True, sync_files=True, thread_count=2)
        save(dict(self.state.tensors), storage_writer=writer)
        return stem

    def restore(self, path: Path) -> None:
        """Load in place."""
        load(dict(self.state.tensors), storage_reader=FileSystemReader(path))
