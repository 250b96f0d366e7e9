from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import CheckpointError, CorruptCheckpointError
from distckpt.storage import rawio
from tests.bare import bare


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rawio.time, "sleep", lambda _: None)


def short(call: Callable[..., int], most: int) -> Callable[..., int]:
    """A system call that moves at most `most` bytes."""

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        return call(fd, data[:most], offset)

    return pwrite


def short_vector(call: Callable[..., int], most: int) -> Callable[..., int]:
    """As `short`, for calls that take several buffers."""

    def vector(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        cut, room = [], most
        for buffer in buffers:
            cut.append(buffer[:room])
            room -= len(cut[-1])
        return call(fd, cut, offset)

    return vector


class Failing:
    """A system call that fails a number of times before it works."""

    def __init__(self, call: Callable[..., int], code: int, times: int) -> None:
        self.call, self.code, self.times = call, code, times
        self.__name__ = call.__name__

    def __call__(self, *args: Any) -> int:
        if self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.call(*args)


def data(nbytes: int) -> memoryview:
    return memoryview(bytes(i % 251 for i in range(nbytes)))


# ---- transfers


def test_short_writes_are_completed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", short(os.pwrite, 7))
    rawio.write_all(fd, data(100), 3)
    assert os.pread(fd, 200, 0) == b"\0\0\0" + bytes(data(100))


@pytest.mark.parametrize("most", [1, 5, 10, 13, 30])
def test_short_vector_writes_are_completed(fd: int, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(os, "pwritev", short_vector(os.pwritev, most))
    rawio.write_vector(fd, [data(10), data(20), data(3)], 5)
    assert os.pread(fd, 200, 5) == bytes(data(10)) + bytes(data(20)) + bytes(data(3))


def test_a_write_that_writes_nothing_is_an_error(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        rawio.write_all(fd, data(10), 0)


@pytest.mark.parametrize("most", [1, 5, 10, 13, 30])
def test_short_reads_are_completed(fd: int, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    os.pwrite(fd, data(40), 0)
    monkeypatch.setattr(os, "preadv", short_vector(os.preadv, most))
    first, second = bytearray(10), bytearray(25)
    rawio.read_vector(fd, [memoryview(first), memoryview(second)], 2)
    assert bytes(first + second) == bytes(data(40)[2:37])


def test_the_end_of_the_file_is_corruption(fd: int) -> None:
    os.pwrite(fd, data(40), 0)
    with pytest.raises(CorruptCheckpointError, match=r"truncated: expected 10 more bytes at byte 40.* has 40 bytes"):
        rawio.read_into(fd, memoryview(bytearray(20)), 30)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ESTALE, errno.EIO])
def test_transient_errors_are_retried_counted_and_logged(
    fd: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    before = rawio.retries.count
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, code, 2))
    monkeypatch.setattr(os, "preadv", Failing(os.preadv, code, 1))
    buffer = bytearray(9)
    with caplog.at_level(logging.WARNING, "distckpt"):
        rawio.write_all(fd, data(9), 0)
        rawio.read_into(fd, memoryview(buffer), 0)
    assert bytes(buffer) == bytes(data(9))
    assert rawio.retries.count == before + 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert os.strerror(code) in caplog.text


def test_retries_are_bounded(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(os.pwrite, errno.EIO, 100)
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="Input/output error"):
        rawio.write_all(fd, data(9), 0)
    assert failing.times == 100 - 4


def test_a_full_disk_is_not_retried(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(os.pwrite, errno.ENOSPC, 100)
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="No space"):
        rawio.write_all(fd, data(9), 0)
    assert failing.times == 99


def test_interrupted_calls_are_repeated(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rawio.retries.count
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, errno.EINTR, 20))
    rawio.write_all(fd, data(9), 0)
    assert os.pread(fd, 9, 0) == bytes(data(9))
    assert rawio.retries.count == before


