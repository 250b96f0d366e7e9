"""The directory of a manager: its records, and the decisions what to save, delete and restore.

Rank 0 only, except for the constructor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from distckpt import retention
from distckpt.errors import CorruptCheckpointError
from distckpt.log import warn
from distckpt.retention import CheckpointRecord, History, Policy
from distckpt.schedule import AutoSchedule, LastSave, Schedule
from distckpt.storage.commit import remove_checkpoints
from distckpt.storage.commit import sweep as sweep_temporary_files
from distckpt.storage.latest import complete_checkpoints, is_complete, saved_files
from distckpt.storage.paths import SUFFIX, from_here, numbered_files, parse_numbered, resolve
from distckpt.storage.state import DamagedStateError, read_entry, write_entry

#: Whether a save in the background has ended.
Ended = Callable[[], bool]


class DirectoryView(msgspec.Struct, frozen=True):
    """The state of the directory as rank 0 tells it to all ranks.

    Attributes:
        latest: Path of the newest complete checkpoint; None without one.
        checkpoints: Paths of the checkpoints that the manager may delete, oldest first.
        serial: Number of this view: a newer one has a higher number.
    """

    latest: str | None
    checkpoints: list[str]
    serial: int


class Decision(msgspec.Struct, frozen=True):
    """Whether to save now, and what is recorded about that save.

    Attributes:
        due: Whether to save.
        time: Time of the decision, in seconds on rank 0's clock.
        step: Value of the step counter; None without one.
        metrics: Name to value, for metrics that are finite.
        directory: Where the directory of the checkpoints is, wherever the program changes to meanwhile.
    """

    due: bool
    time: float
    step: int | None
    metrics: dict[str, float]
    directory: str


class Choice(msgspec.Struct, frozen=True):
    """The checkpoint to restore.

    Attributes:
        path: Path of the checkpoint; None if the directory has none.
        view: The state of the directory in that case, else None.
    """

    path: str | None
    view: DirectoryView | None = None


class ManagedDirectory:
    """The checkpoints of one prefix in one directory, as rank 0 of a `CheckpointManager` sees them.

    The manager calls `open` once. For a save it then calls `decide`, and `record` when the file is committed. A save in
    the background also calls `begin`, from which on it counts as the start of the next interval; the thread that has
    committed it calls `record`, and only then are old checkpoints deleted. A restore calls `begin_restore`, `choose`
    until a checkpoint is sound or none is left, and `restored`.
    """

    def __init__(
        self,
        directory: str,
        prefix: str,
        policy: Policy,
        schedule: Schedule | AutoSchedule,
        *,
        last_step: int | None,
        read_step: Callable[[], int | None],
        clock: Callable[[], float],
    ) -> None:
        """Local.

        Args:
            directory: Directory of the checkpoints.
            prefix: Beginning of their file names.
            policy: Which checkpoints to keep.
            schedule: When to save.
            last_step: Step at which the first interval begins; None saves at once.
            read_step: Returns the current step; None without a step counter.
            clock: Returns the time in seconds.
        """
        self._directory = directory
        self._prefix = prefix
        self._policy = policy
        self._schedule = schedule
        self._read_step = read_step
        self._clock = clock
        self._last = LastSave(last_step)
        self._begun: list[tuple[LastSave, Ended]] = []  # saves in the background, oldest first
        self._lock = threading.RLock()
        self._serial = 0
        self._history = History(last_preserved_time=clock() - 1)
        self._latest: str | None = None
        self._candidates: Iterator[str] = iter(())
        self._rejected: list[str] = []
        self._warned = False  # of metrics without the one of `keep_best`

    def open(self) -> DirectoryView:
        """Read the directory for the first time, and remove the temporary files of interrupted saves."""
        sweep_temporary_files(self._directory)
        self._history = retention.present(self._recorded(), self._own_files())
        now = self._clock()
        if now < self._history.last_preserved_time:
            warn([f"{self._directory}: the clock was set back. All checkpoints made so far are kept for good."])
            self._history = retention.after_clock_reset(self._history, now)
        self._latest = next(complete_checkpoints(self._directory, prefix=self._prefix), None)
        return self._view()

    # ---- save ----

    def decide(self, metrics: Mapping[str, Any] | None, *, check_interval: bool) -> Decision:
        """Decide whether to save now.

        Raises:
            ValueError: The step or a metric is not a number.
        """
        with self._lock:
            step, now = self._read_step(), self._clock()
            due = self._schedule.is_due(step, now, self._newest(), check_interval=check_interval)
            finite = retention.finite_metrics(metrics)
            if due and metrics:
                self._warn_of_metrics(metrics)
            return Decision(due, now, step, finite, from_here(self._directory))

    def _warn_of_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Warn, once, if the metric by which the best are kept has another name: the best would be deleted."""
        best = self._policy.keep_best
        if best is None or best.metric in metrics or self._warned:
            return
        self._warned = True
        given = ", ".join(repr(name) for name in metrics)
        expected = f"metrics: expected {best.metric!r} among them, by which keep_best ranks the checkpoints"
        warn([f"{expected}. Got {given}. This checkpoint is not among the best, whatever it is."])

    def begin(self, decision: Decision, ended: Ended) -> None:
        """Count intervals from a save that has begun in the background, until it ends.

        Args:
            decision: The decision to begin it.
            ended: Returns whether it has ended, successfully or not.
        """
        self._begun.append((LastSave(decision.step, decision.time), ended))

    def _newest(self) -> LastSave:
        """The save from which intervals count: the newest one in the background, or else the last recorded one."""
        self._begun = [(last, ended) for last, ended in self._begun if not ended()]
        return self._begun[-1][0] if self._begun else self._last

    def record(self, path: str, decision: Decision, *, durable: bool, when: float | None = None) -> DirectoryView:
        """Record a new checkpoint, and delete those that no policy keeps. May be called from any thread.

        The state file names the new checkpoint before an old one is deleted, and the deleted ones until the next save.
        So whenever the process ends, the next one knows all files that are there.

        Args:
            path: Path of the checkpoint.
            decision: The decision to save it.
            durable: Whether the file is on disk, so that it survives a crash of the machine.
            when: Time at which its state was captured, in seconds; None for now.

        Raises:
            OSError: The state file cannot be written.
            Exception: Whatever the predicate of the policy raises; the checkpoint is recorded, and none is deleted.
        """
        with self._lock:
            return self._record(path, decision, durable=durable, now=self._clock() if when is None else when)

    def _record(self, path: str, decision: Decision, *, durable: bool, now: float) -> DirectoryView:
        number = parse_numbered(Path(path).name)
        assert number is not None, "made by save"
        step = number.number if decision.step is None else decision.step
        record = CheckpointRecord(name=number.name, time=now, step=step, metrics=decision.metrics, durable=durable)
        self._latest, self._last = path, LastSave(decision.step, now)
        present = retention.present(self._history, self._own_files(decision.directory))
        self._history = retention.after_save(present, record)
        try:
            swept = retention.sweep(self._history, self._policy)
        except BaseException:  # from the user's predicate
            # Else the next process would not know that the file is its own.
            self._write(self._history, decision.directory, durable=durable)
            raise
        self._write(swept.history, decision.directory, durable=durable)
        left = remove_checkpoints(decision.directory, swept.delete)
        self._history = retention.forget(swept.history, {*swept.delete} - {*left})
        return self._view()

    # ---- restore ----

    def begin_restore(self) -> None:
        """Begin a restore: `choose` starts with the newest checkpoint."""
        self._candidates = complete_checkpoints(self._directory, prefix=self._prefix)
        self._rejected = []

    def choose(self, problem: str) -> Choice:
        """Choose the next checkpoint to try, from newest to oldest.

        Args:
            problem: Why the previous choice could not be restored; empty at the first call.

        Raises:
            CorruptCheckpointError: There are checkpoints, and none can be restored.
        """
        if problem:
            self._rejected.append(problem)
            warn([f"falling back to an older checkpoint: {problem}"])
        path = next(self._candidates, None)
        if path is not None:
            return Choice(path)
        self._require_nothing_lost()
        with self._lock:  # the checkpoints known so far may have been removed meanwhile
            self._latest, self._history = None, retention.present(self._history, self._own_files())
            return Choice(None, self._view())

    def restored(self, path: str) -> DirectoryView:
        """Record that a checkpoint was restored: intervals count from here.

        Raises:
            ValueError: The step is not an integer.
        """
        with self._lock:
            self._latest, self._last = path, LastSave(self._read_step(), self._clock())
            return self._view()

    def _require_nothing_lost(self) -> None:
        """Raise if the directory has checkpoints at all: only the user may decide to start anew in spite of them."""
        paths = [Path(self._directory, file.name) for file in saved_files(self._directory, self._prefix)]
        problems = [*self._rejected, *(problem for path in paths if (problem := is_complete(path)) is not None)]
        if problems:
            lines = "\n  ".join(problems[:10])
            raise CorruptCheckpointError(
                f"{self._directory}: no checkpoint can be restored. Move these away to start anew:\n  {lines}"
            )

    # ---- pins ----

    def pin(self, path: str) -> DirectoryView:
        """See `CheckpointManager.pin`."""
        with self._lock:  # first of all: a background save may be removing this one
            found = Path(resolve(path))
            if found.name not in self._own_files() or not found.parent.samefile(self._directory):
                raise self._not_ours("pin", path)
            self._write(retention.pin(self._history, found.name), durable=True)
            return self._view()

    def unpin(self, path: str) -> DirectoryView:
        """See `CheckpointManager.unpin`."""
        with self._lock:
            if Path(path).parent.resolve() != Path(self._directory).resolve():
                raise self._not_ours("unpin", path)
            name = Path(path).name.removesuffix(SUFFIX) + SUFFIX
            self._write(retention.unpin(self._history, name), durable=True)
            return self._view()

    # ---- parts of the above ----

    def _not_ours(self, operation: str, path: str) -> ValueError:
        pattern = str(Path(self._directory, f"{self._prefix}-<number>{SUFFIX}"))
        return ValueError(f"{operation}: expected a checkpoint of this manager, {pattern}. Got {path!r}.")

    def _recorded(self) -> History:
        """The history in the state file; the current one if there is none, or if it is damaged."""
        try:
            entry = read_entry(self._directory, self._prefix)
            return self._history if entry is None else retention.decode(entry)
        except (DamagedStateError, msgspec.ValidationError) as error:
            warn([f"{self._directory}: the manager's records are damaged ({error}). Checkpoints made so far are kept."])
            return self._history

    def _own_files(self, directory: str | None = None) -> set[str]:
        """Names of the existing files of the prefix. A name in the state file counts only if it is one of them.

        Args:
            directory: The directory, where the program may have gone elsewhere meanwhile; see `Decision`.
        """
        return {file.name for file in numbered_files(directory or self._directory) if file.prefix == self._prefix}

    def _write(self, history: History, directory: str | None = None, *, durable: bool) -> None:
        """Write the history into the state file, and keep it; `directory` as for `_own_files`."""
        write_entry(directory or self._directory, self._prefix, retention.encode(history), durable=durable)
        self._history = history

    def _view(self) -> DirectoryView:
        paths = [str(Path(self._directory, record.name)) for record in self._history.checkpoints]
        self._serial += 1
        return DirectoryView(self._latest, paths, self._serial)
