"""Reading together: bytes that several ranks want are read once and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
    wishes = gathered(node, "wishes", agreed(node, lambda: own.wishes(meeting)))
    taking = agreed(node, lambda: _plan(node, want, own, wishes))
    done = run_rounds(
        node,
        node,
        taking.rounds,
        before=lambda this: taking.read(this.units[node.rank], this.parts[node.rank]),
        after=lambda this: _take(taking, this),
        last=taking.settle,
    )
    return taking.finish() if done else None


def _plan(node: Coordinator, want: Want, own: Own, encoded: Sequence[bytes]) -> Taking:
    """Plan the exchange within a node. Local; all ranks of the node get the same rounds."""
    wishes = decode_wishes(encoded)
    files = {index: want.source.in_file(index) for index in wishes}
    wanted = {
        index: _wanted(tuple(found), files[index].shape, files[index].itemsize)
        for index, found in boxes_of(wishes).items()
    }
    party = Party({index: found for index, found in wanted.items() if found is not None}, range(node.size))
    return Taking(want, own, files, wishes, [party], node.size)


@lru_cache(maxsize=1 << 10)  # models repeat few shapes
def _wanted(boxes: tuple[Box, ...], shape: Shape, itemsize: int) -> Wanted | None:
    """What the ranks want of a variable; None if an exchange of it is not worth it."""
    return Wanted(boxes, shape) if is_worth_exchanging(boxes, shape, itemsize) else None


def _take(taking: Taking, this: Round) -> None:
    for mover, (unit, part) in enumerate(zip(this.units, this.parts, strict=True)):
        taking.take(mover, unit, cells_of(unit, taking.files), part)
