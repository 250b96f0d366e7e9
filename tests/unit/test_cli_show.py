"""`distckpt show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import distckpt.saving.draft
from distckpt import Checkpoint
from distckpt.cli import main
from distckpt.errors import CheckpointNotFoundError
from distckpt.layout.records import Manifest
from distckpt.storage.manifest import sealed

ManifestOf = Callable[[str], Manifest]


def checkpoint() -> Checkpoint:
    return Checkpoint(a=torch.arange(1000.0), step=1)


def shown(*arguments: str) -> list[str]:
    result = CliRunner().invoke(main.build(["show"]), ["show", *arguments])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_show_draws_the_object_graph(path: str) -> None:
    file = checkpoint().save(path)
    lines = shown(file)
    assert lines[0] == file
    assert any(line.endswith("a float32 1000 3.9 KiB") for line in lines)
    assert any(line.endswith("step = 1") for line in lines)
    assert not any("median" in line for line in lines)


def test_show_prints_a_line_for_each_step(path: str, manifest_of: ManifestOf) -> None:
    file = checkpoint().save(path)
    stored = manifest_of(file).timing
    assert stored is not None
    lines = shown("--timing", file)
    assert lines[0] == file
    start = lines.index(f"{stored.seconds:.3f} s from the call until the manifest was written")
    assert lines[start + 1].split() == ["step", "min", "median", "max", "slowest", "rank"]
    for line, (name, step) in zip(lines[start + 2 :], stored.steps.items(), strict=True):
        seconds = [f"{value:.6f}" for value in (step.min, step.median, step.max)]
        assert line.split() == [name, *seconds, str(step.slowest_rank)]


def test_show_of_a_file_without_a_timing_says_so(
    path: str, monkeypatch: pytest.MonkeyPatch, manifest_of: ManifestOf
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(distckpt.saving.draft, "sealed", lambda unsealed, _: sealed(unsealed, None))
        file = checkpoint().save(path)
    assert manifest_of(file).timing is None
    assert shown("--timing", file)[-1] == "the file does not say how long its save took"
    checkpoint().restore(file).assert_consumed()


def test_no_name_acts_on_the_terminal(path: str) -> None:
    state = {"a\nb": torch.ones(1), "\x1b[31m[red]": "\x1b[2J", "\u202ec": 1}
    lines = shown(Checkpoint(d=state).save(f"{path}\x07"))
    assert lines[0] == rf"{path}\x07-1.h5"
    assert any(line.endswith(r"a\nb float32 1 4 B") for line in lines)
    assert any(line.endswith(r"\x1b[31m[red] = '\x1b[2J'") for line in lines)
    assert any(line.endswith(r"\u202ec = 1") for line in lines)


def test_a_value_that_cannot_be_shown(path: str) -> None:
    lines = shown(Checkpoint(large=10**5000, small=3).save(path))
    assert any("large = (Exceeds the limit" in line for line in lines)
    assert any(line.endswith("small = 3") for line in lines)


def test_a_directory_means_its_latest_checkpoint(tmp_path: Path) -> None:
    live = checkpoint()
    files = [live.save(tmp_path / "run" / "ckpt") for _ in range(2)]
    assert shown(str(tmp_path / "run"))[0] == files[-1]
    result = CliRunner().invoke(main.build(["show"]), ["show", str(tmp_path)])
    assert isinstance(result.exception, CheckpointNotFoundError)
    assert str(result.exception) == f"{tmp_path}: no complete checkpoint of `save` in this directory."
