"""The protocol on a rank that speaks with root for its team, or for itself if the team does not come together."""

from __future__ import annotations

from distckpt.coordination.arrival.call import Call
from distckpt.coordination.arrival.member import Member
from distckpt.coordination.arrival.participant import ROOT
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError


class Captain(Member):
    """The lowest rank of a team that root does not lead.

    `arrive` gathers the crew; if all confirm, it speaks with root as a member for the whole team and passes the verdict
    on. Otherwise it dissolves the team and speaks for itself.
    """

    def __init__(self, channel: Channel, teams: Teams) -> None:
        super().__init__(channel, teams)
        self._crew_size = len(teams.team_of(self._rank)) - 1
        # The ARRIVE of each rank of the crew that waits for this one; it may come before this rank is in the call.
        self._present: dict[int, Message] = {}
        # The WITHDRAW of each rank of the crew that has left and not come again.
        self._astray: dict[int, Message] = {}
        # The ARRIVE of each rank of the crew once all have confirmed; empty while this rank speaks for itself.
        self._team: list[Message] = []
        # The rank of the team that came last to this call.
        self._last = self._rank

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._astray.clear()
        self._enter()
        self._last = self._rank
        if not self._noticed and self._is_complete():
            self._channel.send(ROOT, self._joint_arrival(call))
        else:
            self._go_alone(call)
        verdict = self._wait(call)
        self._tell_team(Kind.START, self._generation, flag=verdict)
        return verdict

    # ---- the team ----

    def _is_complete(self) -> bool:
        """GATHERING and STARTING: whether all of the crew are here and have confirmed that they stay."""
        deadline = self._entered + self._waits.patience
        while len(self._present) < self._crew_size:
            message = None if self._astray else self._receive(deadline)
            if message is None:
                return False
            if self._is_news(message):
                self._kept.append(message)
                return False
            self._file(message)
        for rank, present in self._present.items():
            self._send(rank, Kind.GO, present.call)
        return self._all_confirm()

    def _all_confirm(self) -> bool:
        """STARTING. No deadline: each rank that is asked confirms, or has sent a WITHDRAW."""
        confirmed = set[int]()
        while len(confirmed) < self._crew_size:
            message = self._channel.receive_surely()
            self._file(message)
            if self._astray:
                return False
            if message.kind is Kind.CONFIRM and self._present[message.source].call == message.call:
                confirmed.add(message.source)
            elif self._is_news(message):
                self._kept.append(message)
        self._team = list(self._present.values())
        self._present.clear()
        return True

    def _file(self, message: Message) -> None:
        """Record an ARRIVE or WITHDRAW of the crew."""
        if message.kind is Kind.ARRIVE:
            self._astray.pop(message.source, None)
            self._present[message.source] = message
            self._last = message.source
        elif message.kind is Kind.WITHDRAW:
            self._present.pop(message.source, None)
            self._astray[message.source] = message

    def _joint_arrival(self, call: Call) -> Message:
        """The ARRIVE of this rank for the whole team."""
        self._own = self._teams.team_of(self._rank)
        self._generation = max(self._generation, *(message.generation for message in self._team))
        differs = any(message.digest != call.digest for message in self._team)
        balance = (call.balance + sum(message.balance for message in self._team)) % 2**64
        return Message(Kind.ARRIVE, self._call, self._generation, False, call.digest, balance, self._last, differs)

    def _go_alone(self, call: Call) -> None:
        """Dissolve the team, and arrive at root for this rank alone."""
        self._dissolve()
        self._tell_arrival(ROOT, call)

    def _dissolve(self) -> None:
        """Send a DISMISS to the crew: to ranks that wait, have confirmed, or ask to leave."""
        team = {message.source: message for message in self._team}
        for rank, message in (team | self._astray | self._present).items():
            self._send(rank, Kind.DISMISS, message.call)
        self._present.clear()
        self._astray.clear()
        self._end_team()

    def _tell_team(self, kind: Kind, generation: int, *, flag: bool = False, absent: tuple[int, ...] = ()) -> None:
        """Pass an answer of root on to the team."""
        for message in self._team:
            self._channel.send(message.source, Message(kind, message.call, generation, flag, absent=absent))
        self._end_team()

    def _end_team(self) -> None:
        self._team = []
        self._own = range(self._rank, self._rank + 1)

    # ---- events of a member, with their effect on the team ----

    def _note(self, message: Message) -> None:
        super()._note(message)
        self._file(message)

    def _meanwhile(self, call: Call, message: Message) -> None:
        super()._meanwhile(call, message)
        if not self._team:
            self._dissolve()
        elif message.source in self._astray:  # it is locked, so it asks to leave
            self._leave()
            self._call += 1
            self._go_alone(call)

    def _overhear(self, message: Message) -> None:
        self._file(message)

    def _receive(self, deadline: float) -> Message | None:
        try:
            return super()._receive(deadline)
        except BaseException:
            self._dissolve()
            raise

    def _gave_up(self, call: Call, absent: tuple[int, ...]) -> RankTimeoutError:
        self._tell_team(Kind.ABORT, self._generation - 1, absent=absent)
        return super()._gave_up(call, absent)
