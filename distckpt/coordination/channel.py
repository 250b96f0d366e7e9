"""Short messages between ranks: sent without waiting for the receiver, received by polling."""

from __future__ import annotations

import enum
import math
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distckpt.coordination.interrupts import INTERRUPTS

if TYPE_CHECKING:
    from mpi4py import MPI

Buffer = bytes | bytearray | memoryview

# Kind, with the flag as its highest bit, call, generation; with ARRIVE, digest and balance follow, and with ABORT the
# absent ranks as one bit per rank. Short, for every rank exchanges four of these with root at each call.
_HEADER = struct.Struct("<BII")
_BROUGHT = struct.Struct("<QQ")
_FLAG = 0x80
#: MPI progresses and then misses what it has just received, so a single empty probe does not prove an empty inbox.
_EMPTY_PROBES = 3


class Kind(enum.IntEnum):
    """What a message says. "Root" is rank 0."""

    ARRIVE = 1
    """To root: I am in a call; with what all ranks must agree on. The flag says that I was told of a give-up."""
    GO = 2
    """From root: all ranks are here. Do you still wait?"""
    CONFIRM = 3
    """To root: yes, and I shall not leave any more."""
    START = 4
    """From root: all confirmed. The flag is the verdict on what they must agree on."""
    WITHDRAW = 5
    """To root: I have left the call."""
    ABORT = 6
    """From root, to all ranks: given up; with the ranks that did not come."""
    ROLL = 7
    """From any rank, to all: root does not answer; who else is here? Whoever waits answers with a ROLL to all."""
    WAIT = 8
    """From root: I am in a call that began after the give-up you were told of."""


_KINDS = {kind.value: kind for kind in Kind}


class Message(NamedTuple):
    """One message of the arrival protocol.

    Attributes:
        kind: What it says.
        call: Number of the call it belongs to, as the rank counts that is not root; 0 is no call.
        generation: Number of give-ups the sender knows of.
        flag: Depends on the kind.
        digest: With ARRIVE: uint64 that must be the same on all ranks.
        balance: With ARRIVE: uint64 whose sum over all ranks must be 0 modulo 2**64.
        absent: With ABORT: ranks that did not come, ascending.
        source: Sending rank, set by the receiver.
    """

    kind: Kind
    call: int
    generation: int
    flag: bool = False
    digest: int = 0
    balance: int = 0
    absent: tuple[int, ...] = ()
    source: int = -1


@dataclass(frozen=True, slots=True)
class Timing:
    """The protocol's times, in seconds.

    Attributes:
        grace: What others than root wait longer than root, and how long they collect the answers to a ROLL.
        notice: How long a rank waits that knows that the others have given up.
        spin: How long to poll without a pause.
        polite: How long to poll, after that, letting others have the core in between.
        nap: Pause between two polls from then on.
    """

    grace: float = 0.5
    notice: float = 1.0
    spin: float = 0.00003
    polite: float = 0.005
    nap: float = 0.001


class Channel:
    """This rank's end of the messages over one communicator and tag."""

    def __init__(self, comm: MPI.Intracomm, tag: int, timing: Timing) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.size = comm.size
        self.timing = timing
        self._comm = comm
        self._tag = tag
        self._any, self._byte, self._status = MPI.ANY_SOURCE, MPI.BYTE, MPI.Status()
        self._inbox = bytearray(_HEADER.size + max(_BROUGHT.size, (self.size + 7) // 8))
        self._under_way: list[MPI.Request] = []

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
            deadline: When to stop waiting, on the clock of `time.monotonic`; may be infinite.
            interruptible: Let KeyboardInterrupt through while waiting; no message is lost by it.

        Returns:
            The message; None at the deadline, when nothing has arrived.
        """
        start = 0.0
        while (message := self._probe()) is None:
            now = time.monotonic()
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
        """Yield what has already arrived."""
        empty = 0
        while empty < _EMPTY_PROBES:
            message = self._probe()
            if message is None:
                empty += 1
            else:
                empty = 0
                yield message

    def _pause(self, waited: float, interruptible: bool) -> None:
        if waited < self.timing.spin:
            return
        if waited < self.timing.polite:
            os.sched_yield()  # the rank that is waited for may need this core
        elif interruptible:
            with INTERRUPTS.allowed():
                time.sleep(self.timing.nap)
        else:
            time.sleep(self.timing.nap)

    def _probe(self) -> Message | None:
        # A matched probe takes the message out of the queue, so that no other thread can receive it in between.
        matched = self._comm.Improbe(self._any, self._tag, self._status)
        if matched is None:
            return None
        matched.Recv((self._inbox, self._byte), self._status)
        return decode(self._inbox, self._status.Get_count(self._byte), self._status.source, self.size)


def encode(message: Message, size: int) -> bytes:
    """Pack a message of a communicator with `size` ranks."""
    kind, call, generation, flag, digest, balance, absent, _ = message
    header = _HEADER.pack(kind | (_FLAG if flag else 0), call, generation)
    if kind is Kind.ARRIVE:
        return header + _BROUGHT.pack(digest, balance)
    if not absent:
        return header
    missing = np.zeros(size, dtype=np.bool_)
    missing[list(absent)] = True
    return header + np.packbits(missing).tobytes()


def decode(inbox: Buffer, nbytes: int, source: int, size: int) -> Message:
    """Unpack the message of `nbytes` bytes that rank `source` has sent."""
    coded, call, generation = _HEADER.unpack_from(inbox)
    kind, flag = _KINDS[coded & ~_FLAG], bool(coded & _FLAG)
    if kind is Kind.ARRIVE:
        digest, balance = _BROUGHT.unpack_from(inbox, _HEADER.size)
        return Message(kind, call, generation, flag, digest, balance, source=source)
    absent: tuple[int, ...] = ()
    if nbytes > _HEADER.size:
        bits = np.frombuffer(inbox, dtype=np.uint8, count=nbytes - _HEADER.size, offset=_HEADER.size)
        absent = tuple(np.flatnonzero(np.unpackbits(bits, count=size)).tolist())
    return Message(kind, call, generation, flag, absent=absent, source=source)
