"""The rival safetensors: one file per rank, without checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distckpt.bench.per_rank import FilePerRank
from distckpt.bench.state import State


class Safetensors(FilePerRank):
    """One safetensors file per rank."""

    def __init__(self, state: State) -> None:
        super().__init__("safetensors", state)

    def write(self, shards: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a file."""
        save_file(dict(shards), path)

    def read(self, path: Path, shards: Mapping[str, torch.Tensor]) -> None:
        """Copy the shards from the memory-mapped file."""
        with safe_open(path, framework="pt") as file:
            for name, shard in shards.items():
                shard.copy_(file.get_tensor(name))
