"""Short messages between ranks: sent without waiting for the receiver, received by polling."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.message import Message, decode, encode, max_nbytes

if TYPE_CHECKING:
    from mpi4py import MPI

#: A probe makes progress, and may miss a message that this has just received. So one empty probe does not prove an
#: empty inbox.
_EMPTY_PROBES = 3


@dataclass(frozen=True, slots=True)
class Waits:
    """The times of the arrival protocol, in seconds.

    Attributes:
        grace: Time that the other ranks wait longer than root, and for which they collect answers to a ROLL.
        patience: Time that a rank waits for its team before it turns to root; all deadlines are later by as much.
        notice: Time that a rank waits after it has heard that the others gave up.
        spin: Time from the start of a wait for which the rank polls without a pause.
        polite: Time from the start of a wait up to which it yields the core between polls.
        nap: Pause between two polls from then on.
    """

    grace: float = 0.5
    patience: float = 0.0
    notice: float = 1.0
    spin: float = 0.00003
    polite: float = 0.005
    nap: float = 0.001


class Channel:
    """Sends and receives the messages of this rank over one communicator and tag."""

    def __init__(self, comm: MPI.Intracomm, tag: int, waits: Waits) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.size = comm.size
        self.waits = waits
        self._comm = comm
        self._tag = tag
        self._any, self._byte, self._status = MPI.ANY_SOURCE, MPI.BYTE, MPI.Status()
        self._inbox = bytearray(max_nbytes(self.size))
        self._under_way: list[MPI.Request] = []

    def now(self) -> float:
        """The time in seconds, on the clock of the deadlines."""
        return time.monotonic()

    def send(self, destination: int, message: Message) -> None:
        """Send without waiting, even if the destination never receives."""
        request = self._comm.Isend((encode(message, self.size), self._byte), destination, self._tag)
        if self._under_way:
            self._under_way = [sent for sent in self._under_way if not sent.Test()]
        if not request.Test():
            self._under_way.append(request)

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        """Wait for the next message until the deadline.

        Args:
            deadline: Time to stop waiting, on the clock of `now`; may be infinite.
            interruptible: Let KeyboardInterrupt through while waiting; no message is lost by it.

        Returns:
            The message; None if none has arrived by the deadline.
        """
        start = 0.0
        while (message := self._probe()) is None:
            now = self.now()
            start = start or now
            if now >= deadline:
                return next(self.drain(), None)
            self._pause(now - start, interruptible)
        return message

    def receive_surely(self) -> Message:
        """Wait for the next message, which is certain to come."""
        while (message := self.receive(math.inf)) is None:
            pass
        return message

    def drain(self) -> Iterator[Message]:
        """Yield the messages that have already arrived."""
        empty = 0
        while empty < _EMPTY_PROBES:
            message = self._probe()
            if message is None:
                empty += 1
            else:
                empty = 0
                yield message

    def _pause(self, waited: float, interruptible: bool) -> None:
        if waited < self.waits.spin:
            return
        if waited < self.waits.polite:
            os.sched_yield()  # the other rank may need this core
        elif interruptible:
            with INTERRUPTS.allowed():
                time.sleep(self.waits.nap)
        else:
            time.sleep(self.waits.nap)

    def _probe(self) -> Message | None:
        # A matched probe takes the message out of the queue, so that no other thread can receive it in between.
        matched = self._comm.Improbe(self._any, self._tag, self._status)
        if matched is None:
            return None
        matched.Recv((self._inbox, self._byte), self._status)
        return decode(self._inbox, self._status.Get_count(self._byte), self._status.source, self.size)
