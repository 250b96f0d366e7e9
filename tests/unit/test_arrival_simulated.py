"""The arrival protocol in virtual time: ranks that come, come late or stay away, on a network of any speed.

Each rank is a thread, of which one runs at a time; waiting takes no time. So a second covers many thousand orders of
messages, the same ones in every run.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator

import pytest

from distckpt.coordination.arrival import Arrival, Call, Teams, arrival_over
from distckpt.coordination.channel import Channel, Waits
from distckpt.coordination.message import Message
from distckpt.errors import RankTimeoutError

TIMEOUT, WAITS = 1.0, Waits(grace=0.5, patience=0.25, notice=1.0)
CALLS = 6
#: Jobs of each kind.
JOBS = 24
#: Ranks, and ranks of a team: root alone with members, and teams.
SIZES = ((2, 2), (4, 4), (4, 2), (5, 2), (6, 3), (9, 3))
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


class Interrupt(BaseException):  # as KeyboardInterrupt
    """Ctrl-C on one rank."""


class World:
    """Clock, network and scheduler."""

    def __init__(
        self, size: int, rng: random.Random, latency: Callable[[random.Random], float], interrupts: float = 0.0
    ) -> None:
        self.size, self.rng, self.interrupts = size, rng, interrupts
        self.now = 0.0
        self.inboxes: list[list[tuple[float, Message]]] = [[] for _ in range(size)]
        self._latency = latency
        self._last_delivery: dict[tuple[int, int], float] = {}
        self._wake = [0.0] * size
        self._listening = [False] * size
        self._running = [True] * size
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._all_ended = threading.Event()
        self._deadlock = False

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
        following = self._next_rank()
        if following != rank:
            self._turns[following].release()
            self._turns[rank].acquire()
        if self._deadlock:
            raise DeadlockError

    def wake(self, rank: int, at: float) -> None:
        """End the wait of another rank at that time."""
        self._wake[rank] = at

    def run(self, body: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=self._body, args=(rank, body)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        self._turns[self._next_rank()].release()
        self._all_ended.wait()
        for thread in threads:
            thread.join()

    def _next_rank(self) -> int:
        """Whose turn it is. The clock goes on to it."""
        wake, rank = min((self._next_wake(rank), rank) for rank in range(self.size) if self._running[rank])
        self._deadlock = wake == math.inf
        self.now = max(self.now, wake)
        return rank

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
            if any(self._running):
                self._turns[self._next_rank()].release()
            else:
                self._all_ended.set()


class SimulatedChannel(Channel):
    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.size, self.waits = rank, world.size, WAITS
        self._world = world
        self.heard: list[Message] = []

    def now(self) -> float:
        return self._world.now

    def send(self, destination: int, message: Message) -> None:
        self._world.send(self.rank, destination, message)

    def receive(self, deadline: float, *, interruptible: bool = False) -> Message | None:
        if interruptible and self._world.rng.random() < self._world.interrupts:
            raise Interrupt
        if self._world.rng.random() < 0.02:  # the machine does not let the rank run
            self._world.wait(self.rank, self._world.now + self._world.rng.uniform(0.0, 0.05))
        while (message := next(self.drain(), None)) is None and self._world.now < deadline:
            self._world.wait(self.rank, deadline, listening=True)
        return message

    def drain(self) -> Iterator[Message]:
        inbox = self._world.inboxes[self.rank]
        while inbox and inbox[0][0] <= self._world.now:
            self.heard.append(inbox[0][1])
            yield inbox.pop(0)[1]


def _arrive(protocol: Arrival, digest: int, timeout: float, balance: int = 0) -> Outcome:
    try:
        return protocol.arrive(Call("save", digest, balance, timeout))
    except RankTimeoutError as error:
        return error.absent
    except Interrupt:
        return ()


def _delay(rng: random.Random) -> float:
    """After how many seconds a rank comes: at once, soon, at a deadline, or at any time."""
    chance, jitter = rng.random(), rng.uniform(-0.05, 0.05)
    if chance < 0.7:
        return 0.0 if chance < 0.5 else rng.uniform(0.0, 0.2)
    if chance < 0.9:
        return TIMEOUT + WAITS.patience + jitter + (WAITS.grace if chance < 0.8 else 0.0)
    return rng.uniform(0.0, 4 * TIMEOUT)


class Meetings:
    """Barriers that need no messages. From the last one who comes, the ranks leave within 10 ms."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._met: dict[int, list[int]] = {}

    def meet(self, rank: int, number: int) -> None:
        world, met = self._world, self._met.setdefault(number, [])
        met.append(rank)
        if len(met) < world.size:
            world.wait(rank, math.inf)
            return
        for other in met[:-1]:
            world.wake(other, world.now + world.rng.uniform(0.0, 0.01))


