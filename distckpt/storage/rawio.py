"""System calls on file descriptors: whole transfers, bounded retries, reservation, write-back, fsync."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distckpt.errors import CheckpointError, CorruptCheckpointError
from distckpt.log import log

#: Seconds to wait before each retry of a transfer that failed with one of `_TRANSIENT`.
_BACKOFF = (0.01, 0.1, 1.0)
_TRANSIENT = frozenset({errno.EAGAIN, errno.ESTALE, errno.EIO})
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})

#: Most buffers in one `pwritev` or `preadv` (Linux: UIO_MAXIOV).
MAX_VECTORS = 1024

_SYNC_FILE_RANGE_WRITE = 2


def _libc_function(name: str, argtypes: Sequence[type]) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = tuple(argtypes)
        function.restype = ctypes.c_int
    return function


_fallocate = _libc_function("fallocate", (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64))
_sync_file_range = _libc_function("sync_file_range", (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint))


@dataclass(slots=True)
class Retries:
    """How often this process had to repeat a transfer after a transient error.

    Attributes:
        count: Number of repetitions since the process started.
    """

    count: int = 0

    def wait(self, attempt: int, error: OSError, what: str) -> bool:
        """Wait before repeating a transfer.

        Args:
            attempt: How many repetitions there were already.
            error: Why the transfer failed.
            what: The transfer, for the log.

        Returns:
            Whether to repeat it: the error is transient and it was not repeated too often yet.
        """
        if error.errno not in _TRANSIENT or attempt >= len(_BACKOFF):
            return False
        self.count += 1
        log.warning("%s failed with %s, retry %d of %d", what, error, attempt + 1, len(_BACKOFF))
        time.sleep(_BACKOFF[attempt])
        return True


retries = Retries()


def _transfer(call: Callable[..., int], *args: object) -> int:
    """Make one system call, repeating it after transient errors."""
    attempt = 0
    while True:
        try:
            return call(*args)
        except InterruptedError:
            continue
        except OSError as error:
            if not retries.wait(attempt, error, call.__name__):
                raise
            attempt += 1


# ---- transfers ---------------------------------------------------------------------------------------------------


def write_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Write all bytes of `buffer` at `offset`, in bytes from the start of the file."""
    done = 0
    while done < len(buffer):
        count = _transfer(os.pwrite, fd, buffer[done:] if done else buffer, offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"pwrite at byte {offset + done} wrote nothing")
        done += count


