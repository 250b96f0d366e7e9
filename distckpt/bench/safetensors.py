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
    """One file per rank in one directory per checkpoint. Restores onto the same ranks and shards only."""

    def __init__(self, state: State) -> None:
        super().__init__("safetensors", state)

    def save(self, stem: Path) -> Path:
        """Write this rank's shards and flush file and directory."""
        stem.mkdir(exist_ok=True)
        path = _file(stem)
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
        with safe_open(_file(path), framework="pt") as file:
            for name, shard in zip(self.state.tensors, self.state.shards(), strict=True):
                shard.copy_(file.get_tensor(name))


def _file(directory: Path) -> Path:
    return directory / f"rank-{dist.get_rank()}.safetensors"
