"""`distckpt verify`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer

from distckpt import Checkpoint
from distckpt.cli.verify import verify
from tests.unit.unprivileged import unprivileged


def test_every_file_is_verified_whatever_is_wrong_with_those_before(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, damaged, secret, gone = (directory / f"ckpt-{number}.h5" for number in (1, 2, 3, 4))
    for path in (damaged, secret):
        path.write_bytes(good.read_bytes())
    with damaged.open("r+b") as file:
        file.truncate(200)
    secret.chmod(0o200)
    verify([good])  # loads all modules that it needs, which the other user may not
    capsys.readouterr()
    with unprivileged(), pytest.raises(typer.Exit) as end:
        verify([gone, secret, damaged, good])
    assert end.value.exit_code == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"{damaged}: damaged", f"{good}: ok"]
    missing, forbidden, reason = printed.err.splitlines()
    assert missing.startswith(f"distckpt: {gone}: no such checkpoint")
    assert forbidden.startswith("distckpt: ")
    assert "Permission denied" in forbidden
    assert str(secret) in forbidden
    assert reason.startswith(f"  {damaged}: HDF5 cannot open the file")


def test_no_name_acts_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = Checkpoint(x=torch.ones(2)).save(tmp_path / "a\x1b[2J\nb")
    verify([Path(saved)])
    assert capsys.readouterr().out == f"{tmp_path}/a\\x1b[2J\\nb-1.h5: ok\n"


def test_a_directory_means_its_latest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(x=torch.ones(2))
    files = [checkpoint.save(tmp_path / "ckpt") for _ in range(2)]
    verify([tmp_path])
    assert capsys.readouterr().out == f"{files[-1]}: ok\n"
