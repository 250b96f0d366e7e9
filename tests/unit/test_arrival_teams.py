"""Teams of the arrival protocol, message by message: captain, crew, and root as they see it."""

from __future__ import annotations

import math

import pytest

from distckpt.coordination.arrival import Teams
from distckpt.coordination.arrival.teams import waits_of
from distckpt.coordination.channel import Waits
from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.message import Kind, Message
from tests.unit.scripted_arrival import DEADLINE, SAVE, Rank, arrived, from_

#: Two teams of three: root with its members, and a captain with its crew.
TEAMS, CAPTAIN = Teams(6, 3), 3


@pytest.fixture
def crew() -> Rank:
    return Rank(4, TEAMS)


@pytest.fixture
def captain() -> Rank:
    return Rank(CAPTAIN, TEAMS)


@pytest.fixture
def head() -> Rank:
    return Rank(0, TEAMS)


def _starts(source: int, call: int = 1) -> tuple[Message, Message]:
    return from_(source, Kind.GO, call), from_(source, Kind.START, call, flag=True)


HERE = (arrived(4), arrived(5))
LOCKED = (from_(4, Kind.CONFIRM), from_(5, Kind.CONFIRM))


@pytest.mark.parametrize(("size", "span"), [(1, 1), (32, 32), (33, 6), (4096, 64), (16384, 128), (16385, 129)])
def test_teams_are_as_many_as_their_ranks(size: int, span: int) -> None:
    teams = Teams.of(size)
    assert teams.span == span
    assert sorted({rank for captain in range(0, size, span) for rank in teams.team_of(captain)}) == list(range(size))


def test_an_error_with_teams_is_late_by_less_than_a_second() -> None:
    waits = waits_of(16384)
    assert 0.0 < waits.patience + 2 * waits.grace < 1.0
    assert waits_of(32) == Waits()


def test_crew_speaks_with_its_captain(crew: Rank) -> None:
    assert crew.call(*_starts(CAPTAIN)) is True
    assert crew.told(CAPTAIN) == [(Kind.ARRIVE, 1), (Kind.CONFIRM, 1)]
    assert not crew.told(0)
    assert crew.channel.deadlines[1] == math.inf, "who has confirmed must not leave"


def test_crew_without_captain_turns_to_root(crew: Rank) -> None:
    assert crew.call(DEADLINE, *_starts(CAPTAIN), *_starts(0, 2)) is True
    assert crew.told(CAPTAIN) == [(Kind.ARRIVE, 1), (Kind.WITHDRAW, 1)]
    assert crew.told(0) == [(Kind.ARRIVE, 2), (Kind.CONFIRM, 2)]
    patience, patient = crew.channel.deadlines[:2]
    assert patient - patience == pytest.approx(SAVE.timeout + Waits().grace, abs=0.1)


@pytest.mark.parametrize("before", [(), (from_(CAPTAIN, Kind.GO),)])
def test_dismissed_crew_turns_to_root(crew: Rank, before: tuple[Message, ...]) -> None:
    assert crew.call(*before, from_(CAPTAIN, Kind.DISMISS), *_starts(0, 2)) is True
    assert (Kind.WITHDRAW, 1) not in crew.told(CAPTAIN)


def test_crew_joins_a_roll_call_outside_its_team(crew: Rank) -> None:
    assert crew.call(from_(1, Kind.ROLL, 9), from_(2, Kind.ROLL, 9), DEADLINE) == (0, 3, 5)
    assert crew.told(CAPTAIN) == [(Kind.ARRIVE, 1), (Kind.WITHDRAW, 1), (Kind.ROLL, 2)]
    assert crew.told(0) == [(Kind.ARRIVE, 2), (Kind.ROLL, 2), (Kind.WITHDRAW, 2)]


def test_locked_crew_joins_a_roll_call_once_dismissed(crew: Rank) -> None:
    rolls = (from_(1, Kind.ROLL, 9), from_(2, Kind.ROLL, 9))
    assert crew.call(from_(CAPTAIN, Kind.GO), *rolls, from_(CAPTAIN, Kind.DISMISS), DEADLINE) == (0, 3, 5)


def test_crew_with_a_notice_does_not_join_its_team(crew: Rank) -> None:
    earlier = (from_(0, Kind.ABORT, 0, absent=(4,)),)
    assert crew.call(from_(0, Kind.WAIT, 2, 1), *_starts(0, 2), earlier=earlier) is True
    assert crew.told(CAPTAIN) == [(Kind.WITHDRAW, 1)]
    assert crew.sent(Kind.ARRIVE)[0].flag


def test_rank_that_root_gave_up_just_before_is_late(crew: Rank) -> None:
    abort = from_(0, Kind.ABORT, 0, absent=(4, 5))
    assert crew.call(from_(1, Kind.ROLL, 9), abort, DEADLINE) == ()


