"""`distckpt ls`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from distckpt import Checkpoint


def listed(directory: Path) -> list[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
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
