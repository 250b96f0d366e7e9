"""The `distckpt` command itself: which commands there are, how they are loaded, how errors end."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distckpt import Checkpoint
from distckpt.cli import main
from distckpt.errors import CheckpointError, CheckpointNotFoundError


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(main.build(main.COMMANDS), ["--help"])
    assert result.exit_code == 0
    for name in main.COMMANDS:
        assert f" {name} " in result.output


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main.build([name]), [name, "-h"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_a_command_loads_nothing_of_the_others_and_no_mpi() -> None:
    program = (
        "import sys; sys.argv = ['distckpt', 'show', '-h']\n"
        "from distckpt.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'distckpt.cli.show', 'distckpt.cli.doctor', 'mpi4py', 'h5py'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "['distckpt.cli.show']"]


def test_an_unknown_command_is_refused() -> None:
    done = subprocess.run([sys.executable, "-m", "distckpt", "sow"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sow" in done.stderr


@pytest.mark.parametrize("error", [CheckpointNotFoundError("runs/ckpt-7.h5: no such file"), OSError("disk on fire")])
def test_errors_end_in_one_message_and_status_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distckpt"])
    monkeypatch.setattr(main, "build", lambda _: _raiser(error))
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == f"distckpt: {error}\n"


def _raiser(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_show_of_a_missing_file_is_such_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distckpt", "show", str(tmp_path / "ckpt-1.h5")])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    assert re.fullmatch(r"distckpt: .*ckpt-1\.h5.*\n", capsys.readouterr().err)


def test_an_error_does_not_act_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distckpt"])
    monkeypatch.setattr(main, "build", lambda _: _raiser(CheckpointError("a\x1b[2Jb:\n  reason")))
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "distckpt: a\\x1b[2Jb:\n  reason\n"


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_stdout_may_be_closed(command: str, tmp_path: Path) -> None:
    saved = Checkpoint(x=torch.ones(2)).save(tmp_path / "ckpt")
    program = f"{sys.executable} -m distckpt {command} {tmp_path if command == 'ls' else saved} >&-"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
