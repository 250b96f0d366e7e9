"""Which ranks speak through which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from distckpt.coordination.channel import Waits
from distckpt.coordination.message import Message

#: Up to so many ranks, root speaks with each: fewest messages, and one after the other.
STAR_LIMIT = 32


@dataclass(frozen=True, slots=True)
class Teams:
    """Teams of consecutive ranks, of which launchers mostly put neighbours on one node. Root leads the first.

    Attributes:
        size: Number of ranks.
        span: Ranks of a team; the last may have fewer.
    """

    size: int
    span: int

    @classmethod
    def of(cls, size: int) -> Self:
        """The teams of so many ranks: a single one up to `STAR_LIMIT`, else about as many as each has ranks."""
        return cls(size, size if size <= STAR_LIMIT else math.isqrt(size - 1) + 1)

    def captain_of(self, rank: int) -> int:
        """The lowest rank of the team."""
        return rank - rank % self.span

    def team_of(self, rank: int) -> range:
        """All ranks of the team."""
        captain = self.captain_of(rank)
        return range(captain, min(captain + self.span, self.size))

    def spoken_for(self, message: Message) -> range:
        """The ranks that a message speaks for: its sender, or all of its team."""
        return self.team_of(message.source) if message.is_of_team else range(message.source, message.source + 1)


def waits_of(size: int) -> Waits:
    """The times for so many ranks: patience and twice the grace are what an error may be late, below a second."""
    return Waits() if size <= STAR_LIMIT else Waits(grace=0.35, patience=0.25)
