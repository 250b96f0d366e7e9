"""The coordinator's verbs: right values, and one error on all ranks when one fails before, inside, or is absent."""

from __future__ import annotations

import copy
import functools
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distckpt.coordination import coordinator as coordinator_module
from distckpt.coordination import merging, outcome, shared_memory
from distckpt.coordination.collectives import MpiCollectives
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RankTimeoutError,
    RestoreMismatchError,
)

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

#: Seconds that an arrival may take in which all ranks take part; only a hang takes longer.
PATIENT = 30.0

Agree = Callable[..., None]


@pytest.fixture
def coordinator(comm: Any) -> Coordinator:
    made = Coordinator(comm)
    assert made.arrive("test", 0, 0, PATIENT)
    return made


@dataclass(frozen=True, slots=True)
class Raised:
    """What a rank got, in words, to be compared between ranks."""

    kind: str
    text: str
    failures: dict[int, str]


def _raised(call: Callable[[], object]) -> Raised | None:
    try:
        call()
    except BaseException as error:
        return Raised(type(error).__name__, str(error), getattr(error, "failures", {}))
    return None


def _same_everywhere(comm: Any, value: object) -> bool:
    return all(other == value for other in comm.allgather(value))


def _works(coordinator: Coordinator) -> bool:
    """The next operation, with every verb."""
    size = coordinator.size
    arrived = coordinator.arrive("next", 1, 0, PATIENT)
    gathered = coordinator.gather_all("gather", b"%d" % coordinator.rank) == [b"%d" % rank for rank in range(size)]
    found = coordinator.on_root("find", lambda: 5, int) == 5
    merged = coordinator.merge("merge", b"a", lambda values: [b"%d" % len(values)] * size) == b"%d" % size
    rows = coordinator.gather_rows(np.array([coordinator.rank]))
    collected = rows is None if coordinator.rank else rows is not None and rows.ravel().tolist() == list(range(size))
    return arrived and gathered and found and merged and collected


# ---- values ------------------------------------------------------------------------------------------------------


def test_rank_and_size_are_those_of_the_communicator(comm: Any) -> None:
    coordinator = Coordinator(comm)
    assert (coordinator.rank, coordinator.size) == (comm.rank, comm.size)
    assert Coordinator().size == MPI.COMM_WORLD.size


def test_arrive_compares(coordinator: Coordinator, agree: Agree) -> None:
    last = coordinator.rank == coordinator.size - 1
    agree(coordinator.arrive("save", 2**64 - 1, 2**64 - 1 if last else 0, PATIENT) is False, "unbalanced")
    agree(coordinator.arrive("save", 3 + last, 0, PATIENT) is False, "not the same")
    agree(coordinator.arrive("save", 3, 0, PATIENT) is True)


