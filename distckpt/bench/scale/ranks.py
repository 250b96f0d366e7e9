"""Virtual ranks around a real rank 0: the messages that they would send, and a count of all bytes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt.coordination.arrival import ROOT, Call, Teams, arrival_over
from distckpt.coordination.channel import Channel, Waits
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts, Reply, header_of, letter_of, reply_of
from distckpt.coordination.message import Buffer, Kind, Message, decode, encode
from distckpt.coordination.session import Spoken


class VirtualRanks:
    """`Collectives` of rank 0 with virtual ranks, which exist only as the messages that they send.

    Attributes:
        values: Makes the values of all ranks for the next merge, in rank order. Called more than once, so that memory
            holds no more of them than on a real rank 0.
        sent: Bytes that all other ranks have sent so far.
        received: Bytes that all other ranks have received so far.
        seconds: Seconds spent on making the messages.
    """

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: Callable[[], Iterator[Parts]] = lambda: iter(())
        self.sent = 0
        self.received = 0
        self.seconds = 0.0
        self._broadcasts: list[Buffer] = []
        self._scatters: list[list[memoryview]] = []

    def merge(self, coordinator: Coordinator, step: str, fn: Callable[[list[Parts]], Sequence[Parts]]) -> None:
        """Let rank 0 merge the values of all ranks with the real code."""
        self.forget()
        coordinator.merge_parts(step, next(self.values()), fn)

    def forget(self) -> None:
        """Drop the messages that rank 0 has sent."""
        self._broadcasts.clear()
        self._scatters.clear()

    def replies(self) -> Iterator[Reply]:
        """The reply that each rank received in the last merge, in rank order."""
        _, records, letters = self._scatters
        for record, letter in zip(records, letters, strict=True):
            yield reply_of(record, letter, self._broadcasts[-1])

    def any_set(self, flag: bool) -> bool:
        """See `Collectives.any_set`."""
        self._count(sent=1, received=1)
        return flag

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """See `Collectives.maximum`."""
        self._count(sent=array.nbytes, received=array.nbytes)

    def lengths(self, length: int) -> list[int]:
        """See `Collectives.lengths`."""
        self._count(sent=8, received=8 * self.size)
        return [length] * self.size

    def broadcast(self, buffer: Buffer) -> None:
        """See `Collectives.broadcast`."""
        self._count(received=len(buffer))
        self._broadcasts.append(buffer)

    def gather(self, value: Buffer, lengths: Sequence[int], buffer: bytearray | memoryview, root: int = 0) -> None:
        """See `Collectives.gather`. Gathers the letters that rank 0 has ordered in a merge."""
        start, position = time.perf_counter(), 0
        for own, order in zip(self.values(), self._scatters[-1], strict=True):
            letter = letter_of(own, order)
            buffer[position : position + len(letter)] = letter
            position += len(letter)
        self.seconds += time.perf_counter() - start
        self.sent += sum(lengths) - lengths[0]

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """See `Collectives.gather_rows`. Gathers the headers with which a merge begins."""
        start = time.perf_counter()
        rows = np.array([header_of(own) for own in self.values()])
        self.seconds += time.perf_counter() - start
        self._count(sent=row.nbytes)
        return rows

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.scatter`."""
        view, ends = memoryview(values), np.cumsum(lengths).tolist()
        scattered = [view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self._scatters.append(scattered)
        buffer[:] = scattered[0]
        self.received += sum(lengths) - lengths[0]

    def _count(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that each other rank sends or receives."""
        self.sent += sent * (self.size - 1)
        self.received += received * (self.size - 1)


class VirtualSession(Spoken):
    """A session of rank 0 with virtual ranks.

    Attributes:
        brought: (digest, balance) that each rank brings to the next arrival; see `Call`.
        nbytes: Bytes of all messages of the arrival protocol so far, between any two ranks.
        seconds: Seconds of the last arrival on the slowest captain and then on rank 0, without the network.
    """

    def __init__(self, ranks: VirtualRanks) -> None:
        super().__init__(ranks)
        self.brought: list[tuple[int, int]] = []
        self.nbytes = 0
        self.seconds = 0.0
        self._teams = Teams.of(ranks.size)

    def meets(self) -> bool:
        """Let all ranks arrive, with the real protocol of rank 0 and all captains; returns whether they agree."""
        members = [Message(Kind.ARRIVE, 1, 0, digest=d, balance=b, source=r) for r, (d, b) in enumerate(self.brought)]
        captains = range(self._teams.span, self.size, self._teams.span)
        runs = [self._run(captain, members) for captain in captains]
        arrivals = [run.arrival for run in runs if run.arrival is not None]
        run = self._run(ROOT, [*members[: self._teams.span], *arrivals])
        self.seconds = run.seconds + max((run.seconds for run in runs), default=0.0)
        return run.verdict

    def _run(self, rank: int, arrivals: Sequence[Message]) -> _Run:
        """Run the protocol on rank 0 or a captain, with the ranks that speak with it: its crew, or also captains."""
        channel = _VirtualChannel(rank, self.size)
        protocol = arrival_over(channel, self._teams)
        crew = arrivals[1:] if rank == ROOT else [arrivals[other] for other in self._teams.team_of(rank)[1:]]
        for arrival in crew:
            channel.post(arrival)
        start = time.perf_counter()
        verdict = protocol.arrive(Call("save", *self.brought[rank], 600.0))
        self.nbytes += channel.nbytes
        return _Run(verdict, channel.arrival, time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _Run:
    """The arrival on one rank: its verdict, its ARRIVE to rank 0 if it has sent one, and its time in seconds."""

    verdict: bool
    arrival: Message | None
    seconds: float


class _VirtualChannel(Channel):
    """The channel of rank 0 or a captain. Members confirm when they are asked, and rank 0 starts the call.

    Attributes:
        nbytes: Bytes of all messages except those between a captain and rank 0, which rank 0's channel counts.
        arrival: The ARRIVE that a captain sent to rank 0; None before.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.waits = Waits(patience=math.inf)
        self.nbytes = 0
        self.arrival: Message | None = None
        self._inbox: deque[tuple[int, bytes]] = deque()  # type: ignore[assignment]  # messages that are on their way

    def post(self, message: Message) -> None:
        """Queue a message for this rank."""
        data = encode(message, self.size)
        self._count(message.source, data)
        self._inbox.append((message.source, data))

    def send(self, destination: int, message: Message) -> None:
        """See `Channel.send`."""
        self._count(destination, encode(message, self.size))
        if message.kind is Kind.ARRIVE:
            self.arrival = message._replace(source=self.rank)
        answer = _ANSWERS.get(message.kind)
        if answer is not None:
            self.post(Message(answer, message.call, 0, flag=True, source=destination))

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        """See `Channel.receive`."""
        return next(self.drain(), None)

    def drain(self) -> Iterator[Message]:
        """See `Channel.drain`."""
        while self._inbox:
            source, data = self._inbox.popleft()
            yield decode(data, len(data), source, self.size)

    def _count(self, peer: int, data: bytes) -> None:
        if self.rank == ROOT or peer != ROOT:
            self.nbytes += len(data)


#: For each kind of message: the answer of a rank that has arrived.
_ANSWERS = {Kind.ARRIVE: Kind.GO, Kind.GO: Kind.CONFIRM, Kind.CONFIRM: Kind.START}
