"""The nodes of a job, their ranks, and transfers of bytes between ranks of different nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distckpt.coordination.message import Buffer

_TAG = 2


class Nodes(NamedTuple):
    """The nodes of a job.

    Attributes:
        ranks: For each node: its ranks, ascending. Nodes are in the order of their first ranks.
        own: Index of this rank's node.
    """

    ranks: list[list[int]]
    own: int

    @classmethod
    def of(cls, firsts: Sequence[int], rank: int) -> Nodes:
        """The nodes, from the first rank on the node of each rank."""
        ranks: dict[int, list[int]] = {first: [] for first in sorted(set(firsts))}
        for each, first in enumerate(firsts):
            ranks[first].append(each)
        return cls(list(ranks.values()), list(ranks).index(firsts[rank]))

    @classmethod
    def single(cls, size: int, rank: int) -> Nodes:
        """Nodes of one rank each."""
        return cls([[each] for each in range(size)], rank)

    @property
    def leaders(self) -> list[int]:
        """The first rank of each node."""
        return [ranks[0] for ranks in self.ranks]

    @property
    def n_lanes(self) -> int:
        """Number of ranks on the smallest node, which is the number of lanes."""
        return min(map(len, self.ranks))

    def lanes(self, node: int) -> list[int]:
        """The ranks of a node that have a counterpart on every other node: the rank at the same position."""
        return self.ranks[node][: self.n_lanes]


class Payload(NamedTuple):
    """Bytes sent to, or received from, a rank.

    Attributes:
        rank: The other rank.
        data: The bytes to send, or the memory that receives them.
    """

    rank: int
    data: Buffer


def swap(comm: Any, outgoing: Payload, incoming: Payload) -> None:
    """See `Coordinator.swap`."""
    from mpi4py import MPI

    to = outgoing.rank if len(outgoing.data) else MPI.PROC_NULL
    source = incoming.rank if len(incoming.data) else MPI.PROC_NULL
    comm.Sendrecv((outgoing.data, MPI.BYTE), to, _TAG, (incoming.data, MPI.BYTE), source, _TAG)
