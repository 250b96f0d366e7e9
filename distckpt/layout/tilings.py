"""The ways in which variables are cut into shards: a model has thousands of variables, and a few such ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.layout.records import Shard, Variable


@dataclass(frozen=True, slots=True)
class Tilings:
    """Each way once.

    Attributes:
        distinct: Different lists of shards, in order of the first variable that has each.
        which: For each variable the index of its own.
    """

    distinct: list[list[Shard]]
    which: list[int]


def tilings_of(variables: Sequence[Variable]) -> Tilings:
    """Find equal lists of shards. Quick where variables share one list, as those of a decoded manifest do."""
    distinct: list[list[Shard]] = []
    by_value: dict[tuple[Shard, ...], int] = {}
    by_identity: dict[int, int] = {}
    which = []
    for variable in variables:
        index = by_identity.get(id(variable.shards))
        if index is None:
            index = by_identity[id(variable.shards)] = by_value.setdefault(tuple(variable.shards), len(distinct))
            if index == len(distinct):
                distinct.append(variable.shards)
        which.append(index)
    return Tilings(distinct, which)
