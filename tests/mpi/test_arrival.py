"""The arrival protocol: who is here, do all agree, and what if somebody does not come, comes late, or leaves."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from distckpt.coordination.arrival import Arrival, Call, Teams, arrival_over
from distckpt.coordination.channel import Channel, Waits
from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

TAG = 5
#: Seconds that an arrival may take in which all ranks take part; only a hang takes longer.
PATIENT = 30.0
#: What a rank gets that came too late.
LATE: tuple[int, ...] = ()

Agree = Callable[..., None]
#: True or False when the call started, else the absent ranks.
Outcome = bool | tuple[int, ...]


class WatchedChannel(Channel):
    """Measures the longest time between two looks into the inbox: how long the machine did not let this rank run."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.watch()

    def watch(self) -> None:
        self._looked, self.stall = time.monotonic(), 0.0

    def _probe(self) -> Message | None:
        now = time.monotonic()
        self.stall = max(self.stall, now - self._looked)
        self._looked = now
        return super()._probe()


#: Ranks of a team: all, or two, so that with four ranks the third is a captain and the fourth its crew.
STAR, TEAMS = 1 << 20, 2
_four_ranks = pytest.mark.mpi(min_size=4)
of_both_shapes = pytest.mark.parametrize("span", [STAR, pytest.param(TEAMS, marks=_four_ranks)])
of_each_place = pytest.mark.parametrize(
    ("span", "rank"),
    [(STAR, 0), (STAR, 1), *(pytest.param(TEAMS, rank, marks=_four_ranks) for rank in range(4))],
)


def _waits(span: int, *, grace: float = 0.5, notice: float = 1.0, patience: float = 0.25) -> Waits:
    return Waits(grace=grace, notice=notice, patience=patience if span == TEAMS else 0.0)


def _protocol(comm: Any, span: int, *, grace: float = 0.5, notice: float = 1.0) -> Arrival:
    channel = Channel(comm, TAG, _waits(span, grace=grace, notice=notice))
    return arrival_over(channel, Teams(comm.size, span))


def _arrive(protocol: Arrival, timeout: float, digest: int = 0, balance: int = 0) -> Outcome:
    try:
        return protocol.arrive(Call("save", digest, balance, timeout))
    except RankTimeoutError as error:
        return error.absent


def _others(comm: Any, *ranks: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(comm.size) if rank not in ranks)


# ---- all come ----------------------------------------------------------------------------------------------------


@of_both_shapes
def test_all_ranks_get_the_verdict(comm: Any, agree: Agree, span: int) -> None:
    protocol, last = _protocol(comm, span), comm.rank == comm.size - 1
    for digest, balance, verdict in (
        (2**64 - 1, 0, True),
        (7 + last, 0, False),
        (7 + (comm.rank == 0), 0, False),
        (7, int(last), False),
        (7, comm.size - 1 if last else 2**64 - 1, True),
        (7, 0, True),
    ):
        agree(_arrive(protocol, PATIENT, digest, balance) is verdict, f"expected {verdict}")


@of_each_place
def test_rank_may_come_late_within_the_timeout(comm: Any, agree: Agree, span: int, rank: int) -> None:
    protocol = _protocol(comm, span)
    if comm.rank == rank:
        time.sleep(0.3)  # longer than the patience of its team
    agree(_arrive(protocol, PATIENT) is True)


# ---- some do not come --------------------------------------------------------------------------------------------


@of_each_place
def test_only_one_rank_calls(comm: Any, agree: Agree, span: int, rank: int) -> None:
    protocol = _protocol(comm, span)
    if comm.rank == rank:
        start = time.monotonic()
        with pytest.raises(RankTimeoutError, match=r"save is collective: call it on every rank") as raised:
            protocol.arrive(Call("save", 0, 0, 0.3))
        assert 0.3 <= time.monotonic() - start < 0.3 + 1.0 + 2.0  # the contract's second, and a slow machine
        assert raised.value.absent == _others(comm, rank)
        assert f"{comm.size - 1} of {comm.size} ranks did not come within 0.3 s" in str(raised.value)
    comm.Barrier()
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    ("span", "absent"),
    [
        *((STAR, absent) for absent in [(0,), (1,), (2,), (0, 1), (1, 2)]),
        *(pytest.param(TEAMS, absent, marks=_four_ranks) for absent in [(0,), (2,), (3,), (0, 2), (0, 3), (2, 3)]),
    ],
)
def test_present_ranks_name_the_absent_ones(comm: Any, agree: Agree, span: int, absent: tuple[int, ...]) -> None:
    protocol, outcome = _protocol(comm, span), None
    comm.Barrier()
    if comm.rank not in absent:
        outcome = _arrive(protocol, 0.5)
    agree(outcome == (None if comm.rank in absent else absent), f"got {outcome}")
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


