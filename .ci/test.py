"""`make test`: runs every stage, counts the tests that were really executed, and ends with the verdict.

Two lanes of stages run side by side, for most of these keep less than one core busy; then the MPI tests, each with the
machine to itself.

A stage fails when its command fails, or when fewer tests were executed than .ci/expected-tests says: a test that was
skipped, or never collected, proves nothing. Reports, the output of the second lane and that of ranks above 0 go to
.reports/.

    python .ci/test.py            all stages
    python .ci/test.py unit e2e   these only
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".reports"
EXPECTED = ROOT / ".ci" / "expected-tests"
LOG_TAIL_LINES = 60
NO_TESTS_COLLECTED = 5


class Lane(Enum):
    """When a stage runs, and where its output is shown."""

    FIRST = "after those before it in this lane, in sight"
    SECOND = "the same beside the first lane; its output is shown when it has ended"
    ALONE = "when both lanes have ended, in sight"


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Attributes:
        limit: Seconds after which it is ended.
        ranks: Ranks under mpirun; 0 without mpirun.
        has_tests: Whether it runs pytest.
        requires: Programs without which it is left out, with a line that says so.
        lane: When it runs.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    ranks: int = 0
    has_tests: bool = True
    requires: tuple[str, ...] = ()
    lane: Lane = Lane.FIRST

    @property
    def missing(self) -> list[str]:
        """The required programs that are not there."""
        return [name for name in self.requires if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

    @property
    def reports(self) -> Path:
        """Directory of the stage's JUnit reports and logs."""
        return REPORTS / self.name

    def command_line(self) -> list[str]:
        """The command with its limit, its launcher and its report."""
        limited = ["timeout", "--kill-after=10", str(self.limit)]
        if not self.has_tests:
            return [*limited, *self.command]
        launcher = ["mpirun", "-n", str(self.ranks)] if self.ranks else []
        return [*limited, *launcher, ".ci/rank", str(self.reports), *self.command]


@dataclass(frozen=True, slots=True)
class Counts:
    """Tests by outcome."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage.

    Attributes:
        problems: Why it failed, one line each.
        missing: The programs for want of which it did not run.
    """

    stage: Stage
    seconds: float
    counts: Counts
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """One word."""
        return "FAILED" if self.problems else "left out" if self.missing else "ok"

    @property
    def notes(self) -> list[str]:
        """What the summary says beside it."""
        if self.missing:
            return [f"not installed: {', '.join(self.missing)}"]
        return [*([str(self.counts)] if self.stage.has_tests else []), *self.problems]


def _pytest(*arguments: str) -> tuple[str, ...]:
    # mpirun gives its ranks a terminal even where there is none.
    color = "yes" if sys.stdout.isatty() else "no"
    return ("python", "-m", "pytest", "-p", "no:cacheprovider", f"--color={color}", *arguments)


def _mpi(ranks: int, limit: int, *options: str) -> Stage:
    return Stage(f"mpi-{ranks}", _pytest("tests/mpi", "--with-mpi", *options), limit, ranks=ranks, lane=Lane.ALONE)


SCRIPTS = (*map(str, sorted((ROOT / "launch").glob("*.s*"))), ".ci/install", ".ci/rank", ".ci/run")
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
#: End-to-end tests of how jobs end, about half of all in time.
ENDS = tuple(f"tests/e2e/test_{name}.py" for name in ("coordination", "kill", "launch", "save_async"))

# Every MPI test runs on 4 ranks, and once more on the number of ranks it states, if that is smaller.
STAGES = (
    Stage("lint", ("ruff", "check", "."), 120, has_tests=False, lane=Lane.SECOND),
    Stage("format", ("ruff", "format", "--check", "."), 120, has_tests=False, lane=Lane.SECOND),
    Stage(
        "shellcheck", ("shellcheck", "-x", *SCRIPTS), 120, has_tests=False, requires=("shellcheck",), lane=Lane.SECOND
    ),
    Stage("typecheck", ("mypy",), 900, has_tests=False, lane=Lane.SECOND),
    Stage("slurm", _pytest("tests/slurm"), 300, requires=SLURM, lane=Lane.SECOND),
    Stage("e2e-ends", _pytest(*ENDS), 1800, lane=Lane.SECOND),
    Stage("unit", _pytest("tests/unit"), 900),
    Stage("e2e", _pytest("tests/e2e", *(f"--ignore={path}" for path in ENDS)), 1800),
    _mpi(4, 1200),
    _mpi(3, 900, "--stated-size-only"),
    _mpi(2, 900, "--stated-size-only"),
)