def write_vector(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write `buffers`, at most `MAX_VECTORS`, one after the other at `offset`."""
    if len(buffers) == 1:
        write_all(fd, buffers[0], offset)
        return
    count = _transfer(os.pwritev, fd, buffers, offset)
    for buffer in buffers:
        written = min(count, len(buffer))
        if written < len(buffer):
            write_all(fd, buffer[written:], offset + written)
        count -= written
        offset += len(buffer)


def read_into(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`, in bytes from the start of the file.

    Raises:
        CorruptCheckpointError: The file ends before the buffer is full.
    """
    filled = _transfer(os.preadv, fd, (buffer,), offset)
    if filled < len(buffer):
        _read_rest(fd, buffer[filled:], offset + filled)


def read_vector(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill `buffers`, at most `MAX_VECTORS`, one after the other from `offset`.

    Raises:
        CorruptCheckpointError: The file ends before the buffers are full.
    """
    count = _transfer(os.preadv, fd, buffers, offset)
    for buffer in buffers:
        filled = min(count, len(buffer))
        if filled < len(buffer):
            _read_rest(fd, buffer[filled:], offset + filled)
        count -= filled
        offset += len(buffer)


def _read_rest(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        rest, position = buffer[done:], offset + done
        count = _transfer(os.preadv, fd, (rest,), position)
        if count == 0:
            size = os.fstat(fd).st_size
            raise CorruptCheckpointError(
                f"the file is truncated: expected {len(rest)} more bytes at byte {position}, got the end of the file; "
                f"it has {size} bytes"
            )
        done += count


# ---- durability --------------------------------------------------------------------------------------------------


def fsync(fd: int) -> None:
    """Wait until the file's bytes, as far as they were written on this machine, are on stable storage.

    Never repeated: after a failed fsync the kernel drops the dirty pages, and a second one would succeed without them.
    """
    os.fsync(fd)


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to start writing a range of dirty pages to disk, so that the later fsync finds little to do.

    A hint: where the system call is missing or refused, nothing happens. Errors of the disk come from fsync.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


class Writeback:
    """Starts early write-back of what was written, in ranges large enough to be worth a system call.

    Args:
        fd: Descriptor of the file.
    """

    _MIN_NBYTES = 1 << 20

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = 0
        self._stop = 0

    def add(self, offset: int, nbytes: int) -> None:
        """Note that `nbytes` at `offset` were written."""
        if offset != self._stop:
            self.flush()
            self._start = offset
        self._stop = offset + nbytes
        if self._stop - self._start >= self._MIN_NBYTES:
            self.flush()

    def flush(self) -> None:
        """Start write-back of what was noted, unless it is too little."""
        if self._stop - self._start >= self._MIN_NBYTES:
            start_writeback(self._fd, self._start, self._stop - self._start)
        self._start = self._stop


# ---- space -------------------------------------------------------------------------------------------------------


def reserve(fd: int, nbytes: int) -> None:
    """Make the file `nbytes` long and reserve its space on disk.

    Where the file system cannot reserve, the file is sparse and only the free space is compared.

    Raises:
        OSError: EFBIG or ENOSPC, naming the bytes needed and available.
    """
    _check_space(fd, nbytes)
    try:
        if _reserve_blocks(fd, nbytes):
            return
        os.ftruncate(fd, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"cannot reserve {nbytes} bytes for the checkpoint: {error.strerror}") from error


def _check_space(fd: int, nbytes: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and nbytes > limit:
        raise OSError(
            errno.EFBIG,
            f"the checkpoint needs a file of {nbytes} bytes, the file size limit of this process is {limit} bytes; "
            "raise it (ulimit -f)",
        )
    system = os.fstatvfs(fd)
    blocks = system.f_bfree if os.geteuid() == 0 else system.f_bavail
    available = blocks * system.f_frsize + os.fstat(fd).st_blocks * 512
    # Some network file systems do not know and report no blocks at all.
    if system.f_blocks and nbytes > available:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs {nbytes} bytes, the file system has {available} bytes free; "
            "delete old checkpoints or save elsewhere",
        )


def _reserve_blocks(fd: int, nbytes: int) -> bool:
    """Whether blocks could be reserved. fallocate(2) itself: posix_fallocate(3) writes every block where it cannot."""
    if _fallocate is None or nbytes == 0:
        return False
    while _fallocate(fd, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which an `OSError` that names no file, such as that of a write, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


# ---- descriptors -------------------------------------------------------------------------------------------------


def open_shared(path: str, nbytes: int, *, writable: bool = False, timeout: float = 10.0) -> int:
    """Open a file that rank 0 has made or looked at, waiting a while for a network file system to show it here.

    Args:
        path: Path of the file.
        nbytes: Its length in bytes as rank 0 sees it.
        writable: Open it for reading and writing.
        timeout: Seconds to wait.

    Returns:
        The descriptor.

    Raises:
        CheckpointError: This rank sees no such file, or one of another length.
    """
    deadline = time.monotonic() + timeout
    while True:
        fd, size = _open_if_there(path, os.O_RDWR if writable else os.O_RDONLY)
        if fd is not None and size == nbytes:
            return fd
        if fd is not None:
            os.close(fd)
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path}: expected a file of {nbytes} bytes, as on rank 0. Got "
                f"{'no such file' if fd is None else f'{size} bytes'}. All ranks must see the same directory: use a "
                "shared file system."
            )
        time.sleep(0.02)


def _open_if_there(path: str, flags: int) -> tuple[int | None, int]:
    """Descriptor and length of a file; none where the file system does not show it, or no longer."""
    fd = None
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
        return fd, os.fstat(fd).st_size
    except BaseException as error:  # also an interrupt
        if fd is not None:
            os.close(fd)
        if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE):
            return None, -1
        raise


def require_descriptors(fd: int, count: int) -> None:
    """Check that this process can have `count` more descriptors; `fd` is any open one.

    Raises:
        OSError: It cannot; says what to do.
    """
    copies: list[int] = []
    try:
        for _ in range(count):
            copies.append(os.dup(fd))  # noqa: PERF401  # those made before an error are to be closed
    except OSError as error:
        raise OSError(
            error.errno, f"{count} more file descriptors are needed: {error.strerror}; raise the limit (ulimit -n)"
        ) from error
    finally:
        for copy in copies:
            os.close(copy)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make the entries of a directory durable, where its file system can."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED and error.errno != errno.EBADF:
            raise
    finally:
        os.close(fd)
