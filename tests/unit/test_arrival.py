"""The arrival protocol message by message: each rule, in orders of messages that a real network produces too rarely."""

from __future__ import annotations

import math

import pytest

from distckpt.coordination.channel import Waits
from distckpt.coordination.message import Kind, Message, decode, encode
from distckpt.errors import RankTimeoutError
from tests.unit.scripted_arrival import DEADLINE, SAVE, Rank, arrived, from_

ARRIVED = (arrived(1), arrived(2), arrived(3))
CONFIRMED = tuple(from_(rank, Kind.CONFIRM) for rank in (1, 2, 3))


@pytest.fixture
def member() -> Rank:
    return Rank(1)


@pytest.fixture
def root() -> Rank:
    return Rank(0)


# ---- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(), (0,), (3, 8), tuple(range(1, 1000, 3))])
def test_messages_survive_the_wire(absent: tuple[int, ...]) -> None:
    abort = Message(Kind.ABORT, 2**32 - 1, 2**31, True, absent=absent, source=5)
    arrive = Message(Kind.ARRIVE, 1, 2, False, 2**64 - 1, 2**63, source=5)
    team = arrive._replace(last=999, differs=True)
    for message in (abort, arrive, team):
        packed = encode(message, 1000)
        assert decode(packed + b"rest of an earlier message", len(packed), 5, 1000) == message


# ---- member ------------------------------------------------------------------------------------------------------


def test_member_starts(member: Rank) -> None:
    assert member.call(from_(0, Kind.GO), from_(0, Kind.START, flag=True)) is True
    assert member.kinds_sent() == [Kind.ARRIVE, Kind.CONFIRM]
    assert member.channel.deadlines[1] == math.inf, "who has confirmed must not leave"
    assert member.call(from_(0, Kind.GO, 2), from_(0, Kind.START, 2, flag=False)) is False


def test_member_waits_longer_than_root(member: Rank, root: Rank) -> None:
    member.call(from_(0, Kind.ABORT, absent=(2,)))
    root.call(DEADLINE)
    assert member.channel.deadlines[0] - root.channel.deadlines[0] == pytest.approx(Waits().grace, abs=0.2)


def test_member_ignores_answers_to_an_earlier_call(member: Rank) -> None:
    member.call(from_(0, Kind.ABORT, absent=(3,)))
    earlier_call = [from_(0, kind, 1, 1) for kind in (Kind.GO, Kind.START, Kind.WAIT)]
    assert member.call(*earlier_call, from_(0, Kind.GO, 2), earlier_call[1], from_(0, Kind.START, 2, flag=True)) is True
    assert member.kinds_sent() == [Kind.ARRIVE, Kind.CONFIRM]


@pytest.mark.parametrize("before", [(), (from_(0, Kind.GO),)])
def test_member_takes_the_list_of_root(member: Rank, before: tuple[Message, ...]) -> None:
    assert member.call(*before, from_(0, Kind.ABORT, absent=(2, 3))) == (2, 3)
    assert Kind.ROLL not in member.kinds_sent()


def test_member_among_the_absent_is_late(member: Rank) -> None:
    member.channel.script = [from_(0, Kind.GO), from_(0, Kind.ABORT, absent=(1,))]
    with pytest.raises(RankTimeoutError, match="rank 1 came when the others had given up"):
        member.protocol.arrive(SAVE)


def test_member_calls_the_roll_when_root_does_not_answer(member: Rank) -> None:
    assert member.call(DEADLINE, from_(3, Kind.ROLL, 9), DEADLINE) == (0, 2)
    assert set(member.sent(Kind.ROLL)) == {0, 2, 3}
    assert member.kinds_sent()[-1] is Kind.WITHDRAW, "only after the answers are in"
    member.call(from_(0, Kind.ABORT, 2, absent=(3,)))
    assert member.sent(Kind.ARRIVE)[0].generation == 1


def test_member_that_waits_joins_a_roll_call(member: Rank) -> None:
    assert member.call(from_(2, Kind.ROLL, 9, 4), from_(3, Kind.ROLL, 9, 4), DEADLINE) == (0,)
    assert {message.generation for message in member.sent(Kind.ROLL).values()} == {4}