def run(stage: Stage, expected: Mapping[str, int]) -> Outcome:
    """Runs one stage; its problems say in one line each why it failed."""
    where = f" on {stage.ranks} ranks" if stage.ranks else ""
    title = f"\n== {stage.name}: {' '.join(stage.command)}{where}\n"
    if stage.missing:
        _show(f"{title}left out, not installed: {', '.join(stage.missing)}\n")
        return Outcome(stage, 0.0, Counts(), missing=stage.missing)
    stage.reports.mkdir(parents=True)
    start = time.monotonic()
    status = _run_beside(stage, title) if stage.lane is Lane.SECOND else _run_in_sight(stage, title)
    seconds = time.monotonic() - start
    counts = count_tests(stage) if stage.has_tests else Counts()
    problems = find_problems(stage, status, counts, expected.get(stage.name, 0))
    if problems:
        show_logs(stage)
    if problems and stage.has_tests and not counts.failed:
        counts += Counts(failed=1)
    return Outcome(stage, seconds, counts, problems)


def _run_in_sight(stage: Stage, title: str) -> int:
    _show(title)
    return subprocess.run(stage.command_line(), cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def _run_beside(stage: Stage, title: str) -> int:
    # A file, not a pipe: who reads a pipe to its end waits for everything that the command has started.
    log = stage.reports / "output.log"
    with log.open("wb") as output:
        done = subprocess.run(
            stage.command_line(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
    _show(f"{title}{log.read_text(errors='replace')}")
    return done.returncode


def _show(text: str) -> None:
    """In one piece: another thread may show something, too."""
    sys.stdout.write(text)
    sys.stdout.flush()


def find_problems(stage: Stage, status: int, counts: Counts, expected: int) -> list[str]:
    """Why the stage failed, one line each; empty if it did not."""
    problems = []
    if status in (124, 137):
        problems.append(f"did not end in {stage.limit} s")
    elif status and not (status == NO_TESTS_COLLECTED and expected == 0):
        problems.append(f"exit status {status}")
    executed = counts.passed + counts.failed
    if executed < expected:
        problems.append(f"{executed} tests executed, at least {expected} expected ({EXPECTED.relative_to(ROOT)})")
    return problems


def count_tests(stage: Stage) -> Counts:
    """The outcomes on rank 0; the failures of whichever rank has most."""
    by_rank = [_read_report(report) for report in sorted(stage.reports.glob("rank-*.xml"))]
    if not by_rank or not (stage.reports / "rank-0.xml").exists():
        return Counts()
    failed = max(counts.failed for counts in by_rank)
    return Counts(by_rank[0].passed - (failed - by_rank[0].failed), failed, by_rank[0].skipped)


def _read_report(report: Path) -> Counts:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, f"{report} holds no test suite"
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = min(number["failures"] + number["errors"], number["tests"])
    return Counts(number["tests"] - failed - number["skipped"], failed, number["skipped"])


def show_logs(stage: Stage) -> None:
    """The ends of what the ranks above 0 wrote."""
    for log in sorted(stage.reports.glob("rank-*.log")):
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        print(f"-- {stage.name}, {log.stem}:", *lines, sep="\n   ", flush=True)


def read_expected() -> dict[str, int]:
    """Stage name to the number of tests it must execute."""
    pairs = [line.split() for line in EXPECTED.read_text().splitlines() if line.strip()]
    return {name: int(number) for name, number in pairs}


def print_summary(outcomes: list[Outcome], expected: dict[str, int]) -> None:
    """A table of the stages, and the hint where .ci/expected-tests lags behind."""
    print("\nstage      seconds  result")
    for outcome in outcomes:
        print(f"{outcome.stage.name:10} {outcome.seconds:7.1f}  {outcome.verdict:8}  {'; '.join(outcome.notes)}")
    for outcome in outcomes:
        executed = outcome.counts.passed + outcome.counts.failed
        if not outcome.problems and executed > expected.get(outcome.stage.name, 0):
            print(f"{outcome.stage.name}: {executed} tests executed; raise its line in {EXPECTED.relative_to(ROOT)}.")


def run_all(stages: Sequence[Stage], expected: Mapping[str, int]) -> list[Outcome]:
    """Runs both lanes side by side, then those that run alone."""
    by_lane = {lane: [stage for stage in stages if stage.lane is lane] for lane in Lane}
    with ThreadPoolExecutor(max_workers=1) as thread:
        second = [thread.submit(run, stage, expected) for stage in by_lane[Lane.SECOND]]
        try:
            first = [run(stage, expected) for stage in by_lane[Lane.FIRST]]
        except BaseException:
            thread.shutdown(cancel_futures=True)
            raise
    alone = [run(stage, expected) for stage in by_lane[Lane.ALONE]]
    return [*(outcome.result() for outcome in second), *first, *alone]


def main(names: list[str]) -> int:
    """Runs the stages of these names, all without names; returns the exit status."""
    stages = [stage for stage in STAGES if not names or stage.name in names]
    shutil.rmtree(REPORTS, ignore_errors=True)
    expected = read_expected()
    outcomes = run_all(stages, expected)
    print_summary(outcomes, expected)
    total = sum((outcome.counts for outcome in outcomes), Counts())
    (REPORTS / "summary").write_text(f"{total}\n")
    print(total)
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