@pytest.mark.parametrize("nbytes", [0, 10, 4000, 5000, 3_000_000])
def test_on_root_gives_all_ranks_the_result(coordinator: Coordinator, agree: Agree, nbytes: int) -> None:
    calls = []

    def find() -> bytes:
        calls.append(coordinator.rank)
        return bytes(range(250)) * (nbytes // 250)

    result = coordinator.on_root("find", find, bytes)
    agree(result == bytes(range(250)) * (nbytes // 250))
    assert calls == ([0] if coordinator.rank == 0 else [])


@pytest.mark.parametrize("nbytes", [0, 1, 200_000])
def test_merge_gives_every_rank_its_reply(coordinator: Coordinator, agree: Agree, nbytes: int) -> None:
    rank, size = coordinator.rank, coordinator.size
    value = bytes([rank]) * nbytes * rank
    reply = coordinator.merge("layout", value, lambda values: [b"<" + value + b">" for value in values[::-1]])
    mirrored = size - 1 - rank
    agree(reply == b"<" + bytes([mirrored]) * nbytes * mirrored + b">")


@pytest.mark.parametrize("kinds", [1, 2, 1000])
def test_merge_of_parts_that_some_ranks_have_alike(coordinator: Coordinator, agree: Agree, kinds: int) -> None:
    rank, size = coordinator.rank, coordinator.size
    values = [Parts(b"%d" % (other % kinds) * 5000, bytes([other]) * other) for other in range(size)]
    gathered: list[Parts] = []

    def mirror(received: list[Parts]) -> list[Parts]:
        gathered.extend(Parts(common, bytes(own)) for common, own in received)
        assert all(received[other].common is received[other % kinds].common for other in range(size))
        return received[::-1]

    reply = coordinator.merge_parts("layout", values[rank], mirror)
    agree((reply.common, bytes(reply.own)) == values[size - 1 - rank])
    agree(gathered == (values if rank == 0 else []))


@pytest.mark.parametrize("limit", [1, 7, 1 << 30])
def test_values_larger_than_an_mpi_call_moves(
    coordinator: Coordinator, agree: Agree, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    size = coordinator.size
    assert coordinator.communicator is not None
    monkeypatch.setattr(coordinator._session, "collectives", MpiCollectives(coordinator.communicator, limit))
    values = [bytes(range(rank, rank + 20 * rank)) for rank in range(size)]
    agree(coordinator.gather_all("report", values[coordinator.rank]) == values)
    reply = coordinator.merge("layout", values[coordinator.rank], lambda gathered: [*gathered[1:], gathered[0]])
    agree(reply == values[(coordinator.rank + 1) % size])
    agree(coordinator.on_root("find", lambda: list(range(40)), list[int]) == list(range(40)))
    np.testing.assert_array_equal(coordinator.share(np.arange(9.0)), np.arange(9.0))
    flags = np.arange(20) % size == coordinator.rank
    np.testing.assert_array_equal(coordinator.any(flags), np.ones(20))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.uint64).reshape(3, 4)[:, ::2],
        np.array(2.5, dtype=np.float32),
        np.zeros((0, 3), dtype=np.int64),
        np.array([True, False]),
        np.arange(5, dtype=">i4"),
        np.array([1 + 2j]),
    ],
    ids=["strided", "scalar", "empty", "bool", "big-endian", "complex"],
)
def test_share(coordinator: Coordinator, agree: Agree, array: np.ndarray) -> None:
    shared = coordinator.share(array if coordinator.rank == 0 else None)
    agree(shared.dtype == array.dtype and shared.shape == array.shape and np.array_equal(shared, array))


def test_share_of_a_read_only_array(coordinator: Coordinator, agree: Agree) -> None:
    array = np.frombuffer(b"12345678", dtype=np.uint8)
    agree(bytes(coordinator.share(array if coordinator.rank == 0 else None)) == b"12345678")


def test_gather_rows(coordinator: Coordinator, agree: Agree) -> None:
    rows = coordinator.gather_rows(np.array([coordinator.rank, 0.5]))
    if coordinator.rank == 0:
        agree(rows is not None and rows.tolist() == [[rank, 0.5] for rank in range(coordinator.size)])
    else:
        agree(rows is None)


def test_any(coordinator: Coordinator, agree: Agree) -> None:
    flags = np.zeros(coordinator.size + 1, dtype=np.uint8)
    flags[coordinator.rank] = 1
    result = coordinator.any(flags)
    agree(result.tolist() == [1] * coordinator.size + [0])
    agree(flags.sum() == 1, "the argument must stay as it was")
    agree(coordinator.any(np.zeros(0, dtype=np.bool_)).size == 0)


# ---- a rank fails ------------------------------------------------------------------------------------------------

AS_THEY_ARE = [LayoutError, RestoreMismatchError, CorruptCheckpointError, CheckpointNotFoundError]
OTHERS = [ValueError, MemoryError, CheckpointError]
EXITS = [KeyboardInterrupt, SystemExit]


def _check_failure(
    coordinator: Coordinator, raised: BaseException | None, error: BaseException, failing: int, step: str
) -> str:
    """What is wrong with what this rank got, given what was raised on rank `failing`; empty if nothing is."""
    here = coordinator.rank == failing
    if here and isinstance(error, tuple(EXITS)):
        return "" if raised is error else f"expected the exit itself. Got {raised!r}"
    if isinstance(error, tuple(AS_THEY_ARE)):
        right = type(raised) is type(error) and str(raised) == str(error)
    else:
        failures = {failing: f"{type(error).__name__}: {error}"}
        right = isinstance(raised, CollectiveError) and raised.failures == failures and raised.step == step
    if not right or raised is None:
        return f"got {raised!r}"
    return "" if raised.__cause__ is (error if here else None) else f"the cause is {raised.__cause__!r}"


def _catch(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", [*AS_THEY_ARE, *OTHERS, *EXITS])
def test_failure_in_a_step(coordinator: Coordinator, agree: Agree, kind: type[BaseException], failing: int) -> None:
    error = kind("model/w: what happened")
    reached = []

    def body() -> None:
        with coordinator.step("write", clear_frames=True):
            if coordinator.rank == failing:
                raise error
            reached.append("end")

    problem = _check_failure(coordinator, _catch(body), error, failing, "write")
    agree(not problem, problem)
    assert reached == ([] if coordinator.rank == failing else ["end"])
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.parametrize("kind", [*AS_THEY_ARE, *OTHERS, *EXITS])
@pytest.mark.parametrize("verb", ["on_root", "merge"])
def test_failure_of_a_function_on_root(
    coordinator: Coordinator, agree: Agree, kind: type[BaseException], verb: str
) -> None:
    error = kind("model/w: what happened")

    def fail(*_values: object) -> list[bytes]:
        raise error

    calls = {
        "on_root": lambda: coordinator.on_root("find", fail, list),
        "merge": lambda: coordinator.merge("find", b"value", fail),
    }
    problem = _check_failure(coordinator, _catch(calls[verb]), error, 0, "find")
    agree(not problem, problem)
    agree(_works(coordinator), "the next operation must work")


def test_failures_of_bad_arguments_are_agreed(coordinator: Coordinator, agree: Agree) -> None:
    root, last = coordinator.rank == 0, coordinator.rank == coordinator.size - 1
    bad: Any = "text" if last else [True]
    for call, failing, text in (
        (lambda: coordinator.share(None), 0, "TypeError: expected an array of numbers on rank 0. Got None."),
        (lambda: coordinator.any(bad), coordinator.size - 1, "ValueError: invalid literal for int()"),
        (lambda: coordinator.on_root("find", object, object), 0, "TypeError: Encoding objects of type object"),
        (lambda: coordinator.merge("find", b"", lambda _: [b""]), 0, "ValueError: expected one reply per rank"),
        (lambda: coordinator.merge("find", b"", lambda values: [None for _ in values] if root else []), 0, "TypeError"),
    ):
        raised = _catch(call)
        right = isinstance(raised, CollectiveError) and list(raised.failures) == [failing]
        agree(right and raised.failures[failing].startswith(text), f"got {raised!r}")
    agree(_works(coordinator), "the next operation must work")


def test_several_ranks_fail(coordinator: Coordinator, agree: Agree) -> None:
    rank, size = coordinator.rank, coordinator.size

    def all_fail() -> None:
        with coordinator.step("write", remedy="Buy a disk."):
            raise OSError(f"disk {rank}")

    def lowest_layout_error_wins() -> None:
        with coordinator.step("layout"):
            if rank == 0:
                raise OSError("disk")
            raise LayoutError(f"shards of rank {rank}")

    raised = _raised(all_fail)
    assert raised is not None
    agree(raised.failures == {other: f"OSError: disk {other}" for other in range(size)}, f"{raised}")
    agree("Buy a disk." in raised.text)
    agree(_raised(lowest_layout_error_wins) == Raised("LayoutError", "shards of rank 1", {}))
    agree(_works(coordinator), "the next operation must work")


def test_long_texts_travel_shortened(coordinator: Coordinator, agree: Agree) -> None:
    def fail() -> None:
        with coordinator.step("write"):
            raise ValueError("ü" * 100_000)

    raised = _raised(fail)
    assert raised is not None
    agree(len(raised.failures) == coordinator.size)
    agree(all(len(text.encode()) < 4200 and text.endswith(" ...") for text in raised.failures.values()))


# ---- a rank fails before a verb, inside it, or does not come -------------------------------------------------------


def _fail(*_values: object) -> list[bytes]:
    raise OSError("inside")


def _fail_parts(_values: list[Parts]) -> list[Parts]:
    raise OSError("inside")


VERBS: dict[str, Callable[[Coordinator, bool], object]] = {
    "on_root": lambda coordinator, fail: coordinator.on_root("verb", _fail if fail else list, list),
    "merge": lambda coordinator, fail: coordinator.merge("verb", b"", _fail if fail else list),
    "merge_parts": lambda coordinator, fail: coordinator.merge_parts(
        "verb", Parts(b"common", b""), _fail_parts if fail else list
    ),
    "gather_all": lambda coordinator, _: coordinator.gather_all("verb", b""),
    "gather_rows": lambda coordinator, _: coordinator.gather_rows(np.zeros(2)),
    "share": lambda coordinator, fail: coordinator.share(None if fail else np.arange(3)),
    "any": lambda coordinator, fail: coordinator.any(["x"] if fail else np.zeros(3)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("verb", VERBS)
def test_failure_before_a_verb(coordinator: Coordinator, agree: Agree, verb: str, failing: int) -> None:
    reached = []

    def operation() -> None:
        with coordinator.step("before"):
            if coordinator.rank == failing:
                raise OSError("disk")
        reached.append(VERBS[verb](coordinator, False))

    raised = _raised(operation)
    agree(raised is not None and raised.failures == {failing: "OSError: disk"}, f"{raised}")
    assert not reached
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in {"gather_all", "gather_rows"}])
def test_failure_inside_a_verb(coordinator: Coordinator, agree: Agree, verb: str) -> None:
    raised = _raised(lambda: VERBS[verb](coordinator, coordinator.rank == 0))
    agree(raised is not None and list(raised.failures) == [0], f"{raised}")
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_without_memory_for_what_others_send(
    coordinator: Coordinator, agree: Agree, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def small_bytearray(nbytes: int = 0) -> bytearray:
        if nbytes > 50_000:
            raise MemoryError
        return bytearray(nbytes)

    if coordinator.rank == failing:
        for module in (outcome, merging):
            monkeypatch.setattr(module, "bytearray", small_bytearray, raising=False)
    raised = _raised(lambda: coordinator.merge_parts("layout", Parts(b"a" * 100_000, b""), list))
    monkeypatch.undo()
    agree(raised is not None and raised.failures == {failing: "MemoryError"}, f"{raised}")
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.parametrize(
    ("owner", "name", "failing"),
    [(merging, "letter_of", 0), (merging, "letter_of", 1), (merging._Orders, "open", 0)],
    ids=["root's own", "what another sends", "what root takes apart"],
)
def test_rank_without_memory_for_copies_of_a_merge(
    coordinator: Coordinator, agree: Agree, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, failing: int
) -> None:
    def without(*_: object) -> object:
        raise MemoryError

    if coordinator.rank == failing:
        monkeypatch.setattr(owner, name, without)
    raised = _raised(lambda: coordinator.merge_parts("layout", Parts(b"a" * 1000, b"b"), list))
    monkeypatch.undo()
    agree(raised is not None and raised.failures == {failing: "MemoryError"}, f"{raised}")
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("verb", ["step", "communicator", *VERBS])
def test_absent_rank_at_a_first_call(
    comm: Any, agree: Agree, monkeypatch: pytest.MonkeyPatch, verb: str, absent: int
) -> None:
    monkeypatch.setattr(coordinator_module, "_FIRST_CALL_TIMEOUT", 0.3)
    coordinator = Coordinator(comm)

    def first_call() -> None:
        if verb == "step":
            with coordinator.step("verb"):
                pytest.fail("a body must not run before all ranks are here")
        elif verb == "communicator":
            _ = coordinator.communicator
        else:
            VERBS[verb](coordinator, False)

    raised = _raised(first_call) if comm.rank != absent else None
    comm.Barrier()
    agree((raised is None) == (comm.rank == absent) and (raised is None or raised.kind == "RankTimeoutError"))
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("first", [True, False])
def test_absent_rank_at_arrive(comm: Any, agree: Agree, absent: int, first: bool) -> None:
    coordinator = Coordinator(comm)
    if not first:
        coordinator.arrive("before", 0, 0, PATIENT)
    comm.Barrier()
    if comm.rank != absent:
        with pytest.raises(RankTimeoutError) as raised:
            coordinator.arrive("save", 0, 0, 0.5)
        assert raised.value.absent == (absent,)
    comm.Barrier()
    agree(_works(coordinator), "the next operation must work")


def test_only_root_calls_then_the_others_come_late(comm: Any, agree: Agree) -> None:
    coordinator = Coordinator(comm)
    if comm.rank == 0:
        with pytest.raises(RankTimeoutError, match="save is collective"):
            coordinator.arrive("save", 0, 0, 0.2)
    comm.Barrier()
    if comm.rank != 0:
        start = time.monotonic()
        with pytest.raises(RankTimeoutError, match="the others had given up"):
            coordinator.arrive("save", 0, 0, PATIENT)
        assert time.monotonic() - start < 1.0 + 2.0
    comm.Barrier()
    agree(_works(coordinator), "the next operation must work")


# ---- interrupts --------------------------------------------------------------------------------------------------


def test_interrupt_between_steps_is_agreed_in_the_next_step(coordinator: Coordinator, agree: Agree) -> None:
    reached = []

    def operation() -> None:
        with coordinator.uninterrupted():
            coordinator.arrive("save", 0, 0, PATIENT)
            if coordinator.rank == 1:
                os.kill(os.getpid(), signal.SIGINT)
            reached.append(coordinator.on_root("find", lambda: 3, int))
            with coordinator.step("write"):
                reached.append(coordinator.rank)

    raised = _raised(operation)
    expected = "KeyboardInterrupt" if coordinator.rank == 1 else "CollectiveError"
    agree(raised is not None and raised.kind == expected, f"{raised}")
    assert reached == ([3] if coordinator.rank == 1 else [3, coordinator.rank])
    agree(_works(coordinator), "the next operation must work")


# ---- communicators -----------------------------------------------------------------------------------------------


def test_different_operations_do_not_pair(coordinator: Coordinator, agree: Agree) -> None:
    raised = _raised(lambda: coordinator.arrive("restore" if coordinator.rank else "save", 0, 0, PATIENT))
    others = ", ".join(str(rank) for rank in range(1, coordinator.size))
    agree(
        raised is not None
        and raised.kind == "LayoutError"
        and f"restore on rank {others}; save on rank 0" in raised.text
    )
    agree(_works(coordinator), "the next operation must work")


def test_different_first_operations_do_not_pair(comm: Any, agree: Agree) -> None:
    coordinator = Coordinator(comm)
    raised = _raised(
        lambda: coordinator.arrive("save", 0, 0, PATIENT) if comm.rank else coordinator.gather_all("x", b"")
    )
    agree(raised is not None and raised.kind == "LayoutError", f"{raised}")
    agree(_works(coordinator), "the next operation must work")


@pytest.mark.mpi(min_size=4)
def test_sub_communicators_at_the_same_time(agree: Agree) -> None:
    world = MPI.COMM_WORLD
    half = world.Split(world.rank % 2, -world.rank)
    coordinator = Coordinator(half)
    for number in range(20):
        assert coordinator.arrive("save", world.rank % 2, 0, PATIENT)
        found = coordinator.on_root("find", functools.partial(max, world.rank, number), int)
        assert found == max(world.size - 2 + world.rank % 2, number)
    if world.rank % 2 == 0:
        if half.rank == 0:
            with pytest.raises(RankTimeoutError) as raised:
                coordinator.arrive("save", 0, 0, 0.2)
            assert raised.value.absent == tuple(range(1, half.size))
        half.Barrier()
    agree(_works(coordinator), "the next operation must work")
    half.Free()


def test_coordinators_share_one_duplicate(comm: Any, agree: Agree) -> None:
    first, second = Coordinator(comm), Coordinator(comm)
    assert first.arrive("save", 0, 0, PATIENT)
    assert second.arrive("save", 0, 0, PATIENT)
    assert first.communicator is not None
    agree(first.communicator is second.communicator)
    agree(copy.deepcopy(first).communicator is first.communicator)
    agree(MPI.Comm.Compare(first.communicator, comm) == MPI.CONGRUENT, "it must be a duplicate")
    other = comm.Dup()
    agree(Coordinator(other).communicator != first.communicator, "a user's duplicate has a session of its own")
    other.Free()
    agree(_works(second))


def test_messages_of_the_user_stay_apart(comm: Any, agree: Agree) -> None:
    coordinator = Coordinator(comm)
    for tag in (0, 1, 7):
        comm.send(("user", tag), (comm.rank + 1) % comm.size, tag)
        assert coordinator.arrive("save", tag, 0, PATIENT)
    received = [comm.recv(tag=tag) for tag in (0, 1, 7)]
    agree(received == [("user", tag) for tag in (0, 1, 7)])


@pytest.mark.parametrize("used", ["never", "in vain", "once"])
def test_freed_communicator(agree: Agree, used: str) -> None:
    comm = MPI.COMM_WORLD.Dup()
    coordinator = Coordinator(comm)
    duplicate = None
    if used == "once":
        duplicate = coordinator.communicator
    if used == "in vain" and comm.rank == 0:
        with pytest.raises(RankTimeoutError):
            coordinator.arrive("save", 0, 0, 0.1)
    comm.Barrier()
    comm.Free()
    for call in (lambda: coordinator.arrive("save", 0, 0, PATIENT), lambda: coordinator.rank):
        raised = _raised(call)
        agree(raised is not None and raised.kind == "CheckpointError" and "has been freed" in raised.text, f"{raised}")
    agree(not duplicate, "the duplicate must be freed with it")


def test_communicator_freed_through_another_handle(agree: Agree) -> None:
    comm = MPI.COMM_WORLD.Dup()
    coordinator = Coordinator(comm)
    assert coordinator.arrive("save", 0, 0, PATIENT)
    handle = MPI.Comm.f2py(comm.py2f())
    handle.Free()
    raised = _raised(lambda: coordinator.arrive("save", 0, 0, PATIENT))
    agree(raised is not None and "has been freed" in raised.text, f"{raised}")


def test_null_communicators_are_refused_at_the_first_call(agree: Agree) -> None:
    for null in (MPI.COMM_NULL, MPI.COMM_WORLD.Split(MPI.UNDEFINED)):
        coordinator = Coordinator(null)
        raised = _raised(lambda coordinator=coordinator: coordinator.arrive("save", 0, 0, PATIENT))
        agree(raised is not None and raised.kind == "CheckpointError" and "null" in raised.text, f"{raised}")


def test_intercommunicators_are_refused(comm: Any, agree: Agree) -> None:
    side = comm.Split(comm.rank == 0)
    between = side.Create_intercomm(0, comm, 1 if comm.rank == 0 else 0)
    raised = _raised(lambda: Coordinator(between))
    agree(raised is not None and raised.kind == "TypeError" and "Intercomm" in raised.text, f"{raised}")
    between.Free()
    side.Free()


def test_same_outcome_for_all_at_once(coordinator: Coordinator, comm: Any) -> None:
    """Many operations in a row, some failing, without any other synchronisation."""
    outcomes = []
    for number in range(200):

        def operation(number: int = number) -> int:
            coordinator.arrive("save", number, 0, PATIENT)
            with coordinator.step("write"):
                if number % 3 == 0 and coordinator.rank == number % coordinator.size:
                    raise OSError("disk")
            return coordinator.on_root("commit", lambda: number, int)

        outcomes.append(_raised(operation))
    assert _same_everywhere(comm, outcomes)
    assert [outcome is not None for outcome in outcomes] == [number % 3 == 0 for number in range(200)]


# ---- shared memory -----------------------------------------------------------------------------------------------


def test_a_python_without_memfd_create_shares_memory_too(
    coordinator: Coordinator, comm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    memory = coordinator.node.shared_memory(1 << 16)
    assert memory is not None
    memory.parts[comm.rank][-1] = 7 + comm.rank
    assert not coordinator.node.any_set(False)
    assert [part[-1] for part in memory.parts] == [7 + rank for rank in range(comm.size)]
    memory.free()


def test_whatever_fails_on_the_rank_that_makes_shared_memory_no_rank_waits(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> int:
        raise AttributeError("memfd_create")

    monkeypatch.setattr(shared_memory, "_memory_file", failing)
    assert coordinator.node.shared_memory(1 << 16) is None
    assert _works(coordinator)


@pytest.mark.parametrize("left", range(4))
@pytest.mark.parametrize("scarce", [0, 1])
def test_all_ranks_of_a_node_have_shared_memory_or_none(
    coordinator: Coordinator, comm: Any, scarce: int, left: int
) -> None:
    """Also if one rank has few descriptors left. A window of MPI would hang or end the job."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    node = coordinator.node
    first = node.shared_memory(1 << 16)
    assert first is not None
    first.free()
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)] if comm.rank == scarce else []
    if held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + left, most))
    try:
        memory = node.shared_memory(1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        for fd in held:
            os.close(fd)
    assert _same_everywhere(comm, memory is None)
    assert (memory is None) == (left == 0) or left in (1, 2)
    if memory is not None:
        memory.parts[comm.rank][-1] = 7 + comm.rank
        assert not node.any_set(False)
        assert [part[-1] for part in memory.parts] == [7 + rank for rank in range(comm.size)]
        memory.free()
    assert _works(coordinator)
