"""Reading and verifying with several threads of a rank."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt import Checkpoint, CorruptCheckpointError, RestoreOptions
from distckpt.cores import cores_of_rank
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.layout.collector import collector_off
from distckpt.storage import parallel_reading, rawio, threads
from distckpt.storage import verify as verifying
from distckpt.storage.checksum import digest
from distckpt.storage.parallel_reading import read_in_threads
from distckpt.storage.threads import Team, share_out
from distckpt.storage.transfer import ReadJob
from distckpt.storage.verify import verify_file
from tests.checkpoint_files import bits
from tests.imitated_gpu import Machine

MIB = 1 << 20


@pytest.fixture(autouse=True)
def little_is_worth_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_reading, "SHARE_NBYTES", MIB)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the threads that have read large jobs; each waits a little for the others."""
    names: set[str] = set()
    call = rawio.read_into

    def read_into(fd: int, buffer: memoryview, offset: int) -> None:
        call(fd, buffer, offset)
        names.add(threading.current_thread().name)
        time.sleep(0.001)

    monkeypatch.setattr(rawio, "read_into", read_into)
    return names


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def stored(fd: int, tensors: list[torch.Tensor], targets: list[torch.Tensor]) -> list[ReadJob]:
    """Write tensors one after the other; the jobs that read them into the targets."""
    jobs, offset = [], 0
    for number, (tensor, target) in enumerate(zip(tensors, targets, strict=True)):
        data, shape = bits(tensor), tuple(tensor.shape)
        assert os.pwrite(fd, data, offset) == len(data)
        jobs.append(ReadJob(f"v{number}", offset, shape, Box.whole(shape), target, digest(data)))
        offset += len(data)
    return jobs


