"""The wants of all nodes, gathered on all ranks: equal wants of several nodes are sent only once."""

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
    """One value of each node, equal ones stored once.

    Attributes:
        values: The distinct values.
        number_of: For each node, the index of its value.
    """

    values: list[bytes]
    number_of: list[int]

    def nodes(self, number: int) -> list[int]:
        """The nodes that have the value of this index."""
        return [node for node, own in enumerate(self.number_of) if own == number]


def gather_distinct(ranks: Coordinator, nodes: Nodes, name: str, of_node: Callable[[], bytes]) -> Distinct:
    """Give all ranks the values of all nodes. Collective over `ranks`.

    Args:
        ranks: All ranks.
        nodes: The nodes, and the ranks on each.
        name: Name of the values, shown in errors.
        of_node: Returns the value of this node, the same on all its ranks; may be collective over the node.

    Raises:
        FailedElsewhere: It failed on another rank. The rank where it failed raises its own error instead.
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
    """The distinct digests among those of all nodes.

    Attributes:
        firsts: For each distinct digest, the first node that has it.
        number_of: For each node, the index of its digest.
    """

    firsts: list[int]
    number_of: list[int]

    @classmethod
    def of(cls, digests: Sequence[bytes]) -> _Found:
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
        return cls([digests.index(digest) for digest in numbers], [numbers[digest] for digest in digests])


# ---- hulls and wishes of a node ----------------------------------------------------------------------------------


def join_hulls(of_ranks: Sequence[bytes]) -> bytes:
    """The hull of what the ranks of a node want of each variable, encoded as `Own.hulls`."""
    hulls = stack_hulls(of_ranks)
    starts, stops = hulls[:, :, 0], hulls[:, :, 1]
    stop = stops.max(axis=0)
    start = np.where(stops > starts, starts, stop).min(axis=0)
    return np.stack([start, stop], axis=1).tobytes()


def join_wishes(of_ranks: Sequence[bytes]) -> bytes:
    """The distinct wishes of the ranks of a node, encoded for `decode_wishes`.

    They are sorted, so that nodes that want the same get equal bytes.
    """
    wishes = decode_wishes(of_ranks)
    return msgspec.msgpack.encode([(index, wish) for index in sorted(wishes) for wish in sorted(set(wishes[index]))])


def variables_that_meet(hulls: Distinct) -> list[int]:
    """Indices of the variables of which the hulls of two nodes overlap.

    Args:
        hulls: `join_hulls` of all nodes.
    """
    # Two of the nodes that want the same are enough to overlap.
    shown = [value for number, value in enumerate(hulls.values) for _ in hulls.nodes(number)[:2]]
    return hulls_that_meet(stack_hulls(shown))
