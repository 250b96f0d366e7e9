"""The steps of a restore: open, match, read, assign; and the values that are still pending afterwards."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import LayoutError, RestoreMismatchError
from distckpt.exchange.reading import read_together
from distckpt.exchange.taking import Want
from distckpt.graph.assignment import Assignment
from distckpt.graph.trackable import Trackable, tracking_of
from distckpt.graph.view import LiveGraph
from distckpt.layout.collector import collector_off
from distckpt.log import log, warn
from distckpt.options import RestoreOptions
from distckpt.progress import progress_bar
from distckpt.request import Attempt, Request, asked_once, meet
from distckpt.restoring.restoration import LocalReport, Restoration, combine, describe_mismatches
from distckpt.restoring.status import Report, RestoreStatus
from distckpt.source import Source, open_source
from distckpt.storage.paths import as_text
from distckpt.storage.threads import threads_of_rank
from distckpt.timing import AGREE, RESTORE_STEPS, Timer, Timing

if TYPE_CHECKING:
    from distckpt.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class _Asked:
    """The arguments of a restore, copied into objects of our own.

    The user's objects may raise; between two agreements that could fail on one rank only.

    Attributes:
        path: The path of the file; a PathLike becomes text.
        options: Options of the restore.
    """

    path: str | None
    options: RestoreOptions

    @classmethod
    def of(cls, save_path: str | os.PathLike[str] | None, options: RestoreOptions) -> _Asked:
        """Copy the user's arguments. What is not a path is kept, to be refused once all ranks have agreed on it."""
        text = asked_once("path", lambda: os.fspath(save_path)) if isinstance(save_path, os.PathLike) else save_path
        rename = asked_once("rename", lambda: None if options.rename is None else dict(options.rename))
        only = asked_once("only", lambda: None if options.only is None else tuple(options.only))
        return cls(text, replace(options, rename=rename, only=only))

    def request(self, operation: str) -> Request:
        """The request in which all ranks must agree."""
        return Request.of(operation, self.path, self.options)


#: The first save warns about unmatched values of at most this many restores, the last ones.
_MAX_UNREPORTED = 8