def test_member_does_not_join_a_roll_call_that_is_over(member: Rank) -> None:
    member.call(from_(0, Kind.ABORT, generation=3, absent=(2,)))
    stale = from_(2, Kind.ROLL, 9, 3)
    assert member.call(stale, from_(0, Kind.GO, 2), stale, from_(0, Kind.START, 2, flag=True)) is True
    assert Kind.ROLL not in member.kinds_sent()


def test_member_returns_from_a_roll_call_that_is_over(member: Rank) -> None:
    # The ROLL was under way for so long that the others are in a newer call already.
    stale = from_(2, Kind.ROLL, 9, 0)
    assert (
        member.call(stale, from_(0, Kind.WAIT, 1, 1), stale, from_(0, Kind.GO), from_(0, Kind.START, flag=True)) is True
    )
    assert len(member.sent(Kind.ROLL)) == 3


def test_list_of_root_replaces_that_of_the_roll_call(member: Rank) -> None:
    assert member.call(DEADLINE, from_(2, Kind.ROLL, 9), from_(0, Kind.ABORT, absent=(3,))) == (3,)


def test_root_that_comes_during_the_roll_call_decides(member: Rank) -> None:
    assert member.call(DEADLINE, from_(0, Kind.GO), from_(0, Kind.ABORT, absent=(0,))) == (0,)
    assert member.channel.deadlines[-1] == math.inf, "root has asked, so it will answer"
    assert Kind.CONFIRM not in member.kinds_sent(), "who has given up does not start"


@pytest.mark.parametrize("kind", [Kind.ABORT, Kind.ROLL])
def test_member_with_a_notice_waits_briefly(member: Rank, kind: Kind) -> None:
    assert member.call(DEADLINE, earlier=(from_(0 if kind is Kind.ABORT else 2, kind, 0),)) == ()
    assert member.sent(Kind.ARRIVE)[0].flag
    assert member.kinds_sent() == [Kind.ARRIVE, Kind.WITHDRAW]
    assert member.channel.deadlines[0] < member.protocol._notice_end + 1e-9


def test_notice_may_come_after_the_arrival(member: Rank) -> None:
    assert member.call(from_(0, Kind.ABORT, 0), DEADLINE) == ()
    first, second = member.channel.deadlines
    assert second < first - 100.0


def test_member_with_a_notice_waits_when_root_says_so(member: Rank) -> None:
    script = (from_(0, Kind.WAIT, 1, 1), from_(0, Kind.GO), from_(0, Kind.START, flag=True))
    assert member.call(*script, earlier=(from_(0, Kind.ABORT, 0),)) is True
    first, second, _ = member.channel.deadlines
    assert second > first + 100.0


def test_give_up_known_already_is_no_notice(member: Rank) -> None:
    member.call(DEADLINE, DEADLINE)
    earlier = (from_(2, Kind.ROLL, 1), from_(0, Kind.ABORT, 0))
    member.call(from_(0, Kind.ABORT, 2, absent=(3,)), earlier=earlier)
    assert not member.sent(Kind.ARRIVE)[0].flag


def test_start_ends_all_give_ups_before_it(member: Rank) -> None:
    member.call(from_(0, Kind.GO), from_(0, Kind.START, generation=5, flag=True))
    member.call(from_(0, Kind.ABORT, 2, absent=(3,)), earlier=(from_(2, Kind.ROLL, 1, 4),))
    assert not member.sent(Kind.ARRIVE)[0].flag


# ---- root --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [0, 2, 3])
def test_root_starts_when_all_have_confirmed(root: Rank, early: int) -> None:
    assert root.call(*ARRIVED[early:], *CONFIRMED, earlier=ARRIVED[:early]) is True
    assert root.kinds_sent() == [Kind.GO] * 3 + [Kind.START] * 3
    assert all(message.flag for message in root.sent(Kind.START).values())


def test_root_counts_each_call_anew(root: Rank) -> None:
    for number in (1, 2, 3):
        confirmed = tuple(from_(rank, Kind.CONFIRM, number) for rank in (1, 2, 3))
        assert root.call(*(arrived(rank, number) for rank in (1, 2, 3)), *confirmed) is True
        assert root.kinds_sent() == [Kind.GO] * 3 + [Kind.START] * 3
    assert root.call(*(arrived(rank, 4) for rank in (1, 2)), DEADLINE) == (3,)


