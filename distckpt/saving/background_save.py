"""A save in the background: the part of `save_async` that is left when the call returns.

In the call the ranks walk and agree as for `save`, and rank 0 decides what the file will be: its name, the positions of
the variables, and the manifest except for the timing. That takes a few milliseconds and moves no data. Then each rank
copies the bytes of its write jobs, one flat copy per tensor, into a host buffer that later saves use again
(`storage.snapshot`). From then on the tensors may change.

The thread of `coordination.background` does the rest. Rank 0 makes the file, since reserving its space may take longer
than everything before, and tells the others. The ranks write the aggregated small variables together; then each writes
its other copies and their checksums with `pwrite`, syncs them, and agrees with the others. Rank 0 commits, and all set
their counters. Nothing is copied twice, and nothing is computed that `save` would not compute.

The file is made in the call where the thread must not call MPI, and in the first save of a layout, since the ranks do
not know the positions of the variables before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import xxhash

from distckpt.coordination.agreement import clear_frames
from distckpt.coordination.background import Background
from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import LayoutError
from distckpt.log import log
from distckpt.request import Attempt
from distckpt.saving.draft import Draft, NewFile, log_saved
from distckpt.saving.writer import Destination, Rest, write_aggregated, write_alone
from distckpt.storage.snapshot import Snapshot
from distckpt.timing import DURABLE_SAVE_STEPS, Timing

#: Called on every rank when the checkpoint is committed.
OnCommit = Callable[[NewFile, Timing], None]
#: Called on every rank after that, with the coordinator of the save: further work that ends before the save does.
Epilogue = Callable[[Coordinator, NewFile], None]


class BackgroundSave:
    """One save in the background, a `coordination.background.Task`.

    Attributes:
        file: The file that is written.
        options: How to save.
        timeout: Seconds that it may take to complete when the program exits.
        error: Why it failed; the same on all ranks. None before the end, and when it was committed.
        asked: Somebody was given the result on this rank.
        timing: How long it took; None until it is committed.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        background: Background,
        destination: Destination,
        draft: Draft | None,
        snapshot: Snapshot,
        on_commit: OnCommit,
        epilogue: Epilogue | None,
    ) -> None:
        self.file = destination.file
        self.options = destination.options
        self.timeout = destination.options.timeout
        self.error: BaseException | None = None
        self.asked = False
        self.timing: Timing | None = None
        self.speaks = background.speaks
        self._coordinator = coordinator
        self._rank = coordinator.rank
        self._background = background
        self._destination = destination
        self._draft = draft
        self._snapshot = snapshot
        self._timer = destination.timer
        self._on_commit = on_commit
        self._epilogue = epilogue
        self._begun = Attempt(result=True, error=None)  # the same on all ranks
        self._rest: Rest | None = None  # what `begin` has left to write; None where it wrote nothing
        self._written: Attempt[bool] | None = None
        self._work_done = threading.Event()
        self._ended = threading.Event()

    # ---- what the thread calls ----

    def begin(self, coordinator: Coordinator) -> None:
        """Make the file, if it is not there yet, and write the aggregated small variables with the other ranks.

        Copy first: the next optimizer step waits for it. Collective.
        """
        self._copy()
        self._begun = Attempt.of(lambda: self._begin(coordinator))

    def _begin(self, coordinator: Coordinator) -> bool:
        """Make the file, and write the aggregated small variables. Collective."""
        if not self.file.exists:
            coordinator.on_root("create", self._make_file, bool)
        if coordinator.size > 1 and not self._destination.aggregation.is_needless:
            self._rest = write_aggregated(coordinator, self._destination, self._snapshot.jobs)
        return True

    def _make_file(self) -> bool:
        """Make the file as it was described. Rank 0 only."""
        assert self._draft is not None, "described on this rank"
        with self._timer.step("create"):
            self._draft.make()
        return True

    def work(self) -> None:
        """Write this rank's part, if there is a file. Local."""
        self._copy()
        self._written = Attempt.of(self._write)
        self._work_done.set()

    def _copy(self) -> None:
        """Complete the snapshot. Raises nothing: `Snapshot.jobs` raises what failed."""
        with self._timer.step("stage"):
            self._snapshot.complete()

    def _write(self) -> bool:
        try:
            if self._begun.error is None:
                rest = self._rest or Rest.all_of(self._snapshot.jobs())
                write_alone(self._destination, rest)
        finally:
            self._rest = None
            self._snapshot.release()
        return True

    def end(self, coordinator: Coordinator) -> None:
        """Agree, commit and count. Collective, unless the ranks know already that there is no file."""
        try:
            self._begun.require()
            with coordinator.step("write"):
                assert self._written is not None, "the work is done"
                self._written.require()
            self._timer.collect(coordinator.gather_rows, DURABLE_SAVE_STEPS)
            timing = coordinator.on_root("commit", self._commit, Timing)
        except BaseException as error:
            self._fail(error)
        else:
            self._succeed(coordinator, self._timer.on_this_rank(timing))
        self._written = None
        self._ended.set()

    def _commit(self) -> Timing:
        """Seal and commit the file. Rank 0 only."""
        assert self._draft is not None, "made on this rank"
        timing, durable = self._timer.timing(), self.options.durable
        with self._timer.step("commit"):
            self._draft.seal(timing, durable=durable)
            self._draft.commit(durable=durable)
        self._timer.add_own("commit")
        return self._timer.timing()

    def _succeed(self, coordinator: Coordinator, timing: Timing) -> None:
        self.timing = timing
        if self._draft is not None:
            self._draft.finish()
        self._on_commit(self.file, timing)
        if self._rank == 0:
            log_saved(self.file, timing)
        try:
            if self._epilogue is not None:
                self._epilogue(coordinator, self.file)
        except BaseException as error:
            self._keep(error)
        else:
            self._background.forget(self)

    def _fail(self, error: BaseException) -> None:
        if self._draft is not None:
            self._draft.abandon()
        self._keep(error)

    def _keep(self, error: BaseException) -> None:
        """Keep an error until somebody asks, but not the buffers that its traceback refers to."""
        clear_frames(error)
        self.error = error

    # ---- what the program calls ----

    def has_ended(self) -> bool:
        """Whether it is committed or has failed, as far as this rank knows. Local."""
        return self._ended.is_set()

    def stage(self) -> None:
        """Wait until this rank's tensors may change, and help with it; Ctrl-C comes after that. Local; any thread."""
        with self._coordinator.uninterrupted():
            self._snapshot.complete()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the end.

        Local where the background speaks to the other ranks; else collective, and it ends the save itself.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            Whether the save has ended. The same on all ranks where the call is collective.

        Raises:
            CheckpointError: This process was forked from the one that saves.
            RankTimeoutError: Collective, and some ranks did not come.
            LayoutError: Collective, and the ranks wait for different saves.
        """
        timeout = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if self._ended.is_set():
            return True
        if self.speaks:
            self._background.require_in_this_process()
            return self._ended.wait(timeout)
        return all(task.end_together(timeout) for task in self._background.up_to(self))

    def end_together(self, timeout: float | None) -> bool:
        """See `coordination.background.Task`."""
        if self._ended.is_set():
            return True
        coordinator = self._coordinator
        with coordinator.uninterrupted():
            name = xxhash.xxh3_64_intdigest(self.file.temp_path.encode())
            if not coordinator.arrive("finish a save in the background", name, 0, self.options.timeout):
                raise LayoutError(
                    f"{self.file.path}: the ranks wait for different saves. Ask for the same result on every rank."
                )
            with coordinator.step("wait for the write"):
                self._work_done.wait(timeout)
            if coordinator.any_set(not self._work_done.is_set()):
                return False
            self.end(coordinator)
        return True

    def outcome(self) -> str:
        """The path of the committed file, or raise why there is none. The save has ended. Local."""
        self.take()
        if self.error is not None:
            raise self.error.with_traceback(None)  # each time anew: it must not collect the frames of all who ask
        return self.file.path

    def take(self) -> None:
        """Note that somebody knows the outcome. Local."""
        self.asked = True
        self._background.forget(self)

    # ---- the end of the program ----

    def complete(self, timeout: float) -> None:
        """Wait for the end, or bring it about; raises nothing."""
        try:
            self.wait(timeout)
        except BaseException as error:
            log.error("%s: not completed at exit: %s", self.file.path, error)

    def report(self) -> None:
        """Log a failure that nobody has asked for, or that the save was not completed. Local."""
        if self._rank != 0 or self.asked:
            return
        if not self._ended.is_set():
            log.error("%s: the save did not end within %g s of the exit", self.file.path, self.timeout)
        elif self.error is not None:
            log.error("%s: the save failed, and nobody asked for its result: %s", self.file.path, self.error)