class Job:
    """Calls that some ranks miss, in step or not, and a last one that all make."""

    def __init__(self, world: World, teams: Teams, in_step: bool) -> None:
        self.outcomes: list[dict[int, Outcome]] = [{} for _ in range(world.size)]
        self._world, self._teams, self._in_step = world, teams, in_step
        self._meetings = Meetings(world)

    def rank(self, rank: int) -> None:
        world, outcomes = self._world, self.outcomes[rank]
        protocol = arrival_over(SimulatedChannel(world, rank), self._teams)
        for number in range(CALLS):
            if self._in_step:
                self._meetings.meet(rank, number)
            if world.rng.random() < 0.88:
                world.wait(rank, world.now + _delay(world.rng))
                outcomes[number] = _arrive(protocol, number, TIMEOUT)
        self._meetings.meet(rank, CALLS)
        world.interrupts = 0.0
        world.wait(rank, world.now + world.rng.choice([0.0, 0.3]))
        outcomes[LAST] = _arrive(protocol, LAST, 100.0)


of_any_size = pytest.mark.parametrize(
    "teams", [Teams(*sizes) for sizes in SIZES], ids=lambda teams: f"{teams.size} by {teams.span}"
)


@pytest.mark.parametrize("in_step", [True, False], ids=["in step", "out of step"])
@pytest.mark.parametrize("network", NETWORKS)
@of_any_size
def test_random_jobs(teams: Teams, network: str, in_step: bool) -> None:
    for seed in range(JOBS):
        world = World(teams.size, random.Random(seed), NETWORKS[network], interrupts=0.01 * (seed % 2))
        job = Job(world, teams, in_step)
        world.run(job.rank)
        where = f"seed {seed}: {job.outcomes}"
        assert all(LAST in outcomes for outcomes in job.outcomes), f"deadlock, {where}"
        for number in (*range(CALLS), LAST):
            started = [outcomes.get(number) is True for outcomes in job.outcomes]
            assert all(started) or not any(started), f"call {number} started on some ranks only, {where}"
        if network != "slower than every patience":
            assert all(outcomes[LAST] is True for outcomes in job.outcomes), f"the last call must work, {where}"


class Rounds:
    """Calls in step, each followed by one of all ranks, so that nobody has a notice when the next begins."""

    def __init__(self, world: World, teams: Teams) -> None:
        #: For each call, by rank: after how many seconds it came, None if not at all; and what became of it.
        self.delays: list[dict[int, float | None]] = [{} for _ in range(CALLS)]
        self.outcomes: list[dict[int, Outcome]] = [{} for _ in range(CALLS)]
        self.afterwards: list[Outcome] = []
        self._world, self._teams = world, teams
        self._meetings = Meetings(world)

    def rank(self, rank: int) -> None:
        rng, protocol = self._world.rng, arrival_over(SimulatedChannel(self._world, rank), self._teams)
        for number in range(CALLS):
            self._meetings.meet(rank, 2 * number)
            delay = _delay(rng) if rng.random() < 0.85 else None
            self.delays[number][rank] = delay
            if delay is not None:
                self._world.wait(rank, self._world.now + delay)
                self.outcomes[number][rank] = _arrive(protocol, 2 * number, TIMEOUT)
            self._meetings.meet(rank, 2 * number + 1)
            self.afterwards.append(_arrive(protocol, 2 * number + 1, 100.0))

    def problem(self, number: int) -> str:
        """What is wrong with a call; empty if nothing is."""
        delays, outcomes = self.delays[number], self.outcomes[number]
        absent = {rank for rank, delay in delays.items() if delay is None}
        on_time = {rank for rank, delay in delays.items() if delay is not None and delay < TIMEOUT / 2}
        told = {outcomes[rank] for rank in on_time}
        if len(told) > 1:
            return f"different outcomes on ranks that were on time: {told}"
        for named in told - {True}:
            if not (isinstance(named, tuple) and absent <= set(named) <= set(delays) - on_time):
                return f"absent are {absent}, perhaps also others, but not {on_time}. Named: {named}"
        return ""


@of_any_size
def test_ranks_on_time_name_the_same_absent_ones(teams: Teams) -> None:
    failed = 0
    for seed in range(JOBS):
        world = World(teams.size, random.Random(seed), NETWORKS["fast"])
        rounds = Rounds(world, teams)
        world.run(rounds.rank)
        assert rounds.afterwards == [True] * teams.size * CALLS, f"seed {seed}: the calls of all ranks must work"
        for number in range(CALLS):
            problem = rounds.problem(number)
            assert not problem, f"seed {seed}, call {number}: {problem}. {rounds.delays[number]}"
        failed += sum(True not in outcomes.values() for outcomes in rounds.outcomes)
    assert failed > 5


def test_root_hears_of_a_team_only_from_its_captain() -> None:
    teams = Teams(9, 3)
    world = World(teams.size, random.Random(0), NETWORKS["fast"])
    channels = [SimulatedChannel(world, rank) for rank in range(teams.size)]
    outcomes: list[Outcome] = []

    def come(rank: int) -> None:
        protocol = arrival_over(channels[rank], teams)
        balance = rank or 2**64 - 36
        outcomes.extend(_arrive(protocol, number, TIMEOUT, balance) for number in range(CALLS))

    world.run(come)
    assert outcomes == [True] * teams.size * CALLS
    assert {message.source for message in channels[0].heard} == {1, 2, 3, 6}
    assert {message.source for message in channels[3].heard} == {0, 4, 5}
    assert len(channels[8].heard) == 2 * CALLS
