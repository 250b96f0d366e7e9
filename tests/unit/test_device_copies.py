"""The order of copies from and to GPUs, on imitated ones: tensors of the CPU that only their streams may touch.

Their copies are made as early as CUDA could, at the start, or as late, when somebody waits. With the one, a buffer
whose bytes are still needed must not be copied into; with the other, no byte is used or overwritten before the wait.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.storage import device, hdf5, rawio, reading, room, writing
from distckpt.storage.checksum import digest
from distckpt.storage.device import Copy, Ticket
from distckpt.storage.reading import read, read_through_hdf5
from distckpt.storage.transfer import ReadJob, WriteJob, copy_bits, is_packed
from distckpt.storage.writing import write_posix
from tests.checkpoint_files import bits, save

N_PIECE = MAX_PIECE_NBYTES // 4  # float32 elements


class Machine:
    """GPUs, and what happened in which order.

    Attributes:
        log: "start k": copies of batch k begin; "wait k": they have ended; "write", "read": a system call.
        buffers: The pinned memory that was asked for.
    """

    def __init__(self, *, late: bool) -> None:
        self.late = late
        self.log: list[str] = []
        self.buffers: list[torch.Tensor] = []
        self.n_starts = itertools.count()
        self.fails_at = -1
        self._places: dict[int, torch.device] = {}

    def put(self, tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The tensor, which is from now on on a GPU."""
        self._places[tensor.untyped_storage().data_ptr()] = torch.device("cuda", index)
        return tensor

    def gpu_of(self, tensor: torch.Tensor) -> torch.device | None:
        return self._places.get(tensor.untyped_storage().data_ptr())

    def is_packed(self, tensor: torch.Tensor) -> bool:
        return self.gpu_of(tensor) is None and is_packed(tensor)

    def pinned_memory(self, nbytes: int) -> torch.Tensor:
        self.buffers.append(torch.full((nbytes,), 0xAA, dtype=torch.uint8))
        return self.buffers[-1]

    def of(self, kind: str) -> list[int]:
        """The places of a kind of entry in the log."""
        return [place for place, entry in enumerate(self.log) if entry.split()[0] == kind]


class Stream:
    """A side stream of an imitated GPU."""

    def __init__(self, machine: Machine, gpu: torch.device) -> None:
        self.machine, self.gpu = machine, gpu
        self.queue: list[Mark] = []

    def start(self, copies: list[Copy]) -> Mark:
        number = next(self.machine.n_starts)
        if number == self.machine.fails_at:
            raise RuntimeError("CUDA error: out of memory")
        assert all(copy.gpu == self.gpu for copy in copies)
        sides = [self.machine.gpu_of(tensor) for copy in copies for tensor in (copy.target, copy.source)]
        assert len([side for side in sides if side is None]) == len(copies)  # the other sides are in host memory
        self.machine.log.append(f"start {number}")
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

    def __init__(self, stream: Stream, number: int, copies: list[Copy]) -> None:
        self.stream, self.number, self.copies = stream, number, copies

    def run(self) -> None:
        for copy in self.copies:
            copy_bits(copy.target, copy.source, non_blocking=True)
        self.copies.clear()

    def synchronize(self) -> None:
        while self in self.stream.queue:
            first = self.stream.queue.pop(0)
            first.run()
            self.stream.machine.log.append(f"wait {first.number}")


