"""What both directions have in common: agreement of the ranks that exchange, and the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.shared_memory import SharedMemory
from distckpt.errors import CollectiveError
from distckpt.layout.exchange import Unit
from distckpt.log import log
from distckpt.request import Attempt

#: Bytes that a rank moves in one round. Two such units of every rank are in memory, and in the shared cache; between
#: nodes as many again for what arrives.
UNIT_NBYTES = 2 << 20

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another rank has failed; it raises what happened in the next agreement of all ranks."""


class Round(NamedTuple):
    """One round.

    Attributes:
        number: Its number, from 0 on.
        units: The unit of each rank of those that exchange.
        parts: The memory of each rank of the node, for its unit; all ranks of the node see it.
        memory: All of the memory: of each rank two areas for its units, and whatever more was asked for.
    """

    number: int
    units: list[Unit]
    parts: list[memoryview]
    memory: SharedMemory

    @classmethod
    def of(cls, rounds: Sequence[list[Unit]], number: int, memory: SharedMemory) -> Round:
        """There are two areas for units: while the slowest rank still empties one, the others fill the other one."""
        return cls(number, rounds[number], [area(part, number % 2) for part in memory.parts], memory)


def area(part: memoryview, number: int) -> memoryview:
    """Room for one unit in the memory of a rank."""
    return part[number * UNIT_NBYTES : (number + 1) * UNIT_NBYTES]


def agreed(ranks: Coordinator, work: Callable[[], T]) -> T:
    """Do local work, or work of a node; where it fails on a rank, all ranks stop. Collective over `ranks`.

    Raises:
        FailedElsewhere: It failed on another rank. On the rank where it failed, what it raised.
    """
    attempt = Attempt.of(work)
    if ranks.any_set(attempt.error is not None):
        attempt.require()
        raise FailedElsewhere
    return attempt.value


def gathered(ranks: Coordinator, name: str, value: bytes) -> list[bytes]:
    """The values of all ranks; where one has no memory for them, all stop. Collective over `ranks`.

    `Coordinator.gather_all` raises on all ranks, and in the agreement to come each of them would name that one anew.

    Args:
        ranks: Those that exchange.
        name: Of the values, shown in errors.
        value: This rank's value.

    Raises:
        FailedElsewhere: It failed on another rank. On the rank where it failed, what it raised.
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
) -> bool:
    """Fill the shared memory, wait for all ranks, empty it; again and again. Collective over `ranks`.

    Args:
        ranks: Those that exchange.
        node: Those of them that are on this node; or the same.
        rounds: For each round the unit of each of the ranks.
        before: Fills memory: this rank's part, or what it has of all parts.
        after: Empties what `before` has filled on all ranks. What it does together with other ranks it does in any
            case, and raises at its end.
        last: Called after the rounds, whatever happened.
        n_areas: Memory of a rank, in units.

    Returns:
        False where a node has no shared memory: nothing was done.

    Raises:
        FailedElsewhere: Another rank failed. On the rank that failed, what was raised.
    """
    if not rounds:
        return True
    memory = node.shared_memory(n_areas * UNIT_NBYTES)
    if memory is None if ranks is node else ranks.any_set(memory is None):
        if memory is None and node.rank == 0:
            log.warning(
                "rank %d: MPI has no %d bytes of shared memory on this node. Its ranks exchange messages, or read and "
                "write for themselves. Make /dev/shm larger.",
                ranks.rank,
                node.size * n_areas * UNIT_NBYTES,
            )
        if memory is not None:
            memory.free()
        return False
    assert memory is not None, "or this rank would have said so"
    try:
        failure = _run(ranks, memory, rounds, before, after)
        failure = Attempt.of(last).error or failure
    finally:
        memory.free()
    if ranks.any_set(failure is not None):
        raise failure or FailedElsewhere
    return True


def _run(
    ranks: Coordinator,
    memory: SharedMemory,
    rounds: Sequence[list[Unit]],
    before: Callable[[Round], object],
    after: Callable[[Round], object],
) -> BaseException | None:
    """The rounds, which a failing rank leaves together with the others; returns what failed here."""
    failure: BaseException | None = None
    for number in range(len(rounds)):
        this = Round.of(rounds, number, memory)
        try:
            before(this)
        except BaseException as error:
            failure = error
        if memory.fence(ranks.any_set, failed=failure is not None):
            break
        try:
            after(this)
        except BaseException as error:
            failure = error
    return failure
