"""What both directions have in common: agreement of the ranks of a node, and the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.shared_memory import SharedMemory
from distckpt.layout.exchange import Unit
from distckpt.log import log
from distckpt.request import Attempt

#: Bytes that a rank moves in one round. Two such units of every rank are in memory, and in the shared cache.
UNIT_NBYTES = 2 << 20

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another rank of the node has failed; it raises what happened in the next agreement of all ranks."""


class Round(NamedTuple):
    """One round.

    Attributes:
        units: The unit of each rank of the node.
        parts: The memory of each rank; all ranks see it.
    """

    units: list[Unit]
    parts: list[memoryview]


def agreed(node: Coordinator, work: Callable[[], T]) -> T:
    """Do local work; where it fails on a rank, all ranks of the node stop. Collective over the node.

    Raises:
        FailedElsewhere: It failed on another rank. On the rank where it failed, what it raised.
    """
    attempt = Attempt.of(work)
    if node.any_set(attempt.error is not None):
        attempt.require()
        raise FailedElsewhere
    return attempt.value


def run_rounds(
    node: Coordinator,
    rounds: Sequence[list[Unit]],
    before: Callable[[Round], None],
    after: Callable[[Round], None],
) -> bool:
    """Fill the shared memory, wait for all ranks, empty it; again and again. Collective over the node.

    Args:
        node: The ranks of this node.
        rounds: For each round the unit of each rank.
        before: Fills memory: this rank's part, or what it has of all parts.
        after: Empties what `before` has filled on all ranks.

    Returns:
        False where there is no shared memory: nothing was done.

    Raises:
        FailedElsewhere: Another rank failed. On the rank that failed, what was raised.
    """
    if not rounds:
        return True
    memory = node.shared_memory(2 * UNIT_NBYTES)
    if memory is None:
        log.warning("no shared memory on this node: every rank reads and writes for itself")
        return False
    try:
        failure = _run(memory, rounds, before, after)
    finally:
        memory.free()
    if node.any_set(failure is not None):
        raise failure or FailedElsewhere
    return True


def _run(
    memory: SharedMemory,
    rounds: Sequence[list[Unit]],
    before: Callable[[Round], None],
    after: Callable[[Round], None],
) -> BaseException | None:
    """The rounds, which a failing rank leaves together with the others; returns what failed here.

    The memory has two halves: while the slowest rank still empties one, the others fill the other one.
    """
    failure: BaseException | None = None
    for number, units in enumerate(rounds):
        start = number % 2 * UNIT_NBYTES
        this = Round(units, [part[start : start + UNIT_NBYTES] for part in memory.parts])
        try:
            before(this)
        except BaseException as error:
            failure = error
        if memory.fence(failed=failure is not None):
            break
        try:
            after(this)
        except BaseException as error:
            failure = error
    return failure
