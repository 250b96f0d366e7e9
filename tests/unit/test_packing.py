"""Small variables that are packed, against the same jobs written one by one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout.aggregation import BIN_NBYTES, SMALL_NBYTES
from distckpt.layout.box import Box
from distckpt.storage import packing as packing_module
from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.packing import Jobs, LiveJobs, write_bundles
from distckpt.storage.snapshot import Snapshot, Watch
from distckpt.storage.staging import HostBuffers
from distckpt.storage.transfer import WriteJob
from distckpt.storage.writing import write_posix
from distckpt.tensor_bytes import bytes_of, join
from tests.imitated_gpu import Machine

DTYPES = (
    torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.uint4, torch.float4_e2m1fn_x2,
)  # fmt: skip
KINDS = ("packed", "strided", "scalar", "lazy", "parameter", "empty", "cut", "large")


def of_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaNs with a payload among them."""
    numel = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, numel * dtype.itemsize).astype(np.uint8)
    if dtype is torch.bool:
        raw &= 1
    return torch.from_numpy(raw).view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype)


def tensor_of(kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    if kind == "scalar":
        return of_bits((1,), dtype, seed)[0]
    if kind == "empty":
        return of_bits((3, 0), dtype, seed)
    if kind == "large":
        return of_bits((70, 1000), dtype, seed)
    tensor = of_bits((2 + seed % 3, 5), dtype, seed)
    if kind == "strided":
        return of_bits((5, 4), dtype, seed).t()
    if kind == "parameter" and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    if kind == "lazy" and tensor.is_complex():
        return tensor.conj()
    if kind == "lazy" and dtype is torch.float32:
        return of_bits((4, 5), torch.complex64, seed).conj().imag
    return tensor


@st.composite
def job_lists(draw: st.DrawFn) -> list[WriteJob]:
    """Disjoint boxes in file order; gaps between some, one of them to another bin."""
    drawn = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(0, 9)), max_size=20))
    far = draw(st.integers(0, 20))
    jobs: list[WriteJob] = []
    offset, checksum = 16, 0
    for number, (kind, dtype, seed) in enumerate(drawn):
        tensor = tensor_of(kind, dtype, seed)
        shape = tuple(tensor.shape)
        offset += (0, 0, 0, 3)[seed % 4] + BIN_NBYTES * (number == far)
        box, whole = Box.whole(shape), shape
        if kind == "cut":  # other ranks have the rows around it
            whole, box = (shape[0] + 2, *shape[1:]), Box((1, *(0 for _ in shape[1:])), shape)
        jobs.append(WriteJob(f"v{number}", offset, whole, box, tensor, checksum))
        offset += int(np.prod(whole)) * dtype.itemsize
        checksum += 1 + seed % 2
    return jobs