@of_both_shapes
@pytest.mark.mpi(min_size=3)
def test_root_that_came_later_than_a_member_still_decides(comm: Any, agree: Agree, span: int) -> None:
    # Rank 1 comes to its deadline first, at 0.8 + 0.5 s, and root's would be at 1.6 s; rank 2 does not come at all.
    protocol = _protocol(comm, span)
    outcome, absent = None, (2,)
    comm.Barrier()
    if comm.rank not in absent:
        time.sleep(0.8 if comm.rank == 0 else 0.0)
        outcome = _arrive(protocol, 0.8)
    agree(outcome == (None if comm.rank in absent else absent), f"got {outcome}")
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


@of_both_shapes
@pytest.mark.mpi(min_size=3)
def test_root_that_comes_during_the_roll_call_is_late(comm: Any, agree: Agree, span: int) -> None:
    protocol = _protocol(comm, span, grace=0.8)
    comm.Barrier()
    time.sleep(0.2 + 0.8 + 0.3 if comm.rank == 0 else 0.0)
    outcome = _arrive(protocol, 0.2)
    agree(outcome == (LATE if comm.rank == 0 else (0,)), f"got {outcome}")
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


# ---- some come when the others have given up -----------------------------------------------------------------------


@of_each_place
def test_late_rank_alone_gets_its_error_soon(comm: Any, agree: Agree, span: int, rank: int) -> None:
    protocol = _protocol(comm, span)
    if comm.rank != rank:
        _arrive(protocol, 0.2)
    comm.Barrier()
    if comm.rank == rank:
        start = time.monotonic()
        with pytest.raises(RankTimeoutError, match="came when the others had given up") as raised:
            protocol.arrive(Call("save", 0, 0, PATIENT))
        assert time.monotonic() - start < 1.0 + 2.0
        assert raised.value.absent == LATE
    comm.Barrier()
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


@of_each_place
@pytest.mark.parametrize("pause", [0.0, 0.4])
def test_late_rank_joins_a_newer_call(comm: Any, agree: Agree, span: int, rank: int, pause: float) -> None:
    protocol = _protocol(comm, span)
    if comm.rank != rank:
        _arrive(protocol, 0.2)
    comm.Barrier()
    if comm.rank == rank:
        time.sleep(pause)
    # Without a pause the late rank may come first.
    agree(_arrive(protocol, PATIENT) is True)


@of_both_shapes
@pytest.mark.mpi(min_size=3)
def test_late_rank_waits_as_long_as_root_is_in_a_newer_call(comm: Any, agree: Agree, span: int) -> None:
    protocol = _protocol(comm, span, notice=0.6)
    if comm.rank != 1:
        _arrive(protocol, 0.2)
    comm.Barrier()
    if comm.rank == 2:
        time.sleep(1.5)  # far beyond the notice of rank 1
    agree(_arrive(protocol, PATIENT) is True)


# ---- some leave --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted_soon() -> Iterator[Callable[[float], None]]:
    timers: list[threading.Timer] = []

    def interrupt_in(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    yield interrupt_in
    for timer in timers:
        timer.join()


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    ("span", "leaver", "absent"),
    [
        (STAR, 0, 2),
        (STAR, 1, 2),
        *(pytest.param(TEAMS, *who, marks=_four_ranks) for who in [(0, 1), (2, 1), (3, 1), (3, 0)]),
    ],
)
def test_interrupted_rank_leaves_and_the_others_name_it(
    comm: Any, agree: Agree, interrupted_soon: Callable[[float], None], span: int, leaver: int, absent: int
) -> None:
    """With teams, the third and the fourth rank have confirmed to each other when one of them is interrupted."""
    protocol = _protocol(comm, span)
    if comm.rank == leaver:
        interrupted_soon(0.3)
        with pytest.raises(KeyboardInterrupt), INTERRUPTS.held():
            protocol.arrive(Call("save", 0, 0, PATIENT))
    elif comm.rank != absent:
        outcome = _arrive(protocol, 1.0)
        # Root can tell the others at once that it leaves; when a member leaves, root waits for its deadline.
        assert outcome == ((0,) if leaver == 0 else tuple(sorted((leaver, absent)))), outcome
    comm.Barrier()
    agree(_arrive(protocol, PATIENT) is True, "the next call must work")


# ---- messages ----------------------------------------------------------------------------------------------------


def test_sending_never_waits_for_the_receiver(comm: Any, agree: Agree) -> None:
    channel, count = Channel(comm, TAG, Waits()), 20_000
    if comm.rank == 1:
        for call in range(count):
            channel.send(0, Message(Kind.ARRIVE, call, 0))
    comm.Barrier()
    received = [message.call for message in channel.drain()]
    while comm.rank == 0 and len(received) < count:
        message = channel.receive(time.monotonic() + PATIENT)
        assert message is not None
        received.append(message.call)
    comm.Barrier()
    agree(received == (list(range(count)) if comm.rank == 0 else []))


# ---- at random ---------------------------------------------------------------------------------------------------

ROUNDS = 200
RANDOM_TIMEOUT, RANDOM_GRACE, RANDOM_NOTICE = 0.08, 0.02, 0.05


