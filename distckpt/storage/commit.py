"""Temporary files, the commit of a finished one, and the removal of checkpoints. Rank 0 only."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import xxhash

from distckpt.log import log
from distckpt.storage import rawio
from distckpt.storage.paths import list_directory

#: Age from which a temporary file is removed even if its writer may still run. In seconds.
STALE_AGE = 24 * 3600.0

# Files that MPI-IO leaves beside a temporary file have its name and a further suffix (".locktest.<rank>").
_TEMP_NAME = re.compile(r"\..+\.(?P<writer>[0-9a-f]{24})[0-9a-f]{8}\.tmp(\..+)?", re.DOTALL)

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


# ---- names and writers -------------------------------------------------------------------------------------------


def temp_path(final: str | os.PathLike[str]) -> str:
    """A new name for the temporary file of `final`, in the same directory: `.<name>.<uuid>.tmp`.

    The uuid identifies the process that writes the file, so that `sweep` needs no locks. Some shared file systems have
    none, and on others MPI-IO uses them itself, and would wait for ours for ever.
    """
    path = Path(final)
    return str(path.with_name(f".{path.name}.{_this_writer()}{secrets.token_hex(4)}.tmp"))


def _this_writer() -> str:
    pid = os.getpid()
    return f"{_host()}{pid:08x}{_process_start(pid)}"


@cache
def _host() -> str:
    """Eight hexadecimal digits for the machine and the container, within which process ids are unique."""
    name = f"{socket.gethostname()}|{_read_or_empty('/etc/machine-id')}|{_link_or_empty('/proc/self/ns/pid')}"
    return xxhash.xxh32_hexdigest(name.encode())


def _read_or_empty(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _link_or_empty(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Eight hexadecimal digits that tell a process from later ones with the same id; None if it does not run."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    # The start time, field 22; fields are counted after the command name, which may contain anything.
    status = _read_or_empty(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if status and status[0] in "ZX":  # it has ended, but its parent has not waited for it yet
        return None
    boot = _read_or_empty("/proc/sys/kernel/random/boot_id")
    return xxhash.xxh32_hexdigest(f"{boot}|{status[19]}".encode()) if status else "0" * 8


def _is_gone(writer: str) -> bool:
    """Whether the writer of a temporary file is known to have ended."""
    host, pid, started = writer[:8], int(writer[8:16], 16), writer[16:]
    return host == _host() and _process_start(pid) != started


def sweep(directory: str | os.PathLike[str]) -> list[str]:
    """Remove temporary files whose writer is gone, and those older than a day.

    Returns:
        Names of the files removed.
    """
    removed = [path.name for path in list_directory(directory) if _remove_if_stale(path)]
    if removed:
        log.info("removed %d stale temporary files from %s", len(removed), directory)
    return removed


def _remove_if_stale(path: Path) -> bool:
    match = _TEMP_NAME.fullmatch(path.name)
    if match is None:
        return False
    try:
        if not _is_gone(match["writer"]) and time.time() - path.lstat().st_mtime < STALE_AGE:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("stale temporary file %s: %s", path, error)
        return False
    return True


def discard(temp: str) -> None:
    """Remove a temporary file, and the files that MPI-IO left beside it, if they exist."""
    path = Path(temp)
    for found in list_directory(path.parent):
        if found.name == path.name or found.name.startswith(f"{path.name}."):
            found.unlink(missing_ok=True)


# ---- commit ------------------------------------------------------------------------------------------------------


def commit(temp: str, final: str, *, replace: bool, durable: bool) -> None:
    """Give a finished temporary file its final name, atomically.

    Args:
        temp: The temporary file; its bytes are on disk already.
        final: Its final path, in the same directory.
        replace: Replace an existing file.
        durable: Return only when the new name is on disk.

    Raises:
        FileExistsError: The file exists, and `replace` is False; says what to do.
    """
    source, target = Path(temp), Path(final)
    if replace:
        source.replace(target)
    else:
        _rename_to_free_name(source, target)
    if durable:
        rawio.sync_directory(target.parent)


def _rename_to_free_name(source: Path, target: Path) -> None:
    inode = source.stat().st_ino
    code = _renameat2(source, target)
    if code == 0 or (code in (errno.EEXIST, errno.ENOENT) and _has_inode(target, inode)):
        # In the second case a network file system has repeated a request whose answer was lost.
        return
    if code == errno.EEXIST:
        raise _taken(target)
    if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(target))
    _link_to_free_name(source, target, inode)


def _link_to_free_name(source: Path, target: Path, inode: int) -> None:
    try:
        target.hardlink_to(source)
    except FileExistsError as error:
        if not _has_inode(target, inode):
            raise _taken(target) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):  # this check and the rename are not atomic, but there is no better way left
            raise _taken(target) from error
        source.rename(target)
        return
    source.unlink()


def _taken(target: Path) -> FileExistsError:
    """The error if the file exists. One rank chooses the numbers of a job, so another job must have written it."""
    return FileExistsError(
        errno.EEXIST,
        "another job has written this file meanwhile, and saves never replace one: save again, under the next number, "
        "and give each job a directory or a file_prefix of its own",
        str(target),
    )


def _has_inode(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except OSError:
        return False


def _renameat2(source: Path, target: Path) -> int:
    """Call renameat2(2) with RENAME_NOREPLACE; returns 0 or the error code."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    failed = function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    return ctypes.get_errno() if failed else 0


# ---- removal ---------------------------------------------------------------------------------------------------------


def remove_checkpoints(directory: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    """Remove checkpoints of a directory. Missing files count as removed.

    Returns:
        Names of the files that could not be removed.
    """
    return [name for name in names if not _remove(Path(directory, name))]


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("old checkpoint %s cannot be removed: %s", path, error)
        return False
    log.info("removed old checkpoint %s", path)
    return True
