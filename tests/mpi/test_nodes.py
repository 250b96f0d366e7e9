"""Several nodes read together: each byte once per job, all of it verified, and sent to the nodes that want it alone.

One machine plays several nodes: the communicator of a node is a part of that of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, CollectiveError, CorruptCheckpointError, SaveOptions, ShardedVariable
from distckpt.coordination import coordinator, outcome, shared_memory
from distckpt.coordination.nodes import Payload
from distckpt.coordination.session import Session
from distckpt.exchange import across, node, taking, wants, writing
from distckpt.layout import box
from distckpt.source import Source
from distckpt.storage import packing, transfer

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(120)]

#: The node of each rank.
SPLITS = {
    "2+2": [0, 0, 1, 1],
    "in turns": [0, 1, 0, 1],
    "one by one": [0, 1, 2, 3],
    "3+1": [0, 0, 0, 1],
    "2+1": [0, 0, 1],
}
EVEN = ("2+2", "one by one")

UNIT_NBYTES = 5000
SHAPE = (32, 256)
FULL = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int32).reshape(SHAPE)
DTYPES = (torch.int32, torch.complex128, torch.uint8)
N_BYTES = sum(dtype.itemsize for dtype in DTYPES)
FAST = SaveOptions(durable=False)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds, each with several batches of arrivals, and many pieces of a variable."""
    for module in (node, across, taking, writing):
        monkeypatch.setattr(module, "UNIT_NBYTES", UNIT_NBYTES)
    for module in (box, transfer):
        monkeypatch.setattr(module, "MAX_PIECE_NBYTES", 9000)
    # Small variables are one piece each, so fewer are small here, and none that other tests have found to be.
    monkeypatch.setattr(packing, "SMALL_NBYTES", 9000)
    monkeypatch.setattr(packing, "_extent", packing._extent.__wrapped__)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, subcomm: Any) -> Callable[[str], Any]:
    """`split(name)`: a communicator over such nodes; None on ranks outside of it. Collective over COMM_WORLD."""

    def make(name: str) -> Any:
        node_of = SPLITS[name]

        def node_communicator(session: Session) -> Any:
            if session._node is None:
                assert session.duplicate is not None
                session._node = session.duplicate.Split(node_of[session.rank])
            return session._node

        monkeypatch.setattr(Session, "node_communicator", node_communicator)
        return subcomm(len(node_of))

    return make


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the messages of this rank."""
    sizes: list[int] = []
    swap = coordinator.swap

    def count(comm: Any, outgoing: Payload, incoming: Payload) -> None:
        sizes.append(len(outgoing.data))
        swap(comm, outgoing, incoming)

    monkeypatch.setattr(coordinator, "swap", count)
    return sizes


def rows(rank: int, size: int) -> tuple[slice, slice]:
    return slice(SHAPE[0] * rank // size, SHAPE[0] * (rank + 1) // size), slice(None)


def columns(rank: int, size: int) -> tuple[slice, slice]:
    return slice(None), slice(SHAPE[1] * rank // size, SHAPE[1] * (rank + 1) // size)


def replica(_rank: int, _size: int) -> tuple[slice, slice]:
    return slice(None), slice(None)


def hybrid(rank: int, _size: int) -> tuple[slice, slice]:
    """Two shards, each on every second rank."""
    return rows(rank % 2, 2)


def overlapping(rank: int, size: int) -> tuple[slice, slice]:
    """Columns that a rank shares with its neighbours."""
    width = SHAPE[1] // (size + 1)
    return slice(None), slice(width * rank, width * (rank + 2) if rank < size - 1 else None)


LAYOUTS = (rows, columns, replica, hybrid, overlapping)
Layout = Callable[[int, int], tuple[slice, slice]]


class Program:
    """A tensor in some layouts; shards that overlap otherwise than as replicas can be restored, and not saved."""

    def __init__(self, comm: Any, layouts: Sequence[Layout], *, blank: bool, biases: int = 20) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.expected: dict[str, torch.Tensor] = {}
        variables: dict[str, Any] = {}
        for number, layout in enumerate(layouts):
            where = layout(comm.rank, comm.size)
            for dtype in DTYPES:
                name = f"x{number}_{dtype.itemsize}"
                expected = self.expected[name] = (FULL + number).to(dtype)[where].contiguous()
                self.tensors[name] = torch.zeros_like(expected) if blank else expected.clone()
                offset = tuple(part.start or 0 for part in where)
                variables[name] = ShardedVariable(self.tensors[name], SHAPE, offset)
        for number in range(biases):
            name = f"bias{number}"
            self.expected[name] = torch.full((7,), float(number))
            variables[name] = self.tensors[name] = torch.zeros(7) if blank else self.expected[name].clone()
        self.nbytes = len(layouts) * FULL.numel() * N_BYTES + biases * 7 * 4
        self.checkpoint = Checkpoint(comm=comm, **variables)

    def is_restored(self) -> bool:
        return all(torch.equal(self.tensors[name], self.expected[name]) for name in self.tensors)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("saved_as", [rows, columns])
def test_each_byte_is_read_once_per_job_and_verified(
    split: Any, mpi_dir: Path, sources: list[Source], name: str, saved_as: Layout
) -> None:
    comm = split(name)
    if comm is None:
        return
    path = Program(comm, [saved_as] * len(LAYOUTS), blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    twin = Program(comm, LAYOUTS, blank=True)
    assert not twin.is_restored()
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()
    (source,) = sources
    assert comm.allreduce(source.bytes_read) == twin.nbytes
    # Of columns, a rank that wants a few rows sees no piece whole; nobody else wants them.
    unseen = FULL.numel() * N_BYTES if saved_as is columns else 0
    assert twin.nbytes - unseen <= comm.allreduce(source.bytes_verified) <= twin.nbytes


def test_what_one_node_alone_wants_is_not_sent(
    split: Any, mpi_dir: Path, sources: list[Source], sent: list[int]
) -> None:
    comm = split("2+2")

    def of_node(rank: int, _size: int) -> tuple[slice, slice]:
        """Replicas on the ranks of a node, columns on those of the other one, in rows of its own."""
        if rank < 2:
            return rows(0, 2)
        return rows(1, 2)[0], columns(rank - 2, 2)[1]

    path = Program(comm, [rows, rows], blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    twin = Program(comm, [of_node, rows], blank=True, biases=0)
    assert not twin.is_restored()
    twin.checkpoint.read(path)
    assert twin.is_restored()
    assert comm.allreduce(sources[0].bytes_read) == twin.nbytes
    assert sent == []


@pytest.mark.parametrize(("layout", "share"), [(replica, 3.0), (columns, 0.75), (hybrid, 1.0)])
def test_a_node_is_sent_what_it_wants_and_has_not_read(
    split: Any, mpi_dir: Path, sent: list[int], layout: Layout, share: float
) -> None:
    comm = split("one by one")
    path = Program(comm, [rows], blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    twin = Program(comm, [layout], blank=True, biases=0)
    twin.checkpoint.read(path)
    assert twin.is_restored()
    assert comm.allreduce(sum(sent)) == share * twin.nbytes
    assert max(sent) <= UNIT_NBYTES


def test_without_shared_memory_everything_goes_by_messages(
    split: Any, mpi_dir: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    comm = split("2+2")
    allocate = shared_memory._allocate

    def scarce(of: Any, nbytes: int) -> Any:
        if of.size == 1 or comm.rank < 2:
            return allocate(of, nbytes)
        return None if comm.rank == 2 else object()  # one rank without is enough

    path = Program(comm, [rows] * len(LAYOUTS), blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    twin = Program(comm, LAYOUTS, blank=True)
    monkeypatch.setattr(shared_memory, "_allocate", scarce)
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()
    assert comm.allreduce(sources[0].bytes_read) == twin.nbytes
    assert ("of this node cannot share" in caplog.text) == (comm.rank == 2)  # the first of the node


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize(
    ("saved_as", "keys"), [(rows, ("x1_4", "x2_16", "x3_1", "x4_4")), (columns, ("x1_1", "x1_16", "x2_4"))]
)
def test_damage_is_one_error_on_all_ranks(
    split: Any, mpi_dir: Path, sources: list[Source], name: str, saved_as: Layout, keys: Sequence[str]
) -> None:
    comm = split(name)
    path = Program(comm, [saved_as] * len(LAYOUTS), blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    Program(comm, LAYOUTS, blank=True).checkpoint.read(path)
    offsets = {variable.key: sources[0].in_file(i).offset for i, variable in enumerate(sources[0].manifest.variables)}
    for key in keys:
        for quarter in range(4):
            place = offsets[key] + quarter * FULL.numel() * int(key.partition("_")[2]) // 4
            flip(comm, path, place)
            with pytest.raises(CorruptCheckpointError, match=rf"{key}: the .* damaged") as raised:
                Program(comm, LAYOUTS, blank=True).checkpoint.read(path)
            assert len(set(comm.allgather(str(raised.value)))) == 1
            flip(comm, path, place)
    twin = Program(comm, LAYOUTS, blank=True)
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()


def flip(comm: Any, path: str, place: int) -> None:
    """Change a byte of the file, or change it back. Collective."""
    comm.Barrier()
    if comm.rank == 0:
        with Path(path).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0xFF]))
    comm.Barrier()


class Failing:
    """A function that fails when it is called for the n-th time."""

    def __init__(self, function: Callable[..., object], at: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


FAULTS = [
    (taking.Own, "of", 1),
    (across, "join_hulls", 1),
    (wants._Digested, "of", 1),
    (wants._Found, "of", 1),
    (wants, "Distinct", 1),
    (across, "variables_that_meet", 1),
    (taking.Own, "wishes", 1),
    (across, "join_wishes", 1),
    (wants._Digested, "of", 2),
    (across, "_Wants", 1),
    (taking, "plan_rounds", 1),
    (across, "_plan_batches", 1),
    (across, "_plan_batches", 3),
    (taking.Taking, "read", 1),
    (taking.Taking, "read", 3),
    (across, "cells_of", 1),
    (across, "pack", 1),
    (across, "pack", 3),
    (taking, "shared_parts", 2),
    (taking, "shared_parts", 30),
    (taking.Taking, "finish", 1),
]


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_at_any_moment_is_the_same_error_on_all_ranks(
    split: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[BaseException]
) -> None:
    comm = split(name)
    path = Program(comm, [rows] * len(LAYOUTS), blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    for owner, function, at in FAULTS:
        where, reached = f"{owner.__name__}.{function} call {at}", []
        for rank in range(comm.size) if kind is OSError else [3]:
            twin = Program(comm, LAYOUTS, blank=True)
            outcome: BaseException | None = None
            failing = Failing(getattr(owner, function), at, kind(f"injected on rank {rank}"))
            with monkeypatch.context() as patch:
                if comm.rank == rank:
                    is_method = isinstance(owner, type) and not hasattr(failing.function, "__self__")
                    patch.setattr(owner, function, as_method(failing) if is_method else failing)
                try:
                    twin.checkpoint.read(path)
                except BaseException as error:
                    outcome = error
            if comm.bcast(failing.left > 0, rank):  # this rank does not come so far
                assert outcome is None, where
            elif comm.rank == rank and kind is KeyboardInterrupt:
                assert type(outcome) is KeyboardInterrupt, where
                reached.append(rank)
            else:
                assert isinstance(outcome, CollectiveError), where
                assert list(outcome.failures) == [rank], where
                assert f"injected on rank {rank}" in outcome.failures[rank]
                reached.append(rank)
            del outcome
        assert len(reached) >= (2 if kind is OSError else 1), where
    twin = Program(comm, LAYOUTS, blank=True)
    assert not twin.is_restored()
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()


def as_method(function: Callable[..., object]) -> Callable[..., object]:
    def method(*args: object) -> object:
        return function(*args)

    return method


#: Gathers of one restore over several nodes: the name of the values, and for the how-manieth time.
GATHERS = [
    ("hulls", 1),
    ("digests of hulls", 1),
    ("hulls", 2),
    ("wishes", 1),
    ("digests of wishes", 1),
    ("wishes", 2),
]


@pytest.mark.parametrize("name", EVEN)
def test_a_rank_without_memory_for_what_is_gathered_is_named_once(
    split: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    comm = split(name)
    path = Program(comm, [rows] * len(LAYOUTS), blank=False).checkpoint.write(mpi_dir / "x", options=FAST)
    for values, at in GATHERS:
        twin = Program(comm, LAYOUTS, blank=True)
        with monkeypatch.context() as patch:
            if comm.rank == 2:
                patch.setattr(outcome, "make", WithoutMemory(values, at))
            with pytest.raises(CollectiveError) as error:
                twin.checkpoint.read(path)
        assert error.value.failures == {2: f"MemoryError: (while the {values} of all ranks were gathered)"}, values
        assert not twin.is_restored()
    twin.checkpoint.read(path).assert_consumed()
    assert twin.is_restored()


class WithoutMemory:
    """`outcome.make` on a rank that has no memory for the n-th gather of some values."""

    def __init__(self, values: str, at: int) -> None:
        self.values, self.left, self.make = values, at, outcome.make

    def __call__(self, collectives: Any, step: str, fn: Callable[[], Any]) -> Any:
        self.left -= step == self.values
        return self.make(collectives, step, fn if self.left or step != self.values else self.fail)

    def fail(self) -> Any:
        raise MemoryError