def written(path: Path, jobs: LiveJobs, source: Jobs, *, packed: bool) -> tuple[bytes, dict[int, int]]:
    """The file and the checksums: with packing, or without."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        indices = jobs.packing.others if packed else range(len(jobs.tensors))
        log = write_posix(fd, [source[index] for index in indices], checksums=True)
        if packed:
            write_bundles(fd, source, jobs.packing.bundles.values(), log)
        return path.read_bytes(), dict(zip(log.indices, log.values, strict=True))
    finally:
        os.close(fd)


@given(job_lists())
def test_packed_or_not_the_file_and_the_checksums_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, listed: list[WriteJob]
) -> None:
    path = tmp_path_factory.getbasetemp() / "packed"
    jobs = LiveJobs.of(listed)
    assert [jobs[index].key for index in range(len(listed))] == [job.key for job in listed]
    expected = written(path, jobs, jobs, packed=False)
    assert written(path, jobs, jobs, packed=True) == expected
    snapshot = Snapshot(jobs, [index % 3 == 0 for index in range(len(listed))], Watch(), HostBuffers(), None)
    snapshot.complete()
    copies = snapshot.jobs()
    assert written(path, jobs, copies, packed=True) == expected
    assert written(path, jobs, copies, packed=False) == expected
    snapshot.release()


def scalars(n: int, *, dtype: torch.dtype = torch.float32) -> list[WriteJob]:
    return [
        WriteJob(f"s{i}", dtype.itemsize * i, (1,), Box.whole((1,)), torch.full((1,), i, dtype=dtype), i)
        for i in range(n)
    ]


def test_neighbours_are_one_write_and_few_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = LiveJobs.of(scalars(5000))
    calls: list[str] = []
    monkeypatch.setattr(packing_module, "join", lambda *args: (calls.append("join"), join(*args)))
    write_all = rawio.write_all
    monkeypatch.setattr(rawio, "write_all", lambda *args: (calls.append("write"), write_all(*args)))
    content, _ = written(tmp_path / "file", jobs, jobs, packed=True)
    assert np.array_equal(np.frombuffer(content, np.float32), np.arange(5000))
    assert calls == ["join", "write"]


def test_what_is_small() -> None:
    def job(key: str, shape: tuple[int, ...], box: Box) -> WriteJob:
        return WriteJob(key, 0, shape, box, torch.zeros(box.shape), 0)

    limit = SMALL_NBYTES // 4
    packing = LiveJobs.of([
        job("small", (limit - 1,), Box.whole((limit - 1,))),
        job("large", (limit,), Box.whole((limit,))),
        job("part of a large one", (limit,), Box((0,), (3,))),
        job("columns", (4, 6), Box((0, 0), (4, 3))),
        job("empty", (4, 0), Box.whole((4, 0))),
        job("no part", (4, 6), Box((0, 0), (0, 6))),
    ]).packing  # fmt: skip
    assert packing.others == [1, 2, 3, 4, 5]
    assert [row.jobs for bundle in packing.bundles.values() for row in bundle.rows] == [[0]]


def test_rows_are_short_enough_for_one_thread() -> None:
    rows = [row for bundle in LiveJobs.of(scalars(100_000)).packing.bundles.values() for row in bundle.rows]
    assert max(row.numel for row in rows) < 1 << 15
    assert sum(row.numel for row in rows) == 100_000
    assert len(rows) == 4


@pytest.mark.parametrize("late", [False, True])
def test_parts_on_gpus_are_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    machine = Machine(late=late)
    jobs = LiveJobs.of(scalars(3000, dtype=torch.int16))
    expected = written(tmp_path / "file", jobs, jobs, packed=True)
    for number in range(0, 3000, 7):
        machine.put(jobs.tensors[number], number % 2)
    machine.install(monkeypatch)
    assert written(tmp_path / "file", jobs, jobs, packed=True) == expected
    assert machine.copied == 2 * len(range(0, 3000, 7))


@pytest.mark.parametrize("late", [False, True])
def test_parts_of_one_gpu_are_joined_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    machine = Machine(late=late)
    jobs = LiveJobs.of(scalars(3000, dtype=torch.int16))
    expected = written(tmp_path / "file", jobs, jobs, packed=True)
    for tensor in jobs.tensors:
        machine.put(tensor, 1)
    machine.install(monkeypatch)
    assert written(tmp_path / "file", jobs, jobs, packed=True) == expected
    assert (machine.copied, machine.n_copies) == (6000, 1)


def test_an_error_of_the_disk_names_a_variable(tmp_path: Path) -> None:
    jobs = LiveJobs.of(scalars(5))
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"s0 and other small variables, 20 bytes at byte 0 of the checkpoint"):
            write_bundles(fd, jobs, jobs.packing.bundles.values(), ChecksumLog())
    finally:
        os.close(fd)


def is_cat(func: Any) -> bool:
    return "cat" in str(func)


class NoFunction(torch.Tensor):
    """A subclass of the program's that does not let itself be concatenated."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_cat(func):
            raise TypeError("no cat")
        return super().__torch_function__(func, types, args, kwargs or {})


class NoDispatch(torch.Tensor):
    """The same, one level below."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_cat(func):
            raise TypeError("no cat")
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.mark.parametrize("subclass", [NoFunction, NoDispatch])
def test_subclasses_have_no_say_in_packing(tmp_path: Path, subclass: type[torch.Tensor]) -> None:
    listed = scalars(5)
    expected = bytes(bytes_of(torch.cat([job.tensor for job in listed])))
    jobs = LiveJobs.of([msgspec.structs.replace(job, tensor=job.tensor.as_subclass(subclass)) for job in listed])
    content, _ = written(tmp_path / "file", jobs, jobs, packed=True)
    assert content == expected
