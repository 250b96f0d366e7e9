"""Checkpoint files for tests, made and read with the storage room alone: no live objects, no coordinator."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from distckpt.layout.box import Box, cut
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.plan import ReadPlanner
from distckpt.layout.records import (
    CHECKSUM_ALGORITHM,
    FORMAT,
    FORMAT_VERSION,
    Manifest,
    Node,
    ObjectGraph,
    Shard,
    Variable,
)
from distckpt.storage import creation, hdf5
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import ChecksumReader
from distckpt.storage.reading import ReadReport, read, read_through_hdf5
from distckpt.storage.skeleton import DatasetSpec, Skeleton
from distckpt.storage.transfer import ReadJob, WriteJob
from distckpt.storage.writing import write_posix

Tensors = Mapping[str, torch.Tensor]


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def specs_of(tensors: Tensors) -> list[DatasetSpec]:
    return [DatasetSpec(key, dtype_name(tensor), tuple(tensor.shape)) for key, tensor in tensors.items()]


def shards_of(shape: tuple[int, ...], n_ranks: int) -> list[Shard]:
    """Shards of about equal size along the leading dimensions; none when there are no elements."""
    box = Box.whole(shape)
    boxes = cut(box, max(1, -(-box.numel // n_ranks)))
    return [Shard(number % n_ranks, part.offset, part.shape) for number, part in enumerate(boxes)]


def variables_of(tensors: Tensors, n_ranks: int) -> list[Variable]:
    return [
        Variable(spec.key, spec.dtype, spec.shape, -1, shards_of(spec.shape, n_ranks)) for spec in specs_of(tensors)
    ]


def make_manifest(variables: Sequence[Variable], **changes: Any) -> Manifest:
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        save_id="0" * 32,
        save_counter=1,
        world_size=1,
        time=1.5,
        host="here",
        transport="posix",
        versions={},
        checksums=CHECKSUM_ALGORITHM,
        metadata=None,
        object_graph=ObjectGraph([Node()]),
        variables=list(variables),
        python_state={},
        file_nbytes=0,
    )
    return msgspec.structs.replace(manifest, **changes)


def placed(manifest: Manifest, skeleton: Skeleton) -> Manifest:
    """The manifest with the positions of the skeleton."""
    variables = [
        msgspec.structs.replace(variable, offset=offset)
        for variable, offset in zip(manifest.variables, skeleton.offsets.tolist(), strict=True)
    ]
    return msgspec.structs.replace(manifest, variables=variables, file_nbytes=skeleton.file_nbytes)


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + extent) for start, extent in zip(box.offset, box.shape, strict=True))]


def write_jobs(
    tensors: Tensors, variables: Sequence[Variable], skeleton: Skeleton, rank: int | None = None
) -> list[WriteJob]:
    """What `rank` writes; None: what all ranks write."""
    jobs = []
    index = index_checksums(variables)
    for number, (variable, offset) in enumerate(zip(variables, skeleton.offsets.tolist(), strict=True)):
        for shard, first in zip(variable.shards, index.firsts(number), strict=True):
            box = Box(shard.offset, shard.shape)
            if rank is None or shard.rank == rank:
                tensor = part(tensors[variable.key], box)
                jobs.append(WriteJob(variable.key, offset, variable.shape, box, tensor, first))
    return jobs


def save(path: Path, tensors: Tensors, *, n_ranks: int = 1, hashed: bool = True, **changes: Any) -> Skeleton:
    """Write a complete checkpoint; `changes` go into the manifest."""
    if not hashed:
        changes["checksums"] = None
    variables = variables_of(tensors, n_ranks)
    manifest = make_manifest(variables, **changes)
    n_checksums = index_checksums(variables).total if hashed else 0
    skeleton = creation.create_file(str(path), specs_of(tensors), n_checksums, manifests.max_nbytes(manifest))
    fd = os.open(path, os.O_RDWR)
    log = write_posix(fd, write_jobs(tensors, variables, skeleton), checksums=hashed)
    log.write(fd, skeleton.checksums_offset)
    creation.write_manifest(fd, skeleton, manifests.encode(placed(manifest, skeleton)))
    os.close(fd)
    return skeleton


def read_jobs(opened: hdf5.OpenedCheckpoint, fd: int, targets: Tensors) -> list[ReadJob]:
    """Jobs that read whole variables."""
    jobs = []
    checksums = None if opened.checksums is None else ChecksumReader(fd, opened.checksums)
    variables = opened.manifest.variables
    planner = ReadPlanner(variables, opened.index)
    for number, (variable, offset) in enumerate(zip(variables, opened.offsets.tolist(), strict=True)):
        for item in planner.items(number, Box.whole(variable.shape)):
            expected = None if checksums is None else checksums[item.checksum]
            target = part(targets[variable.key], item.box)
            jobs.append(ReadJob(variable.key, offset, variable.shape, item.box, target, expected))
    return jobs


def load(path: Path, targets: Tensors, *, verify: bool = True) -> ReadReport:
    """Read a checkpoint into tensors of the saved shapes and dtypes."""
    opened = hdf5.open_checkpoint(str(path))
    report = ReadReport()
    fd = os.open(path, os.O_RDONLY)
    try:
        jobs = read_jobs(opened, fd, targets)
        for done in (
            read(fd, [job for job in jobs if job.dataset_offset >= 0], verify=verify),
            read_through_hdf5(str(path), [job for job in jobs if job.dataset_offset < 0], verify=verify),
        ):
            report.bytes_read += done.bytes_read
            report.bytes_verified += done.bytes_verified
    finally:
        os.close(fd)
    return report


def twins(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes and dtypes with other bytes."""
    return {key: with_bytes_of(tensor, 0x55) for key, tensor in tensors.items()}


def with_bytes_of(tensor: torch.Tensor, value: int) -> torch.Tensor:
    nbytes = tensor.numel() * tensor.element_size()
    return torch.full((nbytes,), value, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bits(left) == bits(right)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order; few operations work on every dtype, so integers of the same size are moved."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    same_size = tensor.detach().view(raw.get(tensor.element_size(), tensor.dtype))
    return same_size.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
