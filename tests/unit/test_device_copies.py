"""The order of copies from and to GPUs, on imitated ones (see imitated_gpu.py)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distckpt import device
from distckpt.device import Ticket
from distckpt.errors import CorruptCheckpointError
from distckpt.graph import fingerprint as graph_fingerprint
from distckpt.graph.fingerprint import fingerprint, fingerprints
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.storage import filling, hdf5, rawio
from distckpt.storage.checksum import digest
from distckpt.storage.packing import LiveJobs
from distckpt.storage.reading import read, read_through_hdf5
from distckpt.storage.room import Arrivals, Departing, Departures
from distckpt.storage.snapshot import Snapshot, Watch
from distckpt.storage.staging import HostBuffers
from distckpt.storage.transfer import ReadJob, WriteJob
from distckpt.storage.writing import write_posix
from tests.checkpoint_files import bits, save
from tests.imitated_gpu import Machine

N_PIECE = MAX_PIECE_NBYTES // 4  # float32 elements


@pytest.fixture(params=["early", "late"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(late=request.param == "late")
    made.install(monkeypatch)
    return made


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
    "a step": lambda: torch.rand(filling.STEP_NBYTES // 4),
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
    assert list(log.indices) == sorted(log.indices)
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


def test_tensors_of_inference_mode_round_trip(machine: Machine, fd: int) -> None:
    """Outside of it torch copies into one of them, but not into several at once."""
    with torch.inference_mode():
        saved, live = machine.put(torch.randn(9)), machine.put(torch.zeros(9))
    write_posix(fd, write_jobs([saved]), checksums=True)
    read(fd, read_jobs([live], values([saved])), verify=True)
    assert torch.equal(live, saved)


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
    monkeypatch.setattr(filling, "STEP_NBYTES", MAX_PIECE_NBYTES // 2)  # two system calls each
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


# ---- through other memory


def test_memory_may_change_as_soon_as_it_was_passed_on(machine: Machine) -> None:
    whole = torch.rand(5, 700_000)  # more than both buffers
    columns, host, target = machine.put(torch.zeros(9, 30).T), torch.zeros(30, 9), machine.put(torch.zeros(5, 700_000))
    with Arrivals() as arrivals:
        for number in range(5):
            memory = whole[number].clone()
            arrivals.pass_on(target[number], memory)
            memory.fill_(-1)
        for tensor in (columns, host):
            memory = whole[0, :270].reshape(30, 9).clone()
            arrivals.pass_on(tensor, memory)
            memory.fill_(-1)
    assert torch.equal(target, whole)
    assert torch.equal(columns, whole[0, :270].reshape(30, 9))
    assert torch.equal(host, columns)
    assert [buffer.nbytes for buffer in machine.buffers] == [MAX_PIECE_NBYTES] * 2


def test_departures_are_under_way_before_they_are_waited_for(machine: Machine) -> None:
    tensors = [machine.put(torch.rand(3, 500_000)[:, ::2], number % 2) for number in range(2)]
    tensors += [torch.rand(4), machine.put(torch.rand(N_PIECE)), machine.put(torch.rand(7))]
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    departures = Departures()
    departures.start([Departing(*pair) for pair in zip(tensors, targets, strict=True)])
    assert machine.log == ["start 0", "start 1"]  # one for each GPU, as much as fits
    assert not any(target.any() for target in targets)
    departures.arrive()
    assert values(targets) == values(tensors)
    assert [buffer.nbytes for buffer in machine.buffers] == [MAX_PIECE_NBYTES]
    departures.start([Departing(tensors[0], targets[1])])  # and again
    departures.arrive()
    assert values(targets[1:2]) == values(tensors[:1])
    departures.finish()
    assert len(machine.of("wait")) == len(machine.of("start"))


# ---- failures


def test_no_departure_goes_on_after_a_failure(machine: Machine) -> None:
    machine.fails_at = 1
    tensors = [machine.put(torch.rand(N_PIECE)) for _ in range(3)]
    departures = Departures()
    departures.start([Departing(tensor, torch.zeros(N_PIECE)) for tensor in tensors])
    with pytest.raises(RuntimeError, match="out of memory"):
        departures.arrive()
    departures.finish()
    assert len(machine.of("wait")) == len(machine.of("start"))


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


# ---- fingerprints ------------------------------------------------------------------------------------------------


def of_all_kinds() -> list[torch.Tensor]:
    """As many as need several batches: small, large, strided, lazy, empty and without dimensions."""
    torch.manual_seed(3)
    made = [torch.randn(16 << 10) for _ in range(100)] + [torch.randn(300, 200).t(), torch.randn(1 << 20)]
    made += [torch.randn(9).to(torch.bfloat16), torch.tensor(3), torch.empty(0), torch.tensor([1, 0], dtype=torch.bool)]
    return [*made, torch.randn(40, dtype=torch.complex64).conj(), torch.randn(2 << 20)[::2]]


@pytest.mark.parametrize("whole", [False, True])
def test_fingerprints_are_those_of_the_cpu(machine: Machine, whole: bool) -> None:
    tensors = of_all_kinds()
    expected = [fingerprint(tensor, whole=whole) for tensor in tensors]
    for number, tensor in enumerate(tensors):
        if number % 5 and tensor.is_contiguous() and not tensor.is_conj():  # what GPUs make of others is not imitated
            machine.put(tensor, number % 2)
    assert fingerprints(tensors, whole=whole) == expected
    assert len(set(expected)) == len(expected)
    n_starts = len(machine.of("start"))
    assert 2 <= n_starts < 10
    assert len(machine.of("wait")) == n_starts
    assert all(buffer.nbytes == 4 << 20 for buffer in machine.buffers)


def test_samples_take_memory_of_a_gpu_for_few_tensors_at_a_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed_part = graph_fingerprint._hashed_part

    def logged(tensor: torch.Tensor, *, whole: bool) -> torch.Tensor:
        machine.log.append("sample")
        return machine.put(hashed_part(tensor, whole=whole))

    strided = torch.randn(2000, 1100).t()  # of each 64 KiB are hashed, and 4 MiB are copied at once
    expected = fingerprint(strided, whole=False)
    monkeypatch.setattr(graph_fingerprint, "_hashed_part", logged)
    tensors = [machine.put(strided)] * 200
    assert fingerprints(tensors, whole=False) == [expected] * 200
    samples = machine.of("sample")
    assert [sum(place < start for place in samples) for start in machine.of("start")] == [65, 129, 193, 200]


def test_a_gpu_that_fails_leaves_no_copy_of_a_fingerprint_under_way(machine: Machine) -> None:
    machine.fails_at = 1
    tensors = [machine.put(torch.randn(9), number) for number in range(2)]
    with pytest.raises(RuntimeError, match="out of memory"):
        fingerprints(tensors, whole=False)
    assert machine.log == ["start 0", "wait 0"]


# ---- snapshots ---------------------------------------------------------------------------------------------------


def expected_copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone().resolve_conj().resolve_neg() for tensor in tensors]


def assert_copied(copied: Snapshot, tensors: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The copies hold what was there, in memory of their own, though the tensors have changed."""
    for tensor in tensors:
        tensor.zero_()
    jobs = copied.jobs()
    for number, (value, tensor) in enumerate(zip(expected, tensors, strict=True)):
        copy = jobs[number].tensor
        assert copy.is_contiguous()
        assert torch.equal(copy, value)
        assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


