from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import MAX_PIECE_NBYTES, Box, is_contiguous, pieces, runs
from distckpt.storage import filling, mpio, rawio, reading, scratch
from distckpt.storage.filling import STEP_NBYTES
from distckpt.storage.reading import read
from distckpt.storage.transfer import ReadJob, WriteJob
from distckpt.storage.writing import write_posix
from distckpt.tensor_bytes import copy_bits
from tests.checkpoint_files import Tensors, bits, load, part, same_bits, save, twins

BASE = 123  # position of the dataset in the file


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def write_job(tensor: torch.Tensor, box: Box, shape: tuple[int, ...], checksum: int = 0) -> WriteJob:
    return WriteJob("key", BASE, shape, box, tensor, checksum)


def read_job(tensor: torch.Tensor, box: Box, shape: tuple[int, ...], expected: int | None = None) -> ReadJob:
    return ReadJob("key", BASE, shape, box, tensor, expected)


def whole(tensor: torch.Tensor) -> Box:
    return Box.whole(tuple(tensor.shape))


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 1] = tensor
    backwards = list(reversed(range(tensor.ndim)))
    turned = tensor.permute(backwards).contiguous().permute(backwards)
    return {"packed": tensor, "every second": wide[..., 1], "column-major": turned}


class Counted:
    """A system call that counts its calls and the bytes moved."""

    def __init__(self, call: Callable[..., int]) -> None:
        self.call, self.calls, self.nbytes = call, 0, 0
        self.__name__ = call.__name__

    def __call__(self, *args: Any) -> int:
        self.calls += 1
        count = self.call(*args)
        self.nbytes += count
        return count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    calls = {name: Counted(getattr(os, name)) for name in ("pwrite", "pwritev", "preadv")}
    for name, call in calls.items():
        monkeypatch.setattr(os, name, call)
    return calls


