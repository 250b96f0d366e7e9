"""One rank's part of the arrival protocol, fed by a script of messages."""

from __future__ import annotations

from collections.abc import Iterator

from distckpt.coordination.arrival import Arrival, Call, Teams, arrival_over
from distckpt.coordination.channel import Channel, Waits
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError

SIZE = 4
SAVE = Call("save", digest=7, balance=0, timeout=600.0)
#: In a script: nothing comes until the deadline.
DEADLINE = None
#: What comes, by and by; an exception stands for one that is raised while the rank waits.
Script = list[Message | BaseException | None]


class ScriptedChannel(Channel):
    """The inbox is a script, the outbox a list."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.waits = rank, size, Waits(patience=0.0 if size == SIZE else 0.25)
        self.earlier: list[Message] = []
        self.script: Script = []
        self.sent: list[tuple[int, Message]] = []
        self.deadlines: list[float] = []

    def send(self, destination: int, message: Message) -> None:
        self.sent.append((destination, message))

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        self.deadlines.append(deadline)
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    def drain(self) -> Iterator[Message]:
        while self.earlier:
            yield self.earlier.pop(0)


class Rank:
    """One rank's protocol, fed by a script."""

    def __init__(self, rank: int, teams: Teams = Teams(SIZE, SIZE)) -> None:  # noqa: B008  # it is frozen
        self.channel = ScriptedChannel(rank, teams.size)
        self.protocol: Arrival = arrival_over(self.channel, teams)

    def call(
        self, *script: Message | BaseException | None, earlier: tuple[Message, ...] = ()
    ) -> bool | tuple[int, ...]:
        """One call: the verdict, or the absent ranks it names. All of the script must be used."""
        self.channel.earlier, self.channel.script = list(earlier), list(script)
        self.channel.sent.clear()
        self.channel.deadlines.clear()
        try:
            return self.protocol.arrive(SAVE)
        except RankTimeoutError as error:
            return error.absent
        finally:
            assert not self.channel.script

    def sent(self, kind: Kind) -> dict[int, Message]:
        return {rank: message for rank, message in self.channel.sent if message.kind is kind}

    def told(self, rank: int) -> list[tuple[Kind, int]]:
        return [(message.kind, message.call) for destination, message in self.channel.sent if destination == rank]

    def kinds_sent(self) -> list[Kind]:
        return [message.kind for _, message in self.channel.sent]


def from_(source: int, kind: Kind, call: int = 1, generation: int = 0, **more: int | bool | tuple[int, ...]) -> Message:
    return Message(kind, call, generation, source=source, **more)  # type: ignore[arg-type]


def arrived(source: int, call: int = 1, generation: int = 0, *, digest: int = 7, flag: bool = False) -> Message:
    return Message(Kind.ARRIVE, call, generation, flag, digest, source=source)
