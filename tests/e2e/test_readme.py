"""Everything the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(code: str, directory: Path) -> str:
    command = [sys.executable, "-W", "error::distckpt.CheckpointWarning", "-c", code]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_code_is_the_quickstart_and_comes_early() -> None:
    assert blocks("python")[0] == (ROOT / "examples" / "quickstart.py").read_text()
    assert README.splitlines().index("```python") < 25


def test_code_blocks_run_as_pasted(tmp_path: Path) -> None:
    shown = blocks("python")[1:]
    assert shown
    assert [run(code, tmp_path) for code in shown] == ["() () ()\n", "runs/background/ckpt-3.h5\n", ""]


def test_shown_commands_read_what_the_quickstart_saves(tmp_path: Path) -> None:
    run((ROOT / "examples" / "quickstart.py").read_text(), tmp_path)
    run((ROOT / "examples" / "quickstart.py").read_text(), tmp_path)
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ distckpt")]
    assert {command.split()[1] for command in commands} >= {"ls", "show", "verify"}
    for command in commands:
        line = command.replace("distckpt", f"{sys.executable} -m distckpt", 1)
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "ckpt-2" in done.stdout


def test_every_test_file_that_a_guarantee_names_is_there() -> None:
    named = re.findall(r"`(tests/[^`]+)`", README)
    assert named
    assert [pattern for pattern in named if not list(ROOT.glob(pattern))] == []


def test_every_make_target_shown_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\$ make ([a-z0-9-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
