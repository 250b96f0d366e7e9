"""The protocol on a rank that speaks with root itself."""

from __future__ import annotations

import math
from collections import deque

from distckpt.coordination.arrival.call import Call
from distckpt.coordination.arrival.participant import ROOT, Arrival
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError


class Member(Arrival):
    """A rank other than root that speaks for itself. Base class of `Captain` and `Crew`."""

    def __init__(self, channel: Channel, teams: Teams) -> None:
        super().__init__(channel, teams)
        # The ranks for which this one speaks with root.
        self._own = range(self._rank, self._rank + 1)
        self._entered = 0.0
        # Messages received in this call that could not be acted on yet.
        self._kept: deque[Message] = deque()

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._enter()
        self._tell_arrival(ROOT, call)
        return self._wait(call)

    def _enter(self) -> None:
        self._call += 1
        self._notice_end = math.inf
        self._kept.clear()
        for message in self._channel.drain():
            self._note(message)
        self._entered = self._channel.now()

    def _tell_arrival(self, head: int, call: Call) -> None:
        arrive = Message(Kind.ARRIVE, self._call, self._generation, self._noticed, call.digest, call.balance)
        self._channel.send(head, arrive)

    def _wait(self, call: Call) -> bool:
        """WAITING for root; returns the verdict."""
        # The grace lets a present root decide first. With equal deadlines the ranks would name different absentees.
        patience = call.timeout + self._waits.patience + self._waits.grace
        deadline = self._entered + patience
        while (message := self._receive(min(deadline, self._notice_end))) is not None:
            mine = message.call == self._call
            if message.kind is Kind.GO and mine:
                return self._confirm(call)
            if message.kind is Kind.ABORT and mine:
                raise self._aborted(call, message)
            if message.kind is Kind.WAIT and mine:
                self._reassure(message)
                deadline = self._channel.now() + patience
            elif message.kind is Kind.ROLL and message.generation >= self._generation:
                return self._roll_call(call, message)
            else:
                self._meanwhile(call, message)
        if self._noticed:
            self._leave()
            raise self._gave_up(call, ())
        return self._roll_call(call)

    def _meanwhile(self, _call: Call, message: Message) -> None:
        """Act on a message outside the exchange with root, while this rank waits for root."""
        self._note(message)

    def _receive(self, deadline: float) -> Message | None:
        try:
            return self._next(deadline, interruptible=True)
        except BaseException:
            self._leave()
            raise

    def _next(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        return self._kept.popleft() if self._kept else self._channel.receive(deadline, interruptible=interruptible)

    def _leave(self) -> None:
        """Tell root that this rank has left the call."""
        self._send(ROOT, Kind.WITHDRAW, self._call)

    def _confirm(self, call: Call) -> bool:
        """CONFIRMED. No deadline: root is in the protocol and answers."""
        self._send(ROOT, Kind.CONFIRM, self._call)
        while True:
            message = self._channel.receive_surely()
            if message.call == self._call and message.kind is Kind.START:
                # Root knows the newest generation of all ranks, so give-ups from before this start are over.
                self._generation = message.generation
                return message.flag
            if message.call == self._call and message.kind is Kind.ABORT:
                raise self._aborted(call, message)
            self._overhear(message)

    def _overhear(self, message: Message) -> None:
        """Take note of a message outside the exchange, at a time when this rank can no longer react to it."""

    def _roll_call(self, call: Call, first: Message | None = None) -> bool:
        """ROLL CALL. Ends in an error, or in WAITING again if it was called for a give-up that is over."""
        heard, too_late = set(self._own), False
        if first is not None:
            heard.update(self._teams.spoken_for(first))
            self._generation = first.generation
        for rank in range(self._size):
            if rank not in self._own:
                self._send(rank, Kind.ROLL, self._call, flag=len(self._own) > 1)
        deadline = self._channel.now() + self._waits.grace
        while (message := self._next(deadline)) is not None:
            mine = message.call == self._call
            if message.kind is Kind.ABORT and mine:
                raise self._aborted(call, message)
            if message.kind is Kind.WAIT and mine:
                self._reassure(message)
                return self._wait(call)
            if message.kind is Kind.GO and mine:
                # Too late: root finds our ROLL in place of a CONFIRM and aborts, with the list that holds for all.
                deadline = math.inf
            if message.kind is Kind.ROLL and message.generation >= self._generation:
                self._generation = message.generation
                heard.update(self._teams.spoken_for(message))
            else:
                too_late |= self._is_without_this_rank(message)
                self._overhear(message)
        # Not before all answers have come: if root comes meanwhile, it may still abort for all with one list.
        self._leave()
        self._generation += 1
        raise self._gave_up(call, () if too_late else tuple(sorted(set(range(self._size)) - heard)))

    def _is_without_this_rank(self, message: Message) -> bool:
        """Whether root gave up just before it heard from this rank; ranks that were with root do not answer then."""
        return self._is_news(message) and self._rank in message.absent

    def _reassure(self, message: Message) -> None:
        """Forget the give-ups that root knows of, since it is in a newer call, and wait as usual."""
        self._generation = max(self._generation, message.generation)
        self._notice_end = math.inf
        self._entered = self._channel.now()

    def _aborted(self, call: Call, message: Message) -> RankTimeoutError:
        self._generation = max(self._generation, message.generation + 1)
        return self._gave_up(call, message.absent)
