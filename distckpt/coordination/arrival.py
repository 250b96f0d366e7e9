"""Who has come to a collective call, and may it start? The first exchange of every save and restore.

An MPI collective waits for ever for a rank that does not come, and cannot be taken back. So the ranks first meet here,
with messages that can be: root (rank 0) waits until all have arrived, asks each once more, and only when all have
confirmed tells them to start. The steady state costs one exchange, which also says whether the ranks agree.

    member (every other rank)                        root
    -------------------------                        ----
    WAITING   -- ARRIVE(digest, balance) -->         GATHERING   until all are here
              <-- GO --
    CONFIRMED -- CONFIRM -->                         STARTING    until all have confirmed
              <-- START(verdict) --

A give-up ends as an error on all ranks that came, which names the same absent ranks:

    root's deadline        ABORT(absent) from root to all ranks.
    member's deadline      root did not come either. ROLL CALL: ROLL to all, answered by a ROLL to all from whoever
                           waits; absent are those not heard within the grace.

`call` numbers keep messages of different calls apart, `generation` numbers those of different give-ups. A rank that
was away when the others gave up finds their ABORT or ROLL at its next call: the NOTICE. It cannot know whether the
others are in a newer call, so it waits a second only, unless root tells it to WAIT.

Two facts carry the proof that calls never mix and nobody hangs. Only root decides a start, and only when every rank
has confirmed this very call; only before it confirms may a rank leave. And messages of one sender arrive in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from distckpt.coordination.channel import Channel, Kind, Message
from distckpt.errors import RankTimeoutError

ROOT = 0
_SHOWN_RANKS = 20


@dataclass(frozen=True, slots=True)
class Call:
    """What one rank brings to a collective call.

    Attributes:
        operation: Name of the call, for messages.
        digest: uint64 that must be the same on all ranks.
        balance: uint64 whose sum over all ranks must be 0 modulo 2**64.
        timeout: Seconds to wait for the other ranks.
    """

    operation: str
    digest: int
    balance: int
    timeout: float


class Arrival:
    """What root and members have in common: counting calls and give-ups."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rank = channel.rank
        self._size = channel.size
        self._timing = channel.timing
        self._call = 0
        self._generation = 0
        # When this rank stops waiting because it was told of a give-up; infinity without a notice.
        self._notice_end = math.inf

    def arrive(self, call: Call) -> bool:
        """Wait until all ranks have come to the same call. Collective over the communicator.

        Args:
            call: What this rank brings.

        Returns:
            Whether all digests are equal and the balances add up to 0.

        Raises:
            RankTimeoutError: Some ranks did not come, or this one came after the others had given up.
        """
        raise NotImplementedError

    def _send(self, destination: int, kind: Kind, call: int, *, flag: bool = False) -> None:
        self._channel.send(destination, Message(kind, call, self._generation, flag))

    @property
    def _noticed(self) -> bool:
        return self._notice_end < math.inf

    def _note(self, message: Message) -> None:
        """Take an ABORT or ROLL of a call this rank is not in as a notice, unless that give-up is known already."""
        if message.kind in (Kind.ABORT, Kind.ROLL) and message.generation >= self._generation:
            self._generation = message.generation + 1
            self._notice_end = time.monotonic() + self._timing.notice

    def _error(self, call: Call, absent: tuple[int, ...]) -> RankTimeoutError:
        """The error of a give-up. A rank that is itself among the absent, or has a notice, came too late."""
        if not absent or self._rank in absent:
            return RankTimeoutError(_late_message(call, self._rank))
        return RankTimeoutError(_absent_message(call, absent, self._size), absent)


