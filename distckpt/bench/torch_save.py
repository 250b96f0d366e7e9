"""The rival `torch.save`: one file per rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from distckpt.bench.per_rank import FilePerRank
from distckpt.bench.state import State


class TorchSave(FilePerRank):
    """One file of `torch.save` per rank. Its format stores a CRC32, which is not verified when it is read."""

    def __init__(self, state: State) -> None:
        super().__init__("torch.save", state)

    def write(self, shards: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a file."""
        torch.save(dict(shards), path)

    def read(self, path: Path, shards: Mapping[str, torch.Tensor]) -> None:
        """Copy the shards from the memory-mapped file, which is faster than reading it first."""
        stored = torch.load(path, mmap=True, weights_only=True)
        for name, shard in shards.items():
            shard.copy_(stored[name])