# ---- any box, any strides


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A non-empty box of a shape."""
    offset, extents = [], []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        offset.append(start)
        extents.append(draw(st.integers(1, size - start)))
    return Box(tuple(offset), tuple(extents))


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    return shape, draw(boxes(shape))


@given(shapes_and_boxes())
def test_is_contiguous_means_one_run(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    assert is_contiguous(box, shape) == (len(runs(box, shape).starts) == 1)


@settings(max_examples=60, deadline=None)
@given(shapes_and_boxes(), st.sampled_from(["packed", "every second", "column-major"]), st.booleans(), st.data())
def test_boxes_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, ...], Box],
    strides: str,
    few: bool,
    data: st.DataObject,
) -> None:
    """Writes one box into a file of other values, reads another one back."""
    shape, box = case
    other = data.draw(boxes(shape))
    generator = torch.Generator().manual_seed(3)
    expected = torch.randint(-9, 9, shape, dtype=torch.int32, generator=generator)
    values = torch.randint(10, 99, box.shape, dtype=torch.int32, generator=generator)
    path = tmp_path_factory.mktemp("file") / "file"
    path.write_bytes(bytes(BASE) + bits(expected))
    part(expected, box).copy_(values)
    fd = os.open(path, os.O_RDWR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "_FEW_RUNS", 64 if few else 1)
        for module in (filling, reading):
            patch.setattr(module, "STEP_NBYTES", 40)
        log = write_posix(fd, [write_job(layouts(values)[strides], box, shape, 5)], checksums=True)
        assert path.read_bytes() == bytes(BASE) + bits(expected)
        assert (list(log.indices), list(log.values)) == ([5], [xxhash.xxh3_64_intdigest(bits(values))])
        target = layouts(torch.full(other.shape, -1, dtype=torch.int32))[strides]
        digest = xxhash.xxh3_64_intdigest(bits(part(expected, other)))
        report = read(fd, [read_job(target, other, shape, digest)], verify=True)
    os.close(fd)
    assert torch.equal(target, part(expected, other))
    assert report.bytes_verified == other.numel * 4
    assert not few or report.bytes_read == other.numel * 4


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((6 << 20,), Box((0,), (6 << 20,))),
        ((3 << 20, 2), Box((5, 0), ((3 << 20) - 9, 2))),
        ((3000, 2000), Box((0, 7), (3000, 1900))),
        ((3, 2000, 700), Box((0, 5, 1), (3, 1800, 698))),
        ((200000, 8), Box((3, 2), (199990, 3))),
        ((2, 5 << 20), Box((0, 1), (2, (5 << 20) - 1))),
    ],
    ids=["flat", "rows", "columns", "blocks", "narrow", "long rows"],
)
@pytest.mark.parametrize("strides", ["packed", "every second"])
def test_large_boxes_are_moved_in_pieces(fd: int, shape: tuple[int, ...], box: Box, strides: str) -> None:
    values = torch.rand(shape)
    os.pwrite(fd, bits(torch.zeros(shape)), BASE)
    source = layouts(part(values, box).contiguous())[strides]
    log = write_posix(fd, [write_job(source, box, shape, 3)], checksums=True)
    found = pieces(box, 4)
    assert list(log.indices) == list(range(3, 3 + len(found)))
    assert all(piece.numel * 4 <= MAX_PIECE_NBYTES for piece in found)
    assert list(log.values) == [xxhash.xxh3_64_intdigest(bits(part(values, piece))) for piece in found]
    targets = [layouts(torch.zeros(piece.shape))[strides] for piece in found]
    jobs = [
        read_job(target, piece, shape, value) for target, piece, value in zip(targets, found, log.values, strict=True)
    ]
    report = read(fd, jobs, verify=True)
    assert report.bytes_verified == box.numel * 4
    assert all(torch.equal(target, part(values, piece)) for target, piece in zip(targets, found, strict=True))
    unverified = layouts(torch.zeros(box.shape))[strides]
    read(fd, [read_job(unverified, box, shape)], verify=True)
    assert torch.equal(unverified, part(values, box))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(5, dtype=torch.complex64).conj(),
        lambda: torch.randn(5, dtype=torch.complex64).conj().imag,
        lambda: torch.nn.Parameter(torch.randn(3, 4)),
        lambda: torch.randn(3, 4, requires_grad=True).T,
        lambda: torch.randn(4, 1).expand(4, 3),
        lambda: torch.tensor(5),
        lambda: torch.empty(0, 3),
        lambda: torch.randn(10)[3:8],
    ],
    ids=["conjugate", "negative", "parameter", "transposed", "expanded", "scalar", "empty", "view"],
)
def test_special_tensors(fd: int, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    write_posix(fd, [write_job(tensor, whole(tensor), tuple(tensor.shape))], checksums=True)
    assert os.pread(fd, 1000, BASE) == bits(tensor.detach().clone().resolve_conj().resolve_neg())


def test_reading_into_special_tensors(fd: int) -> None:
    values = torch.randn(3, 4)
    write_posix(fd, [write_job(values, whole(values), (3, 4))], checksums=True)
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    read(fd, [read_job(parameter, whole(values), (3, 4))], verify=True)
    assert torch.equal(parameter, values)
    rows = torch.zeros(4, 3, requires_grad=True)
    read(fd, [read_job(rows.T, whole(values), (3, 4))], verify=True)
    assert torch.equal(rows.T, values)
    with torch.inference_mode():
        frozen = torch.zeros(3, 4)
    read(fd, [read_job(frozen, whole(values), (3, 4))], verify=True)
    assert torch.equal(frozen, values)
    conjugate = torch.zeros(3, 2, dtype=torch.complex64).conj()
    read(fd, [read_job(conjugate, Box((0, 0), (3, 2)), (3, 2))], verify=True)
    assert torch.equal(conjugate.resolve_conj(), torch.view_as_complex(values.view(3, 2, 2)))


@pytest.mark.parametrize("n_elements", [10, 1 << 20])
def test_autograd_sees_that_a_tensor_changed(fd: int, n_elements: int) -> None:
    values = torch.rand(n_elements)
    write_posix(fd, [write_job(values, whole(values), (n_elements,))], checksums=False)
    weight = torch.zeros(n_elements, requires_grad=True)
    loss = (weight * weight).sum()
    read(fd, [read_job(weight, whole(values), (n_elements,))], verify=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- number of system calls


def test_neighbours_are_joined(fd: int, counted: dict[str, Counted]) -> None:
    tensors = [torch.rand(17) for _ in range(3000)]
    jobs = [WriteJob(f"{i}", i * 68, (17,), whole(tensor), tensor, i) for i, tensor in enumerate(tensors)]
    log = write_posix(fd, jobs, checksums=True)
    assert counted["pwritev"].calls == math.ceil(3000 / rawio.MAX_VECTORS)
    assert counted["pwrite"].calls == 0
    log.write(fd, 1 << 20)
    assert counted["pwrite"].calls == 1
    targets = [torch.zeros(17) for _ in range(3000)]
    reads = [ReadJob(f"{i}", i * 68, (17,), whole(target), target, log.values[i]) for i, target in enumerate(targets)]
    report = read(fd, reads, verify=True)
    assert counted["preadv"].calls == math.ceil(3000 / rawio.MAX_VECTORS)
    assert report.bytes_read == report.bytes_verified == counted["preadv"].nbytes == 3000 * 68
    assert all(torch.equal(target, tensor) for target, tensor in zip(targets, tensors, strict=True))


def test_strided_neighbours_are_staged_and_joined(fd: int, counted: dict[str, Counted]) -> None:
    tensors = [torch.rand(17, 2)[:, 0] for _ in range(500)]
    jobs = [WriteJob(f"{i}", i * 68, (17,), whole(tensor), tensor, i) for i, tensor in enumerate(tensors)]
    log = write_posix(fd, jobs, checksums=True)
    assert counted["pwritev"].calls == 1
    targets = [torch.zeros(17, 3)[:, 1] for _ in range(500)]
    reads = [ReadJob(f"{i}", i * 68, (17,), whole(target), target, log.values[i]) for i, target in enumerate(targets)]
    read(fd, reads, verify=True)
    assert counted["preadv"].calls == 1
    assert all(torch.equal(target, tensor) for target, tensor in zip(targets, tensors, strict=True))


def test_jobs_may_be_made_on_the_way(fd: int) -> None:
    """Each tensor lives until it is written, though nobody else holds it."""
    jobs = (WriteJob("x", i * 4000, (1000,), Box((0,), (1000,)), torch.full((1000,), float(i)), i) for i in range(500))
    write_posix(fd, jobs, checksums=True)
    expected = torch.arange(500.0).repeat_interleave(1000)
    assert os.pread(fd, 1 << 22, 0) == bits(expected)


def test_more_strided_bytes_than_the_staging_buffer_holds(fd: int) -> None:
    tensors = [torch.rand(3 << 18, 2)[:, 0] for _ in range(9)]
    jobs = [WriteJob(f"{i}", i * (3 << 20), (3 << 18,), whole(tensor), tensor, i) for i, tensor in enumerate(tensors)]
    log = write_posix(fd, jobs, checksums=True)
    assert list(log.values) == [xxhash.xxh3_64_intdigest(bits(tensor)) for tensor in tensors]
    assert os.pread(fd, 30 << 20, 0) == b"".join(bits(tensor) for tensor in tensors)


def test_only_what_is_needed_is_read(fd: int, counted: dict[str, Counted]) -> None:
    values = torch.rand(64, 3000)
    write_posix(fd, [write_job(values, whole(values), (64, 3000))], checksums=False)
    for box in (Box((3, 0), (5, 3000)), Box((0, 100), (64, 1500)), Box((60, 2999), (4, 1))):
        counted["preadv"].nbytes = 0
        target = torch.zeros(box.shape)
        report = read(fd, [read_job(target, box, (64, 3000))], verify=True)
        assert report.bytes_read == counted["preadv"].nbytes == box.numel * 4
        assert torch.equal(target, part(values, box))


def test_narrow_strips_are_read_by_the_page(fd: int, counted: dict[str, Counted]) -> None:
    values = torch.rand(100000, 16)
    write_posix(fd, [write_job(values, whole(values), (100000, 16))], checksums=False)
    box = Box((0, 3), (100000, 1))
    target = torch.zeros(box.shape)
    report = read(fd, [read_job(target, box, (100000, 16))], verify=True)
    assert torch.equal(target, part(values, box))
    assert counted["preadv"].calls < 50
    assert report.bytes_read == counted["preadv"].nbytes < values.nbytes


# ---- where the copies are fast


def at(behind: int, nbytes: int) -> torch.Tensor:
    """Zeros whose memory begins so many bytes behind the position `BASE` of a file, modulo a page."""
    room = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    return room[(BASE + behind - room.data_ptr()) % 4096 :][:nbytes]


@pytest.mark.parametrize("verify", [False, True])
def test_no_read_goes_to_just_behind_its_source(fd: int, monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    monkeypatch.setattr(scratch, "_SLOW_NBYTES", 32)
    values = torch.randint(0, 256, (STEP_NBYTES * 3 + 5,), dtype=torch.uint8)
    rawio.write_all(fd, memoryview(values.numpy()), BASE)
    expected = xxhash.xxh3_64_intdigest(values.numpy())
    distances: list[int] = []
    preadv = os.preadv

    def watch(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        distances.extend((np.frombuffer(buffer, np.uint8).ctypes.data - offset) % 4096 for buffer in buffers)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watch)
    for behind in (0, 1, 16, 31, 32, 4095):
        distances.clear()
        target = at(behind, len(values))
        report = read(fd, [read_job(target, whole(target), (len(target),), expected)], verify=verify)
        assert torch.equal(target, values)
        assert (report.bytes_read, report.bytes_verified) == (len(values), len(values) * verify)
        assert set(distances) == ({64} if 0 < behind < 32 else {behind})


def test_a_detour_ends_early_like_any_read(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_SLOW_NBYTES", 32)
    os.ftruncate(fd, BASE + STEP_NBYTES + 7)
    target = at(16, 2 * STEP_NBYTES)
    with pytest.raises(CorruptCheckpointError, match=r"^key: "):
        read(fd, [read_job(target, whole(target), (len(target),))], verify=True)


# ---- transports


def test_why_parallel_hdf5_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Serial:
        mpi = False

    monkeypatch.setattr(h5py, "get_config", Serial)
    assert "was built without MPI" in str(mpio.why_unavailable())
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "h5py cannot be imported" in str(mpio.why_unavailable())


# ---- errors


def test_a_wrong_checksum_names_the_variable(fd: int) -> None:
    for n_elements in (10, 1 << 20):
        values = torch.rand(n_elements)
        write_posix(fd, [write_job(values, whole(values), (n_elements,))], checksums=False)
        jobs = [read_job(torch.zeros(n_elements), whole(values), (n_elements,), 17)]
        with pytest.raises(
            CorruptCheckpointError,
            match=rf"key: the {4 * n_elements} bytes of the piece of shape .*Expected checksum 0000000000000011. Got ",
        ):
            read(fd, jobs, verify=True)
        report = read(fd, jobs, verify=False)
        assert (report.bytes_read, report.bytes_verified) == (4 * n_elements, 0)


@pytest.mark.parametrize("n_elements", [10, 1 << 20])
def test_a_file_that_ends_early_names_the_variable(fd: int, n_elements: int) -> None:
    os.ftruncate(fd, BASE + 4 * n_elements - 1)
    with pytest.raises(CorruptCheckpointError, match="key: the file is truncated"):
        read(fd, [read_job(torch.zeros(n_elements), Box((0,), (n_elements,)), (n_elements,))], verify=True)


@pytest.mark.parametrize("box", [Box((0, 0), (8, 8)), Box((0, 1), (8, 3))], ids=["contiguous", "strided"])
def test_a_full_disk_names_the_variable(fd: int, monkeypatch: pytest.MonkeyPatch, box: Box) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match=r"No space left on device: key, \d+ bytes at byte 12[37]") as raised:
        write_posix(fd, [write_job(torch.rand(box.shape), box, (8, 8))], checksums=True)
    assert raised.value.errno == errno.ENOSPC


def test_transient_errors_are_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: Tensors = {f"{i}": torch.rand(300 + i) for i in range(20)}
    monkeypatch.setattr(rawio.time, "sleep", lambda _: None)
    failures = iter([True, False] * 10000)

    def sometimes(call: Callable[..., int]) -> Callable[..., int]:
        def wrapper(*args: Any) -> int:
            if next(failures):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return wrapper

    for name in ("pwrite", "pwritev", "preadv"):
        monkeypatch.setattr(os, name, sometimes(getattr(os, name)))
    before = rawio.retries.count
    save(tmp_path / "file.h5", saved, n_ranks=2)
    restored = twins(saved)
    load(tmp_path / "file.h5", restored)
    assert all(same_bits(restored[key], tensor) for key, tensor in saved.items())
    assert rawio.retries.count > before


# ---- progress and memory


def test_progress_counts_every_byte(fd: int) -> None:
    values = torch.rand(3 << 20)
    strided = torch.rand(100, 50)
    jobs = [write_job(values, whole(values), (3 << 20,)), write_job(strided[:, :7], Box((0, 3), (100, 7)), (100, 50))]
    done: list[int] = []
    write_posix(fd, jobs, checksums=True, progress=done.append)
    assert sum(done) == values.nbytes + 2800
    done.clear()
    read(fd, [read_job(job.tensor, job.box, job.global_shape) for job in jobs], verify=True, progress=done.append)
    assert sum(done) == values.nbytes + 2800


def test_little_memory_beyond_the_tensors(tmp_path: Path) -> None:
    """Whatever the size, strides and direction: 64 MiB at most. Measured in a process of its own."""
    code = f"""
