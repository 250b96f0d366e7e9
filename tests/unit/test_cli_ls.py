"""`distckpt ls`."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from distckpt import Checkpoint
from distckpt.cli.ls import ls
from distckpt.cli.terminal import table_lines
from distckpt.graph import python_value
from tests.checkpoint_files import save
from tests.unit.unprivileged import unprivileged


def listed(directory: Path, encoding: str = "utf-8:strict") -> list[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "distckpt", "ls", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_every_file_is_one_line_whatever_its_name_and_its_step(tmp_path: Path) -> None:
    saved = Checkpoint(x=torch.ones(2), step="[/]").save(tmp_path / "ckpt")
    for name in (b"[red]-2.h5", b"latin\xff-3.h5"):
        shutil.copy(saved, os.fsencode(tmp_path) + b"/" + name)
    (tmp_path / "a_long_name_of_a_file_that_is_no_checkpoint-4.h5").write_bytes(b"x" * 100)
    head, *rows = listed(tmp_path)
    assert head.split() == ["file", "save", "step", "time", "ranks", "size", "complete"]
    assert [row.split()[0] for row in rows] == [
        "ckpt-1.h5",
        "[red]-2.h5",
        r"latin\udcff-3.h5",
        "a_long_name_of_a_file_that_is_no_checkpoint-4.h5",
    ]
    assert [row.split()[2] for row in rows[:3]] == ["[/]"] * 3
    assert [row.split()[-1] for row in rows[:3]] == ["yes"] * 3
    assert "no: HDF5 cannot open the file" in rows[3]


def test_links_that_lead_nowhere_are_left_out(tmp_path: Path) -> None:
    Checkpoint(x=torch.ones(2)).save(tmp_path / "ckpt")
    (tmp_path / "broken-1.h5").symlink_to("gone.h5")
    (tmp_path / "loop-1.h5").symlink_to("loop-1.h5")
    _, *rows = listed(tmp_path)
    assert [row.split()[0] for row in rows] == ["ckpt-1.h5"]


def test_no_name_acts_on_the_terminal(tmp_path: Path) -> None:
    saved = Checkpoint(x=torch.ones(2), step="\x1b[2J").save(tmp_path / "a\nb")
    shutil.copy(saved, tmp_path / "bell\x07\x1b[31m\x9b-2.h5")
    _, *rows = listed(tmp_path)
    assert [row.split()[0] for row in rows] == [r"a\nb-1.h5", r"bell\x07\x1b[31m\x9b-2.h5"]
    assert [row.split()[2] for row in rows] == [r"\x1b[2J"] * 2


@pytest.mark.parametrize("encoding", ["ascii:strict", "ascii:surrogateescape"])
def test_any_encoding_of_the_output(tmp_path: Path, encoding: str) -> None:
    Checkpoint(x=torch.ones(2), step="é").save(tmp_path / "ckpt")
    _, row = listed(tmp_path, encoding)
    assert row.split()[:3] == ["ckpt-1.h5", "1", r"\xe9"]


def test_a_narrow_terminal_wraps_lines_and_cuts_none(tmp_path: Path) -> None:
    name = "a_name_that_is_longer_than_the_terminal_is_wide-1.h5"
    shutil.copy(Checkpoint(x=torch.ones(2)).save(tmp_path / "ckpt"), tmp_path / name)
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    command = [sys.executable, "-m", "distckpt", "ls", str(tmp_path)]
    subprocess.run(command, stdout=terminal, timeout=60, check=True, env={**os.environ, "TERM": "dumb"})
    os.close(terminal)
    lines = os.read(master, 10_000).decode().split("\r\n")
    os.close(master)
    assert [line.split()[0] for line in lines if line] == ["file", "ckpt-1.h5", name]
    assert [line.split()[-1] for line in lines if line] == ["complete", "yes", "yes"]


def test_columns_are_aligned_whatever_is_in_them() -> None:
    rows = [[Text("file"), Text("n")], [Text("日本"), Text("10")], [Text("a"), Text("")]]
    assert [line.plain for line in table_lines(rows, {1})] == ["file   n", "日本  10", "a"]


def test_what_may_not_be_read_is_said(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / "ckpt-1.h5"
    path.chmod(0o200)
    assert rows_as_nobody(directory, capsys) == ["ckpt-1.h5: unknown: permission denied"]
    path.chmod(0o644)
    assert rows_as_nobody(directory, capsys) == ["ckpt-1.h5: yes"]
    directory.chmod(0o744)
    assert rows_as_nobody(directory, capsys) == ["ckpt-1.h5: unknown: permission denied"]
    directory.chmod(0o700)
    with pytest.raises(PermissionError, match="run"):
        rows_as_nobody(directory, capsys)


def rows_as_nobody(directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Name and last column of each row."""
    ls(directory)  # loads all modules that it needs, which the other user may not
    capsys.readouterr()
    with unprivileged():
        ls(directory)
    _, *rows = capsys.readouterr().out.splitlines()
    return [re.sub(r"^(\S+) .*?((unknown|no|yes).*)$", r"\1: \2", row) for row in rows]


@pytest.mark.parametrize("step", [10**5000, b"no JSON"], ids=["huge", "damaged"])
def test_a_step_that_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    if isinstance(step, bytes):
        monkeypatch.setattr(python_value, "_to_json", lambda _: {"type": "no such"})
    Checkpoint(x=torch.ones(2), step=step).save(tmp_path / "ckpt")
    _, row = listed(tmp_path)
    assert row.split()[:3] == ["ckpt-1.h5", "1", "?"]


@pytest.mark.parametrize("time", [1e308, -1e308, 1e18, -1e18])
def test_a_time_that_no_calendar_has(tmp_path: Path, time: float) -> None:
    save(tmp_path / "ckpt-1.h5", {"x": torch.ones(2)}, time=time)
    _, row = listed(tmp_path)
    assert row.split()[:3] == ["ckpt-1.h5", "1", "?"]
