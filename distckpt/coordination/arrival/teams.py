"""Teams: the ranks for which a captain speaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from distckpt.coordination.channel import Waits
from distckpt.coordination.message import Message

#: Up to this many ranks, root speaks with each rank itself, which takes the fewest messages.
STAR_LIMIT = 32


@dataclass(frozen=True, slots=True)
class Teams:
    """Teams of consecutive ranks, which launchers mostly put on the same node. Root leads the first team.

    Attributes:
        size: Number of ranks.
        span: Number of ranks in a team; the last team may have fewer.
    """

    size: int
    span: int

    @classmethod
    def of(cls, size: int) -> Self:
        """The teams of `size` ranks: a single one up to `STAR_LIMIT`, else about as many teams as ranks in each."""
        return cls(size, size if size <= STAR_LIMIT else math.isqrt(size - 1) + 1)

    def captain_of(self, rank: int) -> int:
        """The lowest rank of a rank's team."""
        return rank - rank % self.span

    def team_of(self, rank: int) -> range:
        """All ranks of a rank's team."""
        captain = self.captain_of(rank)
        return range(captain, min(captain + self.span, self.size))

    def spoken_for(self, message: Message) -> range:
        """The ranks for which a message speaks: its sender, or all of the sender's team."""
        return self.team_of(message.source) if message.is_of_team else range(message.source, message.source + 1)


def waits_of(size: int) -> Waits:
    """The times for `size` ranks. Patience plus twice the grace, by which an error may be late, stay below a second."""
    return Waits() if size <= STAR_LIMIT else Waits(grace=0.35, patience=0.25)
