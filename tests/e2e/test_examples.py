"""The examples run as pasted, and what `train_gpt.py` says of itself is true: killed and resumed, it repeats itself."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--layers", "2", "--width", "64", "--batch", "8", "--context", "32"]
DEADLINE = 120.0  # seconds

Losses = dict[tuple[int, str], float]


def train(*arguments: str | Path) -> list[str | Path]:
    return [EXAMPLES / "train_gpt.py", *TINY, "--steps", "40", "--save-every", "8", *arguments]


def losses(directory: Path) -> Losses:
    """Value by step and name; what was computed again after a restore replaces what was lost."""
    log = directory / "loss.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return {
        (record["step"], name): record[name]
        for record in map(json.loads, lines)
        for name in ("loss", "test_loss", "lr")
        if name in record
    }


def wait_for_step(job: subprocess.Popen[str], directory: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while (step, "loss") not in losses(directory):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_quickstart_goes_on_where_it_stopped_on_another_number_of_ranks(mpirun: Any, tmp_path: Path) -> None:
    for ranks, line in ((0, "step 100: loss"), (2, "step 200: loss")):
        job = mpirun(ranks, EXAMPLES / "quickstart.py", cwd=tmp_path)
        assert job.returncode == 0, job.stdout
        assert line in job.stdout
    assert (tmp_path / "runs/quickstart/ckpt-2.h5").exists()


def shown_runs(example: str) -> list[tuple[int, list[str]]]:
    """Ranks and arguments of the commands in the docstring of an example; 0 ranks without mpirun."""
    lines = re.findall(rf"^    (?:mpirun -n (\d) )?python examples/{example}([^#\n]*)", read(example), re.MULTILINE)
    return [(int(ranks or 0), arguments.split()) for ranks, arguments in lines]


def read(example: str) -> str:
    return (EXAMPLES / example).read_text()


@pytest.mark.parametrize(
    ("example", "layouts"),
    [
        ("tensor_parallel.py", ["on 4 ranks, 2 of them", "on 3 ranks, 3 of them", "on 1 ranks"]),
        ("pipeline_parallel.py", ["layers 0 to 0 on the first", "layers 0 to 2 on the first", "layers 0 to 5 on the"]),
    ],
)
def test_a_run_goes_on_from_the_loss_of_the_one_before_on_another_layout(
    mpirun: Any, tmp_path: Path, example: str, layouts: list[str]
) -> None:
    shown = shown_runs(example)
    assert len(shown) == len(layouts)
    losses = {}
    for (ranks, arguments), layout in zip(shown, layouts, strict=True):
        job = mpirun(ranks, [EXAMPLES / example, *arguments], cwd=tmp_path)
        assert job.returncode == 0, job.stdout
        found = re.findall(rf"^(restored|saved) step (\d+): loss (\S+) .*{layout}", job.stdout, re.MULTILINE)
        for verb, step, loss in found:
            assert verb == "saved" or float(loss) == pytest.approx(losses[int(step)], abs=1e-4)
            losses[int(step)] = float(loss)
        assert [verb for verb, _, _ in found] == ["restored"] * (ranks != shown[0][0]) + ["saved"], job.stdout
    assert list(losses) == [20, 40, 60]
    assert losses[20] > losses[40] > losses[60]


def test_custom_trackables_go_on_as_if_nothing_had_happened(mpirun: Any, tmp_path: Path) -> None:
    def run(ranks: int, directory: str, *, times: int = 1) -> str:
        for _ in range(times):
            job = mpirun(ranks, [EXAMPLES / "custom_trackable.py", "--dir", directory], cwd=tmp_path)
            assert job.returncode == 0, job.stdout
        return str(job.stdout)

    assert [ranks for ranks, _ in shown_runs("custom_trackable.py")] == [3, 2]
    run(3, "resharded")
    resharded, alone = run(2, "resharded"), run(0, "alone", times=2)
    values = r"level .* table \S+, seen here \d+"
    assert re.findall(values, resharded) == re.findall(values, alone) != []
    assert "step 20 on 2 ranks: level" in resharded
    assert "'step': 20" in resharded


@pytest.mark.parametrize("example", ["tensor_parallel.py", "pipeline_parallel.py", "custom_trackable.py"])
def test_examples_fit_on_a_few_screens(example: str) -> None:
    assert len(read(example).splitlines()) <= 120


def test_a_killed_run_repeats_the_uninterrupted_one_bit_for_bit(mpirun: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = mpirun(2, train("--dir", whole))
    assert job.returncode == 0, job.stdout
    assert len(losses(whole)) == 40 * 2 + 40 / 8

    interrupted = mpirun.start(2, train("--dir", killed))
    wait_for_step(interrupted, killed, 19)
    mpirun.kill(interrupted)
    interrupted.wait()
    until_kill = losses(killed)
    assert (40, "loss") not in until_kill, "the run ended before it was killed"
    assert until_kill.items() <= losses(whole).items()

    job = mpirun(2, train("--dir", killed))
    assert job.returncode == 0, job.stdout
    assert "at step 16" in job.stdout or "at step 24" in job.stdout
    assert losses(killed) == losses(whole)


def test_the_demo_resumes_on_half_the_ranks_and_differs_by_rounding_only_without_dropout(
    mpirun: Any, tmp_path: Path
) -> None:
    job = mpirun(0, [EXAMPLES / "demo.py", "--dir", tmp_path, *TINY, "--dropout", "0"], timeout=300.0)
    assert job.returncode == 0, job.stdout
    assert "SIGKILL to process" in job.stdout
    assert (tmp_path / "loss.png").stat().st_size > 0
    resumed, whole = losses(tmp_path / "interrupted"), losses(tmp_path / "uninterrupted")
    assert resumed == pytest.approx(whole, abs=1e-4)
    assert "BAD" not in job.stdout
    assert "exp_avg" in job.stdout, "the tree of the file shows the slots"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return module


def records(first: int, **change: float) -> list[dict[str, float]]:
    """A log of 10 steps: the same numbers each time, but for what is added to those of the last step."""
    log = [{"step": first, "test_loss": 4.0}]
    log += [{"step": step, "loss": 5.0 - 0.1 * step, "lr": 0.1} for step in range(first + 1, first + 11)]
    log += [{"step": first + 10, "test_loss": 3.0}]
    for name, difference in change.items():
        last = max(index for index, record in enumerate(log) if name in record)
        log[last] = log[last] | {name: log[last][name] + difference}
    return log


@pytest.mark.parametrize(
    ("until_kill", "resumed", "good"),
    [
        ({}, {}, True),
        ({}, {"loss": 0.1}, True),
        ({}, {"loss": 0.2}, False),
        ({}, {"loss": float("nan")}, False),
        ({}, {"test_loss": 0.05}, False),
        ({}, {"lr": 1e-6}, False),
        ({"loss": 1e-7}, {}, False),
    ],
)
def test_the_demo_fails_when_the_resumed_curve_is_another_one(
    demo: ModuleType, until_kill: dict[str, float], resumed: dict[str, float], good: bool
) -> None:
    whole = records(0) + records(10)
    assert demo.compare(whole, records(0, **until_kill), records(10, **resumed)) is good