def many() -> list[torch.Tensor]:
    """Large and small ones by turns, packed and not; one is longer than a piece."""
    torch.manual_seed(0)
    large = [torch.randn(1024, 300 + number) for number in range(8)]
    small = [torch.randn(number * 7) for number in range(8)]
    odd = [
        torch.randn(MAX_PIECE_NBYTES // 4 + 9),
        torch.randn(600, 1000).T,
        torch.randn(1200, 500)[:, 3:],
        torch.rand(3),
    ]
    return [*(tensor for pair in zip(large, small, strict=True) for tensor in pair), *odd]


def like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Targets of the same strides, with other values."""
    return [torch.full_like(tensor, -1) for tensor in tensors]


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("distckpt-worker")]


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_threads_read_what_one_does(verify: bool, fd: int, readers: set[str]) -> None:
    tensors = many()
    targets = like(tensors)
    assert not any(torch.equal(*pair) for pair in zip(tensors, targets, strict=True) if pair[0].numel())
    told: list[int] = []
    report = read_in_threads(fd, stored(fd, tensors, targets), verify=verify, progress=told.append, threads=4)
    assert all(torch.equal(*pair) for pair in zip(tensors, targets, strict=True))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    assert (report.bytes_read, report.bytes_verified, sum(told)) == (nbytes, nbytes if verify else 0, nbytes)
    assert len(readers) > 1
    assert no_thread_is_left()


@pytest.mark.parametrize("late", [True, False])
def test_threads_fill_gpus(late: bool, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(late=late)
    machine.install(monkeypatch)
    tensors = many()
    targets = [machine.put(target, number % 2) for number, target in enumerate(like(tensors))]
    jobs = stored(fd, tensors, targets)
    read_in_threads(fd, jobs, verify=True, progress=None, threads=3)
    assert all(torch.equal(*pair) for pair in zip(tensors, targets, strict=True))
    assert machine.n_follows == 3 * 2  # each thread's streams see what the program had begun, and nothing later
    assert sum(buffer.nbytes for buffer in machine.buffers) <= 3 * MAX_PIECE_NBYTES


def test_few_bytes_are_not_worth_a_thread(fd: int, readers: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_reading, "SHARE_NBYTES", 8 * MIB)
    tensors = [torch.rand(MIB), torch.rand(5)]
    targets = like(tensors)
    read_in_threads(fd, stored(fd, tensors, targets), verify=True, progress=None, threads=4)
    assert readers == {threading.current_thread().name}
    assert torch.equal(targets[0], tensors[0])


def test_small_jobs_stay_in_one_thread(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    call = rawio.read_vector

    def read_vector(fd: int, buffers: Any, offset: int) -> None:
        if len(buffers) > 1:  # joined
            names.add(threading.current_thread().name)
        call(fd, buffers, offset)

    monkeypatch.setattr(rawio, "read_vector", read_vector)
    tensors = [torch.rand(100) for _ in range(500)] + [torch.rand(MIB) for _ in range(6)]
    targets = like(tensors)
    read_in_threads(fd, stored(fd, tensors, targets), verify=True, progress=None, threads=3)
    assert names == {threading.current_thread().name}
    assert all(torch.equal(*pair) for pair in zip(tensors, targets, strict=True))


@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("damaged", [0, 1, 4, 15])
def test_damage_that_any_thread_finds_is_raised(damaged: int, fd: int) -> None:
    tensors = [torch.rand(1024, 300) for _ in range(16)]
    jobs = stored(fd, tensors, like(tensors))
    os.pwrite(fd, b"\xff\xff\xff", jobs[damaged].dataset_offset + 1000)
    with pytest.raises(CorruptCheckpointError, match=rf"^v{damaged}: .* are damaged"):
        read_in_threads(fd, jobs, verify=True, progress=None, threads=3)
    assert no_thread_is_left()


def test_a_truncated_file_ends_all_threads(fd: int) -> None:
    tensors = [torch.rand(1024, 300) for _ in range(16)]
    jobs = stored(fd, tensors, like(tensors))
    os.ftruncate(fd, jobs[-1].dataset_offset + 17)
    with pytest.raises(CorruptCheckpointError, match=r"^v15: the file is truncated"):
        read_in_threads(fd, jobs, verify=True, progress=None, threads=3)
    assert no_thread_is_left()


@pytest.mark.parametrize("n_started", [0, 1])
def test_a_system_without_more_threads_reads_with_those_there_are(
    n_started: int, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = ThreadPoolExecutor.submit, []

    def refuse(self: ThreadPoolExecutor, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > n_started:
            raise RuntimeError("can't start new thread")
        return submit(self, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    tensors = many()
    targets = like(tensors)
    read_in_threads(fd, stored(fd, tensors, targets), verify=True, progress=None, threads=4)
    assert len(calls) == n_started + 1
    assert all(torch.equal(*pair) for pair in zip(tensors, targets, strict=True))


def test_threads_have_the_mode_of_their_caller(fd: int) -> None:
    """Tensors that inference mode has made change in that mode only."""
    with torch.inference_mode():
        tensors = [torch.rand(1000, 1000).T for _ in range(6)]
        targets = like(tensors)
        read_in_threads(fd, stored(fd, tensors, targets), verify=True, progress=None, threads=3)
    assert all(torch.equal(*pair) for pair in zip(tensors, targets, strict=True))


# ---- sharing jobs out --------------------------------------------------------------------------------------------


def test_each_job_is_done_once() -> None:
    done: list[int] = []

    def work(jobs: Iterator[int]) -> None:
        for job in jobs:
            time.sleep(0.0001)
            done.append(job)

    share_out(range(100, 110), range(100), [work] * 4)
    assert sorted(done) == list(range(110))


def test_the_first_failure_ends_the_others() -> None:
    done: list[int] = []

    def work(jobs: Iterator[int]) -> None:
        for job in jobs:
            if job == 5:
                raise ValueError(job)
            time.sleep(0.001)
            done.append(job)

    with pytest.raises(ValueError, match="5"):
        share_out((), range(10_000), [work] * 3)
    assert len(done) < 100
    assert no_thread_is_left()


def test_one_worker_needs_no_thread() -> None:
    names: list[str] = []
    share_out([1], [2, 3], [lambda jobs: names.extend(threading.current_thread().name for _ in jobs)])
    assert names == [threading.current_thread().name] * 3


# ---- a whole restore ---------------------------------------------------------------------------------------------


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"v{number}": torch.randn(700, 600) for number in range(8)} | {"small": torch.randn(9)}


def test_a_restore_with_threads(tmp_path: Path, readers: set[str]) -> None:
    saved, live = state(0), state(1)
    path = Checkpoint(state=saved).save(tmp_path / "a")
    assert not torch.equal(live["v3"], saved["v3"])
    status = Checkpoint(state=live).restore(path, options=RestoreOptions(threads=3))
    status.assert_consumed()
    assert all(torch.equal(live[key], saved[key]) for key in saved)
    assert len(readers) > 1


def test_a_restore_with_one_thread(tmp_path: Path, readers: set[str]) -> None:
    saved, live = state(0), state(1)
    path = Checkpoint(state=saved).save(tmp_path / "a")
    Checkpoint(state=live).restore(path, options=RestoreOptions(threads=1)).assert_consumed()
    assert all(torch.equal(live[key], saved[key]) for key in saved)
    assert readers == {threading.current_thread().name}


def test_by_default_there_is_a_thread_per_core(
    tmp_path: Path, readers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores_of_rank", lambda _: 3)
    saved, live = state(0), state(1)
    path = Checkpoint(state=saved).save(tmp_path / "a")
    Checkpoint(state=live).restore(path).assert_consumed()
    assert all(torch.equal(live[key], saved[key]) for key in saved)
    assert len(readers) > 1


def test_targets_that_share_memory_are_read_in_order(tmp_path: Path, readers: set[str]) -> None:
    """Two threads would mix them, and find the mixture damaged."""
    saved = state(0)
    memory = torch.zeros(700, 600)
    live = state(1) | {"v3": memory, "v5": memory.view(600, 700).view(700, 600)}
    path = Checkpoint(state=saved).save(tmp_path / "a")
    Checkpoint(state=live).restore(path, options=RestoreOptions(threads=3, strict=False))
    assert any(torch.equal(memory, saved[key]) for key in ("v3", "v5"))
    assert torch.equal(live["v7"], saved["v7"])
    assert readers == {threading.current_thread().name}


def test_a_reader_without_live_objects(tmp_path: Path, readers: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores_of_rank", lambda _: 3)
    tensor = torch.randn(3 * MAX_PIECE_NBYTES // 4)
    path = Checkpoint(state={"large": tensor}).save(tmp_path / "a")
    with distckpt.load_checkpoint(path) as reader:
        assert torch.equal(reader["state/large"].read(), tensor)
    assert len(readers) > 1


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2"])
def test_the_number_of_threads_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^threads: expected an integer >= 1\. Got"):
        RestoreOptions(threads=value)


# ---- verifying ---------------------------------------------------------------------------------------------------


def test_threads_verify_a_file(tmp_path: Path, readers: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "threads_of_rank", lambda _: 4)
    path = Checkpoint(state=state(0)).save(tmp_path / "a")
    told: list[int] = []
    assert verify_file(path, progress=told.append) == []
    assert sum(told) >= sum(tensor.nbytes for tensor in state(0).values())
    assert len(readers) > 1


def test_all_damage_is_found_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "threads_of_rank", lambda _: 4)
    saved = state(0)
    path = Checkpoint(state=saved).save(tmp_path / "a")
    content = Path(path).read_bytes()
    damaged = ["v0", "v2", "v5", "v7", "small"]
    with Path(path).open("r+b") as file:
        for key in damaged:
            file.seek(content.index(bits(saved[key])))
            file.write(b"\xff\xff")
    found = [problem.split(":")[0] for problem in verify_file(path)]
    assert found == [f"state/{key}" for key in damaged]
    assert no_thread_is_left()


# ---- what decides how many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "cores", "ranks", "expected"),
    [
        (16, 16, 2, 8),  # not bound
        (1, 16, 2, 1),  # to a core
        (64, 128, 8, 16),  # to half of the node, with three other ranks
        (16, 128, 8, 16),  # to cores of its own
        (2, 2, 4, 1),  # more ranks than cores
    ],
)
def test_the_cores_of_a_rank(
    bound: int, cores: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert cores_of_rank(ranks) == expected


# ---- teams -------------------------------------------------------------------------------------------------------


def test_a_team_does_all_parts_of_each_step_before_the_next() -> None:
    done: list[tuple[int, int]] = []
    names: set[str] = set()

    def part(step: int, number: int) -> None:
        time.sleep(0.002 * number)
        names.add(threading.current_thread().name)
        done.append((step, number))

    with Team(3) as team:
        for step in range(5):
            team.do(partial(part, step))
            assert sorted(done) == [(number // 3, number % 3) for number in range(3 * (step + 1))]
    assert len(names) > 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("distckpt-team")]


def test_a_team_of_one_uses_this_thread() -> None:
    names: list[str] = []
    with Team(1) as team:
        team.do(lambda number: names.append(f"{number} {threading.current_thread().name}"))
    assert names == [f"0 {threading.current_thread().name}"]


def test_the_error_of_a_part_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def part(number: int) -> None:
        if number == 0:
            raise OSError("no luck")
        time.sleep(0.02)
        ended.append(number)

    with Team(3) as team:
        begun = set(ended)
        with pytest.raises(OSError, match="no luck"):
            team.do(part)
        after = list(ended)
        time.sleep(0.05)
        assert ended == after  # nothing goes on
        assert begun == set()
        team.do(ended.append)  # the next step finds the team in order
    assert set(ended) >= {0, 1, 2}


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_error_of_a_team_keeps_nothing_alive(n_threads: int) -> None:
    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)

    def part(_: int, own: Held) -> None:
        assert own
        raise OSError("no luck")

    with collector_off():
        with Team(n_threads) as team, pytest.raises(OSError, match="no luck"):
            team.do(partial(part, own=held))
        del held
        assert alive() is None


def test_a_team_whose_threads_cannot_start_does_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with Team(4) as team:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            team.do(done.append)
        assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("inference", [False, True])
def test_the_modes_of_torch_hold_in_all_threads_of_a_team(inference: bool) -> None:
    modes: list[tuple[bool, bool]] = []

    def part(_: int) -> None:
        time.sleep(0.005)
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode(inference), Team(3) as team:
        team.do(part)
    assert modes == [(inference, False)] * 3