class Member(Arrival):
    """The protocol on every rank but root."""

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._call += 1
        self._notice_end = math.inf
        for message in self._channel.drain():
            self._note(message)
        arrive = Message(Kind.ARRIVE, self._call, self._generation, self._noticed, call.digest, call.balance)
        self._channel.send(ROOT, arrive)
        return self._wait(call)

    def _wait(self, call: Call) -> bool:
        """WAITING."""
        # The grace lets a present root decide first. With equal deadlines the ranks would name different absentees.
        deadline = time.monotonic() + call.timeout + self._timing.grace
        while (message := self._receive(min(deadline, self._notice_end))) is not None:
            mine = message.call == self._call
            if message.kind is Kind.GO and mine:
                return self._confirm(call)
            if message.kind is Kind.ABORT and mine:
                raise self._aborted(call, message)
            if message.kind is Kind.WAIT and mine:
                self._reassure(message)
                deadline = time.monotonic() + call.timeout + self._timing.grace
            elif message.kind is Kind.ROLL and message.generation >= self._generation:
                return self._roll_call(call, message)
            else:
                self._note(message)
        if self._noticed:
            self._send(ROOT, Kind.WITHDRAW, self._call)
            raise self._error(call, ())
        return self._roll_call(call)

    def _receive(self, deadline: float) -> Message | None:
        try:
            return self._channel.receive(deadline, interruptible=True)
        except BaseException:
            self._send(ROOT, Kind.WITHDRAW, self._call)
            raise

    def _confirm(self, call: Call) -> bool:
        """CONFIRMED. No deadline: root is in the protocol and answers."""
        self._send(ROOT, Kind.CONFIRM, self._call)
        while True:
            message = self._channel.receive_surely()
            if message.call == self._call and message.kind is Kind.START:
                # Root knows the newest generation of all, so no give-up from before this start counts any more.
                self._generation = message.generation
                return message.flag
            if message.call == self._call and message.kind is Kind.ABORT:
                raise self._aborted(call, message)

    def _roll_call(self, call: Call, first: Message | None = None) -> bool:
        """ROLL CALL. Ends in an error, or in WAITING again when it was called for a give-up that is over."""
        heard = {self._rank}
        if first is not None:
            heard.add(first.source)
            self._generation = first.generation
        for rank in range(self._size):
            if rank != self._rank:
                self._send(rank, Kind.ROLL, self._call)
        deadline = time.monotonic() + self._timing.grace
        while (message := self._channel.receive(deadline)) is not None:
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
                heard.add(message.source)
        # Not before the answers are in: root, when it comes in between, may still abort for all with one list.
        self._send(ROOT, Kind.WITHDRAW, self._call)
        self._generation += 1
        raise self._error(call, tuple(sorted(set(range(self._size)) - heard)))

    def _reassure(self, message: Message) -> None:
        """Root is in a newer call than the give-ups it knows of: forget them and wait as usual."""
        self._generation = max(self._generation, message.generation)
        self._notice_end = math.inf

    def _aborted(self, call: Call, message: Message) -> RankTimeoutError:
        self._generation = max(self._generation, message.generation + 1)
        return self._error(call, message.absent)


