"""The simplest rivals: one file per rank, flushed, without any agreement."""

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
    """One file per rank in one directory per checkpoint. Restores onto the same ranks and shards only.

    Of a state that all ranks hold, rank 0 writes the only file.
    """

    def save(self, stem: Path) -> Path:
        """Write this rank's shards and flush file and directory."""
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
        """Write a file. Local."""

    @abstractmethod
    def read(self, path: Path, shards: Mapping[str, torch.Tensor]) -> None:
        """Fill shards from a file. Local."""

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self._writer()}.{self.name}"

    def _writer(self) -> int:
        """The rank that writes what this one reads."""
        return 0 if self.state.is_replicated else dist.get_rank()


def shards_by_name(state: State) -> dict[str, torch.Tensor]:
    """This rank's shards as ordinary tensors, to those who know nothing of DTensors. Local."""
    return dict(zip(state.tensors, state.shards, strict=True))


def flush_files(paths: Iterable[Path]) -> None:
    """Make the content of files survive a power cut. Local."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