def test_a_snapshot_copies_from_all_gpus_while_the_cpu_copies(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = of_all_kinds()
    for number, tensor in enumerate(tensors):
        if number % 3:
            machine.put(tensor, number % 2)
    copy = Snapshot._copy_from_host
    monkeypatch.setattr(
        Snapshot, "_copy_from_host", lambda self, index: (machine.log.append("copy"), copy(self, index))
    )
    expected = expected_copies(tensors)
    copied = Snapshot(LiveJobs.of(write_jobs(tensors)), [False] * len(tensors), Watch(), HostBuffers(), None)
    assert copied.is_complete
    assert [entry for entry, _ in itertools.groupby(machine.log)] == [
        "pin", "start 0", "start 1", "copy", "wait 0", "wait 1",
    ]  # fmt: skip
    assert machine.n_follows == 2
    assert_copied(copied, tensors, expected)


def test_a_snapshot_made_later_starts_all_copies_at_once_and_sees_nothing_newer(machine: Machine) -> None:
    tensors = of_all_kinds()
    for number, tensor in enumerate(tensors):
        if number % 3:
            machine.put(tensor, number % 2)
    expected = expected_copies(tensors)
    copied = Snapshot(LiveJobs.of(write_jobs(tensors)), [True] * len(tensors), Watch(), HostBuffers(), None)
    assert not copied.is_complete
    assert (machine.log, machine.n_follows) == (["pin"], 2)
    copied.complete()
    assert machine.log == ["pin", "start 0", "start 1", "wait 0", "wait 1"]
    assert machine.n_follows == 2
    assert_copied(copied, tensors, expected)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_snapshot_joins_small_tensors_on_their_gpu(machine: Machine, deferred: bool) -> None:
    kinds = [torch.randn(7, 3), torch.randn(5).to(torch.bfloat16), torch.tensor(3), torch.randn(6, 5).t()]
    tensors = [kind.clone() for kind in kinds for _ in range(300)]
    for tensor in tensors:
        machine.put(tensor)
    expected = expected_copies(tensors)
    copied = Snapshot(LiveJobs.of(write_jobs(tensors)), [deferred] * len(tensors), Watch(), HostBuffers(), None)
    copied.complete()
    assert machine.n_copies == 3  # one of each dtype
    assert machine.copied == sum(tensor.nbytes for tensor in tensors)
    assert_copied(copied, tensors, expected)


def test_small_tensors_of_a_gpu_without_memory_are_copied_one_by_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "joined", none_left)
    tensors = [machine.put(tensor) for tensor in (torch.randn(7, 3), torch.randn(()), torch.randn(6, 5).t())]
    expected = expected_copies(tensors)
    copied = Snapshot(LiveJobs.of(write_jobs(tensors)), [False] * 3, Watch(), HostBuffers(), None)
    assert_copied(copied, tensors, expected)