def test_locked_crew_takes_the_answer_of_root(crew: Rank) -> None:
    assert crew.call(from_(CAPTAIN, Kind.GO), from_(CAPTAIN, Kind.ABORT, 1, 6, absent=(2,))) == (2,)
    crew.call(*_starts(CAPTAIN, 2))
    assert crew.sent(Kind.ARRIVE)[CAPTAIN].generation == 7


@pytest.mark.parametrize("answer", [Kind.DISMISS, Kind.ABORT])
def test_interrupted_locked_crew_leaves_when_it_may(crew: Rank, answer: Kind) -> None:
    with pytest.raises(KeyboardInterrupt):
        crew.call(from_(CAPTAIN, Kind.GO), KeyboardInterrupt(), from_(CAPTAIN, answer, absent=(1,)))
    assert crew.told(CAPTAIN)[-1] == (Kind.WITHDRAW, 1)
    assert not crew.told(0)


def test_interrupt_of_locked_crew_waits_for_the_end_of_a_call_that_starts(crew: Rank) -> None:
    go, start = _starts(CAPTAIN)
    verdicts = []
    with pytest.raises(KeyboardInterrupt), INTERRUPTS.held():  # raised by the end of held()
        verdicts.append(crew.call(go, KeyboardInterrupt(), start))
    assert verdicts == [True]


def test_captain_speaks_for_its_team(captain: Rank) -> None:
    crew = (arrived(4, 7)._replace(balance=3), arrived(5, 8, 2)._replace(balance=2**64 - 1))
    locked = (from_(5, Kind.CONFIRM, 8), from_(4, Kind.CONFIRM, 7))
    go, start = _starts(0)
    assert captain.call(crew[1], *locked, go, start._replace(generation=6), earlier=crew[:1]) is True
    assert captain.sent(Kind.ARRIVE)[0] == Message(Kind.ARRIVE, 1, 2, False, 7, 2, last=5)
    assert captain.told(4) == [(Kind.GO, 7), (Kind.START, 7)]
    assert captain.told(5) == [(Kind.GO, 8), (Kind.START, 8)]
    assert captain.sent(Kind.START)[4].generation == 6
    assert captain.told(0) == [(Kind.ARRIVE, 1), (Kind.CONFIRM, 1)]


def test_captain_says_when_digests_differ(captain: Rank) -> None:
    captain.call(*LOCKED, *_starts(0), earlier=(arrived(4), arrived(5, digest=8)))
    assert captain.sent(Kind.ARRIVE)[0].differs


def test_captain_waits_for_its_crew_only_so_long(captain: Rank) -> None:
    assert captain.call(HERE[0], DEADLINE, HERE[1], *_starts(0)) is True
    assert captain.told(4) == [(Kind.DISMISS, 1)]
    assert captain.told(5) == [(Kind.DISMISS, 1)], "who comes later need not wait at all"
    assert not captain.sent(Kind.ARRIVE)[0].is_of_team
    assert captain.channel.deadlines[0] < captain.channel.deadlines[2] - 600.0


@pytest.mark.parametrize("when", ["before", "gathering", "starting"])
def test_captain_goes_alone_when_one_of_the_crew_has_left(captain: Rank, when: str) -> None:
    left = from_(5, Kind.WITHDRAW)
    scripts: dict[str, tuple[tuple[Message, ...], tuple[Message, ...]]] = {
        "before": ((*HERE, left), ()),
        "gathering": ((), (HERE[1], left)),
        "starting": (HERE, (LOCKED[0], left)),
    }
    earlier, script = scripts[when]
    assert captain.call(*script, *_starts(0), earlier=earlier) is True
    assert not captain.sent(Kind.ARRIVE)[0].is_of_team
    assert captain.told(5)[-1] == (Kind.DISMISS, 1), "it may be one that confirmed, and asks"
    again = (arrived(4, 2), arrived(5, 2))
    locked = (from_(4, Kind.CONFIRM, 2), from_(5, Kind.CONFIRM, 2))
    assert captain.call(*locked, *_starts(0, 2), earlier=again) is True
    assert captain.sent(Kind.ARRIVE)[0].is_of_team, "until the next call only"


def test_captain_alone_keeps_arrivals_for_the_next_call(captain: Rank) -> None:
    go, start = _starts(0)
    captain.call(DEADLINE, go, arrived(4, 2), arrived(5, 2), start)
    captain.call(from_(4, Kind.CONFIRM, 2), from_(5, Kind.CONFIRM, 2), *_starts(0, 2))
    assert captain.sent(Kind.ARRIVE)[0].is_of_team


def test_captain_with_a_notice_goes_alone(captain: Rank) -> None:
    earlier = (*HERE, from_(0, Kind.ABORT, 0, absent=(3,)))
    assert captain.call(from_(0, Kind.WAIT, 1, 1), *_starts(0), earlier=earlier) is True
    assert captain.told(4) == captain.told(5) == [(Kind.DISMISS, 1)]


