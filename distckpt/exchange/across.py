"""Reading together over several nodes: each byte is read by one rank of the job, and sent to the nodes that want it.

The ranks at the same position on their nodes form a lane. In each round every rank of a lane reads a unit into memory
shared by its node. Then come as many steps as there are other nodes. In step s each rank swaps parcels within its lane:
it sends to the rank s nodes ahead the part of its unit that is wanted there, and receives from the rank s nodes behind
what its own node wants; all ranks of the node take from what has arrived. So each byte reaches each node that wants it
once, all lanes work at the same time, and the load is even: for replicas this is an allgather, for shards an
all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.nodes import Nodes, Payload
from distckpt.exchange.node import UNIT_NBYTES, Round, agreed, area, gathered, run_rounds
from distckpt.exchange.taking import Own, Taking, Want, boxes_of, decode_wishes
from distckpt.exchange.wants import Distinct, gather_distinct, join_hulls, join_wishes, variables_that_meet
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.exchange import InFile, Unit, is_worth_exchanging
from distckpt.layout.parcels import NO_PARCEL, Parcel, cells_of, parcel_of
from distckpt.layout.rounds import Party, Wanted
from distckpt.request import Attempt
from distckpt.source import Source
from distckpt.storage.room import padded
from distckpt.storage.units import pack

#: Areas in the shared memory of each rank: two for the units it reads, then two for what arrives.
_N_AREAS = 4
_ARRIVALS = 2


def read_across(ranks: Coordinator, node: Coordinator, nodes: Nodes, want: Want) -> list[TensorRead] | None:
    """Read the variables of which several nodes want the same bytes, or interleaved strips. Collective over `ranks`.

    Args:
        ranks: All ranks.
        node: The ranks of this node.
        nodes: The nodes, and the ranks on each.
        want: What this rank wants.

    Returns:
        The reads that are left to the node; None if some node has no shared memory, and nothing was read.

    Raises:
        FailedElsewhere: Another rank failed. The rank that failed raises its own error instead.
    """
    own = agreed(ranks, lambda: Own.of(want))
    hulls = gather_distinct(ranks, nodes, "hulls", lambda: join_hulls(gathered(node, "hulls", own.hulls)))
    meeting = agreed(ranks, lambda: variables_that_meet(hulls))
    if not meeting:
        return list(want.reads)
    encoded = agreed(ranks, lambda: own.wishes(meeting))
    wishes = gather_distinct(ranks, nodes, "wishes", lambda: join_wishes(gathered(node, "wishes", encoded)))
    relay = agreed(ranks, lambda: _Relay(ranks, node, nodes, want, own, wishes))
    return relay.run()


# ---- who wants what ----------------------------------------------------------------------------------------------


class _Wants:
    """The boxes that each node wants of the variables that are worth exchanging.

    Attributes:
        files: Variable index to its place in the file.
        wishes: Variable index to the wishes of all ranks.
        parties: One for each distinct want: what is wanted, and the ranks of the nodes that want it.
    """

    def __init__(self, source: Source, nodes: Nodes, wishes: Distinct) -> None:
        everything = [boxes_of(decode_wishes([value])) for value in wishes.values]
        indices = {index for found in everything for index in found}
        files = {index: source.in_file(index) for index in sorted(indices)}
        holders = [wishes.nodes(number) for number in range(len(everything))]
        worth = {index for index, file in files.items() if _is_worth(index, file, everything, holders)}
        self.files = {index: files[index] for index in files if index in worth}
        self._boxes = [{index: found[index] for index in found if index in worth} for found in everything]
        self.wishes = decode_wishes(wishes.values)
        self._number_of = wishes.number_of
        movers = [[rank for node in held for rank in nodes.lanes(node)] for held in holders]
        self.parties = [
            Party({index: Wanted(of_one, files[index].shape) for index, of_one in found.items()}, ranks)
            for found, ranks in zip(self._boxes, movers, strict=True)
        ]

    def of(self, node: int) -> dict[int, list[Box]]:
        """Variable index to the boxes that ranks of a node want. Nodes that want the same get the same object."""
        return self._boxes[self._number_of[node]]


def _is_worth(index: int, file: InFile, boxes: Sequence[dict[int, list[Box]]], holders: Sequence[list[int]]) -> bool:
    """As `is_worth_exchanging`; a variable that several nodes want alike is always worth it."""
    found = [box for of_party in boxes for box in of_party.get(index, ())]
    shared = any(index in of_party and len(nodes) > 1 for of_party, nodes in zip(boxes, holders, strict=True))
    return shared or is_worth_exchanging(found, file.shape, file.itemsize)


# ---- what goes where in a round ----------------------------------------------------------------------------------


class _Incoming(NamedTuple):
    """A parcel that a rank receives.

    Attributes:
        mover: The rank that has read the unit and sends the parcel.
        unit: The unit that it has read.
        parcel: The part of the unit that it sends.
    """

    mover: int
    unit: Unit
    parcel: Parcel


class _Step(NamedTuple):
    """One step of a round on the ranks of one node: each sends to the node at one distance ahead, and receives.

    Attributes:
        to: The rank that this rank sends to.
        outgoing: The parcel that it sends.
        incoming: The parcels that the ranks of this node receive, by lane.
        place: Position of each parcel in its receiver's arrival area, in bytes.
    """

    to: int
    outgoing: Parcel
    incoming: list[_Incoming]
    place: int


def _plan_batches(wants: _Wants, nodes: Nodes, lane: int | None, units: Sequence[Unit]) -> list[list[_Step]]:
    """The steps of a round in order, in batches whose arrivals fit into one area. Local.

    Batches and places are the same on all ranks of a node.

    Args:
        wants: What each node wants.
        nodes: The nodes, and the ranks on each.
        lane: This rank's lane; None if it is in none, because some node has too few ranks.
        units: The unit of each rank.
    """
    own, n_nodes = nodes.own, len(nodes.ranks)
    batches: list[list[_Step]] = []
    parcels: dict[int, Parcel] = {}  # by id of what is wanted: nodes that want the same get the same parcel
    used = 0
    for distance in range(1, n_nodes):
        sources, targets = nodes.lanes((own - distance) % n_nodes), nodes.lanes((own + distance) % n_nodes)
        incoming = [
            _Incoming(rank, units[rank], parcel_of(units[rank], wants.files, wants.of(own))) for rank in sources
        ]
        outgoing = NO_PARCEL
        if lane is not None:
            wanted = wants.of((own + distance) % n_nodes)
            if id(wanted) not in parcels:
                parcels[id(wanted)] = parcel_of(units[nodes.ranks[own][lane]], wants.files, wanted)
            outgoing = parcels[id(wanted)]
        most = max(each.parcel.nbytes for each in incoming)
        if not batches or used + most > UNIT_NBYTES:
            batches.append([])
            used = 0
        batches[-1].append(_Step(targets[lane or 0], outgoing, incoming, used))
        used += padded(most)
    return batches


# ---- doing it ----------------------------------------------------------------------------------------------------


class _Relay:
    """One exchange over several nodes: its plan, the same on all ranks, and this rank's part in the rounds.

    `read_across` makes one and calls `run`. In each round `_read` fills this rank's unit; after the agreement
    `_hand_on` takes from the units of the node, then swaps parcels with the other nodes, batch by batch.
    """

    def __init__(
        self, ranks: Coordinator, node: Coordinator, nodes: Nodes, want: Want, own: Own, wishes: Distinct
    ) -> None:
        self._ranks = ranks
        self._node = node
        self._nodes = nodes
        self._lane = node.rank if node.rank < nodes.n_lanes else None
        self._wants = _Wants(want.source, nodes, wishes)
        self._taking = Taking(want, own, self._wants.files, self._wants.wishes, self._wants.parties, ranks.size)
        self._message = memoryview(bytearray(UNIT_NBYTES))
        self._packed: Parcel | None = None
        self._batches: list[list[_Step]] = []
        self._failures: list[BaseException] = []

    def run(self) -> list[TensorRead] | None:
        """Run all rounds. Collective over all ranks; returns as `read_across`."""
        done = run_rounds(
            self._ranks,
            self._node,
            self._taking.rounds,
            before=self._read,
            after=self._hand_on,
            last=self._taking.settle,
            n_areas=_N_AREAS,
        )
        return agreed(self._ranks, self._taking.finish) if done else None

    def _read(self, this: Round) -> None:
        """Read this rank's unit. Local. The steps are planned here too, so that nothing can fail once they began."""
        self._batches = _plan_batches(self._wants, self._nodes, self._lane, this.units)
        rank = self._ranks.rank
        self._taking.read(rank, this.units[rank], this.parts[self._node.rank])

    def _hand_on(self, this: Round) -> None:
        """Take from the units of this node, then send and receive. Collective over all ranks.

        Local errors are kept and raised at the end: the other ranks wait for this one in every step.
        """
        for rank, part in zip(self._nodes.lanes(self._nodes.own), this.parts, strict=False):
            self._try(self._take_unit, rank, this.units[rank], part)
        for number, batch in enumerate(self._batches):
            arrived = [area(part, _ARRIVALS + number % 2) for part in this.memory.parts]
            for step in batch:
                self._swap(step, this, arrived[self._node.rank])
            if any(each.parcel.nbytes for step in batch for each in step.incoming):
                self._node.any_set(False)  # all have arrived
                self._try(self._take_batch, batch, arrived)
        if self._failures:
            raise self._failures[0]

    def _swap(self, step: _Step, this: Round, arrived: memoryview) -> None:
        """Send and receive the parcels of one step; does nothing on a rank without a lane."""
        if self._lane is not None:
            data = self._data_of(step.outgoing, this.parts[self._node.rank])
            source, _, parcel = step.incoming[self._lane]
            room = arrived[step.place : step.place + parcel.nbytes]
            self._ranks.swap(Payload(step.to, data), Payload(source, room))

    def _data_of(self, parcel: Parcel, unit: memoryview) -> memoryview:
        """The bytes of a parcel to send. If packing fails, as many other bytes, because the receiver waits for them."""
        if parcel.is_whole:
            return unit[: parcel.nbytes]
        if parcel is not self._packed:
            self._packed = parcel
            self._try(pack, parcel, unit, self._wants.files, self._message)
        return self._message[: parcel.nbytes]

    def _take_unit(self, mover: int, unit: Unit, part: memoryview) -> None:
        self._taking.take(mover, unit, cells_of(unit, self._wants.files), part)

    def _take_batch(self, batch: Sequence[_Step], arrived: Sequence[memoryview]) -> None:
        for step in batch:
            for (mover, unit, parcel), part in zip(step.incoming, arrived, strict=False):
                if parcel.nbytes:
                    self._taking.take(mover, unit, parcel.cells, part[step.place : step.place + parcel.nbytes])

    def _try(self, work: Callable[..., object], *arguments: object) -> None:
        """Do local work. An error is kept until the other ranks no longer need this one."""
        error = Attempt.of(lambda: work(*arguments)).error
        if error is not None:
            self._failures.append(error)