def test_fsync_is_never_retried(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(os.fsync, errno.EIO, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        rawio.fsync(fd)
    assert failing.times == 0


# ---- write-back


def test_writeback_joins_neighbours(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(rawio, "start_writeback", lambda _, offset, nbytes: started.append((offset, nbytes)))
    writeback = rawio.Writeback(fd)
    for number in range(4):
        writeback.add(number << 18, 1 << 18)
    writeback.add(8 << 20, 3 << 20)
    writeback.add(100 << 20, 10)
    writeback.flush()
    assert started == [(0, 1 << 20), (8 << 20, 3 << 20)]


def test_writeback_is_only_a_hint(fd: int) -> None:
    rawio.start_writeback(fd, 0, 1 << 20)
    rawio.start_writeback(-1, 0, 1 << 20)


# ---- space


def test_reserve_takes_the_blocks(fd: int) -> None:
    rawio.reserve(fd, 1 << 20)
    status = os.fstat(fd)
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20


def test_reserve_without_fallocate_sets_the_length(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rawio, "_fallocate", None)
    rawio.reserve(fd, 12345)
    assert os.fstat(fd).st_size == 12345


def test_reserve_where_fallocate_is_not_supported(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        rawio.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(rawio, "_fallocate", refuse)
    rawio.reserve(fd, 12345)
    assert os.fstat(fd).st_size == 12345


def test_reserve_says_how_much_is_free(fd: int) -> None:
    with pytest.raises(OSError, match=r"needs 4611686018427387904 bytes, the file system has \d+ bytes free") as raised:
        rawio.reserve(fd, 1 << 62)
    assert raised.value.errno == errno.ENOSPC
    assert os.fstat(fd).st_size == 0


def test_reserve_repeats_what_a_quota_says(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        rawio.ctypes.set_errno(errno.EDQUOT)
        return -1

    monkeypatch.setattr(rawio, "_fallocate", refuse)
    with pytest.raises(OSError, match="cannot reserve 12345 bytes for the checkpoint: Disk quota exceeded"):
        rawio.reserve(fd, 12345)


def test_reserve_knows_the_file_size_limit(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    with pytest.raises(OSError, match="file of 1001 bytes, the file size limit of this process is 1000") as raised:
        rawio.reserve(fd, 1001)
    assert raised.value.errno == errno.EFBIG
    rawio.reserve(fd, 1000)


# ---- descriptors


def test_open_shared_opens_what_rank_0_sees(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(data(100)))
    for writable in (False, True):
        fd = rawio.open_shared(str(path), 100, writable=writable)
        assert os.pread(fd, 100, 0) == bytes(data(100))
        os.close(fd)


def test_open_shared_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    steps: Iterator[Callable[[], object]] = iter([lambda: path.write_bytes(b"123"), lambda: path.write_bytes(b"12345")])
    monkeypatch.setattr(rawio.time, "sleep", lambda _: next(steps)())
    fd = rawio.open_shared(str(path), 5)
    assert os.pread(fd, 10, 0) == b"12345"
    os.close(fd)


def test_open_shared_leaves_nothing_open_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    asked: list[int] = []

    def interrupted(fd: int) -> os.stat_result:
        asked.append(fd)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rawio.os, "fstat", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rawio.open_shared(str(tmp_path / "file"), 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(*asked)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_open_shared_leaves_nothing_open_when_the_file_is_gone(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may take a file away again, or fail, between open and fstat."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    n_open = len(list(Path("/proc/self/fd").iterdir()))

    def gone(_: int) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(rawio.os, "fstat", gone)
        with pytest.raises(CheckpointError if code == errno.ESTALE else OSError, match=r"no such file|Input/output"):
            rawio.open_shared(str(path), 5, timeout=0.0)
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open


@pytest.mark.parametrize(("content", "seen"), [(None, "no such file"), (b"123", "3 bytes")])
def test_open_shared_gives_up(tmp_path: Path, content: bytes | None, seen: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=f"expected a file of 5 bytes, as on rank 0. Got {seen}.*shared"):
        rawio.open_shared(str(path), 5, timeout=0.0)
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open


def test_sync_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rawio.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, errno.EINVAL, 1))  # type: ignore[arg-type]
    rawio.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, errno.EIO, 1))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Input/output"):
        rawio.sync_directory(tmp_path)


def test_the_real_file_size_limit_is_no_signal(tmp_path: Path) -> None:
    """Linux sends SIGXFSZ; Python ignores it, so that an error can be raised."""
    code = (
        f"{bare()}import os, resource; from distckpt.storage import rawio;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"fd = os.open({str(tmp_path / 'file')!r}, os.O_RDWR | os.O_CREAT);"
        "rawio.write_all(fd, memoryview(bytes(5000)), 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
