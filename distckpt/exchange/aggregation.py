"""Aggregation: the ranks send their parts of many small variables to a few ranks, which write them.

Each bin of the file (see `layout.aggregation`) has one rank as its aggregator. In a save the ranks go through the bins
in rounds, with one bin for each aggregator: they send their parts of the bins, then the aggregators put the bins
together and write them, all at once. Who has which parts is agreed in the first save of a layout, so that later saves
send nothing but the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.layout.aggregation import EXTENT_NBYTES, Assembly, Extents, aggregators, count_bins, rounds_of
from distckpt.request import Attempt
from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.packing import Bundle, Jobs, Packing, write_runs
from distckpt.tensor_bytes import bytes_of

_STEP = "aggregate"
_COUNT_NBYTES = 8
_T = TypeVar("_T")


class Aggregation:
    """Writes small parts in all saves of one layout: the first `write` agrees on a plan, which all carry out."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    @property
    def is_needless(self) -> bool:
        """Whether there is a plan, and it aggregates nothing. The same on all ranks."""
        return self._plan is not None and not self._plan.rounds

    def write(
        self, coordinator: Coordinator, fd: int, file_nbytes: int, jobs: Jobs, log: ChecksumLog | None
    ) -> list[Bundle]:
        """Write the small parts of all ranks in the bins that are aggregated. Collective over the communicator.

        Args:
            coordinator: Coordinator of the ranks that save; the same ranks in every save.
            fd: Descriptor of the file.
            file_nbytes: Length of the file.
            jobs: What this rank writes; the same places in every save.
            log: Receives the checksums of the aggregated parts; None computes none.

        Returns:
            The bundles that this rank has to write itself.

        Raises:
            CollectiveError: It failed on some rank.
        """
        bundles = jobs.packing.bundles
        if coordinator.size == 1:
            return list(bundles.values())
        if self._plan is None:
            self._plan = _agree_on_plan(coordinator, jobs.packing, file_nbytes)
        plan = self._plan
        if plan.rounds:
            with coordinator.step(_STEP):
                writing = _Writing(plan, jobs, fd, log)
            writing.run(coordinator)
            with coordinator.step(_STEP):
                if writing.failure is not None:
                    raise writing.failure
        return [bundle for number, bundle in bundles.items() if number not in plan.numbers]


# ---- who has what ------------------------------------------------------------------------------------------------