class Root(Arrival):
    """The protocol on rank 0."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        # The ARRIVE of each member that is in a call; it may be there before root itself.
        self._present: dict[int, Message] = {}
        # Members that have been asked to GO in this call, and those of them that have confirmed.
        self._asked: set[int] = set()
        self._confirmed: set[int] = set()
        # Who came last to this call.
        self._last = ROOT
        # Give-ups below this generation are over: a rank has come back from them. Later ones may still be going on.
        self._settled = 0

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        self._enter()
        deadline = time.monotonic() + call.timeout
        while len(self._confirmed) < self._size - 1:
            self._ask()
            message = self._receive(self._deadline(deadline))
            if message is None or self._calls_roll(message):
                raise self._give_up(call)
            self._take(message)
        return self._start(call)

    def _enter(self) -> None:
        self._call += 1
        self._notice_end = math.inf
        self._settled = self._generation
        self._asked.clear()
        self._confirmed.clear()
        for message in self._channel.drain():
            self._file(message)
        self._last = ROOT
        self._reassure(self._present)

    def _all_present(self) -> bool:
        return len(self._present) == self._size - 1

    def _ask(self) -> None:
        """From GATHERING to STARTING, once all are here. Back again when one of them has left instead of confirming."""
        # All that are asked are among the present here; to compare the sets at every message would take quadratic time.
        if self._all_present() and len(self._asked) < self._size - 1:
            for rank in self._present.keys() - self._asked:
                self._asked.add(rank)
                self._send(rank, Kind.GO, self._present[rank].call)

    def _deadline(self, deadline: float) -> float:
        """With a notice root waits as briefly as a member does, unless somebody is in a newer call with it."""
        if self._all_present():
            return math.inf  # each of them answers, for it is in the protocol or has left word that it is not
        return deadline if self._present else min(deadline, self._notice_end)

    def _receive(self, deadline: float) -> Message | None:
        try:
            return self._channel.receive(deadline, interruptible=True)
        except BaseException:
            self._abort((ROOT,))
            raise

    def _calls_roll(self, message: Message) -> bool:
        """Whether a member that is in this call has come to its deadline, so that all give up now, with one list."""
        new = message.generation >= self._generation or message.source in self._asked
        return message.kind is Kind.ROLL and new and not self._is_over(message) and self._is_present(message)

    def _is_over(self, message: Message) -> bool:
        return message.generation < self._settled

    def _is_present(self, message: Message) -> bool:
        present = self._present.get(message.source)
        return present is not None and present.call == message.call

    def _take(self, message: Message) -> None:
        """Act on a message during a call."""
        settled = self._settled
        self._file(message)
        if message.kind is Kind.ARRIVE:
            self._last = message.source
            self._reassure(self._present if self._settled > settled else (message.source,))
        elif message.kind is Kind.CONFIRM and message.source in self._asked and self._is_present(message):
            self._confirmed.add(message.source)
        elif message.kind is Kind.ROLL and message.source in self._asked and self._is_present(message):
            # It was told to WAIT, after it may have missed the GO: once more, for it cannot tell.
            self._send(message.source, Kind.GO, message.call)

    def _file(self, message: Message) -> None:
        """Note who is in a call and who has left it."""
        if message.kind is Kind.ARRIVE:
            self._present[message.source] = message
            self._asked.discard(message.source)
            self._generation = max(self._generation, message.generation)
            self._settled = max(self._settled, message.generation)
        elif message.kind is Kind.ROLL and self._is_over(message):
            pass  # its sender, told late of what is over, has been told to WAIT since: it returns or withdraws
        elif message.kind in (Kind.ROLL, Kind.WITHDRAW) and self._is_present(message):
            del self._present[message.source]
        self._note(message)

    def _reassure(self, ranks: Iterable[int]) -> None:
        """Tell those to WAIT that do not know whether root is in a newer call than a give-up.

        These are the ones with a notice, and those whose notice is still on its way.
        """
        for rank in ranks:
            present = self._present[rank]
            if present.flag or present.generation < self._settled:
                self._send(rank, Kind.WAIT, present.call)

    def _give_up(self, call: Call) -> RankTimeoutError:
        absent = tuple(rank for rank in range(1, self._size) if rank not in self._present)
        if self._noticed and not self._present:
            return self._error(call, ())
        # Nobody is missing when a member came to its deadline before it could confirm: the last one was too late.
        absent = absent or (self._last,)
        self._abort(absent)
        return self._error(call, absent)

    def _abort(self, absent: tuple[int, ...]) -> None:
        """Tell all ranks, so that those away find a notice at their next call."""
        for rank in range(1, self._size):
            call = self._present[rank].call if rank in self._present else 0
            self._channel.send(rank, Message(Kind.ABORT, call, self._generation, absent=absent))
        self._present.clear()
        self._generation += 1

    def _start(self, call: Call) -> bool:
        arrived = self._present.values()
        agreed = all(message.digest == call.digest for message in arrived)
        balanced = (call.balance + sum(message.balance for message in arrived)) % 2**64 == 0
        for message in arrived:
            self._send(message.source, Kind.START, message.call, flag=agreed and balanced)
        self._present.clear()
        return agreed and balanced


def arrival_over(channel: Channel) -> Arrival:
    """This rank's part of the protocol."""
    return Root(channel) if channel.rank == ROOT else Member(channel)


def _absent_message(call: Call, absent: tuple[int, ...], size: int) -> str:
    shown = ", ".join(map(str, absent[:_SHOWN_RANKS]))
    more = f" and {len(absent) - _SHOWN_RANKS} more" if len(absent) > _SHOWN_RANKS else ""
    return (
        f"{call.operation}: {len(absent)} of {size} ranks did not come within {call.timeout:g} s: rank {shown}{more}. "
        f"{call.operation} is collective: call it on every rank, in the same order as every other collective call "
        f"(not under `if rank == 0`). If all ranks do call it, the absent ones have died, hang, or need a longer "
        f"timeout."
    )


def _late_message(call: Call, rank: int) -> str:
    return (
        f"{call.operation}: rank {rank} came when the others had given up waiting for it, and none of them is in a "
        f"newer call. {call.operation} is collective: call it on every rank, in the same order as every other "
        f"collective call; where a rank needs longer than the others, raise the timeout."
    )
