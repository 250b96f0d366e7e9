"""Reading together: what several ranks want of the same bytes is read once and handed on."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.nodes import Nodes
from distckpt.exchange.across import read_across
from distckpt.exchange.node import FailedElsewhere, Round, agreed, gathered, run_rounds
from distckpt.exchange.taking import Own, Taking, Want, boxes_of, decode_wishes, stack_hulls
from distckpt.graph.assignment import TensorRead
from distckpt.layout.exchange import hulls_that_meet, is_worth_exchanging
from distckpt.layout.parcels import cells_of
from distckpt.layout.rounds import Party, Wanted


def read_together(coordinator: Coordinator, want: Want) -> list[TensorRead]:
    """Read what ranks want of the same bytes, or in strips between those of other ranks.

    First what several nodes want, with messages between them; then what ranks of one node want, in its shared memory
    alone. Collective over the communicator. Where a rank fails, all ranks of the job stop, or of its node, and just
    that rank raises: an agreement of all ranks must follow.

    Args:
        coordinator: All ranks.
        want: What this rank wants.

    Returns:
        The reads that are left to this rank alone; none when another rank has failed.

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
    """What ranks of one node want; None where it has no shared memory, and nothing was done. Collective over the node.

    Raises:
        FailedElsewhere: Another rank of the node failed. On the rank that failed, what was raised.
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
    """The same on all ranks of the node, but for what each takes."""
    wishes = decode_wishes(encoded)
    files = {index: want.source.in_file(index) for index in wishes}
    wanted = {
        index: Wanted(found, files[index].shape)
        for index, found in boxes_of(wishes).items()
        if is_worth_exchanging(found, files[index].shape, files[index].itemsize)
    }
    return Taking(want, own, wishes, [Party(wanted, range(node.size))], node.size)


def _take(taking: Taking, this: Round) -> None:
    for mover, (unit, part) in enumerate(zip(this.units, this.parts, strict=True)):
        taking.take(mover, unit, cells_of(unit, taking.files), part)