@dataclass(frozen=True, slots=True)
class Role:
    """What a rank does in a round: comes after `delay` seconds, or not at all."""

    comes: bool
    delay: float

    @property
    def on_time(self) -> bool:
        return self.comes and self.delay < RANDOM_TIMEOUT / 2


@dataclass(frozen=True, slots=True)
class Result:
    """What became of it: nothing for a rank that did not come; and its longest stall, in seconds."""

    outcome: Outcome | None
    stall: float


def _random_role(rng: random.Random) -> Role:
    chance, jitter = rng.random(), rng.uniform(-0.005, 0.005)
    if chance < 0.15:
        return Role(False, 0.0)
    if chance < 0.25:
        return Role(True, rng.uniform(0.0, RANDOM_TIMEOUT / 3))
    if chance < 0.35:  # at root's deadline
        return Role(True, RANDOM_TIMEOUT + jitter)
    if chance < 0.42:  # at a member's deadline
        return Role(True, RANDOM_TIMEOUT + RANDOM_GRACE + jitter)
    if chance < 0.46:  # at the end of a roll call
        return Role(True, RANDOM_TIMEOUT + 2 * RANDOM_GRACE + 4 * jitter)
    return Role(True, 0.0)


def _play(protocol: Arrival, channel: WatchedChannel, role: Role, digest: int) -> Result:
    if not role.comes:
        return Result(None, 0.0)
    time.sleep(role.delay)
    channel.watch()
    outcome = _arrive(protocol, RANDOM_TIMEOUT, digest)
    return Result(outcome, channel.stall)


def _find_problem(roles: list[Role], results: list[Result]) -> str:
    """What is wrong with a round on a machine that let all ranks run; empty if nothing is."""
    absent = {rank for rank, role in enumerate(roles) if not role.comes}
    may_be_missed = {rank for rank, role in enumerate(roles) if not role.on_time}
    lists = {result.outcome for role, result in zip(roles, results, strict=True) if role.on_time}
    if len(lists) > 1:
        return f"different outcomes on ranks that were on time: {lists}"
    for outcome in lists - {True}:
        if not (isinstance(outcome, tuple) and absent <= set(outcome) <= may_be_missed):
            return f"absent are {absent}, perhaps also {may_be_missed - absent}. Named: {outcome}"
    return ""


def _find_mixed(results: list[Result]) -> str:
    """What must not happen on any machine: a call that started without a rank."""
    outcomes = {result.outcome for result in results}
    started = bool({True, False} & outcomes)
    return f"started on some ranks only: {outcomes}" if started and outcomes != {True} else ""


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("span", [STAR, TEAMS])
@pytest.mark.timeout(300)
def test_random_rounds(comm: Any, agree: Agree, span: int) -> None:
    waits = _waits(span, grace=RANDOM_GRACE, notice=RANDOM_NOTICE, patience=RANDOM_GRACE)
    channel = WatchedChannel(comm, TAG, waits)
    protocol, rng = arrival_over(channel, Teams(comm.size, span)), random.Random(20_240)
    checked = 0
    for number in range(ROUNDS):
        roles = [_random_role(rng) for _ in range(comm.size)]
        comm.Barrier()
        mine = _play(protocol, channel, roles[comm.rank], 2 * number)
        results = comm.allgather(mine)
        # Without a clock in common, a rank that the machine does not let run is a rank that does not come.
        stalled = max(result.stall for result in results) > RANDOM_GRACE / 2
        checked += not stalled
        problem = _find_mixed(results) or ("" if stalled else _find_problem(roles, results))
        assert not problem, f"round {number}: {problem}. {roles} {results}"
        agree(_arrive(protocol, PATIENT, 2 * number + 1) is True, f"the call after round {number} must work")
    assert checked > 0, "no round without a stall: the machine is too busy for this test"


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("span", [STAR, TEAMS])
def test_random_calls_never_mix(comm: Any, agree: Agree, span: int) -> None:
    """Without a rest between the calls: whatever happens, a call in which all agree is the same call on all ranks."""
    waits = _waits(span, grace=RANDOM_GRACE, notice=RANDOM_NOTICE, patience=RANDOM_GRACE)
    protocol = arrival_over(Channel(comm, TAG, waits), Teams(comm.size, span))
    rng, outcomes = random.Random(comm.rank), dict[int, Outcome]()
    for number in range(100):
        if rng.random() < 0.05:
            time.sleep(rng.uniform(0.0, 2 * RANDOM_TIMEOUT))
        if rng.random() > 0.03:
            outcomes[number] = _arrive(protocol, RANDOM_TIMEOUT, number)
    comm.Barrier()
    agree(_arrive(protocol, PATIENT, 2**32) is True, "the next call must work")
    everywhere = comm.allgather({number for number, outcome in outcomes.items() if outcome is True})
    agree(all(started == everywhere[0] for started in everywhere), f"{everywhere}")