@pytest.fixture(params=["early", "late"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(late=request.param == "late")
    for module in (writing, room):
        monkeypatch.setattr(module, "gpu_of", made.gpu_of)
    for module in (writing, reading):
        monkeypatch.setattr(module, "is_packed", made.is_packed)
    monkeypatch.setattr(room, "pinned_memory", made.pinned_memory)
    monkeypatch.setattr(device, "SideStream", lambda gpu: Stream(made, gpu))
    log_calls(monkeypatch, made, "write_vector", "write")
    log_calls(monkeypatch, made, "read_into", "read")
    return made


def log_calls(monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str, entry: str) -> None:
    call = getattr(rawio, name)

    def logged(*args: object) -> None:
        machine.log.append(entry)
        call(*args)

    monkeypatch.setattr(rawio, name, logged)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def write_jobs(tensors: list[torch.Tensor]) -> list[WriteJob]:
    """One whole dataset after the other."""
    jobs, offset = [], 0
    for index, tensor in enumerate(tensors):
        shape = tuple(tensor.shape)
        jobs.append(WriteJob(f"{index}", offset, shape, Box.whole(shape), tensor, 100 * index))
        offset += tensor.nbytes
    return jobs


def read_jobs(tensors: list[torch.Tensor], saved: list[bytes]) -> list[ReadJob]:
    jobs = zip(write_jobs(tensors), saved, strict=True)
    return [ReadJob(j.key, j.dataset_offset, j.global_shape, j.box, j.tensor, digest(data)) for j, data in jobs]


def values(tensors: list[torch.Tensor]) -> list[bytes]:
    return [bits(tensor.detach().clone().resolve_conj().resolve_neg()) for tensor in tensors]


MAKERS: dict[str, Callable[[], torch.Tensor]] = {
    "packed": lambda: torch.rand(1000),
    "0-d": lambda: torch.tensor(3.5),
    "0-d byte": lambda: torch.tensor(7, dtype=torch.uint8),
    "columns": lambda: torch.rand(700, 300)[:, 3:77],
    "transposed": lambda: torch.rand(40, 50).T,
    "conjugate": lambda: torch.randn(77, dtype=torch.complex64).conj(),
    "0-d conjugate": lambda: torch.tensor(1 + 2j).conj(),
    "negative": lambda: torch.randn(5, dtype=torch.complex128).conj().imag,
    "16 bytes": lambda: torch.randn(9, dtype=torch.complex128),
    "bfloat16": lambda: torch.randn(33).bfloat16(),
    "parameter": lambda: torch.nn.Parameter(torch.rand(3, 4)),
    "empty": lambda: torch.empty(0, 3),
    "a step": lambda: torch.rand(reading.STEP_NBYTES // 4),
    "large": lambda: torch.rand(N_PIECE),
    "pieces": lambda: torch.rand(2 * N_PIECE + 5),
    "large columns": lambda: torch.rand(1500, 2000)[:, :1700],
}


def mixed(machine: Machine) -> list[torch.Tensor]:
    """Tensors of all kinds, by turns on the CPU and on two GPUs."""
    tensors = []
    for number, (make, place) in enumerate(itertools.product(MAKERS.values(), ("cpu", 0, 1))):
        torch.manual_seed(number)
        tensor = make()
        tensors.append(tensor if place == "cpu" else machine.put(tensor, place))
    return tensors


def test_tensors_of_all_kinds_and_devices_round_trip(machine: Machine, fd: int) -> None:
    tensors = mixed(machine)
    saved = values(tensors)
    log = write_posix(fd, write_jobs(tensors), checksums=True)
    assert os.pread(fd, 1 << 30, 0) == b"".join(saved)
    assert log.indices == sorted(log.indices)
    assert len(machine.buffers) == 2
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(1)
    assert all(a != b for a, b in zip(saved, values(tensors), strict=True) if b)
    report = read(fd, read_jobs(tensors, saved), verify=True)
    assert values(tensors) == saved
    assert report.bytes_verified == sum(map(len, saved))
    assert len(machine.buffers) == 4
    assert sum(buffer.nbytes for buffer in machine.buffers) == 4 * MAX_PIECE_NBYTES


def test_strips_of_a_dataset_round_trip(machine: Machine, fd: int) -> None:
    """Boxes that are not contiguous in the file."""
    shape, box = (3000, 1600), Box((5, 7), (2900, 1500))
    whole = torch.rand(box.shape)
    os.pwrite(fd, bytes(4 * 3000 * 1600), 0)
    write_posix(fd, [WriteJob("w", 0, shape, box, machine.put(whole), 0)], checksums=True)
    assert os.pread(fd, 6000, (5 * 1600 + 7) * 4) == bits(whole[0])
    target = machine.put(torch.zeros(1500, 2900).T, 1)
    read(fd, [ReadJob("w", 0, shape, box, target, digest(bits(whole)))], verify=True)
    assert torch.equal(target, whole)


def test_the_next_batch_is_copied_while_one_is_written(machine: Machine, fd: int) -> None:
    tensors = [machine.put(torch.rand(N_PIECE)) for _ in range(5)]
    write_posix(fd, write_jobs(tensors), checksums=True)
    steps = ["start 0", "start 1", "wait 0", "write", "start 2", "wait 1", "write", "start 3", "wait 2", "write"]
    assert machine.log == [*steps, "start 4", "wait 3", "write", "wait 4", "write"]
    assert [buffer.nbytes for buffer in machine.buffers] == [MAX_PIECE_NBYTES] * 2


def test_one_buffer_is_copied_while_the_next_is_read(
    machine: Machine, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STEP_NBYTES", MAX_PIECE_NBYTES // 2)  # two system calls each
    tensors = [torch.rand(N_PIECE) for _ in range(4)]
    saved = values(tensors)
    os.pwrite(fd, b"".join(saved), 0)
    targets = [machine.put(torch.zeros(N_PIECE)) for _ in range(4)]
    read(fd, read_jobs(targets, saved), verify=True)
    assert values(targets) == saved
    steps = ["read", "read", "start 0", "read", "read", "start 1", "wait 0", "read", "read", "start 2", "wait 1"]
    assert machine.log == [*steps, "read", "read", "start 3", "wait 2", "wait 3"]
    assert [buffer.nbytes for buffer in machine.buffers] == [MAX_PIECE_NBYTES] * 2


def test_small_tensors_share_batches_and_writes(machine: Machine, fd: int) -> None:
    tensors = [machine.put(torch.rand(17)) for _ in range(3000)]
    saved = values(tensors)
    write_posix(fd, write_jobs(tensors), checksums=True)
    assert os.pread(fd, 1 << 20, 0) == b"".join(saved)
    assert len(machine.of("start")) == len(machine.of("write")) == -(-3000 // rawio.MAX_VECTORS)
    machine.log.clear()
    targets = [machine.put(torch.zeros(17)) for _ in range(3000)]
    read(fd, read_jobs(targets, saved), verify=True)
    assert values(targets) == saved
    assert len(machine.of("start")) == 1


def test_each_gpu_has_a_stream(machine: Machine, fd: int) -> None:
    tensors = [machine.put(torch.rand(100), index % 3) for index in range(30)]
    write_posix(fd, write_jobs(tensors), checksums=True)
    assert len(machine.of("start")) == 3
    assert os.pread(fd, 1 << 20, 0) == b"".join(values(tensors))


def test_tensors_of_the_cpu_go_without_copies(machine: Machine, fd: int) -> None:
    tensors = [torch.rand(100), torch.rand(100, 2)[:, 0], torch.rand(N_PIECE)]
    saved = values(tensors)
    write_posix(fd, write_jobs(tensors), checksums=True)
    read(fd, read_jobs(tensors, saved), verify=True)
    assert not machine.of("start")
    assert not machine.buffers


def test_pieces_before_the_first_one_on_a_gpu_are_not_asked_for_ahead(machine: Machine, fd: int) -> None:
    made = []

    def jobs() -> Iterator[WriteJob]:
        for job in write_jobs([torch.rand(N_PIECE) for _ in range(4)]):
            made.append(len(machine.of("write")))
            yield job

    write_posix(fd, jobs(), checksums=True)
    assert made == [0, 0, 1, 2]  # the one before is written when the next one is there


def test_chunked_datasets_are_read_onto_gpus(machine: Machine, tmp_path: Path) -> None:
    tensors = {"a": torch.rand(2 * N_PIECE + 3), "b": torch.tensor(2.5), "c": torch.rand(30, 40)}
    save(tmp_path / "file.h5", tensors)
    opened = hdf5.open_checkpoint(str(tmp_path / "file.h5"))
    targets = [machine.put(torch.zeros_like(tensor), index % 2) for index, tensor in enumerate(tensors.values())]
    jobs = [
        ReadJob(key, -1, tuple(target.shape), Box.whole(tuple(target.shape)), target, digest(bits(tensors[key])))
        for key, target in zip(tensors, targets, strict=True)
    ]
    read_through_hdf5(opened.path, jobs, verify=True)
    assert values(targets) == values(list(tensors.values()))
    assert len(machine.buffers) == 2


# ---- failures


def test_tensors_before_a_damaged_one_have_their_values_when_the_read_has_failed(machine: Machine, fd: int) -> None:
    tensors = [torch.rand(100) for _ in range(3)]
    saved = values(tensors)
    os.pwrite(fd, b"".join(saved), 0)
    targets = [machine.put(torch.zeros(100)) for _ in range(3)]
    jobs = read_jobs(targets, [*saved[:2], b"other"])
    with pytest.raises(CorruptCheckpointError, match="2: the 400 bytes"):
        read(fd, jobs, verify=True)
    assert values(targets[:2]) == saved[:2]
    assert not targets[2].any()


def test_no_copy_goes_on_after_a_failure(machine: Machine, fd: int) -> None:
    machine.fails_at = 1
    saved = values([torch.rand(N_PIECE) for _ in range(3)])
    os.pwrite(fd, b"".join(saved), 0)
    targets = [machine.put(torch.zeros(N_PIECE)) for _ in range(3)]
    with pytest.raises(RuntimeError, match="out of memory"):
        read(fd, read_jobs(targets, saved), verify=True)
    assert len(machine.of("wait")) == len(machine.of("start"))


def test_a_failed_copy_fails_the_write(machine: Machine, fd: int) -> None:
    machine.fails_at = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        write_posix(fd, write_jobs([machine.put(torch.rand(N_PIECE)) for _ in range(3)]), checksums=True)


def test_a_ticket_whose_wait_failed_is_not_over() -> None:
    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error")

    ticket = Ticket([Broken()])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error"):
            ticket.wait()