def test_root_says_when_digests_differ(root: Rank) -> None:
    assert root.call(arrived(1), arrived(2, digest=8), arrived(3), *CONFIRMED) is False
    assert not any(message.flag for message in root.sent(Kind.START).values())


def test_root_gives_up_for_all(root: Rank) -> None:
    assert root.call(arrived(2, 5), DEADLINE) == (1, 3)
    aborts = root.sent(Kind.ABORT)
    assert {rank: (message.call, message.absent) for rank, message in aborts.items()} == {
        1: (0, (1, 3)),
        2: (5, (1, 3)),
        3: (0, (1, 3)),
    }
    assert root.call(DEADLINE) == (1, 2, 3), "those who were told are not there any more"


def test_root_forgets_who_has_left(root: Rank) -> None:
    assert root.call(*ARRIVED[:2], from_(2, Kind.WITHDRAW), DEADLINE) == (2, 3)
    assert root.call(DEADLINE, earlier=(arrived(1, 2, 1), from_(1, Kind.WITHDRAW, 2, 1))) == (1, 2, 3)


def test_root_keeps_who_has_come_again(root: Rank) -> None:
    # The WITHDRAW belongs to the call before.
    assert root.call(arrived(1), from_(1, Kind.WITHDRAW), arrived(1, 2), from_(1, Kind.CONFIRM), DEADLINE) == (2, 3)


def test_roll_call_of_a_waiting_member_ends_the_wait_of_all(root: Rank) -> None:
    assert root.call(*ARRIVED[:2], from_(1, Kind.ROLL)) == (3,)
    assert root.sent(Kind.ABORT)[1].call == root.sent(Kind.ABORT)[2].call == 1


def test_root_that_comes_after_a_roll_call_is_late(root: Rank) -> None:
    # Rank 2 gave up before root came; 1 and 3 answer its ROLL, with lists in which root is absent.
    rolls = (from_(1, Kind.ROLL), from_(3, Kind.ROLL))
    assert root.call(*rolls, DEADLINE, earlier=(*ARRIVED, from_(2, Kind.ROLL))) == ()
    assert root.kinds_sent() == []
    first, _, third = root.channel.deadlines
    assert third < first - 100.0, "alone with a notice, root waits briefly"


def test_root_with_a_notice_waits_for_a_member_in_a_newer_call(root: Rank) -> None:
    earlier = (arrived(1), from_(1, Kind.ROLL), arrived(1, 2, 1))
    assert root.call(DEADLINE, earlier=earlier) == (2, 3)
    assert root.channel.deadlines[0] > root.protocol._notice_end + 100.0


def test_roll_in_place_of_a_confirmation_names_the_last_rank(root: Rank) -> None:
    answers = (CONFIRMED[0], from_(3, Kind.ROLL))
    assert root.call(arrived(1), arrived(3), arrived(2), *answers) == (2,)
    assert set(root.sent(Kind.ABORT)) == {1, 2, 3}
    assert root.call(DEADLINE, earlier=(from_(3, Kind.WITHDRAW),)) == (1, 2, 3)
    assert root.call(*CONFIRMED[:1], DEADLINE) == (1, 2, 3), "a late confirmation is no arrival"


def test_roll_in_place_of_a_confirmation_counts_in_a_give_up_known_already(root: Rank) -> None:
    # Whoever has been asked waits for an answer.
    earlier = (from_(3, Kind.ROLL, 0), *ARRIVED)
    assert root.call(from_(1, Kind.ROLL), earlier=earlier) == ()
    assert root.sent(Kind.ABORT)[1] == Message(Kind.ABORT, 1, 1, absent=(0,))


def test_root_itself_may_be_the_last_rank(root: Rank) -> None:
    root.channel.earlier, root.channel.script = list(ARRIVED), [CONFIRMED[0], from_(3, Kind.ROLL)]
    with pytest.raises(RankTimeoutError, match="rank 0 came when the others had given up"):
        root.protocol.arrive(SAVE)
    assert root.sent(Kind.ABORT)[1].absent == (0,)


