"""The arrival protocol in virtual time: ranks that come, come late or stay away, on a network of any speed.

Each rank is a thread, of which one runs at a time; waiting takes no time. So a second covers many thousand orders of
messages, the same ones in every run.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from distckpt.coordination import arrival
from distckpt.coordination.arrival import Call, arrival_over
from distckpt.coordination.channel import Channel, Message, Timing
from distckpt.errors import RankTimeoutError

TIMEOUT, TIMING = 1.0, Timing(grace=0.5, notice=1.0)
CALLS = 6
#: Digest of the last call, which all ranks make.
LAST = 10**6
#: Seconds a message is under way, by chance.
NETWORKS: dict[str, Callable[[random.Random], float]] = {
    "fast": lambda rng: rng.uniform(0.0, 1e-4),
    "congested": lambda rng: 1e-3 if rng.random() < 0.8 else rng.uniform(0.0, 0.3),
    "slower than every patience": lambda rng: 1e-3 if rng.random() < 0.7 else rng.uniform(0.0, 2.5),
}

#: True or False when the call started, else the absent ranks.
Outcome = bool | tuple[int, ...]


class DeadlockError(Exception):
    """All ranks wait for ever."""


class World:
    """Clock, network and scheduler. `monotonic` stands for that of the module `time`."""

    def __init__(self, size: int, rng: random.Random, latency: Callable[[random.Random], float]) -> None:
        self.size, self.rng = size, rng
        self.now = 0.0
        self.inboxes: list[list[tuple[float, Message]]] = [[] for _ in range(size)]
        self._latency = latency
        self._last_delivery: dict[tuple[int, int], float] = {}
        self._wake = [0.0] * size
        self._listening = [False] * size
        self._running = [True] * size
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._handed_back = threading.Semaphore(0)
        self._deadlock = False

    def monotonic(self) -> float:
        return self.now

    def send(self, source: int, destination: int, message: Message) -> None:
        """Messages between two ranks arrive in order; nothing else is certain."""
        pair = (source, destination)
        delivery = max(self.now + self._latency(self.rng), self._last_delivery.get(pair, 0.0) + 1e-9)
        self._last_delivery[pair] = delivery
        self.inboxes[destination].append((delivery, message._replace(source=source)))
        self.inboxes[destination].sort(key=lambda entry: entry[0])

    def wait(self, rank: int, until: float, *, listening: bool = False) -> None:
        """Let the others run until then, or until a message has come."""
        self._wake[rank], self._listening[rank] = until, listening
        self._handed_back.release()
        self._turns[rank].acquire()
        if self._deadlock:
            raise DeadlockError

    def run(self, body: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=self._body, args=(rank, body)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        while any(self._running):
            _, rank = min((self._next_wake(rank), rank) for rank in range(self.size) if self._running[rank])
            self._deadlock = self._next_wake(rank) == math.inf
            self.now = max(self.now, self._next_wake(rank))
            self._turns[rank].release()
            self._handed_back.acquire()
        for thread in threads:
            thread.join()

    def _next_wake(self, rank: int) -> float:
        inbox = self.inboxes[rank]
        return min(self._wake[rank], inbox[0][0]) if self._listening[rank] and inbox else self._wake[rank]

    def _body(self, rank: int, body: Callable[[int], None]) -> None:
        self._turns[rank].acquire()
        try:
            body(rank)
        except DeadlockError:
            pass
        finally:
            self._running[rank] = False
            self._handed_back.release()


class SimulatedChannel(Channel):
    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.size, self.timing = rank, world.size, TIMING
        self._world = world

    def send(self, destination: int, message: Message) -> None:
        self._world.send(self.rank, destination, message)

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        if self._world.rng.random() < 0.02:  # the machine does not let the rank run
            self._world.wait(self.rank, self._world.now + self._world.rng.uniform(0.0, 0.05))
        while (message := next(self.drain(), None)) is None and self._world.now < deadline:
            self._world.wait(self.rank, deadline, listening=True)
        return message

    def drain(self) -> Iterator[Message]:
        inbox = self._world.inboxes[self.rank]
        while inbox and inbox[0][0] <= self._world.now:
            yield inbox.pop(0)[1]


@dataclass(slots=True)
class Job:
    """What the ranks do in one world, and what becomes of it."""

    world: World
    in_step: bool
    outcomes: list[dict[int, Outcome]] = field(default_factory=list)
    _met: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outcomes = [{} for _ in range(self.world.size)]

    def rank(self, rank: int) -> None:
        protocol = arrival_over(SimulatedChannel(self.world, rank))
        for number in range(CALLS):
            if self.in_step:
                self._meet(rank, number)
            if self.world.rng.random() < 0.88:
                self.world.wait(rank, self.world.now + self._delay())
                self._arrive(protocol, rank, number, TIMEOUT)
        self._meet(rank, CALLS)
        self.world.wait(rank, self.world.now + self.world.rng.choice([0.0, 0.3]))
        self._arrive(protocol, rank, LAST, 100.0)

    def _delay(self) -> float:
        chance, jitter = self.world.rng.random(), self.world.rng.uniform(-0.05, 0.05)
        if chance < 0.7:
            return 0.0 if chance < 0.5 else self.world.rng.uniform(0.0, 0.2)
        if chance < 0.9:
            return TIMEOUT + jitter + (TIMING.grace if chance < 0.8 else 0.0)
        return self.world.rng.uniform(0.0, 4 * TIMEOUT)

    def _arrive(self, protocol: arrival.Arrival, rank: int, digest: int, timeout: float) -> None:
        try:
            self.outcomes[rank][digest] = protocol.arrive(Call("save", digest, 0, timeout))
        except RankTimeoutError as error:
            self.outcomes[rank][digest] = error.absent

    def _meet(self, rank: int, number: int) -> None:
        self._met[number] = self._met.get(number, 0) + 1
        while self._met[number] < self.world.size:
            self.world.wait(rank, self.world.now + 0.01)


@pytest.mark.parametrize("in_step", [True, False], ids=["in step", "out of step"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_random_jobs(monkeypatch: pytest.MonkeyPatch, size: int, network: str, in_step: bool) -> None:
    for seed in range(15):
        world = World(size, random.Random(seed), NETWORKS[network])
        monkeypatch.setattr(arrival, "time", world)
        job = Job(world, in_step)
        world.run(job.rank)
        where = f"seed {seed}: {job.outcomes}"
        assert all(LAST in outcomes for outcomes in job.outcomes), f"deadlock, {where}"
        for number in (*range(CALLS), LAST):
            started = [outcomes.get(number) is True for outcomes in job.outcomes]
            assert all(started) or not any(started), f"call {number} started on some ranks only, {where}"
        if network != "slower than every patience":
            assert all(outcomes[LAST] is True for outcomes in job.outcomes), f"the last call must work, {where}"
