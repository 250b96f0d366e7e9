"""Imitated GPUs: tensors of the CPU that only the streams of a machine may touch.

Their copies are made as early as CUDA could, at the start, or as late, when somebody waits. With the one, a buffer
whose bytes are still needed must not be copied into; with the other, no byte is used or overwritten before the wait.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from distckpt import device
from distckpt.device import Copy, Joining, start_all
from distckpt.exchange import taking
from distckpt.graph import fingerprint
from distckpt.storage import packing, parallel_reading, rawio, reading, room, snapshot, units, writing
from distckpt.storage.staging import HostBuffer
from distckpt.tensor_bytes import is_packed


class Machine:
    """GPUs, and what happened in which order.

    Attributes:
        log: "start k": copies of batch k begin; "wait k": they have ended; "write", "read": a system call.
        buffers: The pinned memory that was asked for.
        copied: Bytes of all copies that began.
        n_copies: Number of those copies.
        n_follows: How often a stream was told to see what the program has begun.
    """

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.log: list[str] = []
        self.buffers: list[torch.Tensor] = []
        self.copied = 0
        self.n_copies = 0
        self.n_follows = 0
        self.n_starts = itertools.count()
        self.fails_at = -1
        self._places: dict[int, torch.device] = {}
        self._kept: list[torch.Tensor] = []  # else other tensors could get their addresses

    def put(self, tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The tensor, which is from now on on a GPU."""
        self._kept.append(tensor)
        self._places[tensor.untyped_storage().data_ptr()] = torch.device("cuda", index)
        return tensor

    def gpu_of(self, tensor: torch.Tensor) -> torch.device | None:
        return self._places.get(tensor.untyped_storage().data_ptr())

    def is_packed(self, tensor: torch.Tensor) -> bool:
        return self.gpu_of(tensor) is None and is_packed(tensor)

    def pinned_memory(self, nbytes: int) -> torch.Tensor:
        self.buffers.append(torch.full((nbytes,), 0xAA, dtype=torch.uint8))
        return self.buffers[-1]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the package see these GPUs, and log its system calls."""
        for module in (device, packing, writing, parallel_reading, room, units, taking, snapshot, fingerprint):
            monkeypatch.setattr(module, "gpu_of", self.gpu_of)
        for module in (writing, reading, parallel_reading, units, taking, snapshot, fingerprint):
            monkeypatch.setattr(module, "is_packed", self.is_packed)
        monkeypatch.setattr(packing, "any_on_gpu", lambda tensors: any(map(self.gpu_of, tensors)))
        for module in (packing, room, fingerprint):
            monkeypatch.setattr(module, "pinned_memory", self.pinned_memory)
        monkeypatch.setattr(HostBuffer, "pin", lambda _: self.log.append("pin"))
        monkeypatch.setattr(device, "SideStream", lambda gpu: Stream(self, gpu))
        _log_calls(monkeypatch, self, "write_vector", "write")
        _log_calls(monkeypatch, self, "read_into", "read")

    def of(self, kind: str) -> list[int]:
        """The places of a kind of entry in the log."""
        return [place for place, entry in enumerate(self.log) if entry.split()[0] == kind]


class Stream:
    """A side stream of an imitated GPU."""

    def __init__(self, machine: Machine, gpu: torch.device) -> None:
        self.machine, self.gpu = machine, gpu
        self.queue: list[Mark] = []

    def follow(self) -> None:
        self.machine.n_follows += 1

    def start(self, copies: list[Copy | Joining]) -> Mark:
        number = next(self.machine.n_starts)
        if number == self.machine.fails_at:
            raise RuntimeError("CUDA error: out of memory")
        assert all(copy.gpu == self.gpu for copy in copies)
        for copy in copies:  # between this GPU and host memory
            sources = copy.sources if isinstance(copy, Joining) else [copy.source]
            sides = {self.machine.gpu_of(copy.target), *map(self.machine.gpu_of, sources)}
            assert sides == {None, self.gpu}
        self.machine.log.append(f"start {number}")
        self.machine.copied += sum(copy.target.nbytes for copy in copies)
        self.machine.n_copies += len(copies)
        mark = Mark(self, number, list(copies))
        self.queue.append(mark)
        if not self.machine.late:
            mark.run()
        return mark

    def finish(self) -> None:
        for mark in list(self.queue):
            mark.synchronize()


class Mark:
    """The end of a batch of copies in a stream."""

    def __init__(self, stream: Stream, number: int, copies: list[Copy | Joining]) -> None:
        self.stream, self.number, self.copies = stream, number, copies

    def run(self) -> None:
        start_all(self.copies)
        self.copies.clear()

    def synchronize(self) -> None:
        while self in self.stream.queue:
            first = self.stream.queue.pop(0)
            first.run()
            self.stream.machine.log.append(f"wait {first.number}")


def _log_calls(monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str, entry: str) -> None:
    call = getattr(rawio, name)

    def logged(*args: object) -> None:
        machine.log.append(entry)
        call(*args)

    monkeypatch.setattr(rawio, name, logged)
