"""Writing together: narrow strips of several ranks of a node are joined in memory and written as long ranges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.exchange.node import UNIT_NBYTES, FailedElsewhere, Round, agreed, gathered, run_rounds
from distckpt.layout.box import Box
from distckpt.layout.exchange import InFile, Span, cut_at_multiples, filled_bands, hull, is_narrow
from distckpt.layout.parcels import cells_of
from distckpt.layout.rounds import Party, Wanted, plan_rounds
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.rawio import Writeback
from distckpt.storage.room import PINNED_NBYTES, Departing, Departures
from distckpt.storage.transfer import WriteJob
from distckpt.storage.units import Held, shared_parts, write_unit
from distckpt.storage.writing import PieceBytes, pieces_of

assert UNIT_NBYTES <= PINNED_NBYTES, "each part of a unit fits into the buffer of `Departures`"

#: The variable that each job of a rank writes, and its box there.
_Boxes = list[tuple[InFile, Box]]


def write_together(node: Coordinator, fd: int, jobs: Sequence[WriteJob], log: ChecksumLog | None) -> list[WriteJob]:
    """Write the narrow strips that ranks of one node have next to each other.

    Collective over the node. If a rank fails, all ranks of the node stop, and only that rank raises: an agreement of
    all ranks must follow.

    Args:
        node: The ranks of this node.
        fd: Descriptor of the file.
        jobs: What this rank writes.
        log: Receives the checksums of the pieces written here; None computes none.

    Returns:
        The jobs that this rank has to write itself; empty if another rank has failed.

    Raises:
        OSError: A range could not be written.
    """
    if node.size == 1:
        return list(jobs)
    try:
        narrow = agreed(node, lambda: [job for job in jobs if _is_narrow(job)])
        if not node.any_set(bool(narrow)):  # no rank has any
            return list(jobs)
        boxes = gathered(node, "boxes", agreed(node, lambda: _encode_boxes(narrow)))
        writing = agreed(node, lambda: _Writing(node, narrow, boxes))
        done = writing.run(fd, log)
    except FailedElsewhere:
        return []
    own = set(map(id, writing.own)) if done else set()
    return [job for job in jobs if id(job) not in own]


def _is_narrow(job: WriteJob) -> bool:
    return is_narrow(job.box, job.global_shape, job.tensor.element_size()) and job.box.numel > 0


def _in_file(job: WriteJob) -> InFile:
    return InFile(job.key, job.dataset_offset, job.global_shape, job.tensor.element_size())


def _encode_boxes(jobs: Sequence[WriteJob]) -> bytes:
    return msgspec.msgpack.encode([(_in_file(job), job.box) for job in jobs])


class _Writing:
    """One exchange of narrow strips: its plan, the same on all ranks of the node, and this rank's part in the rounds.

    `write_together` makes one and calls `run`. In each round every rank copies its strips into the units of all ranks;
    after the agreement each writes its own unit, and hashes some of its own strips while the disk writes.

    Attributes:
        own: The jobs of this rank that the exchange writes.
    """

    def __init__(self, node: Coordinator, narrow: Sequence[WriteJob], gathered: Sequence[bytes]) -> None:
        self._node = node
        boxes: dict[InFile, list[Box]] = {}
        for of_rank in gathered:
            for variable, box in msgspec.msgpack.decode(of_rank, type=_Boxes):
                boxes.setdefault(variable, []).append(box)
        ordered = sorted(boxes, key=lambda variable: variable.offset)
        self._files = dict(enumerate(ordered))
        number_of = {variable: number for number, variable in self._files.items()}
        filled = {number: filled_bands(boxes[file], file.shape) for number, file in self._files.items()}
        covered = {number: Wanted(boxes[file], file.shape) for number, file in self._files.items()}
        self.own = [job for job in narrow if _lies_in(job, filled[number_of[_in_file(job)]])]
        self._departures = Departures()
        self._held: dict[int, list[Held]] = {}
        for job in self.own:
            self._held.setdefault(number_of[_in_file(job)], []).append(Held(job.box, job.tensor.detach()))
        party = Party(covered, range(node.size))
        parts = {number: cut_at_multiples(filled[number], file, UNIT_NBYTES) for number, file in self._files.items()}
        self._rounds = plan_rounds(self._files, parts, [party], node.size, UNIT_NBYTES)

    def run(self, fd: int, log: ChecksumLog | None) -> bool:
        """Run all rounds; returns False if the node has no shared memory. Collective over the node."""
        hashing = agreed(self._node, lambda: _Hashing(self.own, log, len(self._rounds)))
        writeback = Writeback(fd)

        def write_and_hash(this: Round) -> None:
            self._write(this, fd, writeback)
            hashing.advance(this.number)

        def finish() -> None:
            try:
                self._departures.finish()
            finally:
                hashing.finish()

        done = run_rounds(self._node, self._node, self._rounds, before=self._put, after=write_and_hash, last=finish)
        writeback.flush()
        return done

    def _put(self, this: Round) -> None:
        """Copy this rank's strips into all units of the round. Copies from GPUs began in the round before."""
        if this.number == 0:
            self._start(this)
        with torch.no_grad():
            self._departures.arrive()

    def _write(self, this: Round, fd: int, writeback: Writeback) -> None:
        """Write this rank's unit, while GPUs copy into those of the next round."""
        if this.number + 1 < len(self._rounds):
            self._start(Round.of(self._rounds, this.number + 1, this.memory))
        rank = self._node.rank
        write_unit(fd, this.units[rank], this.parts[rank], self._files, writeback)

    @torch.no_grad()
    def _start(self, this: Round) -> None:
        self._departures.start(
            Departing(here, there)
            for unit, part in zip(this.units, this.parts, strict=True)
            for there, here in shared_parts(cells_of(unit, self._files), part, self._held)
        )


def _lies_in(job: WriteJob, filled: Sequence[Span]) -> bool:
    own = hull(job.box, job.global_shape)
    return any(band.start <= own.start and own.stop <= band.stop for band in filled)


class _Hashing:
    """Computes the checksums of jobs in the rounds, of as many pieces in each.

    Args:
        jobs: The jobs.
        log: Receives the checksums; None computes none.
        n_rounds: Number of rounds.
    """

    def __init__(self, jobs: Sequence[WriteJob], log: ChecksumLog | None, n_rounds: int) -> None:
        pieces = [] if log is None else list(pieces_of(jobs))
        self._n_pieces = len(pieces)
        self._n_rounds = n_rounds
        self._source = PieceBytes(log)
        self._left = itertools.chain.from_iterable(self._source.batches(pieces))

    def advance(self, number: int) -> None:
        """Compute the checksums due in a round; after the last one there are all."""
        done, due = (self._n_pieces * n // self._n_rounds for n in (number, number + 1))
        for piece in itertools.islice(self._left, due - done):
            self._source.get(piece)  # logs its checksum
            self._source.flushed()  # nothing else needs the bytes

    def finish(self) -> None:
        """Wait for the copies from GPUs that are still on the way after a failure."""
        self._source.finish()
