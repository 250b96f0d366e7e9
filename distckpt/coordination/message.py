"""The messages of the arrival protocol, and how they are packed."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import numpy as np

Buffer = bytes | bytearray | memoryview

# Kind, with the flag as its highest bit, call, generation. ARRIVE is followed by digest and balance, and for a team by
# `last` and `differs`; ABORT by the absent ranks as one bit per rank. Messages are short, as each rank sends and
# receives four in each call.
_HEADER = struct.Struct("<BII")
_BROUGHT = struct.Struct("<QQ")
_TEAM = struct.Struct("<I?")
_FLAG = 0x80


class Kind(enum.IntEnum):
    """Meaning of a message. A rank's head is rank 0, called root, or the captain of its team."""

    ARRIVE = 1
    """To the head: I am in a call; with what all ranks must agree on. The flag says that I was told of a give-up."""
    GO = 2
    """From the head: all ranks are here, or all of the team. Do you still wait?"""
    CONFIRM = 3
    """To the head: yes, and I shall not leave any more."""
    START = 4
    """From the head: all ranks confirmed. The flag is the verdict on what they must agree on."""
    WITHDRAW = 5
    """To the head: I have left the call, or the team; from one of the crew that has confirmed: let me leave."""
    ABORT = 6
    """From root, to all ranks, and from captains: given up; with the ranks that did not come."""
    ROLL = 7
    """To all: root does not answer; who else is here? Whoever waits answers so, too. The flag: I am a whole team."""
    WAIT = 8
    """From root: I am in a call that began after the give-up you were told of."""
    DISMISS = 9
    """From a captain: I do not speak for you in this call. Turn to root."""


_KINDS = {kind.value: kind for kind in Kind}


class Message(NamedTuple):
    """One message of the arrival protocol.

    Attributes:
        kind: Meaning of the message.
        call: Number of the call it belongs to, as counted by the rank that is not the head; 0 for none.
        generation: Number of give-ups the sender knows of.
        flag: Meaning depends on the kind.
        digest: With ARRIVE: uint64 that must be the same on all ranks.
        balance: With ARRIVE: uint64 whose sum over all ranks must be 0 modulo 2**64.
        last: With ARRIVE: rank that came last of the team that the sender speaks for; -1 if it speaks for itself.
        differs: With ARRIVE: whether the digests of the team differ.
        absent: With ABORT: ranks that did not come, ascending.
        source: Sending rank, set by the receiver.
    """

    kind: Kind
    call: int
    generation: int
    flag: bool = False
    digest: int = 0
    balance: int = 0
    last: int = -1
    differs: bool = False
    absent: tuple[int, ...] = ()
    source: int = -1

    @property
    def is_of_team(self) -> bool:
        """Whether the sender speaks for its whole team."""
        return self.last >= 0 or (self.kind is Kind.ROLL and self.flag)


def max_nbytes(size: int) -> int:
    """Bytes of the longest message in a communicator with `size` ranks."""
    return _HEADER.size + max(_BROUGHT.size + _TEAM.size, (size + 7) // 8)


def encode(message: Message, size: int) -> bytes:
    """Encode a message in a communicator with `size` ranks."""
    kind, call, generation, flag, digest, balance, last, differs, absent, _ = message
    header = _HEADER.pack(kind | (_FLAG if flag else 0), call, generation)
    if kind is Kind.ARRIVE:
        return header + _BROUGHT.pack(digest, balance) + (_TEAM.pack(last, differs) if last >= 0 else b"")
    if not absent:
        return header
    missing = np.zeros(size, dtype=np.bool_)
    missing[list(absent)] = True
    return header + np.packbits(missing).tobytes()


def decode(inbox: Buffer, nbytes: int, source: int, size: int) -> Message:
    """Decode a message of `nbytes` bytes from rank `source`."""
    coded, call, generation = _HEADER.unpack_from(inbox)
    kind, flag = _KINDS[coded & ~_FLAG], bool(coded & _FLAG)
    if kind is Kind.ARRIVE:
        digest, balance = _BROUGHT.unpack_from(inbox, _HEADER.size)
        last, differs = -1, False
        if nbytes > _HEADER.size + _BROUGHT.size:
            last, differs = _TEAM.unpack_from(inbox, _HEADER.size + _BROUGHT.size)
        return Message(kind, call, generation, flag, digest, balance, last, differs, source=source)
    absent: tuple[int, ...] = ()
    if nbytes > _HEADER.size:
        bits = np.frombuffer(inbox, dtype=np.uint8, count=nbytes - _HEADER.size, offset=_HEADER.size)
        absent = tuple(np.flatnonzero(np.unpackbits(bits, count=size)).tolist())
    return Message(kind, call, generation, flag, absent=absent, source=source)
