"""Write jobs and read jobs, and their division into blocks of the file and the matching parts of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch

from distckpt.layout.box import MAX_PIECE_NBYTES, Box, Shape, pieces

#: Called with the number of bytes that were just moved.
Progress = Callable[[int], Any]


class WriteJob(msgspec.Struct, frozen=True):
    """A box that this rank writes.

    Attributes:
        key: Checkpoint key, for messages and for HDF5.
        dataset_offset: Position of the dataset in the file, in bytes.
        global_shape: Shape of the dataset.
        box: The box, in coordinates of the dataset.
        tensor: Its elements, of shape `box.shape`; any strides, any device.
        checksum: Index of the checksum of its first piece.
    """

    key: str
    dataset_offset: int
    global_shape: Shape
    box: Box
    tensor: torch.Tensor
    checksum: int


class ReadJob(msgspec.Struct, frozen=True):
    """A box that this rank reads.

    Attributes:
        key: Checkpoint key, for messages and for HDF5.
        dataset_offset: Position of the dataset in the file, in bytes.
        global_shape: Shape of the dataset.
        box: The box, in coordinates of the dataset.
        tensor: Receives its elements; of shape `box.shape` and of the stored dtype; any strides, any device.
        expected: Checksum of the box's packed bytes if the box is a piece; None if it cannot be verified.
    """

    key: str
    dataset_offset: int
    global_shape: Shape
    box: Box
    tensor: torch.Tensor
    expected: int | None = None


# ---- in the file -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A piece of a write job, or a part of a read job that fits into a staging buffer.

    Attributes:
        box: Its box, in coordinates of the dataset.
        start: Position of its first byte in the packed bytes of the job.
        nbytes: Its size in bytes.
    """

    box: Box
    start: int
    nbytes: int


def blocks_of(box: Box, itemsize: int) -> Iterator[Block]:
    """The pieces of a box with their positions in its packed bytes."""
    nbytes = math.prod(box.shape) * itemsize
    if nbytes <= MAX_PIECE_NBYTES:
        if nbytes:
            yield Block(box, 0, nbytes)
        return
    start = 0
    for piece in pieces(box, itemsize):
        block = Block(piece, start, piece.numel * itemsize)
        yield block
        start += block.nbytes


# ---- in memory ---------------------------------------------------------------------------------------------------


def part_of(job: WriteJob | ReadJob, block: Block) -> torch.Tensor:
    """The part of a job's tensor that belongs to a block."""
    return sub_tensor(job.tensor.detach(), block.box, job.box)


def sub_tensor(tensor: torch.Tensor, box: Box, outer: Box) -> torch.Tensor:
    """The view of a tensor with the elements of `box`; the whole tensor is `outer`. Both in global coordinates."""
    if box == outer:
        return tensor
    for axis, (start, base, extent) in enumerate(zip(box.offset, outer.offset, box.shape, strict=True)):
        if extent != outer.shape[axis]:
            tensor = tensor.narrow(axis, start - base, extent)
    return tensor
