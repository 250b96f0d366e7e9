"""What each node wants, told to all ranks of all nodes: the same wants of several nodes are sent once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.nodes import Nodes
from distckpt.exchange.node import agreed, gathered
from distckpt.exchange.taking import decode_wishes, stack_hulls
from distckpt.layout.exchange import hulls_that_meet


class Distinct(NamedTuple):
    """A value of each node.

    Attributes:
        values: The different ones.
        number_of: Of each node the number of its value.
    """

    values: list[bytes]
    number_of: list[int]

    def nodes(self, number: int) -> list[int]:
        """The nodes that have a value."""
        return [node for node, own in enumerate(self.number_of) if own == number]


def gather_distinct(ranks: Coordinator, nodes: Nodes, name: str, of_node: Callable[[], bytes]) -> Distinct:
    """Give all ranks the values of all nodes. Collective over `ranks`.

    Args:
        ranks: All ranks.
        nodes: Their nodes.
        name: Name of the step, shown in errors.
        of_node: Gives the value of this node, the same on all its ranks; may be collective over the node.

    Raises:
        FailedElsewhere: It failed on another rank. On the rank where it failed, what it raised.
    """
    is_leader = nodes.leaders[nodes.own] == ranks.rank
    own = agreed(ranks, lambda: _Digested.of(of_node()))
    digests = gathered(ranks, f"digests of {name}", own.digest if is_leader else b"")
    found = agreed(ranks, lambda: _Found.of([digests[leader] for leader in nodes.leaders]))
    sends = is_leader and nodes.own in found.firsts
    values = gathered(ranks, name, own.value if sends else b"")
    return agreed(ranks, lambda: Distinct([values[nodes.leaders[node]] for node in found.firsts], found.number_of))


class _Digested(NamedTuple):
    value: bytes
    digest: bytes

    @classmethod
    def of(cls, value: bytes) -> _Digested:
        return cls(value, xxhash.xxh3_128_digest(value))


class _Found(NamedTuple):
    """Equal digests among those of all nodes.

    Attributes:
        firsts: For each different digest the first node that has it.
        number_of: For each node the number of its digest.
    """

    firsts: list[int]
    number_of: list[int]

    @classmethod
    def of(cls, digests: Sequence[bytes]) -> _Found:
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
        return cls([digests.index(digest) for digest in numbers], [numbers[digest] for digest in digests])


# ---- hulls and wishes of a node ----------------------------------------------------------------------------------


def join_hulls(of_ranks: Sequence[bytes]) -> bytes:
    """From the first to the last element that ranks of a node want of each variable; encoded as those of each rank."""
    hulls = stack_hulls(of_ranks)
    starts, stops = hulls[:, :, 0], hulls[:, :, 1]
    stop = stops.max(axis=0)
    start = np.where(stops > starts, starts, stop).min(axis=0)
    return np.stack([start, stop], axis=1).tobytes()


def join_wishes(of_ranks: Sequence[bytes]) -> bytes:
    """What ranks of a node want, each once, in an order that depends on nothing else; for `decode_wishes`."""
    wishes = decode_wishes(of_ranks)
    return msgspec.msgpack.encode([(index, wish) for index in sorted(wishes) for wish in sorted(set(wishes[index]))])


def variables_that_meet(hulls: Distinct) -> list[int]:
    """Variables of which one node wants elements between, or among, those of another.

    Args:
        hulls: `join_hulls` of all nodes.
    """
    # Of nodes that want the same, two show it as well as all.
    shown = [value for number, value in enumerate(hulls.values) for _ in hulls.nodes(number)[:2]]
    return hulls_that_meet(stack_hulls(shown))
