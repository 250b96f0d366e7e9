"""`CheckpointManager`: decides when to save, and which checkpoints to keep."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from distckpt.checkpoint import Checkpoint
from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from distckpt.handle import SaveHandle
from distckpt.managed_directory import Choice, Decision, DirectoryView, ManagedDirectory
from distckpt.options import Options, RestoreOptions, SaveOptions, given_or_default
from distckpt.request import Attempt, Request, meet
from distckpt.restoring.status import RestoreStatus
from distckpt.retention import CheckpointRecord, Mode, Policy, as_best
from distckpt.saving.draft import NewFile
from distckpt.schedule import (
    AutoSchedule,
    BackgroundTiming,
    SaveTimes,
    Schedule,
    StepCounter,
    as_integer,
    read_step,
    require_step_counter,
)
from distckpt.storage.paths import NUMBER_LIMIT, SUFFIX, as_text

_SAVED = "The new checkpoint is complete; only the removal of old ones was not finished."


class CheckpointManager:
    """Saves a Checkpoint at intervals, deletes old checkpoints, and restores the newest undamaged one.

    A program makes one, calls `restore_or_initialize` before training and `save` or `save_async` at every step; these
    return None until the interval has passed. Rank 0 decides for all ranks: only its clock, step counter, metrics and
    view of the directory count.

    Checkpoints that the manager did not make are never deleted. Its records are in the directory's state file, so that
    a manager made after a restart, even for a directory that was moved, goes on where the last one stopped. Only one
    manager at a time may use a directory and name.

    Example:
        >>> manager = CheckpointManager(checkpoint, "runs/a", max_to_keep=3, step_counter="step",
        ...                             checkpoint_interval=100)
        >>> manager.restore_or_initialize()
        >>> for checkpoint.step in range(checkpoint.step + 1, 1001):
        ...     train()
        ...     manager.save()
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 5,
        keep_every_n_hours: float | None = None,
        keep_every_n_steps: int | None = None,
        keep_best: tuple[str, Mode, int] | None = None,
        keep: Callable[[CheckpointRecord], bool] | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: StepCounter | None = None,
        checkpoint_interval: int | Literal["auto"] | None = None,
        checkpoint_interval_seconds: float | None = None,
        mtbf: float | None = None,
        init_fn: Callable[[], object] | None = None,
        last_checkpoint_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Local: the directory is not read before the first collective call.

        Args:
            checkpoint: The Checkpoint to save and restore.
            directory: Directory of the checkpoints; made by the first save.
            max_to_keep: Number of newest checkpoints to keep; None keeps all. Older ones are deleted, unless another
                option keeps them.
            keep_every_n_hours: Of those beyond `max_to_keep`, keep one in this many hours for good.
            keep_every_n_steps: Of those beyond `max_to_keep`, keep for good the first at or after each multiple of this
                many steps. Without a `step_counter` the steps are the numbers of the checkpoints.
            keep_best: (metric, "min" or "max", count): keep the `count` best by a metric passed to `save`. Checkpoints
                without the metric, or with one that is not finite, do not count.
            keep: Predicate: a checkpoint is kept while it returns True for it. Called on rank 0; for saves in the
                background in their thread.
            checkpoint_name: Beginning of the file names.
            step_counter: Where rank 0 finds the current step: a function, a tensor, or the name of an attribute of the
                checkpoint, such as "step".
            checkpoint_interval: `save` does nothing until the step counter has advanced by this many steps. "auto":
                until the interval has passed that loses the least time to saves and to work repeated after failures,
                computed from the measured time of steps and saves and from `mtbf`.
            checkpoint_interval_seconds: `save` does nothing until this many seconds have passed. With both intervals,
                it saves when either has passed.
            mtbf: Mean time between failures of the job, in seconds, for "auto": that of a node divided by the number of
                nodes.
            init_fn: Called by `restore_or_initialize`, on every rank, if there is nothing to restore.
            last_checkpoint_step: Step at which the first interval begins; None makes the first `save` save.
            clock: Returns the time in seconds since the epoch; only that of rank 0 counts.

        Raises:
            TypeError: `checkpoint` is not a Checkpoint, or `directory` is not a path.
            ValueError: An option has a bad value.
        """
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"checkpoint: expected a distckpt.Checkpoint. Got a {type(checkpoint).__qualname__}.")
        if checkpoint_interval is not None and not isinstance(checkpoint_interval, str) and step_counter is None:
            raise ValueError("checkpoint_interval: expected a step_counter with it. Got none.")
        require_step_counter(step_counter)
        if init_fn is not None and not callable(init_fn):
            raise ValueError(f"init_fn: expected a function, or None. Got {init_fn!r:.100}.")
        policy = Policy(
            max_to_keep=max_to_keep,
            keep_every_n_hours=keep_every_n_hours,
            keep_every_n_steps=keep_every_n_steps,
            keep_best=as_best(keep_best),
            keep=keep,
        )
        self._times = SaveTimes()
        self._checkpoint = checkpoint
        self._directory = str(Path(as_text("directory", directory)))
        self._name = _checked_name(checkpoint_name)
        self._init_fn = init_fn
        self._managed = ManagedDirectory(
            self._directory,
            self._name,
            policy,
            _schedule(checkpoint_interval, checkpoint_interval_seconds, mtbf, self._times),
            last_step=_as_step(last_checkpoint_step),
            read_step=functools.partial(read_step, step_counter, checkpoint),
            clock=clock,
        )
        self._known: DirectoryView | None = None
        self._status: RestoreStatus | None = None

    # ---- properties ----

    @property
    def checkpoint(self) -> Checkpoint:
        """The Checkpoint that is saved and restored."""
        return self._checkpoint

    @property
    def directory(self) -> str:
        """Directory of the checkpoints, as passed to the constructor."""
        return self._directory

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest complete checkpoint in the directory, whoever made it; None if there is none.

        Those of other managers, which differ in the name, count only if there is no other.
        Collective over the communicator at the first use of the manager, local afterwards.
        """
        return self._view().latest

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the checkpoints that this manager may delete some day, oldest first.

        Those kept for good and those made by others are not among them. Collective over the communicator at the first
        use of the manager, local afterwards.
        """
        return list(self._view().checkpoints)

    @property
    def status(self) -> RestoreStatus | None:
        """The status of the last `restore_or_initialize`; None before the first. Local."""
        return self._status

    @property
    def save_seconds(self) -> float | None:
        """Duration of the longest of the last saves on this rank, in seconds; None before the first one. Local."""
        return self._times.longest_save

    # ---- the collective calls ----

    def save(
        self,
        checkpoint_number: int | None = None,
        *,
        check_interval: bool = True,
        metrics: Mapping[str, Any] | None = None,
        options: SaveOptions | None = None,
    ) -> str | None:
        """Save if the interval has passed, and delete old checkpoints. Collective over the communicator.

        Args:
            checkpoint_number: Number for the file name, greater than all existing ones; None for the next one. The save
                counter is incremented all the same.
            check_interval: False saves even if the interval has not passed, but not twice at one step.
            metrics: Name to number, for `keep_best` and `keep`; only those of rank 0 count.
            options: Options of the save; the same on all ranks.

        Returns:
            Path of the file; None if nothing was saved.

        Raises:
            CheckpointError: As `Checkpoint.save`.
        """
        options = self._options("save", options, SaveOptions)
        with self._coordinator.turn, self._coordinator.uninterrupted():
            number, decision = self._decide("save", checkpoint_number, check_interval, metrics, options)
            if not decision.due:
                return None
            with self._times.synchronous():
                path = self._checkpoint._save_numbered(self._prefix, number, options)
            record = functools.partial(self._managed.record, path, decision, durable=options.durable)
            self._learn(self._coordinator.on_root("delete old checkpoints", record, DirectoryView, remedy=_SAVED))
        return path

    def save_async(
        self,
        checkpoint_number: int | None = None,
        *,
        check_interval: bool = True,
        metrics: Mapping[str, Any] | None = None,
        options: SaveOptions | None = None,
    ) -> SaveHandle | None:
        """Begin a save in the background if the interval has passed. Collective over the communicator.

        Old checkpoints are deleted in the background too, once the new one is committed. See `Checkpoint.save_async`.

        Args:
            checkpoint_number: As in `save`.
            check_interval: As in `save`.
            metrics: As in `save`.
            options: Options of the save; the same on all ranks.

        Returns:
            A handle on the save; None if none was begun.

        Raises:
            CheckpointError: As `Checkpoint.save_async`.
        """
        options = self._options("save_async", options, SaveOptions)
        with self._coordinator.turn, self._coordinator.uninterrupted():
            number, decision = self._decide("save_async", checkpoint_number, check_interval, metrics, options)
            if not decision.due:
                return None
            timing = self._times.background()
            record = functools.partial(self._record_later, decision, options.durable, timing)
            save = self._checkpoint._start_numbered(self._prefix, number, options, record)
            timing.returned()
            if self._coordinator.rank == 0:
                self._managed.begin(decision, save.has_ended)
        return SaveHandle(save)

    def restore_or_initialize(self, options: RestoreOptions | None = None) -> str | None:
        """Restore the newest checkpoint, or call `init_fn` if there is none. Collective over the communicator.

        Those of other managers of the directory, which differ in the name, come last.
        A damaged checkpoint is skipped with a warning, and the next older one is tried. Afterwards the property
        `status` has the status of the restore.

        Args:
            options: Options of the restore; the same on all ranks.

        Returns:
            Path of the restored file; None if there is none.

        Raises:
            CorruptCheckpointError: There are checkpoints, and all of them are damaged.
            CheckpointError: As `Checkpoint.restore`.
        """
        options = self._options("restore_or_initialize", options, RestoreOptions)
        with self._coordinator.turn, self._coordinator.uninterrupted():
            self._checkpoint._session.saver.in_flight.settle("restore_or_initialize", options.timeout)
            self._meet("restore_or_initialize", options.timeout)
            self._coordinator.on_root("look for checkpoints", self._managed.begin_restore, type(None))
            path = self._restore_newest(options)
            if path is None:
                self._initialize(options)
            else:
                restored = functools.partial(self._managed.restored, path)
                self._learn(self._coordinator.on_root("read the step", restored, DirectoryView))
        return path

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Keep a checkpoint until it is unpinned, whatever the policies say. Collective over the communicator.

        Args:
            path: Path of a checkpoint of this manager, with or without ".h5".

        Raises:
            CheckpointNotFoundError: There is no such file.
            CollectiveError: It is not a checkpoint of this manager.
        """
        self._change_pin("pin", path, self._managed.pin)

    def unpin(self, path: str | os.PathLike[str]) -> None:
        """Let the policies decide about a checkpoint again, from the next save on. Collective over the communicator.

        Args:
            path: Path of the checkpoint, with or without ".h5"; nothing happens if it is not pinned.

        Raises:
            CollectiveError: It is in another directory.
        """
        self._change_pin("unpin", path, self._managed.unpin)

    # ---- parts of the above ----

    @property
    def _coordinator(self) -> Coordinator:
        return self._checkpoint._session.coordinator

    def _meet(
        self,
        operation: str,
        timeout: float,
        fields: Mapping[str, object] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Wait for all ranks; the first time, read the directory too. Collective over the communicator."""
        own = {"directory": self._directory, "checkpoint_name": self._name}
        request = Request(f"CheckpointManager.{operation}", {**own, **(fields or {})})
        meet(self._coordinator, request, error, timeout)
        if self._known is None:
            self._learn(self._coordinator.on_root("look at the directory", self._managed.open, DirectoryView))

    def _options(self, operation: str, options: Options | None, kind: type[Options]) -> Options:
        """Check the options of a call, as `Checkpoint._options`. Collective over the communicator if they are bad."""
        given = Attempt.of(lambda: given_or_default(options, kind))
        if given.error is not None and self._coordinator.size > 1:
            with self._coordinator.turn, self._coordinator.uninterrupted():
                self._meet(operation, kind().timeout, error=given.error)
        given.require()
        return given.value

    def _decide(
        self,
        operation: str,
        checkpoint_number: int | None,
        check_interval: bool,
        metrics: Mapping[str, Any] | None,
        options: SaveOptions,
    ) -> tuple[int | None, Decision]:
        """The number passed by the caller, and rank 0's decision. Collective over the communicator."""
        number = Attempt.of(functools.partial(_as_number, checkpoint_number))
        fields = {"checkpoint_number": number.result, "check_interval": check_interval}
        self._meet(operation, options.timeout, fields, number.error)
        decide = functools.partial(self._managed.decide, metrics, check_interval=check_interval)
        return number.result, self._coordinator.on_root("decide whether to save", decide, Decision)

    @property
    def _prefix(self) -> Path:
        return Path(self._directory, self._name)

    def _record_later(
        self,
        decision: Decision,
        durable: bool,
        timing: BackgroundTiming,
        coordinator: Coordinator,
        file: NewFile,
    ) -> None:
        """Epilogue of a save in the background: record its checkpoint. Collective over the save's communicator.

        Called in the background thread if that one calls MPI, else in the main thread.
        """
        timing.committed()
        record = functools.partial(self._managed.record, file.path, decision, durable=durable, when=decision.time)
        self._learn(coordinator.on_root("delete old checkpoints", record, DirectoryView, remedy=_SAVED))

    def _learn(self, view: DirectoryView) -> None:
        """Keep rank 0's view of the directory, unless a newer one came first, from a save in the background."""
        if self._known is None or view.serial > self._known.serial:
            self._known = view

    def _view(self) -> DirectoryView:
        if self._known is None:
            with self._coordinator.turn, self._coordinator.uninterrupted():
                self._meet("look", SaveOptions().timeout)
        assert self._known is not None, "just looked"
        return self._known

    def _change_pin(self, operation: str, path: str | os.PathLike[str], change: Callable[[str], DirectoryView]) -> None:
        with self._coordinator.turn, self._coordinator.uninterrupted():
            text = Attempt.of(functools.partial(as_text, "path", path))
            self._meet(operation, SaveOptions().timeout, {"path": text.result}, text.error)
            self._learn(self._coordinator.on_root(operation, functools.partial(change, text.value), DirectoryView))

    def _restore_newest(self, options: RestoreOptions) -> str | None:
        """Restore the newest undamaged checkpoint; returns its path, or None. Collective over the communicator."""
        problem = ""
        while True:
            choose = functools.partial(self._managed.choose, problem)
            choice = self._coordinator.on_root("choose a checkpoint", choose, Choice)
            path = choice.path
            if path is None:
                assert choice.view is not None, "it comes without a path"
                self._learn(choice.view)
                return None
            try:
                self._status = self._checkpoint.restore(path, options=options)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:  # the same on all ranks
                problem = str(error) if path in str(error) else f"{path}: {error}"
            else:
                return path

    def _initialize(self, options: RestoreOptions) -> None:
        self._status = self._checkpoint.restore(None, options=options)
        if self._init_fn is not None:
            with self._coordinator.step("init_fn"):
                self._init_fn()


def _schedule(
    steps: int | Literal["auto"] | None, seconds: float | None, mtbf: float | None, times: SaveTimes
) -> Schedule | AutoSchedule:
    if steps == "auto":
        return AutoSchedule(mtbf, times, Schedule(None, seconds))
    if isinstance(steps, str):
        raise ValueError(f'checkpoint_interval: expected a number > 0, "auto" or None. Got {steps!r}.')
    if mtbf is not None:
        raise ValueError(f'mtbf: expected checkpoint_interval="auto" with it. Got {steps!r}.')
    return Schedule(steps, seconds)


def _checked_name(name: object) -> str:
    if isinstance(name, str) and "/" not in name and name.removesuffix(SUFFIX) == name and name not in {"", ".", ".."}:
        return name
    raise ValueError(f"checkpoint_name: expected what file names begin with, such as 'ckpt'. Got {name!r}.")


def _as_step(last_checkpoint_step: int | None) -> int | None:
    return None if last_checkpoint_step is None else as_integer("last_checkpoint_step", last_checkpoint_step)


def _as_number(checkpoint_number: int | None) -> int | None:
    if checkpoint_number is None:
        return None
    number = as_integer("checkpoint_number", checkpoint_number)
    if not 0 <= number < NUMBER_LIMIT:
        raise ValueError(f"checkpoint_number: expected a number >= 0 and below {NUMBER_LIMIT}. Got {number}.")
    return number
