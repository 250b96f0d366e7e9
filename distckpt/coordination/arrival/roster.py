"""The list of ranks in a call that root keeps."""

from __future__ import annotations

from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.message import Message


class Roster:
    """The ranks that are in a call: those that speak with root, and those for which these speak.

    Attributes:
        arrivals: The ARRIVE of each rank that speaks with root. Read only.
    """

    def __init__(self, teams: Teams) -> None:
        self.arrivals: dict[int, Message] = {}
        self._teams = teams
        self._count = 0  # of ranks; one that left its team may be counted twice until the captain's message arrives
        self._complete: bool | None = None  # None: not computed yet

    def add(self, arrival: Message) -> None:
        """Record an arrival, in place of an earlier one of the same rank."""
        self.remove(arrival.source)
        self.arrivals[arrival.source] = arrival
        self._count += len(self._teams.spoken_for(arrival))
        self._complete = None

    def remove(self, rank: int) -> None:
        """Remove a rank, and those for which it speaks."""
        arrival = self.arrivals.pop(rank, None)
        if arrival is not None:
            self._count -= len(self._teams.spoken_for(arrival))
            self._complete = None

    def clear(self) -> None:
        """Remove all ranks."""
        self.arrivals.clear()
        self._count = 0
        self._complete = None

    def has(self, message: Message) -> bool:
        """Whether a message belongs to the call that its sender is in."""
        arrival = self.arrivals.get(message.source)
        return arrival is not None and arrival.call == message.call

    @property
    def is_complete(self) -> bool:
        """Whether each rank but root is here, and none is counted twice."""
        if self._complete is None:
            others = self._teams.size - 1
            self._complete = self._count == others and len(self.ranks()) == others
        return self._complete

    def ranks(self) -> set[int]:
        """The ranks that are here."""
        return {rank for arrival in self.arrivals.values() for rank in self._teams.spoken_for(arrival)}