def test_rank_that_leaves_instead_of_confirming_may_come_again(root: Rank) -> None:
    answers = (CONFIRMED[0], from_(3, Kind.WITHDRAW), arrived(3, 2), from_(3, Kind.CONFIRM, 2))
    assert root.call(*ARRIVED, *answers, CONFIRMED[1]) is True
    assert [(rank, message.call) for rank, message in root.channel.sent if message.kind is Kind.GO] == [
        *((rank, 1) for rank in (1, 2, 3)),
        (3, 2),
    ]
    assert root.sent(Kind.START)[3].call == 2


def test_confirmation_of_an_earlier_call_does_not_count(root: Rank) -> None:
    stale = from_(3, Kind.CONFIRM)
    script = (stale, *ARRIVED[:2], arrived(3, 2), stale, *CONFIRMED[:2], from_(3, Kind.WITHDRAW, 2), DEADLINE)
    assert root.call(*script) == (3,)


def test_rank_that_leaves_instead_of_confirming_is_named_at_the_deadline(root: Rank) -> None:
    assert root.call(*ARRIVED, *CONFIRMED[:2], from_(3, Kind.WITHDRAW), DEADLINE) == (3,)
    assert {rank: message.call for rank, message in root.sent(Kind.ABORT).items()} == {1: 1, 2: 1, 3: 0}
    assert root.channel.deadlines[-2] == math.inf
    assert root.channel.deadlines[-1] == root.channel.deadlines[0]


@pytest.mark.parametrize("arrival", [arrived(1, 2, 1, flag=True), arrived(1, 2, 0)])
def test_root_tells_those_with_a_notice_to_wait(root: Rank, arrival: Message) -> None:
    root.call(DEADLINE)
    root.call(arrival, DEADLINE)
    assert root.sent(Kind.WAIT)[1].call == 2
    root.call(arrived(1, 3, 2), DEADLINE)
    assert not root.sent(Kind.WAIT), "no notice, no WAIT"


def test_root_voids_roll_calls_that_are_over(root: Rank) -> None:
    # Rank 2 comes back from give-up 4. Rank 1 does not know of it yet, and answers an old ROLL.
    script = (arrived(1, 8, 4), arrived(2, 9, 5), from_(1, Kind.ROLL, 8, 4), arrived(3, 9, 5))
    again = from_(1, Kind.ROLL, 8, 4)
    answers = (from_(1, Kind.CONFIRM, 8), from_(2, Kind.CONFIRM, 9), from_(3, Kind.CONFIRM, 9))
    assert root.call(*script, again, *answers) is True
    assert root.sent(Kind.WAIT)[1].call == 8
    assert root.sent(Kind.START)[1].generation == 5
    assert [rank for rank, message in root.channel.sent if message.kind is Kind.GO].count(1) == 2, "may have missed it"


def test_give_up_that_is_over_only_after_the_question(root: Rank) -> None:
    # Rank 3 has come back from the give-up for which rank 1, asked already, calls the roll.
    answers = (from_(3, Kind.WITHDRAW), arrived(3, 2, 1), from_(1, Kind.ROLL), from_(3, Kind.CONFIRM, 2))
    assert root.call(*ARRIVED, *answers, *CONFIRMED[:2]) is True
    told = [message.kind for rank, message in root.channel.sent if rank == 1]
    assert told == [Kind.GO, Kind.WAIT, Kind.GO, Kind.START]


def test_interrupted_root_tells_all(root: Rank) -> None:
    root.channel.earlier = list(ARRIVED)
    with pytest.raises(IndexError):  # the end of the script stands for an interrupt
        root.protocol.arrive(SAVE)
    assert [root.sent(Kind.ABORT)[rank].call for rank in (1, 2, 3)] == [1, 1, 1]
    assert root.sent(Kind.ABORT)[1].absent == (0,)


def test_interrupted_member_leaves_word(member: Rank) -> None:
    with pytest.raises(IndexError):
        member.protocol.arrive(SAVE)
    assert member.kinds_sent() == [Kind.ARRIVE, Kind.WITHDRAW]