@pytest.mark.parametrize("deferred", [False, True])
def test_small_tensors_of_several_gpus_are_copied_one_by_one(machine: Machine, deferred: bool) -> None:
    tensors = [machine.put(torch.randn(3), number % 2) for number in range(10)]
    expected = expected_copies(tensors)
    copied = Snapshot(LiveJobs.of(write_jobs(tensors)), [deferred] * len(tensors), Watch(), HostBuffers(), None)
    copied.complete()
    assert machine.n_copies == 10
    assert_copied(copied, tensors, expected)


@pytest.mark.parametrize("deferred", [False, True])
def test_memory_is_given_back_when_no_gpu_copies_into_it_any_more(machine: Machine, deferred: bool) -> None:
    machine.fails_at = 1
    buffers = HostBuffers()
    tensors = [machine.put(torch.randn(9), number) for number in range(2)]
    arguments = LiveJobs.of(write_jobs(tensors)), [deferred] * 2, Watch(), buffers, None
    if deferred:
        copied = Snapshot(*arguments)
        copied.complete()
        with pytest.raises(RuntimeError, match="out of memory"):
            copied.jobs()
        copied.release()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            Snapshot(*arguments)
    assert machine.log == ["pin", "start 0", "wait 0"]
    assert buffers.take(64, 128).nbytes == 128  # the same again
