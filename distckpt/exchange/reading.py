"""Reading together: bytes that several ranks want are read once and handed on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import msgspec

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.nodes import Nodes
from distckpt.exchange.across import read_across
from distckpt.exchange.node import FailedElsewhere, Round, agreed, gathered, run_rounds
from distckpt.exchange.taking import Own, Taking, Want, boxes_of, decode_wishes, stack_hulls
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box, Shape
from distckpt.layout.exchange import hulls_that_meet, is_worth_exchanging
from distckpt.layout.parcels import cells_of
from distckpt.layout.rounds import Party, Wanted
from distckpt.storage.threads import SHARE_NBYTES, Team, threads_of_rank

#: Most threads of each rank. More are no faster, as all wait for each other in every round.
_MAX_THREADS = 4


def read_together(coordinator: Coordinator, want: Want) -> list[TensorRead]:
    """Read the variables of which ranks want the same bytes, or interleaved strips.

    First come the variables that several nodes want, with messages between them; then those that ranks of one node
    want, through its shared memory alone. Collective over the communicator. If a rank fails, all ranks of the job or of
    its node stop, and only that rank raises: an agreement of all ranks must follow.

    Args:
        coordinator: Coordinator of the ranks that restore.
        want: What this rank wants.

    Returns:
        The reads that this rank must do itself; empty if another rank has failed.

    Raises:
        CorruptCheckpointError: The bytes of a tensor do not match their checksum.
    """
    if coordinator.size == 1:
        return list(want.reads)
    node, nodes = coordinator.node, coordinator.nodes
    several = len(nodes.ranks) > 1
    try:
        rest = read_across(coordinator, node, nodes, want) if several else _read_within(node, want)
        if rest is None:  # no shared memory somewhere: everything goes by messages
            every = Nodes.single(coordinator.size, coordinator.rank)
            rest = read_across(coordinator, Coordinator.alone(), every, want)
        if rest is None:
            rest = list(want.reads)
        if several:
            left = _read_within(node, want._replace(reads=rest))
            rest = rest if left is None else left
    except FailedElsewhere:
        return []
    return rest


def _read_within(node: Coordinator, want: Want) -> list[TensorRead] | None:
    """Read the variables that ranks of this node share. Collective over the node.

    Returns:
        The reads that this rank must do itself; None if the node has no shared memory, and nothing was read.

    Raises:
        FailedElsewhere: Another rank of the node failed. The rank that failed raises its own error instead.
    """
    if node.size == 1:
        return list(want.reads)
    own = agreed(node, lambda: Own.of(want))
    hulls = gathered(node, "hulls", own.hulls)
    meeting = agreed(node, lambda: hulls_that_meet(stack_hulls(hulls)))
    if not meeting:
        return list(want.reads)
    told = gathered(node, "wishes", agreed(node, lambda: _tell(node, want, own, meeting)))
    for most_threads in (_MAX_THREADS, 1):  # where the memory for several threads is not to be had, one may do
        taking = agreed(node, partial(_plan, node, want, own, told, most_threads))
        if _run(node, taking):
            return taking.finish()
        if taking.n_threads == 1:
            break
    return None


class _Told(NamedTuple):
    """What a rank tells the others of its node.

    Attributes:
        threads: With how many threads it could take part.
        wishes: Its `Own.wishes`.
    """

    threads: int
    wishes: bytes


def _tell(node: Coordinator, want: Want, own: Own, variables: Iterable[int]) -> bytes:
    """What this rank tells the others, encoded. Local."""
    threads = want.threads or threads_of_rank(node.size)
    return msgspec.msgpack.encode(_Told(threads, own.wishes(variables)))


def _plan(node: Coordinator, want: Want, own: Own, encoded: Sequence[bytes], most_threads: int) -> Taking:
    """Plan the exchange within a node. Local; all ranks of the node get the same rounds."""
    told = [msgspec.msgpack.decode(data, type=_Told) for data in encoded]
    wishes = decode_wishes([of_rank.wishes for of_rank in told])
    files = {index: want.source.in_file(index) for index in wishes}
    wanted = {
        index: _wanted(tuple(found), files[index].shape, files[index].itemsize)
        for index, found in boxes_of(wishes).items()
    }
    worth = {index: found for index, found in wanted.items() if found is not None}
    share = sum(files[index].nbytes for index in worth) // node.size
    n_threads = max(1, min(most_threads, share // SHARE_NBYTES, *(of_rank.threads for of_rank in told)))
    party = Party(worth, range(node.size * n_threads))
    return Taking(want, own, files, wishes, [party], node.size, n_threads)


@lru_cache(maxsize=1 << 10)  # models repeat few shapes
def _wanted(boxes: tuple[Box, ...], shape: Shape, itemsize: int) -> Wanted | None:
    """What the ranks want of a variable; None if an exchange of it is not worth it."""
    return Wanted(boxes, shape) if is_worth_exchanging(boxes, shape, itemsize) else None


def _run(node: Coordinator, taking: Taking) -> bool:
    """Run all rounds; returns False if the node has not enough shared memory. Collective over the node."""
    with Team(taking.n_threads) as team:
        return run_rounds(
            node,
            node,
            taking.rounds,
            before=lambda this: team.do(partial(_read, taking, node.rank, this)),
            after=lambda this: team.do(partial(_take, taking, this)),
            last=taking.settle,
            n_threads=taking.n_threads,
        )


def _read(taking: Taking, rank: int, this: Round, thread: int) -> None:
    mover = rank * taking.n_threads + thread
    taking.read(mover, this.units[mover], this.parts[mover])


def _take(taking: Taking, this: Round, thread: int) -> None:
    for mover in range(thread, len(this.units), taking.n_threads):
        unit = this.units[mover]
        taking.take(mover, unit, cells_of(unit, taking.files), this.parts[mover])
