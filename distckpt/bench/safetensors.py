"""The simplest rival: one safetensors file per rank, flushed, without any agreement or checksum."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from distckpt.bench.competitor import Competitor
from distckpt.bench.raw import flush_directory
from distckpt.bench.state import State


class Safetensors(Competitor):
    """One file per rank in one directory per checkpoint. Restores onto the same ranks and shards only.

    Of a state that all ranks hold, rank 0 writes the only file.
    """

    def __init__(self, state: State) -> None:
        super().__init__("safetensors", state)

    def save(self, stem: Path) -> Path:
        """Write this rank's shards and flush file and directory."""
        if self._writer() != dist.get_rank():
            return stem
        stem.mkdir(exist_ok=True)
        path = self._file(stem)
        save_file(dict(zip(self.state.tensors, self.state.shards(), strict=True)), path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush_directory(stem)
        return stem

    def restore(self, path: Path) -> None:
        """Copy every stored shard into the live one."""
        with safe_open(self._file(path), framework="pt") as file:
            for name, shard in zip(self.state.tensors, self.state.shards(), strict=True):
                shard.copy_(file.get_tensor(name))

    def _file(self, directory: Path) -> Path:
        return directory / f"rank-{self._writer()}.safetensors"

    def _writer(self) -> int:
        """The rank that writes what this one reads."""
        return 0 if self.state.is_replicated else dist.get_rank()