class Restorer:
    """The restores of one Checkpoint, done and pending.

    `Checkpoint.restore` and `Checkpoint.read` call `restore`, which returns a status. Restores with pending values are
    kept: a new attribute of a trackable object (`on_attribute`), the user (`retry_pending`) or an assertion of the
    status (`refresh`) makes each of them try again. Every save calls `before_save`, which warns about values that
    stayed unmatched and gives up pending ones that the save replaces; rank 0 warns of those of all ranks.
    """

    def __init__(self, coordinator: Coordinator, checkpoint: weakref.ref[Checkpoint]) -> None:
        self._coordinator = coordinator
        self._checkpoint = checkpoint
        self._active: list[Restoration] = []  # those with pending values, newest first
        self._unreported: dict[str, list[str]] = {}  # `Restoration.unmatched` by path
        self._dropped: list[str] = []  # pending values that a save replaces, until rank 0 has heard of them
        self._applying = False
        self._statuses = weakref.WeakSet[RestoreStatus]()

    # ---- the steps ----

    def restore(
        self, operation: str, save_path: str | os.PathLike[str] | None, options: RestoreOptions
    ) -> RestoreStatus:
        """Restore; see `Checkpoint.restore` and `Checkpoint.read`. Collective over the communicator."""
        with collector_off(), self._coordinator.uninterrupted():
            return self._restore(operation, save_path, options)

    def _restore(
        self, operation: str, save_path: str | os.PathLike[str] | None, options: RestoreOptions
    ) -> RestoreStatus:
        coordinator, with_counter = self._coordinator, operation == "restore"
        timer = Timer()
        asked = Attempt.of(lambda: _Asked.of(save_path, options))
        with timer.step("walk"):
            walk = Attempt.of(lambda: self._walk(with_counter=with_counter))
        with timer.step(AGREE):
            request = asked.result.request(operation) if asked.result else Request(operation, {})
            meet(coordinator, request, asked.error or walk.error, options.timeout)
        save_path, options = asked.value.path, asked.value.options
        if save_path is None:
            log.info("%s(None): nothing to restore", operation)
            return RestoreStatus(self, self._require_checkpoint(), None, Report(0))
        path = as_text("save_path" if with_counter else "path", save_path)  # agreed on, so all ranks or none raise
        source = open_source(coordinator, path, timer)
        checkpoint = self._require_checkpoint()
        counter = checkpoint._session.counter
        try:
            restoration = Restoration(source, options, with_counter=with_counter)
            return self._carry_out(restoration, walk.value, timer)
        except BaseException:
            self._forget(source)
            checkpoint._set_counter(counter)  # the ranks must still agree on it
            raise

    def _carry_out(self, restoration: Restoration, live: LiveGraph, timer: Timer) -> RestoreStatus:
        """Match, agree, read, assign. Collective over the communicator."""
        coordinator, source = self._coordinator, restoration.source
        with coordinator.step("match"), timer.step("plan"):
            binding, assignment = restoration.plan(live)
            local = msgspec.msgpack.encode(restoration.report(live, binding, assignment))
        report = self._agree(restoration, local)
        self._refuse(restoration, report)
        self._read(source, assignment, timer, restoration.options)
        with coordinator.step("assign"), timer.step("assign"):
            self._apply(assignment)
            restoration.settle(binding, assignment)
            self._wait_for_the_rest(restoration, live)
            self._remember(restoration, report)
        timer.collect(coordinator.gather_rows, RESTORE_STEPS)
        tell = functools.partial(self._tell, restoration, report, timer)
        timing = timer.on_this_rank(coordinator.on_root("report", tell, Timing))
        status = RestoreStatus(self, self._require_checkpoint(), restoration, report, timing)
        self._statuses.add(status)
        return status

    def _read(self, source: Source, assignment: Assignment, timer: Timer, options: RestoreOptions) -> None:
        """Read all tensors, those that other ranks want too together with them. Collective over the communicator."""
        coordinator, verify = self._coordinator, options.verify
        with progress_bar(coordinator.rank, "restore", assignment.nbytes) as progress, source.named_in_errors():
            want = Want(source, assignment.reads, verify, progress, options.threads)
            with timer.step("exchange"):
                rest = Attempt.of(functools.partial(read_together, coordinator, want))
            with coordinator.step("read"), timer.step("read"):
                rest.require()
                threads = options.threads or threads_of_rank(coordinator.node.size)  # `read_together` knows the node
                source.read(rest.value, verify=verify, progress=progress, threads=threads)

    def _walk(self, *, with_counter: bool) -> LiveGraph:
        return self._require_checkpoint()._walk(with_counter=with_counter)

    def _require_checkpoint(self) -> Checkpoint:
        checkpoint = self._checkpoint()
        assert checkpoint is not None, "its method is running"
        return checkpoint

    def _agree(self, restoration: Restoration, local: bytes) -> Report:
        """The report of all ranks, from the encoded `LocalReport` of each. Collective over the communicator."""
        gathered = self._coordinator.gather_all("report", local)
        reports: list[LocalReport] = []
        with self._coordinator.step("combine reports"):
            reports += [msgspec.msgpack.decode(data, type=LocalReport) for data in gathered]
        return combine(restoration, reports)

    def _refuse(self, restoration: Restoration, report: Report) -> None:
        """Raise if the options do not allow what the report says. Same on all ranks, before anything is changed."""
        options, path = restoration.options, restoration.source.path
        if report.disputed:
            lines = "\n  ".join(report.disputed[:20])
            more = f"\n  ... and {len(report.disputed) - 20} more" if len(report.disputed) > 20 else ""
            raise LayoutError(
                f"{path}: ranks disagree on tensors. Nothing was changed.\n  {lines}{more}\n"
                "Give a tensor the same mesh and placements on every rank of its mesh."
            )
        if report.mismatched and options.on_mismatch == "error":
            raise RestoreMismatchError(describe_mismatches(path, report.mismatched))
        if report.ambiguous and options.strict:
            lines = "\n  ".join(report.ambiguous[:20])
            raise RestoreMismatchError(f"{path}: ambiguous, and strict=True. Nothing was changed.\n  {lines}")
        if report.exempt and options.per_rank == "error":
            saved, size = restoration.source.manifest.world_size, self._coordinator.size
            raise RestoreMismatchError(
                f"{path}: per-rank values of {saved} rank(s) cannot be restored on {size}, and per_rank='error'. "
                f"Nothing was changed. Keys: {', '.join(sorted(report.exempt)[:10])}. Pass per_rank='keep'."
            )

    def _apply(self, assignment: Assignment) -> None:
        """Apply an assignment, while `retry_pending` ignores the attributes that this sets."""
        self._applying = True
        try:
            assignment.apply()
        finally:
            self._applying = False

    def _tell(self, restoration: Restoration, report: Report, timer: Timer) -> Timing:
        """Log one line and issue the warnings of a restore. Rank 0 only."""
        timing, path = timer.timing(), restoration.source.path
        log.info("%s from %s in %.3f s: %s", report.summary(), path, timing.seconds, timing.in_words())
        warn(report.immediate_warnings(path))
        return timing

    def _remember(self, restoration: Restoration, report: Report) -> None:
        """Keep the warnings about unmatched values for the first save.

        Only those of the last restores are kept: an evaluation restores again and again, and never saves.
        """
        path = restoration.source.path
        self._unreported.pop(path, None)
        restoration.agreed = report
        if not restoration.options.expect_partial:
            restoration.unmatched = self._unreported[path] = report.partial_warnings(path)
        for oldest in list(self._unreported)[:-_MAX_UNREPORTED]:
            del self._unreported[oldest]

    # ---- pending values ----

    def _wait_for_the_rest(self, restoration: Restoration, live: LiveGraph) -> None:
        for older in self._active:
            older.give_way(restoration, live)
        self._active.insert(0, restoration)
        restoration.wait()
        self._forget_finished()
        self._listen(live)

    def retry_pending(self) -> int:
        """Restore the pending values that have a live counterpart now; returns their number. Local.

        The statuses of all restores then show what this rank has restored since.
        """
        try:
            return self._retry()
        finally:  # one restore may have failed after others were applied
            for status in self._statuses:
                status.update_locally()

    def _retry(self) -> int:
        """Restore the pending values that have a live counterpart now; returns their number. Local."""
        if not self._active or self._applying:
            return 0
        live = self._walk(with_counter=any(restoration.with_counter for restoration in self._active))
        self._applying = True
        try:
            applied = sum(restoration.catch_up(live) for restoration in self._active)
        finally:
            self._applying = False
            for restoration in self._active:
                restoration.update_unmatched()
            self._forget_finished()
        self._listen(live)
        return applied

    def on_attribute(self, name: str) -> None:
        """Called when a trackable object of the graph gets an attribute of this name. Local."""
        if any(restoration.waits_for(name) for restoration in self._active):
            self._retry()

    def refresh(self, operation: str, restoration: Restoration) -> Report:
        """Retry pending values and report anew, for a method of the status. Collective over the communicator."""
        request = Request.of(operation, restoration.source.path, restoration.options)
        with collector_off(), self._coordinator.turn, self._coordinator.uninterrupted():
            attempt = Attempt.of(lambda: self._catch_up_and_report(restoration))
            meet(self._coordinator, request, attempt.error, restoration.options.timeout)
            return self._agree(restoration, attempt.value)

    def _catch_up_and_report(self, restoration: Restoration) -> bytes:
        self._retry()
        live = self._walk(with_counter=restoration.with_counter)
        binding, assignment = restoration.plan(live)
        assignment.consumed.clear()  # nothing is being restored now
        return msgspec.msgpack.encode(restoration.report(live, binding, assignment))

    def before_save(self, live: LiveGraph) -> None:
        """Give up the pending values that a save replaces, and warn of what stayed unmatched. Local.

        Args:
            live: What is saved. Its `dropped` receives the values given up, now or for earlier saves that failed before
                rank 0 heard of them.
        """
        for restoration in self._active:
            self._dropped += [
                f"{key}: a saved value was waiting for this object, which is now saved with a value of its own. The "
                "waiting value is dropped. Call retry_pending() before save() to apply it."
                for key in restoration.give_up_met(live)
            ]
        self._forget_finished()
        live.dropped += self._dropped
        messages = [message for unmatched in self._unreported.values() for message in unmatched]
        self._unreported.clear()
        if self._coordinator.rank == 0:
            warn(messages)

    def forget_dropped(self) -> None:
        """Rank 0 has heard of the pending values given up so far, and warns of them. Local."""
        self._dropped.clear()

    def close(self, restoration: Restoration) -> None:
        """Give up the pending values of one restore. Local."""
        restoration.finish()
        self._forget_finished()

    def _forget(self, source: Source) -> None:
        """Remove all traces of a restore that failed, and close its file."""
        self._active = [restoration for restoration in self._active if restoration.source is not source]
        self._unreported.pop(source.path, None)
        source.close()

    def _forget_finished(self) -> None:
        for restoration in self._active:
            if not restoration.pending:
                restoration.finish()
        self._active = [restoration for restoration in self._active if restoration.pending]

    def _listen(self, live: LiveGraph) -> None:
        """While values are pending, listen for new attributes on every trackable object."""
        # A Checkpoint with a separate root is not a node of the graph, but may get attributes all the same.
        objects = [self._require_checkpoint(), *(node.obj for node in live.nodes)] if self._active else []
        for obj in objects:
            if isinstance(obj, Trackable):
                tracking_of(obj).listeners[self] = None
