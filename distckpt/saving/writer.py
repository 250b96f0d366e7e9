"""Every rank writes its shards and checksums into the new file, with either transport, and makes them durable.

`write_shards` belongs to a save that all ranks wait for, `write_aggregated` and `write_alone` to one in the background.

The steps are in an order in which no failure leaves a rank waiting: open a descriptor, agree; write aggregated
variables with all ranks, agree; write narrow strips with the ranks of the node, agree; open parallel HDF5; write,
whatever happens; close on all ranks, always; agree; gather the times; rank 0 writes the manifest, all fsync, agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from distckpt.coordination.coordinator import Coordinator
from distckpt.exchange.aggregation import Aggregation
from distckpt.exchange.writing import write_together
from distckpt.options import SaveOptions
from distckpt.progress import progress_bar
from distckpt.request import Attempt
from distckpt.saving.draft import NewFile
from distckpt.storage import mpio
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.packing import Bundle, Jobs, write_bundles
from distckpt.storage.rawio import fsync, naming, open_shared, require_descriptors
from distckpt.storage.transfer import Progress, WriteJob
from distckpt.storage.writing import write_posix
from distckpt.timing import SAVE_STEPS, Timer

#: Descriptors that a rank must have left for MPI-IO, which hangs on all ranks if it lacks one while it opens the file.
_MPIO_DESCRIPTORS = 16


class Destination(NamedTuple):
    """A new file that a save writes into, and how.

    Attributes:
        file: The file.
        aggregation: The small variables that aggregators write for all ranks.
        options: How to save.
        timer: Measures the save on this rank.
        temp_path: Where this rank finds the file until it is committed: `file.temp_path`; absolute for a save in the
            background, since the program may change directory meanwhile.
    """

    file: NewFile
    aggregation: Aggregation
    options: SaveOptions
    timer: Timer
    temp_path: str

    def open(self) -> int:
        """A descriptor of the file. Local."""
        return open_shared(self.temp_path, self.file.nbytes, writable=True)


def write_shards(
    coordinator: Coordinator,
    destination: Destination,
    plan_jobs: Callable[[], Jobs],
    seal: Callable[[], None],
) -> None:
    """Write this rank's shards and checksums, and make them durable. Collective over the communicator.

    Args:
        coordinator: The coordinator of the ranks that save.
        destination: The file.
        plan_jobs: Gives what this rank writes; called within the first step.
        seal: Writes what belongs into the file when all data are in it and before they are made durable.

    Raises:
        CollectiveError: A step failed on some rank.
    """
    timer, fd = destination.timer, -1
    try:
        with coordinator.step("open"), timer.step("open"):
            fd = destination.open()
            work = _Work.begin(coordinator, destination, fd, plan_jobs())
        work = work.after_aggregation().after_exchange()
        if destination.file.transport == "mpio":
            work.write_mpio()
        else:
            work.write_posix()
        timer.collect(coordinator.gather_rows, SAVE_STEPS)
        with coordinator.step("fsync"), timer.step("fsync"), naming(destination.file.path):
            seal()
            if destination.options.durable:
                fsync(fd)
            closing, fd = fd, -1
            os.close(closing)  # network file systems report a full quota here at the latest
    finally:
        _close_after_failure(fd)


class Rest(NamedTuple):
    """What a rank writes alone in the background.

    Attributes:
        jobs: What it writes, and what was aggregated.
        bundles: The bundles of it that were not aggregated.
        log: Checksums of what was aggregated.
    """

    jobs: Jobs
    bundles: Sequence[Bundle]
    log: ChecksumLog

    @classmethod
    def all_of(cls, jobs: Jobs) -> Rest:
        """Where nothing was aggregated."""
        return cls(jobs, list(jobs.packing.bundles.values()), ChecksumLog())


def write_aggregated(coordinator: Coordinator, destination: Destination, take_jobs: Callable[[], Jobs]) -> Rest:
    """Write the aggregated small variables, with all other ranks. Collective; any thread.

    Args:
        coordinator: That of the thread.
        destination: The file.
        take_jobs: Gives what this rank writes; called within the first step.

    Returns:
        What is left to write.

    Raises:
        CollectiveError: A step failed on some rank.
    """
    fd, log = -1, ChecksumLog()
    try:
        with coordinator.step("write"), destination.timer.step("open"):
            fd = destination.open()
            jobs = take_jobs()
        with destination.timer.step("exchange"):
            wanted = log if destination.options.checksums else None
            bundles = destination.aggregation.write(coordinator, fd, destination.file.nbytes, jobs, wanted)
        with coordinator.step("write"):
            closing, fd = fd, -1
            os.close(closing)  # network file systems report a full quota here at the latest
    finally:
        _close_after_failure(fd)
    return Rest(jobs, bundles, log)


def write_alone(destination: Destination, rest: Rest) -> None:
    """Write this rank's shards and checksums with `pwrite`, and make them durable. Local; any thread.

    Args:
        destination: The file.
        rest: What this rank writes.

    Raises:
        OSError: It failed; the caller tells the other ranks.
    """
    options, timer = destination.options, destination.timer
    with timer.step("open"):
        fd = destination.open()
    try:
        with timer.step("write"), naming(destination.file.path):
            jobs = rest.jobs
            others = [jobs[index] for index in jobs.packing.others]
            checksums = write_posix(fd, others, checksums=options.checksums)
            checksums.extend(rest.log)
            write_bundles(fd, jobs, rest.bundles, checksums if options.checksums else None)
            checksums.write(fd, destination.file.checksums_offset)
        with timer.step("fsync"), naming(destination.file.path):
            if options.durable:
                fsync(fd)
    except BaseException:
        _close_after_failure(fd)
        raise
    os.close(fd)  # network file systems report a full quota here at the latest


def _close_after_failure(fd: int) -> None:
    """Close a descriptor of a save that has failed already; -1 is none. What goes wrong now does not matter."""
    if fd >= 0:
        with suppress(OSError):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Work:
    """What this rank has still to write, and where.

    Attributes:
        jobs: What this rank writes in this save.
        bundles: Those of its bundles that are left.
        others: Those of its jobs in no bundle that are left.
        exchanged: Checksums of what was written together with other ranks.
    """

    coordinator: Coordinator
    destination: Destination
    fd: int
    jobs: Jobs
    bundles: Sequence[Bundle]
    others: list[WriteJob]
    exchanged: ChecksumLog = field(default_factory=ChecksumLog)

    @classmethod
    def begin(cls, coordinator: Coordinator, destination: Destination, fd: int, jobs: Jobs) -> _Work:
        """All of it: nothing has been written. Local."""
        packing = jobs.packing
        others = [jobs[index] for index in packing.others]
        return cls(coordinator, destination, fd, jobs, list(packing.bundles.values()), others)

    @property
    def timer(self) -> Timer:
        """Measures the save on this rank."""
        return self.destination.timer

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(job.tensor.nbytes for job in self.others) + sum(bundle.nbytes for bundle in self.bundles)

    def after_aggregation(self) -> _Work:
        """Write the aggregated small variables, with all other ranks. Collective.

        Returns:
            What is left to this rank and those of its node.
        """
        aggregation, file_nbytes = self.destination.aggregation, self.destination.file.nbytes
        with self.timer.step("exchange"):
            bundles = aggregation.write(self.coordinator, self.fd, file_nbytes, self.jobs, self._log)
        return replace(self, bundles=bundles)

    def after_exchange(self) -> _Work:
        """Write narrow strips that alternate with those of other ranks, with the ranks of the node. Collective.

        Returns:
            What is left to this rank alone.
        """
        node = self.coordinator.node
        with self.timer.step("exchange"):
            rest = Attempt.of(lambda: write_together(node, self.fd, self.others, self._log))
        with self.coordinator.step("exchange"), naming(self.destination.file.path):
            rest.require()
        return replace(self, others=rest.value)

    @property
    def _log(self) -> ChecksumLog | None:
        """Takes the checksums; None: they are not computed."""
        return self.exchanged if self.destination.options.checksums else None

    def write_posix(self) -> None:
        """Write with `pwrite` only. Collective."""
        with (
            self.coordinator.step("write"),
            self.timer.step("write"),
            naming(self.destination.file.path),
            progress_bar(self.coordinator.rank, "save", self.nbytes) as progress,
        ):
            checksums = self.destination.options.checksums
            self._finish(write_posix(self.fd, self.others, checksums=checksums, progress=progress), progress)

    def write_mpio(self) -> None:
        """Write through parallel HDF5. Collective.

        Between open and close nothing may raise out of this method: closing is collective, and a rank that does not
        close would hang the others. A failure inside of the two calls cannot be agreed on, so a watchdog ends the job.
        """
        coordinator, timeout = self.coordinator, self.destination.options.timeout
        with coordinator.step("divide"), self.timer.step("write"):
            require_descriptors(self.fd, _MPIO_DESCRIPTORS)
            pieces = mpio.split_pieces(self.others)
        n_calls = self._count_collective_calls(len(pieces.large))
        communicator = coordinator.communicator
        with coordinator.watchdog("open parallel HDF5", timeout):
            file = self._open_parallel(communicator, collective=n_calls is not None)
        with self.timer.step("write"):
            written = Attempt.of(lambda: self._fill(file, pieces, n_calls))
        with coordinator.watchdog("close parallel HDF5", timeout):
            closed = Attempt.of(file.close)
            with coordinator.step("write", clear_frames=True):
                written.require()
                closed.require()

    def _open_parallel(self, communicator: Any, *, collective: bool) -> mpio.ParallelFile:
        """Open the file on all ranks or, in the end, on none. Collective.

        Not in the body of the step, where Ctrl-C could stop one rank: the others would wait for it in the open.
        """
        opened = Attempt.of(
            lambda: mpio.ParallelFile(self.destination.temp_path, communicator, self.destination.options.hints)
        )
        try:
            with self.coordinator.step("open parallel HDF5"):
                opened.require()
                if collective:
                    opened.value.prepare_collective()
        except BaseException:
            if opened.result is not None:
                opened.result.close()
            raise
        return opened.value

    def _count_collective_calls(self, own: int) -> int | None:
        """The number of transfers that all ranks make; None for independent transfers. Collective."""
        if not self.destination.options.collective:
            return None
        counts = self.coordinator.gather_all("count transfers", own.to_bytes(8, "little"))
        return max(int.from_bytes(count, "little") for count in counts)

    def _fill(self, file: mpio.ParallelFile, pieces: mpio.SplitPieces, n_calls: int | None) -> bool:
        with (
            naming(self.destination.file.path),
            progress_bar(self.coordinator.rank, "save", self.nbytes) as progress,
        ):
            checksums = mpio.write_mpio(
                file,
                self.fd,
                pieces,
                checksums=self.destination.options.checksums,
                n_collective_calls=n_calls,
                progress=progress,
            )
            self._finish(checksums, progress)
        return True

    def _finish(self, checksums: ChecksumLog, progress: Progress | None) -> None:
        """Write the small parts that are left, and all checksums. Local."""
        checksums.extend(self.exchanged)
        write_bundles(self.fd, self.jobs, self.bundles, None if self._log is None else checksums, progress)
        checksums.write(self.fd, self.destination.file.checksums_offset)
