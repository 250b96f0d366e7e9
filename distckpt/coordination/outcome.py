"""Share outcomes with all ranks: errors, and results of rank 0. Collective, unless a function says otherwise."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from distckpt.coordination import agreement
from distckpt.coordination.collectives import Collectives
from distckpt.coordination.message import Buffer

T = TypeVar("T")

# The packet that rank 0 broadcasts: whether it failed, the length of its value, and the value itself if it fits.
_PACKET_HEADER = struct.Struct("<?Q")
_PACKET_SIZE = agreement.TEXT_LIMIT + 512
_INLINE_LIMIT = _PACKET_SIZE - _PACKET_HEADER.size


def agree(collectives: Collectives, step: str, own: BaseException | None, remedy: str = "") -> None:
    """Raise the error of `agreement.agreed_error` on all ranks if any rank has an exception. One reduction if none has.

    Args:
        collectives: The collectives of the communicator.
        step: Name of the step, for the error.
        own: The exception that this rank caught; None without one.
        remedy: Advice to the user, for the error.
    """
    if collectives.any_set(own is not None):
        texts = gather_texts(collectives, agreement.encode(own))
        try:
            _raise_agreed(step, agreement.decode(texts), own, remedy)
        finally:
            own = None


def announce(collectives: Collectives, step: str, value: bytes, own: BaseException | None, remedy: str = "") -> Buffer:
    """Give all ranks rank 0's value, or raise its exception on all. One broadcast if the value is small.

    Args:
        collectives: The collectives of the communicator.
        step: Name of the step, for the error.
        value: On rank 0: the value.
        own: On rank 0: the exception that it caught instead; None without one.
        remedy: Advice to the user, for the error.

    Returns:
        The value of rank 0.
    """
    packet = bytearray(_PACKET_SIZE)
    if collectives.rank == 0:
        value = value if own is None else agreement.encode(own)
        inline = value if len(value) <= _INLINE_LIMIT else b""
        _PACKET_HEADER.pack_into(packet, 0, own is not None, len(value))
        packet[_PACKET_HEADER.size : _PACKET_HEADER.size + len(inline)] = inline
    collectives.broadcast(packet)
    failed, length = _PACKET_HEADER.unpack_from(packet)
    if length > _INLINE_LIMIT:
        return _announce_rest(collectives, step, value, length)
    announced = packet[_PACKET_HEADER.size : _PACKET_HEADER.size + length]
    if failed:
        try:
            _raise_agreed(step, agreement.decode([bytes(announced)]), own, remedy)
        finally:
            own = None
    return announced


def allocate(collectives: Collectives, step: str, nbytes: int) -> bytearray:
    """Allocate a buffer on every rank; raise on all if a rank lacks memory, so that none misses the next transfer."""
    return make(collectives, step, lambda: bytearray(nbytes))


def make(collectives: Collectives, step: str, fn: Callable[[], T]) -> T:
    """Run `fn`, which allocates, on every rank and return its result; raise on all ranks if one lacks memory."""
    made: list[T] = []
    own: BaseException | None = None
    try:
        made.append(fn())
    except MemoryError as error:
        own = error
    agree(collectives, step, own)
    return made[0]


def gather_texts(collectives: Collectives, text: bytes) -> list[bytes]:
    """Give all ranks the short texts of all ranks, in rank order."""
    lengths = collectives.lengths(len(text))
    texts = bytearray(sum(lengths))
    collectives.gather(text, lengths, texts)
    collectives.broadcast(texts)
    return split(texts, lengths)


def split(values: bytearray, lengths: Sequence[int]) -> list[bytes]:
    """Split concatenated values by their lengths. Local."""
    view = memoryview(values)
    return [bytes(view[end - length : end]) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]


def _announce_rest(collectives: Collectives, step: str, value: bytes, length: int) -> Buffer:
    is_root = collectives.rank == 0
    buffer = allocate(collectives, step, 0 if is_root else length)
    announced: Buffer = value if is_root else buffer
    collectives.broadcast(announced)
    return announced


def _raise_agreed(
    step: str, failures: dict[int, agreement.Failure], own: BaseException | None, remedy: str
) -> NoReturn:
    try:
        if own is not None and not isinstance(own, Exception):
            raise own  # this rank is told to exit
        raise agreement.agreed_error(step, failures, remedy) from own
    finally:
        own = None  # else the exception, its traceback and this frame keep each other alive
