"""The protocol on rank 0."""

from __future__ import annotations

import math
from collections.abc import Iterable

from distckpt.coordination.arrival.call import Call
from distckpt.coordination.arrival.participant import ROOT, Arrival
from distckpt.coordination.arrival.roster import Roster
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError


class Root(Arrival):
    """Rank 0, which decides whether a call starts. Its members are single ranks, and captains that speak for teams."""

    def __init__(self, channel: Channel, teams: Teams) -> None:
        super().__init__(channel, teams)
        # The ranks that are in a call; members may come before root itself.
        self._roster = Roster(teams)
        # Members to which a GO was sent in this call, and those of them that have confirmed.
        self._asked: set[int] = set()
        self._confirmed: set[int] = set()
        # The rank that came last to this call.
        self._last = ROOT
        # Give-ups below this generation are over, since a rank has come back from them. Later ones may be going on.
        self._settled = 0

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._enter()
        deadline = self._channel.now() + call.timeout + self._waits.patience
        while not self._all_confirmed():
            self._ask()
            message = self._receive(self._deadline(deadline))
            if message is None or self._calls_roll(message):
                raise self._give_up(call)
            self._take(message)
        return self._start(call)

    def _enter(self) -> None:
        self._call += 1
        self._notice_end = math.inf
        self._settled = self._generation
        self._asked.clear()
        self._confirmed.clear()
        for message in self._channel.drain():
            self._file(message)
        self._last = ROOT
        self._reassure(self._roster.arrivals)

    def _all_confirmed(self) -> bool:
        return self._roster.is_complete and len(self._confirmed) == len(self._roster.arrivals)

    def _ask(self) -> None:
        """Go to STARTING once all are here: send each GO that is missing. If a member leaves, it is GATHERING again."""
        if self._roster.is_complete and len(self._asked) < len(self._roster.arrivals):
            for rank in self._roster.arrivals.keys() - self._asked:
                self._asked.add(rank)
                self._send(rank, Kind.GO, self._roster.arrivals[rank].call)

    def _deadline(self, deadline: float) -> float:
        """The time until which to wait. With a notice it is as short as a member's, unless another rank is here."""
        if self._roster.is_complete:
            return math.inf  # each of them answers: it is in the protocol, or has sent a WITHDRAW or ROLL
        return deadline if self._roster.arrivals else min(deadline, self._notice_end)

    def _receive(self, deadline: float) -> Message | None:
        try:
            return self._channel.receive(deadline, interruptible=True)
        except BaseException:
            self._abort((ROOT,))
            raise

    def _calls_roll(self, message: Message) -> bool:
        """Whether a member in this call has reached its deadline, so that all give up now, with one list."""
        new = message.generation >= self._generation or message.source in self._asked
        return message.kind is Kind.ROLL and new and not self._is_over(message) and self._roster.has(message)

    def _is_over(self, message: Message) -> bool:
        return message.generation < self._settled

    def _take(self, message: Message) -> None:
        """Act on a message during a call."""
        settled = self._settled
        self._file(message)
        if message.kind is Kind.ARRIVE:
            self._last = message.last if message.is_of_team else message.source
            self._reassure(self._roster.arrivals if self._settled > settled else (message.source,))
        elif message.kind is Kind.CONFIRM and message.source in self._asked and self._roster.has(message):
            self._confirmed.add(message.source)
        elif message.kind is Kind.ROLL and message.source in self._asked and self._roster.has(message):
            # It was told to WAIT, possibly after it had missed the GO. Send the GO again.
            self._send(message.source, Kind.GO, message.call)

    def _file(self, message: Message) -> None:
        """Record that a rank is in a call, or has left it."""
        if message.kind is Kind.ARRIVE:
            self._roster.add(message)
            self._asked.discard(message.source)
            self._generation = max(self._generation, message.generation)
            self._settled = max(self._settled, message.generation)
        elif message.kind is Kind.ROLL and self._is_over(message):
            pass  # its sender heard late of a give-up that is over. It has been told to WAIT, and returns or withdraws
        elif message.kind in (Kind.ROLL, Kind.WITHDRAW) and self._roster.has(message):
            self._roster.remove(message.source)
            self._asked.discard(message.source)
        self._note(message)

    def _reassure(self, ranks: Iterable[int]) -> None:
        """Send WAIT to ranks that do not know whether root is in a newer call than a give-up.

        These are the ranks with a notice, and those whose notice is still on its way.
        """
        for rank in ranks:
            arrival = self._roster.arrivals[rank]
            if arrival.flag or arrival.generation < self._settled:
                self._send(rank, Kind.WAIT, arrival.call)

    def _give_up(self, call: Call) -> RankTimeoutError:
        if self._noticed and not self._roster.arrivals:
            return self._gave_up(call, ())
        present = self._roster.ranks()
        absent = tuple(rank for rank in range(1, self._size) if rank not in present)
        # No rank is missing if a member reached its deadline before it could confirm; then the last one was too late.
        absent = absent or (self._last,)
        self._abort(absent)
        return self._gave_up(call, absent)

    def _abort(self, absent: tuple[int, ...]) -> None:
        """Send ABORT to all ranks, so that absent ones, and those that are just leaving a team, find a notice."""
        for rank in range(1, self._size):
            arrival = self._roster.arrivals.get(rank)
            call = 0 if arrival is None else arrival.call
            self._channel.send(rank, Message(Kind.ABORT, call, self._generation, absent=absent))
        self._roster.clear()
        self._generation += 1

    def _start(self, call: Call) -> bool:
        arrived = self._roster.arrivals.values()
        agreed = all(message.digest == call.digest and not message.differs for message in arrived)
        balanced = (call.balance + sum(message.balance for message in arrived)) % 2**64 == 0
        for message in arrived:
            self._send(message.source, Kind.START, message.call, flag=agreed and balanced)
        self._roster.clear()
        return agreed and balanced
