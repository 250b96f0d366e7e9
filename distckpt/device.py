"""Asynchronous copies between pinned host memory and GPUs, on streams separate from those of the program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import torch

from distckpt.tensor_bytes import can_join, copy_bits, joined


def gpu_of(tensor: torch.Tensor) -> torch.device | None:
    """The GPU that holds a tensor; None for tensors that `copy_bits` copies synchronously."""
    return tensor.device if tensor.is_cuda else None


def any_on_gpu(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a GPU holds any of the tensors, see `gpu_of`."""
    return any(map(attrgetter("is_cuda"), tensors))


def pinned_memory(nbytes: int) -> torch.Tensor:
    """Allocate `nbytes` bytes of host memory that GPUs can access directly.

    torch reuses freed pinned memory, but not before the copies that use it have ended.
    """
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class Copy(NamedTuple):
    """One copy between two tensors of the same shape and dtype.

    Attributes:
        gpu: The device of one of the tensors; the other is contiguous, in pinned memory.
        target: The tensor to copy into.
        source: The tensor to copy from.
    """

    gpu: torch.device
    target: torch.Tensor
    source: torch.Tensor


class Joining(NamedTuple):
    """A copy of several tensors of a GPU into host memory, one after the other: they are joined on the GPU first.

    Attributes:
        gpu: The device of the tensors.
        target: The memory, pinned: a contiguous 1-d tensor with as many elements as all sources together.
        sources: The tensors, for which `tensor_bytes.can_join` holds; any shapes, any strides.
    """

    gpu: torch.device
    target: torch.Tensor
    sources: Sequence[torch.Tensor]

    def start(self) -> None:
        """Start the copy on the current stream. Only that stream uses the memory of the joined tensors afterwards."""
        with torch.no_grad():
            try:
                self.target.copy_(joined(self.sources), non_blocking=True)
            except torch.OutOfMemoryError:
                start_all(self._one_by_one())

    def _one_by_one(self) -> list[Copy]:
        """The copies without joining, for a GPU that has no memory left."""
        parts = torch.split(self.target, [source.numel() for source in self.sources])
        return [
            Copy(self.gpu, part.view(source.shape), source) for part, source in zip(parts, self.sources, strict=True)
        ]


def joining_gpu(dtype: torch.dtype, tensors: Sequence[torch.Tensor]) -> torch.device | None:
    """The GPU that can join tensors of this dtype; None if they are not all on one, or torch cannot join them."""
    gpus = set(map(gpu_of, tensors))
    return gpus.pop() if len(gpus) == 1 and can_join(dtype, tensors) else None


class Event(Protocol):
    """A mark in a stream, as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until the stream has reached the mark."""


class Ticket:
    """Handle on copies that have begun. Until `wait` returns, do not use their targets or change their sources."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def wait(self) -> None:
        """Wait until the copies have ended. May be called again."""
        while self._events:
            self._events[-1].synchronize()
            self._events.pop()


class SideStream:
    """A stream for copies on one GPU, separate from that of the program, so that neither waits for the other's work.

    Args:
        gpu: The device.
    """

    def __init__(self, gpu: torch.device) -> None:
        self._gpu = gpu
        self._stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Make copies started from now on wait for the work that the program has queued on the GPU so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._gpu))

    def start(self, copies: Sequence[Copy | Joining]) -> Event:
        """Start copies; returns an event after the last of them."""
        with torch.cuda.stream(self._stream):
            start_all(copies)
        mark: Event = self._stream.record_event()
        return mark

    def finish(self) -> None:
        """Wait for all copies on the stream."""
        self._stream.synchronize()


def start_all(copies: Sequence[Copy | Joining]) -> None:
    """Start copies on the current stream: the plain ones all in one call, which takes the least time in Python."""
    plain: list[Copy] = []
    special: list[Copy] = []
    for copy in copies:
        if isinstance(copy, Joining):
            copy.start()
        else:
            (plain if _is_plain(copy) else special).append(copy)
    if plain:
        with torch.no_grad():
            torch._foreach_copy_([copy.target for copy in plain], [copy.source for copy in plain], non_blocking=True)
    for copy in special:
        copy_bits(copy.target, copy.source, non_blocking=True)


def _is_plain(copy: Copy) -> bool:
    """Whether `torch._foreach_copy_` can make the copy, moving the bytes unchanged whatever the dtype."""
    return _is_packed(copy.source) and _is_packed(copy.target) and not copy.target.is_inference()


def _is_packed(tensor: torch.Tensor) -> bool:
    """As `tensor_bytes.is_packed`, but on any device."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


class DeviceCopies:
    """Asynchronous copies from and to any number of GPUs, on one side stream for each."""

    def __init__(self, moment: Iterable[torch.device] | None = None) -> None:
        """Local.

        Args:
            moment: GPUs whose memory is copied as of now: copies wait for the work that the program has queued there so
                far, and for nothing later, whichever thread starts them. None copies as of each `start`.
        """
        self._streams: dict[torch.device, SideStream] = {}
        self._follows = moment is None
        for gpu in moment or ():
            self._stream_of(gpu).follow()

    def start(self, copies: Iterable[Copy | Joining]) -> Ticket:
        """Start copies; returns a ticket. Their tensors must stay unchanged until `Ticket.wait` has returned."""
        by_gpu: dict[torch.device, list[Copy | Joining]] = {}
        for copy in copies:
            by_gpu.setdefault(copy.gpu, []).append(copy)
        if self._follows:
            for gpu in by_gpu:
                self._stream_of(gpu).follow()
        return Ticket([self._stream_of(gpu).start(found) for gpu, found in by_gpu.items()])

    def finish(self) -> None:
        """Wait for all copies, including those of a `start` that failed."""
        for stream in self._streams.values():
            stream.finish()

    def _stream_of(self, gpu: torch.device) -> SideStream:
        if gpu not in self._streams:
            self._streams[gpu] = SideStream(gpu)
        return self._streams[gpu]
