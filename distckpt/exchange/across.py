"""Reading together over several nodes: each byte is read by one rank of the job, and sent to the nodes that want it.

The ranks of equal place on their nodes make a lane. In each round every rank of a lane reads a unit into memory that
its node shares. Then, in as many steps as there are other nodes, it sends to the rank s nodes after its own, and
receives from the one s nodes before, just what the ranks of that node want; all ranks of the node take from what has
arrived. So a byte comes once to each node that wants it, over all lanes at the same time, and all ranks send and
receive as much: for replicas this is an allgather, for shards an exchange of all with all.
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

#: In the memory of a rank: two areas for units it reads, and two for what arrives.
_N_AREAS = 4
_ARRIVALS = 2


def read_across(ranks: Coordinator, node: Coordinator, nodes: Nodes, want: Want) -> list[TensorRead] | None:
    """Read what several nodes want of the same bytes, or in strips between those of others. Collective over `ranks`.

    Args:
        ranks: All ranks.
        node: Those of this node.
        nodes: The nodes.
        want: What this rank wants.

    Returns:
        The reads that are left to the node; None where some node has no shared memory, and nothing was done.

    Raises:
        FailedElsewhere: Another rank failed. On the rank that failed, what was raised.
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
    """What each node wants of what is worth exchanging.

    Attributes:
        files: Where the variables are in the file, by index.
        wishes: What any rank wants, by variable.
        parties: Nodes that want the same, and what.
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
        """Variable to the boxes that ranks of a node want; the same object for nodes that want the same."""
        return self._boxes[self._number_of[node]]


def _is_worth(index: int, file: InFile, boxes: Sequence[dict[int, list[Box]]], holders: Sequence[list[int]]) -> bool:
    """See `is_worth_exchanging`; several nodes that want the same share all of its elements."""
    found = [box for of_party in boxes for box in of_party.get(index, ())]
    shared = any(index in of_party and len(nodes) > 1 for of_party, nodes in zip(boxes, holders, strict=True))
    return shared or is_worth_exchanging(found, file.shape, file.itemsize)


# ---- what goes where in a round ----------------------------------------------------------------------------------


class _Incoming(NamedTuple):
    """What a rank receives.

    Attributes:
        mover: The rank that has read it, and sends it.
        unit: What that rank has read.
        parcel: What is sent of it.
    """

    mover: int
    unit: Unit
    parcel: Parcel


class _Step(NamedTuple):
    """What this rank and the others of its node have to do between nodes that are equally far apart.

    Attributes:
        to: The rank that this one sends to.
        outgoing: What it sends.
        incoming: What the ranks of this node receive, by lane.
        place: Where they put it in their areas for what arrives.
    """

    to: int
    outgoing: Parcel
    incoming: list[_Incoming]
    place: int


def _plan_batches(wants: _Wants, nodes: Nodes, lane: int | None, units: Sequence[Unit]) -> list[list[_Step]]:
    """The steps of a round in order, in batches whose arrivals fit into an area.

    Batches and places are the same on all ranks of a node.

    Args:
        wants: What each node wants.
        nodes: The nodes.
        lane: This rank's place on its node; None where it has no counterpart on some node.
        units: The unit of each rank.
    """
    own, n_nodes = nodes.own, len(nodes.ranks)
    batches: list[list[_Step]] = []
    parcels: dict[int, Parcel] = {}  # by identity of what is wanted: nodes that want the same get the same
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
    """One exchange: its plan, which is the same on all ranks, and this rank's part of the rounds."""

    def __init__(
        self, ranks: Coordinator, node: Coordinator, nodes: Nodes, want: Want, own: Own, wishes: Distinct
    ) -> None:
        self._ranks = ranks
        self._node = node
        self._nodes = nodes
        self._lane = node.rank if node.rank < nodes.n_lanes else None
        self._wants = _Wants(want.source, nodes, wishes)
        self._taking = Taking(want, own, self._wants.wishes, self._wants.parties, ranks.size)
        self._message = memoryview(bytearray(UNIT_NBYTES))
        self._packed: Parcel | None = None
        self._batches: list[list[_Step]] = []
        self._failures: list[BaseException] = []

    def run(self) -> list[TensorRead] | None:
        """Read and hand on; see `read_across`. Collective."""
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
        """Read this rank's unit, and plan the steps: nothing that they need can be missing once they have begun."""
        self._batches = _plan_batches(self._wants, self._nodes, self._lane, this.units)
        self._taking.read(this.units[self._ranks.rank], this.parts[self._node.rank])

    def _hand_on(self, this: Round) -> None:
        """Take from the units of this node, then send and receive; all of it whatever fails, which is raised then."""
        for rank, part in zip(self._nodes.lanes(self._nodes.own), this.parts, strict=False):
            self._try(self._take_unit, rank, this.units[rank], part)
        for number, batch in enumerate(self._batches):
            arrived = [area(part, _ARRIVALS + number % 2) for part in this.memory.parts]
            for step in batch:
                self._swap(step, this, arrived[self._node.rank])
            if any(each.parcel.nbytes for step in batch for each in step.incoming):
                this.memory.fence(self._node.any_set, failed=False)
                self._try(self._take_batch, batch, arrived)
        if self._failures:
            raise self._failures[0]

    def _swap(self, step: _Step, this: Round, arrived: memoryview) -> None:
        """Send and receive what one step asks for."""
        if self._lane is not None:
            data = self._data_of(step.outgoing, this.parts[self._node.rank])
            source, _, parcel = step.incoming[self._lane]
            room = arrived[step.place : step.place + parcel.nbytes]
            self._ranks.swap(Payload(step.to, data), Payload(source, room))

    def _data_of(self, parcel: Parcel, unit: memoryview) -> memoryview:
        """The bytes of a parcel; where they cannot be put together others, for the receiver waits for as many."""
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
        """Do local work; what it raises waits until the other ranks do not need this one any more."""
        error = Attempt.of(lambda: work(*arguments)).error
        if error is not None:
            self._failures.append(error)
