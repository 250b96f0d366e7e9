"""`make test`: runs every stage, counts the tests that were really executed, and ends with the verdict.

A stage fails when its command fails, or when fewer tests were executed than .ci/expected-tests says: a test that was
skipped, or never collected, proves nothing. Reports and the output of ranks above 0 go to .reports/.

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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".reports"
EXPECTED = ROOT / ".ci" / "expected-tests"
LOG_TAIL_LINES = 60
NO_TESTS_COLLECTED = 5


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Attributes:
        limit: Seconds after which it is ended.
        ranks: Ranks under mpirun; 0 without mpirun.
        has_tests: Whether it runs pytest.
        requires: Programs without which it is left out, with a line that says so.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    ranks: int = 0
    has_tests: bool = True
    requires: tuple[str, ...] = ()

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


def _pytest(folder: str, *options: str) -> tuple[str, ...]:
    # mpirun gives its ranks a terminal even where there is none.
    color = "yes" if sys.stdout.isatty() else "no"
    return ("python", "-m", "pytest", "-p", "no:cacheprovider", f"--color={color}", *options, f"tests/{folder}")


SCRIPTS = (*map(str, sorted((ROOT / "launch").glob("*.s*"))), ".ci/install", ".ci/rank", ".ci/run")

# Every MPI test runs on 4 ranks, and once more on the number of ranks it states, if that is smaller.
STAGES = (
    Stage("lint", ("ruff", "check", "."), 120, has_tests=False),
    Stage("format", ("ruff", "format", "--check", "."), 120, has_tests=False),
    Stage("typecheck", ("mypy",), 900, has_tests=False),
    Stage("shellcheck", ("shellcheck", "-x", *SCRIPTS), 120, has_tests=False, requires=("shellcheck",)),
    Stage("unit", _pytest("unit"), 900),
    Stage("mpi-4", _pytest("mpi", "--with-mpi"), 1200, ranks=4),
    Stage("mpi-3", _pytest("mpi", "--with-mpi", "--stated-size-only"), 900, ranks=3),
    Stage("mpi-2", _pytest("mpi", "--with-mpi", "--stated-size-only"), 900, ranks=2),
    Stage("e2e", _pytest("e2e"), 1800),
    Stage("slurm", _pytest("slurm"), 300, requires=("munged", "slurmctld", "slurmd", "sbatch", "srun")),
)


def run(stage: Stage, expected: int) -> Outcome:
    """Runs one stage; its problems say in one line each why it failed."""
    where = f" on {stage.ranks} ranks" if stage.ranks else ""
    print(f"\n== {stage.name}: {' '.join(stage.command)}{where}", flush=True)
    if stage.missing:
        print(f"left out, not installed: {', '.join(stage.missing)}")
        return Outcome(stage, 0.0, Counts(), missing=stage.missing)
    stage.reports.mkdir(parents=True)
    start = time.monotonic()
    status = subprocess.run(stage.command_line(), cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    seconds = time.monotonic() - start
    counts = count_tests(stage) if stage.has_tests else Counts()
    problems = find_problems(stage, status, counts, expected)
    if problems:
        show_logs(stage)
    if problems and stage.has_tests and not counts.failed:
        counts += Counts(failed=1)
    return Outcome(stage, seconds, counts, problems)


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


def main(names: list[str]) -> int:
    """Runs the stages of these names, all without names; returns the exit status."""
    stages = [stage for stage in STAGES if not names or stage.name in names]
    shutil.rmtree(REPORTS, ignore_errors=True)
    expected = read_expected()
    outcomes = [run(stage, expected.get(stage.name, 0)) for stage in stages]
    print_summary(outcomes, expected)
    total = sum((outcome.counts for outcome in outcomes), Counts())
    (REPORTS / "summary").write_text(f"{total}\n")
    print(total)
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
