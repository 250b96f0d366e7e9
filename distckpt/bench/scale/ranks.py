"""The other ranks of rank 0, simulated: the messages they would send, and a count of every byte."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from distckpt.coordination.arrival import Call, Root
from distckpt.coordination.channel import Buffer, Channel, Kind, Message, Timing, decode, encode
from distckpt.coordination.session import Spoken


class VirtualRanks:
    """Collectives of rank 0 with ranks that exist only as the messages they send; see `Collectives`.

    Attributes:
        messages: What all ranks bring to the next gather, in rank order. Called twice for each gather, so that no more
            of it is in memory than a real rank 0 would have.
        replies: What rank 0 scattered last.
        sent: Bytes that all other ranks sent so far.
        received: Bytes that all other ranks received so far.
        seconds: Time spent on making the messages.
    """

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: Callable[[], Iterator[bytes]] = lambda: iter(())
        self.replies: list[memoryview] = []
        self.sent = 0
        self.received = 0
        self.seconds = 0.0

    def any_set(self, flag: bool) -> bool:
        """See `Collectives.any_set`."""
        self._count(sent=1, received=1)
        return flag

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """See `Collectives.maximum`."""
        self._count(sent=array.nbytes, received=array.nbytes)

    def lengths(self, length: int) -> list[int]:
        """See `Collectives.lengths`."""
        start = time.perf_counter()
        lengths = [len(message) for message in self.messages()]
        self.seconds += time.perf_counter() - start
        self._count(sent=8, received=8 * self.size)
        return lengths

    def broadcast(self, buffer: Buffer) -> None:
        """See `Collectives.broadcast`."""
        self._count(received=len(buffer))

    def gather(self, value: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.gather`."""
        start, position = time.perf_counter(), 0
        for message in self.messages():
            buffer[position : position + len(message)] = message
            position += len(message)
        self.seconds += time.perf_counter() - start
        self.sent += sum(lengths) - lengths[0]

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """See `Collectives.gather_rows`."""
        self._count(sent=row.nbytes)
        return np.tile(row, (self.size, 1))

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.scatter`."""
        view, ends = memoryview(values), np.cumsum(lengths).tolist()
        self.replies = [view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        buffer[:] = self.replies[0]
        self.received += sum(lengths) - lengths[0]

    def _count(self, *, sent: int = 0, received: int = 0) -> None:
        """Bytes of each other rank."""
        self.sent += sent * (self.size - 1)
        self.received += received * (self.size - 1)


class VirtualSession(Spoken):
    """A session of rank 0 with virtual ranks.

    Attributes:
        brought: What each rank brings to the next arrival: what must be equal, and what must add up to 0.
    """

    def __init__(self, ranks: VirtualRanks) -> None:
        super().__init__(ranks)
        self.brought: list[tuple[int, int]] = []
        self._channel = _VirtualChannel(ranks.size)
        self._root = Root(self._channel)

    @property
    def nbytes(self) -> int:
        """Bytes of all messages of the arrival protocol so far."""
        return self._channel.nbytes

    def meets(self) -> bool:
        """Let all ranks arrive, with the real protocol of rank 0; returns whether they agree."""
        (shared, own), *others = self.brought
        for rank, (digest, balance) in enumerate(others, 1):
            self._channel.bring(rank, digest, balance)
        return self._root.arrive(Call("save", shared, own, 600.0))


class _VirtualChannel(Channel):
    """Rank 0's end, with members that come at once and confirm when they are asked."""

    def __init__(self, size: int) -> None:
        self.rank = 0
        self.size = size
        self.timing = Timing()
        self.nbytes = 0
        self._inbox: deque[tuple[int, bytes]] = deque()  # type: ignore[assignment]  # messages that are on their way
        self._calls = [0] * size

    def bring(self, rank: int, digest: int, balance: int) -> None:
        """Let a member arrive."""
        self._calls[rank] += 1
        self._post(rank, Message(Kind.ARRIVE, self._calls[rank], 0, digest=digest, balance=balance))

    def _post(self, rank: int, message: Message) -> None:
        data = encode(message, self.size)
        self.nbytes += len(data)
        self._inbox.append((rank, data))

    def send(self, destination: int, message: Message) -> None:
        """See `Channel.send`."""
        self.nbytes += len(encode(message, self.size))
        if message.kind is Kind.GO:
            self._post(destination, Message(Kind.CONFIRM, message.call, 0))

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        """See `Channel.receive`."""
        return next(self.drain(), None)

    def drain(self) -> Iterator[Message]:
        """See `Channel.drain`."""
        while self._inbox:
            source, data = self._inbox.popleft()
            yield decode(data, len(data), source, self.size)
