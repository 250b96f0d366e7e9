"""Gather values of all ranks on rank 0, and hand out its replies; parts that many ranks have in common are sent once.

    gather     headers -> orders: which ranks send their common part -> values, with or without their common part
    hand out   broadcast of the common parts of many replies -> replies, with or without their common part

Every function that takes `collectives` is collective over the communicator; the others are local.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from distckpt.coordination import outcome
from distckpt.coordination.collectives import Collectives
from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.message import Buffer

#: A common part of replies is broadcast if at least 1/16 of the ranks get it. So at most 16 parts are broadcast.
_BROADCAST_SHARE = 16
# From rank 0: whether to send the common part, and the number of bytes that all ranks send together.
_ORDER = struct.Struct("<?Q")
# From rank 0: bytes of the own part, bytes of a common part that follows it, or else start and length of the common
# part in the broadcast.
_REPLY = struct.Struct("<QQQQ")
# From rank 0: number of bytes handed out to single ranks, and of those broadcast.
_TOTALS = struct.Struct("<QQ")


class Parts(NamedTuple):
    """A value in two parts.

    Attributes:
        common: The part that other ranks may have, too. Equal ones are the same object on rank 0.
        own: The part of this rank alone.
    """

    common: bytes
    own: Buffer


class Reply(NamedTuple):
    """A reply in two parts, on the rank that receives it; see `Parts`."""

    common: Buffer
    own: Buffer


def merge(
    collectives: Collectives, step: str, value: Parts, fn: Callable[[list[Parts]], Sequence[Parts]], remedy: str = ""
) -> Reply:
    """Gather a value of every rank on rank 0, run a function on them there, and hand out its replies.

    Args:
        collectives: The collectives of the communicator.
        step: Name of the step, for the error.
        value: This rank's value.
        fn: Run on rank 0 only; takes all values in rank order, and returns one reply per rank.
        remedy: Advice to the user, for the error.

    Returns:
        This rank's reply.
    """
    gathered = _gather(collectives, step, value)
    replies, own = _Replies(), None
    if collectives.rank == 0:
        try:
            with INTERRUPTS.allowed():
                replies = _pack(fn(gathered.open()), collectives.size)
        except BaseException as error:
            own = error
    del gathered
    try:
        totals = outcome.announce(collectives, step, replies.totals, own, remedy)
    finally:
        own = None
    return _hand_out(collectives, step, replies, *_TOTALS.unpack(totals))


# ---- to rank 0 ---------------------------------------------------------------------------------------------------


def header_of(value: Parts) -> np.ndarray[Any, Any]:
    """The header of a value, which rank 0 receives first: four uint64.

    They are the bytes of the own part, those of the common part, and a digest of the common part. The digest has 128
    bits, since the parts themselves are not compared.
    """
    digest = np.frombuffer(xxhash.xxh3_128_digest(value.common), np.uint64)
    return np.array([len(value.own), len(value.common), *digest], np.uint64)


def letter_of(value: Parts, order: Buffer) -> bytes:
    """The bytes of a value that rank 0 has ordered: the own part, and the common part if it is to be sent."""
    with_common, _ = _ORDER.unpack(order)
    return bytes(value.own) + value.common if with_common else bytes(value.own)


def _gather(collectives: Collectives, step: str, value: Parts) -> _Gathered:
    """Gather the values of all ranks on rank 0; none on the others."""
    size, is_root = collectives.size, collectives.rank == 0
    orders = _Orders(collectives.gather_rows(header_of(value)))
    order = bytearray(_ORDER.size)
    collectives.scatter(orders.packed, [_ORDER.size] * size, order)
    make = functools.partial(outcome.make, collectives, step)
    letter, letters = make(lambda: (letter_of(value, order), bytearray(sum(orders.lengths))))
    collectives.gather(letter, orders.lengths if is_root else [_ORDER.unpack(order)[1]], letters)
    return _Gathered(orders, letters)


class _Orders:
    """The parts that each rank sends to rank 0: the lowest rank with a common part sends it. Empty on other ranks.

    Attributes:
        lengths: Bytes that each rank sends.
        packed: The order for each rank, concatenated.
    """

    def __init__(self, headers: np.ndarray[Any, Any] | None) -> None:
        rows: list[list[int]] = [] if headers is None else headers.tolist()
        self._headers = [(own, common, (low, high)) for own, common, low, high in rows]
        senders = dict[tuple[int, int], int]()
        for rank, (_, _, digest) in enumerate(self._headers):
            senders.setdefault(digest, rank)
        self._sends = [senders[digest] == rank for rank, (_, _, digest) in enumerate(self._headers)]
        self.lengths = [
            own + (common if sends else 0) for (own, common, _), sends in zip(self._headers, self._sends, strict=True)
        ]
        total = sum(self.lengths)
        self.packed = b"".join(_ORDER.pack(sends, total) for sends in self._sends)

    def open(self, letters: bytearray) -> list[Parts]:
        """Decode the values from the concatenated letters of the ranks."""
        view, position, commons = memoryview(letters).toreadonly(), 0, dict[tuple[int, int], bytes]()
        values: list[Parts] = []
        for (own, common, digest), sends in zip(self._headers, self._sends, strict=True):
            middle = position + own
            if sends:
                commons[digest] = bytes(view[middle : middle + common])
            values.append(Parts(commons[digest], view[position:middle]))
            position = middle + (common if sends else 0)
        return values


class _Gathered(NamedTuple):
    """The orders and the letters received, on rank 0."""

    orders: _Orders
    letters: bytearray

    def open(self) -> list[Parts]:
        """The values of all ranks."""
        return self.orders.open(self.letters)


# ---- from rank 0 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Replies:
    """The replies that rank 0 hands out, encoded. Empty on other ranks.

    Attributes:
        totals: Number of bytes in `letters` and `commons`, encoded.
        commons: Common parts that are broadcast, concatenated.
        records: For each rank, the composition of its reply (`_REPLY`), concatenated.
        letters: For each rank, the bytes sent to it alone, concatenated.
        lengths: Bytes of each letter.
    """

    totals: bytes = b""
    commons: bytes = b""
    records: bytes = b""
    letters: bytes = b""
    lengths: Sequence[int] = ()


def _pack(replies: Sequence[Parts], size: int) -> _Replies:
    if len(replies) != size:
        raise ValueError(f"expected one reply per rank, {size} in all. Got {len(replies)}.")
    users = Counter(reply.common for reply in replies)
    commons = [common for common, n in users.items() if 1 < n and size <= n * _BROADCAST_SHARE]
    starts = dict(zip(commons, itertools.accumulate(map(len, commons), initial=0), strict=False))
    records, letters = list[bytes](), list[bytes]()
    for common, own in replies:
        if common in starts:
            records.append(_REPLY.pack(len(own), 0, starts[common], len(common)))
            letters.append(bytes(own))
        else:
            records.append(_REPLY.pack(len(own), len(common), 0, 0))
            letters.append(bytes(own) + common)
    lengths = [len(letter) for letter in letters]
    joined = b"".join(commons)
    return _Replies(_TOTALS.pack(sum(lengths), len(joined)), joined, b"".join(records), b"".join(letters), lengths)


def _hand_out(collectives: Collectives, step: str, replies: _Replies, n_letters: int, n_commons: int) -> Reply:
    """Hand out the replies of rank 0; returns this rank's reply."""
    size, is_root = collectives.size, collectives.rank == 0
    record = bytearray(_REPLY.size)
    collectives.scatter(replies.records, [_REPLY.size] * size, record)
    own, inline, _, _ = _REPLY.unpack(record)
    letter = outcome.allocate(collectives, step, own + inline)
    collectives.scatter(replies.letters, replies.lengths if is_root else [n_letters], letter)
    commons: Buffer = outcome.allocate(collectives, step, 0 if is_root else n_commons)
    commons = replies.commons if is_root else commons
    collectives.broadcast(commons)
    return reply_of(record, letter, commons)


def reply_of(record: Buffer, letter: Buffer, commons: Buffer) -> Reply:
    """Decode a rank's reply from the bytes that it has received, without copying."""
    own, inline, start, length = _REPLY.unpack(record)
    common = memoryview(letter)[own:] if inline else memoryview(commons)[start : start + length]
    return Reply(common, memoryview(letter)[:own])
