"""The checksums of a file are read as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distckpt.errors import CorruptCheckpointError
from distckpt.storage import checksum, rawio
from distckpt.storage.checksum import ChecksumReader, StoredChecksums

VALUES = np.arange(10, dtype=np.uint64) + np.uint64(1 << 63)
OFFSET = 24


@pytest.fixture
def fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A file with some checksums; four make a block."""
    monkeypatch.setattr(checksum, "_BLOCK", 4)
    (tmp_path / "file").write_bytes(bytes(OFFSET) + VALUES.tobytes())
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def test_each_block_is_read_once_and_only_when_needed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read_into = rawio.read_into

    def count(fd: int, buffer: memoryview, offset: int) -> None:
        reads.append((offset, len(buffer)))
        read_into(fd, buffer, offset)

    monkeypatch.setattr(rawio, "read_into", count)
    reader = ChecksumReader(fd, StoredChecksums(len(VALUES), OFFSET))
    assert reads == []
    assert [reader[index] for index in (9, 0, 3, 8, 0)] == VALUES[[9, 0, 3, 8, 0]].tolist()
    assert reads == [(OFFSET + 8 * 8, 2 * 8), (OFFSET, 4 * 8)]


def test_checksums_that_are_no_range_of_bytes_come_as_values(fd: int) -> None:
    reader = ChecksumReader(fd, StoredChecksums(len(VALUES), -1, VALUES.tobytes()))
    assert [reader[index] for index in range(len(VALUES))] == VALUES.tolist()


def test_a_file_that_was_truncated_after_it_had_been_opened(fd: int) -> None:
    reader = ChecksumReader(fd, StoredChecksums(len(VALUES), OFFSET))
    os.truncate(fd, OFFSET + 40)
    assert reader[3] == VALUES[3]
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        reader[4]