class _Bin(NamedTuple):
    """A bin of the plan, as one rank sees it.

    Attributes:
        root: Rank of the aggregator.
        own: The parts that this rank sends.
        assembly: How the aggregator puts the bin together; None on other ranks.
    """

    root: int
    own: Bundle
    assembly: Assembly | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is aggregated, and how.

    Attributes:
        rounds: The bins, at most one of each aggregator in a round; the same bins on all ranks.
        numbers: Their indices among the bins of the file.
    """

    rounds: list[list[_Bin]]
    numbers: frozenset[int]

    @property
    def bins(self) -> list[_Bin]:
        """All bins."""
        return [each for bins in self.rounds for each in bins]


class _Own(NamedTuple):
    """This rank's parts in a bin.

    Attributes:
        root: Rank of the aggregator.
        bundle: The parts.
        encoded: Their places in the file, encoded for the aggregator.
    """

    root: int
    bundle: Bundle
    encoded: bytes


def _agree_on_plan(coordinator: Coordinator, packing: Packing, file_nbytes: int) -> _Plan:
    """Choose the bins to aggregate, and tell each aggregator which parts the ranks have. Collective."""
    with coordinator.step(_STEP):
        crowded = packing.parts.crowded(count_bins(file_nbytes), coordinator.size)
    numbers = np.flatnonzero(coordinator.any(crowded)).tolist()
    with coordinator.step(_STEP):
        roots = aggregators(len(numbers), coordinator.size)
        own = [_own(root, packing.bundle(number)) for root, number in zip(roots, numbers, strict=True)]
    by_rank = _tell_aggregators(coordinator, own)
    with coordinator.step(_STEP):
        assemblies = [Assembly.of(extents) if extents else None for extents in by_rank]
        bins = [_Bin(each.root, each.bundle, assembly) for each, assembly in zip(own, assemblies, strict=True)]
        rounds = [[bins[index] for index in indices] for indices in rounds_of(roots)]
        return _Plan(rounds, frozenset(numbers))


def _own(root: int, bundle: Bundle) -> _Own:
    return _Own(root, bundle, bundle.extents.encode())


def _tell_aggregators(coordinator: Coordinator, own: Sequence[_Own]) -> list[list[Extents]]:
    """Send the extents of each bin to its aggregator. Returns, by bin, those of each rank; [] elsewhere. Collective."""
    size = coordinator.size
    with coordinator.step(_STEP):
        counts = [np.zeros(size if each.root == coordinator.rank else 0, np.int64) for each in own]
    for each, count in zip(own, counts, strict=True):
        encoded = len(each.bundle.checksums).to_bytes(_COUNT_NBYTES, "little")
        coordinator.gather_into(each.root, encoded, [_COUNT_NBYTES] * size, count.data.cast("B"))
    with coordinator.step(_STEP):
        tables = [bytearray(EXTENT_NBYTES * int(count.sum())) for count in counts]
        lengths = [(EXTENT_NBYTES * count).tolist() for count in counts]
    for each, length, table in zip(own, lengths, tables, strict=True):
        coordinator.gather_into(each.root, each.encoded, length, table)
    with coordinator.step(_STEP):
        return [_decode(table, length) for table, length in zip(tables, lengths, strict=True)]


def _decode(table: bytearray, lengths: Sequence[int]) -> list[Extents]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    view = memoryview(table)
    return [Extents.decode(view[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


# ---- one save ----------------------------------------------------------------------------------------------------


class _Writing:
    """The aggregation of one save: packs and sends this rank's parts, and writes the bins that it aggregates.

    All memory is allocated before `run` begins, so that no rank runs out of it between two gathers.

    Attributes:
        failure: First error on this rank, if any. It still takes part to the end, since others wait for its bytes.
    """

    def __init__(self, plan: _Plan, jobs: Jobs, fd: int, log: ChecksumLog | None) -> None:
        bins = plan.bins
        received = max((each.assembly.nbytes for each in bins if each.assembly is not None), default=0)
        self.failure: BaseException | None = None
        self._plan = plan
        self._jobs = jobs
        self._fd = fd
        self._log = log
        self._writeback = rawio.Writeback(fd)
        self._message = torch.empty(max(each.own.nbytes for each in bins), dtype=torch.uint8, device="cpu")
        self._arrived = np.empty(received, np.uint8)
        self._memory = np.empty(received, np.uint8)

    def run(self, coordinator: Coordinator) -> None:
        """Send, and as an aggregator write, round after round. Collective. Local errors go to `failure`."""
        for bins in self._plan.rounds:
            for each in bins:
                self._send(coordinator, each)
            for each in bins:
                if each.assembly is not None:
                    self._try(self._write, each, each.assembly)
        self._writeback.flush()

    def _send(self, coordinator: Coordinator, each: _Bin) -> None:
        """Send this rank's parts of a bin to the aggregator. Collective."""
        room = self._message[: each.own.nbytes]
        message = self._try(self._pack, each.own, room)
        lengths = [] if each.assembly is None else each.assembly.lengths
        arrived = self._arrived[: sum(lengths)]
        coordinator.gather_into(each.root, bytes_of(room) if message is None else message, lengths, arrived.data)

    def _pack(self, bundle: Bundle, room: torch.Tensor) -> memoryview:
        """This rank's parts of a bin. Logs their checksums."""
        packed = self._jobs.packed(bundle, room)
        if self._log is not None:
            bundle.log(packed, self._log)
        return packed

    def _write(self, each: _Bin, assembly: Assembly) -> None:
        """Put a bin together from all messages, and write it."""
        arrived, memory = (array[: assembly.nbytes] for array in (self._arrived, self._memory))
        ordered = assembly.put_together(arrived, memory)
        write_runs(self._fd, assembly.runs, ordered, each.own.name(self._jobs.packing), self._writeback)

    def _try(self, work: Callable[..., _T], *arguments: object) -> _T | None:
        """Do local work, unless earlier work failed. An error is kept in `failure` until the ranks agree."""
        if self.failure is not None:
            return None
        attempt = Attempt.of(lambda: work(*arguments))
        self.failure = attempt.error
        return attempt.result
