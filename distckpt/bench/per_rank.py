"""Base of the simplest rivals: one file per rank, flushed to disk, without agreement among ranks."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from distckpt.bench.competitor import Competitor
from distckpt.bench.raw import flush_directory
from distckpt.bench.state import State


class FilePerRank(Competitor):
    """One file per rank, in one directory per checkpoint. Restores only onto the same ranks and shards.

    Of a replicated state, rank 0 writes the only file.
    """

    def save(self, stem: Path) -> Path:
        """Write this rank's shards, and flush the file and the directory."""
        if self._writer() != dist.get_rank():
            return stem
        stem.mkdir(exist_ok=True)
        self.write(shards_by_name(self.state), self._file(stem))
        flush_files([self._file(stem)])
        flush_directory(stem)
        return stem

    def restore(self, path: Path) -> None:
        """Copy every stored shard into the live one."""
        self.read(self._file(path), shards_by_name(self.state))

    @abstractmethod
    def write(self, shards: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write shards to a file. Local."""

    @abstractmethod
    def read(self, path: Path, shards: Mapping[str, torch.Tensor]) -> None:
        """Fill shards from a file. Local."""

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self._writer()}.{self.name}"

    def _writer(self) -> int:
        """The rank that writes the file that this one reads."""
        return 0 if self.state.is_replicated else dist.get_rank()


def shards_by_name(state: State) -> dict[str, torch.Tensor]:
    """This rank's shards as ordinary tensors, for checkpointers that do not know DTensors. Local."""
    return dict(zip(state.tensors, state.shards, strict=True))


def flush_files(paths: Iterable[Path]) -> None:
    """Flush the contents of files to disk, so that they survive a power cut. Local."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
