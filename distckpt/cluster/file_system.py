"""The file system of a directory: its type, and its free space."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Space:
    """Room on a file system.

    Attributes:
        free: Bytes free for ordinary users; None if the file system does not say.
        total: Capacity in bytes; 0 if the file system does not say.
        largest_file: Largest file this process may write, in bytes; None without a limit.
    """

    free: int | None
    total: int
    largest_file: int | None


def existing_parent(directory: Path) -> Path:
    """The directory itself, or else its nearest parent that exists; absolute, without links."""
    path = directory.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def file_system_type(directory: Path, mounts: str | None = None) -> str:
    """The kernel's name for the file system of an existing directory, such as "ext4" or "lustre"; "" if unknown.

    Args:
        directory: Absolute and without links.
        mounts: Text in the form of /proc/self/mountinfo, which is the default.
    """
    best = ("", "")
    for line in (_MOUNTS.read_text() if mounts is None else mounts).splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", _octal, left.split()[4])
        # A later mount on the same point hides the earlier one.
        if directory.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, right.split()[0])
    return best[1]


def _octal(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def space(directory: Path) -> Space:
    """The room on the file system of an existing directory."""
    found = os.statvfs(directory)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    largest_file = None if limit == resource.RLIM_INFINITY else limit
    free = found.f_bavail * found.f_frsize if found.f_blocks else None
    return Space(free, found.f_blocks * found.f_frsize, largest_file)
