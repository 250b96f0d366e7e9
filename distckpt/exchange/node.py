"""The common part of reading and writing together: agreement of the ranks, and the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.shared_memory import SharedMemory
from distckpt.errors import CollectiveError
from distckpt.layout.exchange import Unit
from distckpt.log import log
from distckpt.request import Attempt

#: Most bytes that a mover moves in one round. Two such units of every mover of a node are in memory at once, and should
#: fit into the shared cache; an exchange between nodes holds as many again for what arrives.
UNIT_NBYTES = 2 << 20

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another rank has failed. It raises its own error, which all ranks learn in their next agreement."""


class Round(NamedTuple):
    """One round.

    Attributes:
        number: Its number, from 0 on.
        units: The unit of each mover: of each rank that takes part, or of each of its threads.
        parts: For each mover of the node, the area of shared memory that holds its unit in this round.
        memory: The whole shared memory: for each rank of the node two areas per thread for units, then any others
            asked for.
    """

    number: int
    units: list[Unit]
    parts: list[memoryview]
    memory: SharedMemory

    @classmethod
    def of(cls, rounds: Sequence[list[Unit]], number: int, memory: SharedMemory, n_threads: int = 1) -> Round:
        """Make the round of a number.

        Rounds alternate between two areas: while the slowest rank still empties one, the others fill the other.
        """
        first = number % 2 * n_threads
        parts = [area(part, first + thread) for part in memory.parts for thread in range(n_threads)]
        return cls(number, rounds[number], parts, memory)


def area(part: memoryview, number: int) -> memoryview:
    """One area, of `UNIT_NBYTES` bytes, in the shared memory of a rank."""
    return part[number * UNIT_NBYTES : (number + 1) * UNIT_NBYTES]


def agreed(ranks: Coordinator, work: Callable[[], T]) -> T:
    """Do work that is local, or collective over a node. If it fails on any rank, all raise. Collective over `ranks`.

    Raises:
        FailedElsewhere: It failed on another rank. The rank where it failed raises its own error instead.
    """
    attempt = Attempt.of(work)
    if ranks.any_set(attempt.error is not None):
        attempt.require()
        raise FailedElsewhere
    return attempt.value


def gathered(ranks: Coordinator, name: str, value: bytes) -> list[bytes]:
    """Gather the values of all ranks; if one has no memory for them, all raise. Collective over `ranks`.

    `Coordinator.gather_all` raises the same error on all ranks, and each would report it again in the next agreement.
    So here only the rank that failed raises it.

    Args:
        ranks: The ranks that take part.
        name: Name of the values, shown in errors.
        value: This rank's value.

    Raises:
        FailedElsewhere: It failed on another rank. The rank where it failed raises its own error instead.
    """
    attempt = Attempt.of(lambda: ranks.gather_all(name, value))
    error = attempt.error
    if isinstance(error, CollectiveError):
        if ranks.rank not in error.failures:
            raise FailedElsewhere
        error = error.__cause__ or error
        error.add_note(f"while the {name} of all ranks were gathered")
        raise error
    attempt.require()
    return attempt.value


def run_rounds(
    ranks: Coordinator,
    node: Coordinator,
    rounds: Sequence[list[Unit]],
    before: Callable[[Round], object],
    after: Callable[[Round], object],
    *,
    last: Callable[[], object],
    n_areas: int = 2,
    n_threads: int = 1,
) -> bool:
    """Run all rounds: in each, fill shared memory, wait for all ranks, empty it. Collective over `ranks`.

    Args:
        ranks: The ranks that take part.
        node: Those of them on this node; the same object as `ranks` in an exchange within one node.
        rounds: For each round, the unit of each mover.
        before: Fills shared memory: this rank's areas, or this rank's share of all areas. Local.
        after: Empties the areas that all ranks have filled. If it is collective, it must go through to its end
            whatever fails, and raise only then.
        last: Called once after the rounds, also after a failure.
        n_areas: Areas of shared memory for each thread.
        n_threads: Threads of each rank that move units.

    Returns:
        False if a node has no shared memory, and nothing was done.

    Raises:
        FailedElsewhere: Another rank failed. The rank that failed raises its own error instead.
    """
    if not rounds:
        return True
    nbytes = n_areas * n_threads * UNIT_NBYTES
    memory = node.shared_memory(nbytes)
    if memory is None if ranks is node else ranks.any_set(memory is None):
        if memory is None and node.rank == 0 and n_threads == 1:  # with several threads less memory may do
            log.warning(
                "rank %d: the ranks of this node cannot share %d bytes of memory. They exchange messages, or read and "
                "write for themselves.",
                ranks.rank,
                node.size * nbytes,
            )
        if memory is not None:
            memory.free()
        return False
    assert memory is not None, "or this rank would have said so"
    try:
        every = (Round.of(rounds, number, memory, n_threads) for number in range(len(rounds)))
        failure = _run(ranks, every, before, after)
        failure = Attempt.of(last).error or failure
    finally:
        memory.free()
    if ranks.any_set(failure is not None):
        raise failure or FailedElsewhere
    return True


def _run(
    ranks: Coordinator,
    rounds: Iterable[Round],
    before: Callable[[Round], object],
    after: Callable[[Round], object],
) -> BaseException | None:
    """Run the rounds, which all ranks leave together if one fails; returns the error of this rank, if any."""
    failure: BaseException | None = None
    for this in rounds:
        try:
            if failure is None:  # else a second error would hide the first
                before(this)
        except BaseException as error:
            failure = error
        if ranks.any_set(failure is not None):
            break
        try:
            after(this)
        except BaseException as error:
            failure = error
    return failure
