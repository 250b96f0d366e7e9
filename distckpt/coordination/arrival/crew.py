"""The protocol on a rank that speaks with its captain, or with root if the team does not come together."""

from __future__ import annotations

import math

from distckpt.coordination.arrival.call import Call
from distckpt.coordination.arrival.member import Member
from distckpt.coordination.arrival.participant import ROOT
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel
from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.message import Kind


class Crew(Member):
    """A rank of a team that is not its captain."""

    def __init__(self, channel: Channel, teams: Teams) -> None:
        super().__init__(channel, teams)
        self._captain = teams.captain_of(self._rank)
        self._head = self._captain

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._enter()
        self._head = self._captain
        verdict = self._join(call)
        if verdict is not None:
            return verdict
        # A new call number, so that no answer of the captain can be taken for one of root.
        self._call += 1
        self._head = ROOT
        self._tell_arrival(ROOT, call)
        return self._wait(call)

    def _leave(self) -> None:
        """Tell the captain or root that this rank is not in the call any more."""
        self._send(self._head, Kind.WITHDRAW, self._call)

    def _join(self, call: Call) -> bool | None:
        """Take part in the call with the team; returns the verdict, or None if this rank has to turn to root."""
        if not self._noticed:
            self._tell_arrival(self._captain, call)
            deadline = self._entered + self._waits.patience
            while (message := self._receive(deadline)) is not None:
                if message.kind is Kind.GO and message.call == self._call:
                    return self._locked(call)
                if message.kind is Kind.DISMISS and message.call == self._call:
                    return None
                if self._is_news(message):
                    self._kept.append(message)
                    break
        self._leave()
        return None

    def _locked(self, call: Call) -> bool | None:
        """LOCKED. No deadline: the captain is in the protocol and answers. None if it dissolves the team."""
        self._send(self._captain, Kind.CONFIRM, self._call)
        interrupt: BaseException | None = None
        while True:
            try:
                message = self._channel.receive(math.inf, interruptible=interrupt is None)
            except BaseException as error:
                if interrupt is not None:
                    raise
                interrupt = error
                self._leave()  # takes effect when the captain dismisses this rank
                continue
            if message is None:
                continue
            mine = message.call == self._call
            if mine and message.kind is Kind.START:
                if interrupt is not None:
                    INTERRUPTS.postpone()
                self._generation = message.generation
                return message.flag
            if mine and message.kind in (Kind.ABORT, Kind.DISMISS):
                if interrupt is not None:
                    raise interrupt
                if message.kind is Kind.DISMISS:
                    return None
                raise self._aborted(call, message)
            if self._is_news(message):
                self._kept.append(message)