import os, torch
from distckpt.layout.box import Box
from distckpt.storage.reading import read
from distckpt.storage.transfer import ReadJob, WriteJob
from distckpt.storage.writing import write_posix
fd = os.open({str(tmp_path / "file")!r}, os.O_RDWR | os.O_CREAT)
shape = (8 << 20, 8)
tensor = torch.ones(shape)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10
write_posix(fd, [WriteJob("w", 0, shape, Box((0, 0), (9, 8)), tensor[:9].T.contiguous().T, 0)], checksums=True)
read(fd, [ReadJob("w", 0, shape, Box((0, 0), (9, 8)), tensor[:9].T, None)][:0], verify=True)
before = peak()
write_posix(fd, [WriteJob("w", 0, shape, Box.whole(shape), tensor, 0)], checksums=True)
write_posix(fd, [WriteJob("w", 0, shape, Box.whole(shape), tensor.view(8, 8 << 20).T, 0)], checksums=True)
read(fd, [ReadJob("w", 0, shape, Box.whole(shape), tensor, None)], verify=True)
read(fd, [ReadJob("w", 0, shape, Box.whole(shape), tensor.view(8, 8 << 20).T, 7)], verify=False)
column = Box((0, 3), (8 << 20, 1))
read(fd, [ReadJob("w", 0, shape, column, tensor[:, :1], None)], verify=True)
half = tensor.view(-1)[:1 << 20].view(1 << 20, 1)
write_posix(fd, [WriteJob("w", 0, shape, Box((0, 3), (1 << 20, 1)), half, 0)], checksums=True)
small = peak() - before
buffer = bytearray(b"x") * (200 << 20)
print(small, peak() - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True, env=environment
    )
    peak, peak_with_a_large_buffer = map(int, done.stdout.split())
    assert peak <= 64
    assert peak_with_a_large_buffer >= 150


def test_memory_that_is_not_aligned_is_copied() -> None:
    """A piece of a file begins anywhere in a buffer; torch itself crashes on complex128 there."""
    for dtype in (torch.complex128, torch.float64, torch.complex64, torch.bfloat16):
        for shift in range(1, 17):
            buffer = torch.zeros(7 * dtype.itemsize + 16, dtype=torch.uint8)
            memory = buffer.numpy()[shift : shift + 7 * dtype.itemsize]
            memory[:] = range(7 * dtype.itemsize)
            target = torch.zeros(7, dtype=dtype)
            copy_bits(target, torch.frombuffer(memory, dtype=dtype))
            assert target.view(torch.uint8).tolist() == list(range(7 * dtype.itemsize))