def test_captain_lets_go_who_asks_to_leave(captain: Rank) -> None:
    wish = from_(4, Kind.WITHDRAW)
    assert captain.call(*LOCKED, wish, from_(0, Kind.GO), *_starts(0, 2), earlier=HERE) is True
    assert captain.told(0) == [(Kind.ARRIVE, 1), (Kind.WITHDRAW, 1), (Kind.ARRIVE, 2), (Kind.CONFIRM, 2)]
    assert not captain.sent(Kind.ARRIVE)[0].is_of_team
    assert captain.told(4) == captain.told(5) == [(Kind.GO, 1), (Kind.DISMISS, 1)]


def test_captain_that_has_confirmed_lets_nobody_go(captain: Rank) -> None:
    go, start = _starts(0)
    assert captain.call(*LOCKED, go, from_(4, Kind.WITHDRAW), start, earlier=HERE) is True
    assert captain.told(4) == captain.told(5) == [(Kind.GO, 1), (Kind.START, 1)]


@pytest.mark.parametrize("absent", [(1,), (3,), (5,)])
def test_captain_passes_the_list_of_root_on(captain: Rank, absent: tuple[int, ...]) -> None:
    assert captain.call(*LOCKED, from_(0, Kind.ABORT, 1, 4, absent=absent), earlier=HERE) == (
        () if absent == (3,) else absent
    )
    assert captain.sent(Kind.ABORT)[5] == Message(Kind.ABORT, 1, 4, absent=absent)


def test_captain_answers_a_roll_call_for_its_team(captain: Rank) -> None:
    assert captain.call(*LOCKED, DEADLINE, from_(2, Kind.ROLL, 9), DEADLINE, earlier=HERE) == (0, 1)
    assert all(captain.sent(Kind.ROLL)[rank].flag for rank in (0, 1, 2))
    assert captain.told(4) == [(Kind.GO, 1), (Kind.ABORT, 1)]
    assert captain.sent(Kind.ABORT)[4].absent == (0, 1)


def test_captain_without_its_crew_answers_for_itself(captain: Rank) -> None:
    assert captain.call(HERE[0], from_(2, Kind.ROLL, 9), from_(4, Kind.ROLL, 2), DEADLINE) == (0, 1, 5)
    assert not captain.sent(Kind.ROLL)[0].flag


def test_late_captain_tells_its_crew(captain: Rank) -> None:
    assert captain.call(*LOCKED, from_(0, Kind.ABORT, 0), DEADLINE, earlier=HERE) == ()
    assert captain.told(0) == [(Kind.ARRIVE, 1), (Kind.WITHDRAW, 1)]
    assert captain.sent(Kind.ABORT)[4].absent == ()


@pytest.mark.parametrize("script", [(KeyboardInterrupt(),), (*HERE, *LOCKED, KeyboardInterrupt())])
def test_interrupted_captain_dismisses_its_crew(captain: Rank, script: tuple[Message | BaseException, ...]) -> None:
    with pytest.raises(KeyboardInterrupt):
        captain.call(*script, earlier=() if len(script) > 1 else HERE[:1])
    assert captain.told(4)[-1] == (Kind.DISMISS, 1)
    assert captain.told(0)[-1] == (Kind.WITHDRAW, 1)


def _team(call: int = 1, **more: int | bool) -> Message:
    return Message(Kind.ARRIVE, call, 0, digest=7, source=CAPTAIN, **{"last": 5, **more})  # type: ignore[arg-type]


def test_root_takes_a_captain_for_its_team(head: Rank) -> None:
    confirmed = tuple(from_(rank, Kind.CONFIRM) for rank in (1, 2, CAPTAIN))
    assert head.call(arrived(1), _team(balance=2**64 - 4), arrived(2)._replace(balance=4), *confirmed) is True
    assert set(head.sent(Kind.START)) == {1, 2, CAPTAIN}
    assert head.call(arrived(1), _team(differs=True), arrived(2), *confirmed) is False


def test_root_names_all_of_a_team_that_it_has_not_heard_of(head: Rank) -> None:
    assert head.call(arrived(1), arrived(2), arrived(4, 2), DEADLINE) == (3, 5)
    assert head.call(_team(), DEADLINE) == (1, 2)
    assert head.sent(Kind.ABORT)[CAPTAIN].call == 1
    assert head.sent(Kind.ABORT)[4].call == 0


def test_root_counts_nobody_twice(head: Rank) -> None:
    # Rank 4 has left its team; its captain's word of that is on its way.
    twice = (arrived(1), _team(), arrived(4, 2))
    apart = (from_(CAPTAIN, Kind.WITHDRAW), arrived(CAPTAIN, 2), arrived(5, 2), arrived(2))
    confirmed = tuple(from_(rank, Kind.CONFIRM, 1 if rank < CAPTAIN else 2) for rank in (1, 2, 3, 4, 5))
    assert head.call(*twice, *apart, *confirmed) is True
    goes = [rank for rank, message in head.channel.sent if message.kind is Kind.GO]
    assert sorted(goes) == [1, 2, 3, 4, 5]


def test_root_names_who_came_last_of_a_team(head: Rank) -> None:
    assert head.call(arrived(1), arrived(2), _team(last=4), from_(1, Kind.ROLL)) == (4,)
