"""`save_async` under MPI: the same file as `save`, failures on any rank at any step, ranks that do not come.

All of it twice: with a thread that speaks to the other ranks (THREAD_MULTIPLE), and without, as on an MPI that does not
allow it: then the ranks end a save together in a collective call.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt.checkpoint
import distckpt.managed_directory
import distckpt.saving.background_save
import distckpt.saving.draft
import distckpt.saving.output
import distckpt.saving.saver
import distckpt.saving.writer
import distckpt.storage.rawio
from distckpt import Checkpoint, CheckpointManager, RankTimeoutError, SaveOptions, ShardedVariable, latest_checkpoint
from distckpt.coordination import background
from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CollectiveError, LayoutError
from distckpt.exchange import aggregation
from distckpt.saving.agreed_layout import AgreedLayout
from distckpt.saving.background_save import BackgroundSave
from distckpt.storage import creation, packing
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.verify import verify_file

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(120)]

SIZE = 3
ROOT, EVERY = [0], [0, 1, 2]
PATIENCE = 30.0
NAMES = ("model", "optimizer", "rows", "small", "step")


@pytest.fixture(params=["multiple", "serialized"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The thread level. Communicators of a test are new, and so are their threads in the background."""
    if request.param == "serialized":
        # One rank with less is enough: the ranks agree on what they do.
        monkeypatch.setattr(background, "threads_may_speak", lambda: MPI.COMM_WORLD.rank != 1)
    level: str = request.param
    return level


class Program:
    """What a rank trains: replicated and sharded tensors, optimizer state, python values."""

    def __init__(self, comm: Any, seed: int, n_small: int = 0) -> None:
        torch.manual_seed(seed)
        own = [torch.full((2,), float(seed + comm.rank + number)) for number in range(n_small)]
        self.small = [ShardedVariable(tensor, (2 * comm.size,), (2 * comm.rank,)) for tensor in own]
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        rows = torch.full((200, 3), float(10 * seed + comm.rank))
        self.checkpoint = Checkpoint(
            comm=comm,
            model=self.model,
            optimizer=self.optimizer,
            small=self.small,
            rows=ShardedVariable(rows, (200 * comm.size, 3), (200 * comm.rank, 0)),
            step=seed,
        )
        self.train()

    def train(self) -> None:
        """Changes values, not the layout."""
        generator = torch.Generator().manual_seed(self.checkpoint.step)
        self.model(torch.randn(8, 6, generator=generator)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.checkpoint.rows.tensor += 1
        self.checkpoint.step += 1

    def values(self) -> list[object]:
        slots = [value for slots in self.optimizer.state.values() for value in slots.values()]
        sharded = [shard.tensor for shard in (self.checkpoint.rows, *self.small)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *slots, *sharded]
        return [*(tensor.detach().numpy().tobytes() for tensor in tensors), self.checkpoint.step]


def names_in(comm: Any, directory: Path) -> set[str]:
    """What is in the directory when all ranks are done."""
    comm.Barrier()
    return set(comm.bcast(os.listdir(directory) if comm.rank == 0 else None))  # noqa: PTH208


def without_manifest(path: str) -> bytes:
    manifest = open_checkpoint(path).manifest_bytes
    return Path(path).read_bytes().replace(manifest, b" " * len(manifest))


@dataclass(frozen=True)
class Outcome:
    """How a call ended on one rank."""

    kind: str
    text: str = ""
    failures: tuple[tuple[int, str], ...] = ()


def outcome_of(call: Callable[[], object]) -> Outcome:
    try:
        call()
    except CollectiveError as error:
        return Outcome("CollectiveError", error.step, tuple(error.failures.items()))
    except BaseException as error:
        return Outcome(type(error).__name__, str(error))
    return Outcome("ok")


def wait_ended(comm: Any, handle: Any) -> None:
    """Until the save has ended on all ranks, without asking for its result."""
    while not comm.allreduce(handle.done(), MPI.LAND):
        time.sleep(0.001)


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_file_is_that_of_a_synchronous_save(subcomm: Any, mpi_dir: Path, level: str, overlap: bool) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    expected, found = [], []
    for _ in range(3):
        twin = Checkpoint(comm=comm, **{name: getattr(program.checkpoint, name) for name in NAMES})
        expected.append(twin.save(mpi_dir / "a" / "ckpt", options=SaveOptions(transport="posix")))
        handle = program.checkpoint.save_async(mpi_dir / "b" / "ckpt", options=SaveOptions(overlap=overlap))
        assert handle.is_local == (level == "multiple")
        handle.wait_staged()
        program.train()
        found.append(handle.result())
    assert program.checkpoint.save_counter == 3
    if comm.rank == 0:
        assert latest_checkpoint(mpi_dir / "b") == found[-1]
        for left, right in zip(found, expected, strict=True):
            # The counter of each twin is that of the directory, so the whole files are equal.
            assert without_manifest(left) == without_manifest(right)
            assert verify_file(left) == []
        assert without_manifest(found[0]) != without_manifest(found[1])
    comm.Barrier()


def test_a_commit_without_a_further_call(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    handle = Program(comm, 1).checkpoint.save_async(mpi_dir / "ckpt")
    deadline = time.monotonic() + PATIENCE
    while not Path(handle.path).exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert Path(handle.path).exists()
    assert handle.result(PATIENCE) == handle.path


@pytest.mark.parametrize("overlap", [False, True])
def test_the_file_is_made_in_the_background_where_the_thread_may_say_so(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, level: str, overlap: bool
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program, opened = Program(comm, 1), threading.Event()
    program.checkpoint.save_async(mpi_dir / "ckpt").result()
    known = names_in(comm, mpi_dir)
    make = distckpt.saving.draft.create_like
    if level == "serialized":
        opened.set()
    monkeypatch.setattr(
        distckpt.saving.draft, "create_like", lambda *args: make(*args) if opened.wait(PATIENCE) else None
    )
    before = program.values()
    handle = program.checkpoint.save_async(mpi_dir / "ckpt", options=SaveOptions(overlap=overlap))
    program.train()
    assert len(names_in(comm, mpi_dir) - known) == (level == "serialized")
    comm.Barrier()
    opened.set()
    path = handle.result()
    assert names_in(comm, mpi_dir) == {*known, "ckpt-2.h5"}
    program.checkpoint.restore(path).assert_consumed()
    assert program.values() == before


@pytest.mark.usefixtures("level")
def test_several_in_flight(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    begin, work = BackgroundSave.begin, BackgroundSave.work

    def slow_begin(flight: BackgroundSave, coordinator: Coordinator) -> None:
        time.sleep(0.02 * (SIZE - comm.rank))
        begin(flight, coordinator)

    def slow_work(flight: BackgroundSave) -> None:
        time.sleep(0.02 * comm.rank)
        work(flight)

    monkeypatch.setattr(BackgroundSave, "begin", slow_begin)
    monkeypatch.setattr(BackgroundSave, "work", slow_work)
    program, options = Program(comm, 1), SaveOptions(max_in_flight=3)
    states, handles = [], []
    for _ in range(8):
        handles.append(program.checkpoint.save_async(mpi_dir / "ckpt", options=options))
        states.append(program.values())
        program.train()
    assert [handle.path for handle in handles] == [str(mpi_dir / f"ckpt-{n + 1}.h5") for n in range(8)]
    assert handles[-1].result() == str(mpi_dir / "ckpt-8.h5")
    assert all(handle.done() for handle in handles)
    assert program.checkpoint.save_counter == 8
    for handle, state in zip(handles, states, strict=True):
        program.checkpoint.restore(handle.path).assert_consumed()
        assert program.values() == state


# ---- failures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        step: The step that must fail.
        owner: Module or class in which a function is replaced by one that raises.
        name: The function.
        ranks: The ranks on which it fails, one after the other.
        n_small: Number of small sharded variables.
    """

    step: str
    owner: Any
    name: str
    ranks: list[int]
    n_small: int = 0

    def is_in_background(self, level: str) -> bool:
        """Whether the call has returned before. The file is made there where the thread may say so."""
        return self.step in ("write", "aggregate", "commit") or (level == "multiple" and self.owner is creation)

    def is_possible(self, level: str) -> bool:
        """Whether the function is called at all: without a thread that speaks there is less to do."""
        return level == "multiple" or self.step not in ("duplicate the communicator", "aggregate")

    def __str__(self) -> str:
        return f"{self.step}-{self.owner.__name__.rpartition('.')[2]}.{self.name}" + "-many" * (self.n_small > 0)


class Raise:
    """A function that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_args: object, **_kwargs: object) -> None:
        raise self.error


MANY = 90  # small variables, whose shards the ranks write for one another
FAULTS = [
    Fault("capture", distckpt.checkpoint, "walk", EVERY),
    Fault("start a thread", background.Background, "start", EVERY),
    Fault("duplicate the communicator", background, "PolledCollectives", EVERY),
    Fault("create", distckpt.saving.output, "next_number", ROOT),
    Fault("create", creation, "rebuild", ROOT),
    Fault("create", creation, "_new_file", ROOT),
    Fault("stage", AgreedLayout, "jobs", EVERY),
    Fault("stage", distckpt.saving.background_save.Snapshot, "_copy_now", EVERY),
    Fault("stage", distckpt.saving.saver.HostBuffers, "take", EVERY),
    Fault("write", distckpt.saving.background_save.Snapshot, "jobs", EVERY),
    Fault("write", distckpt.saving.writer, "open_shared", EVERY),
    Fault("write", packing, "write_runs", EVERY),
    Fault("write", ChecksumLog, "write", EVERY),
    Fault("write", distckpt.saving.writer, "fsync", EVERY),
    Fault("write", distckpt.saving.writer, "open_shared", EVERY, MANY),
    Fault("aggregate", aggregation, "_Writing", EVERY, MANY),
    Fault("aggregate", packing, "digest", EVERY, MANY),
    Fault("aggregate", aggregation.Assembly, "put_together", ROOT, MANY),
    Fault("commit", distckpt.saving.draft, "write_manifest", ROOT),
    Fault("commit", distckpt.saving.draft, "fsync", ROOT),
    Fault("commit", distckpt.saving.draft, "commit", ROOT),
    Fault("commit", distckpt.storage.rawio, "sync_directory", ROOT),
    Fault("commit", distckpt.saving.draft, "record_save", ROOT),
]
ONCE = {"start a thread", "duplicate the communicator"}


def assert_agreed(comm: Any, fault: Fault, failing: int, mine: Outcome) -> None:
    outcomes = set(comm.allgather(mine))
    assert len(outcomes) == 1, outcomes
    agreed = outcomes.pop()
    assert (agreed.kind, agreed.text) == ("CollectiveError", fault.step), agreed
    assert [rank for rank, _ in agreed.failures] == [failing]
    assert agreed.failures[0][1].startswith(f"OSError: [Errno 28] injected on rank {failing}")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_failure_is_the_same_error_on_all_ranks_and_changes_nothing(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, level: str, fault: Fault
) -> None:
    if not fault.is_possible(level):
        return
    for rank in fault.ranks:
        comm = subcomm(SIZE)
        if comm is None:
            continue
        directory = mpi_dir / str(rank)
        program = Program(comm, 1, fault.n_small)
        program.checkpoint.save(directory / "ckpt")
        if fault.step not in ONCE:
            program.checkpoint.save_async(directory / "ckpt").result()
        known = names_in(comm, directory)
        program.train()
        before, counter = program.values(), program.checkpoint.save_counter
        handle = None
        with monkeypatch.context() as patch:
            if comm.rank == rank:
                patch.setattr(fault.owner, fault.name, Raise(OSError(28, f"injected on rank {rank}")))
            if fault.is_in_background(level):
                handle = program.checkpoint.save_async(directory / "ckpt")
                outcome = outcome_of(handle.result)
            else:
                outcome = outcome_of(lambda: program.checkpoint.save_async(directory / "ckpt"))  # noqa: B023
        assert_agreed(comm, fault, rank, outcome)
        assert names_in(comm, directory) == known
        assert program.values() == before
        assert program.checkpoint.save_counter == counter
        path = program.checkpoint.save_async(directory / "ckpt").result()
        assert path == str(directory / f"ckpt-{counter + 1}.h5")
        assert names_in(comm, directory) == {*known, f"ckpt-{counter + 1}.h5"}
        twin = Program(comm, 77, fault.n_small)
        assert twin.values() != program.values()
        twin.checkpoint.restore(path).assert_consumed()
        assert twin.values() == program.values()


@pytest.mark.parametrize("call", ["save", "save_async", "restore", "write"])
def test_a_failure_that_nobody_asked_for_is_raised_by_the_next_call_on_all_ranks(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, level: str, call: str
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    older = program.checkpoint.save(mpi_dir / "ckpt")
    target = older if call == "restore" else mpi_dir / "next"

    def make() -> None:
        made = getattr(program.checkpoint, call)(target)
        if call == "save_async":
            made.result()

    asked_by = {"nobody": [], "one": [1], "all": [0, 1, 2]} if level == "multiple" else {"nobody": [], "all": [0, 1, 2]}
    for who, ranks in asked_by.items():
        fault = Fault("write", distckpt.saving.writer, "fsync", [2])
        with monkeypatch.context() as patch:
            if comm.rank == 2:
                patch.setattr(fault.owner, fault.name, Raise(OSError(28, "injected on rank 2")))
            handle = program.checkpoint.save_async(mpi_dir / "ckpt")
            wait_ended(comm, handle)
        if comm.rank in ranks:
            assert outcome_of(handle.result).kind == "CollectiveError"
        outcome = outcome_of(make)
        if who == "nobody":
            assert_agreed(comm, fault, 2, outcome)
            outcome = outcome_of(make)  # only once
        assert outcome.kind == "ok", (who, outcome)


@pytest.mark.usefixtures("level")
def test_all_failing_ranks_are_named(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    if comm.rank > 0:
        monkeypatch.setattr(distckpt.saving.writer, "fsync", Raise(ValueError(f"from {comm.rank}")))
    with pytest.raises(CollectiveError) as error:
        program.checkpoint.save_async(mpi_dir / "ckpt").result()
    assert error.value.failures == {1: "ValueError: from 1", 2: "ValueError: from 2"}
    assert isinstance(error.value.__cause__, ValueError) == (comm.rank > 0)


# ---- ranks that do not come --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("level")
def test_a_rank_that_does_not_come(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    options = SaveOptions(timeout=0.3)
    for absent in range(SIZE):
        handle = program.checkpoint.save_async(mpi_dir / "ckpt")
        handle.result()
        if comm.rank != absent:
            with pytest.raises(RankTimeoutError) as error:
                program.checkpoint.save_async(mpi_dir / "ckpt", options=options)
            assert error.value.absent == (absent,)
        comm.Barrier()
    assert names_in(comm, mpi_dir) == {"checkpoint", "ckpt-1.h5", "ckpt-2.h5", "ckpt-3.h5"}
    assert program.checkpoint.save(mpi_dir / "ckpt") == str(mpi_dir / "ckpt-4.h5")


def test_a_rank_that_does_not_ask_where_all_must(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    monkeypatch.setattr(background, "threads_may_speak", lambda: False)
    program = Program(comm, 1)
    handle = program.checkpoint.save_async(mpi_dir / "ckpt", options=SaveOptions(timeout=0.3))
    assert not handle.is_local
    if comm.rank != 1:
        with pytest.raises(RankTimeoutError) as error:
            handle.result()
        assert error.value.absent == (1,)
    comm.Barrier()
    assert not Path(handle.path).exists()
    assert program.checkpoint.save(mpi_dir / "ckpt") == str(mpi_dir / "ckpt-2.h5")  # the next call ends both
    assert handle.result() == str(mpi_dir / "ckpt-1.h5")
    assert names_in(comm, mpi_dir) == {"checkpoint", "ckpt-1.h5", "ckpt-2.h5"}


@pytest.mark.usefixtures("level")
def test_a_slow_rank(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    opened = threading.Event()
    program = Program(comm, 1)
    if comm.rank == 1:
        fsync = distckpt.saving.writer.fsync
        monkeypatch.setattr(distckpt.saving.writer, "fsync", lambda fd: fsync(fd) if opened.wait(PATIENCE) else None)
    handle = program.checkpoint.save_async(mpi_dir / "ckpt")
    program.train()
    assert not handle.done()
    with pytest.raises(TimeoutError, match="not saved after"):
        handle.result(0.05)
    assert not Path(handle.path).exists()
    comm.Barrier()
    opened.set()
    assert handle.result() == handle.path
    assert program.checkpoint.save_counter == 1


@pytest.mark.usefixtures("level")
def test_different_calls(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    checkpoint = Program(comm, 1).checkpoint
    call = checkpoint.save if comm.rank == 1 else checkpoint.save_async
    with pytest.raises(LayoutError, match="different calls: save on rank 1; save_async on rank 0, 2"):
        call(mpi_dir / "ckpt")
    assert checkpoint.save_async(mpi_dir / "ckpt").result() == str(mpi_dir / "ckpt-1.h5")


# ---- the manager -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("level")
def test_a_manager_on_all_ranks(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    manager = CheckpointManager(program.checkpoint, mpi_dir, max_to_keep=2, step_counter="step", checkpoint_interval=1)
    for number in range(1, 5):
        handle = manager.save_async()
        assert handle is not None
        assert manager.save_async() is None  # it was at this step
        program.train()
        path = handle.result()
        assert path == manager.latest_checkpoint == str(mpi_dir / f"ckpt-{number}.h5")
        assert manager.checkpoints == [str(mpi_dir / f"ckpt-{n}.h5") for n in (number - 1, number) if n]
    assert names_in(comm, mpi_dir) == {"checkpoint", "ckpt-3.h5", "ckpt-4.h5"}
    with monkeypatch.context() as patch:
        if comm.rank == 0:
            patch.setattr(distckpt.managed_directory, "remove_checkpoints", Raise(OSError(28, "injected on rank 0")))
        handle = manager.save_async()
        assert handle is not None
        outcome = outcome_of(handle.result)
    assert_agreed(comm, Fault("delete old checkpoints", None, "", ROOT), 0, outcome)
    assert names_in(comm, mpi_dir) == {"checkpoint", "ckpt-3.h5", "ckpt-4.h5", "ckpt-5.h5"}
    assert program.checkpoint.save_counter == 5  # the checkpoint itself is complete
    program.train()
    assert manager.save() == str(mpi_dir / "ckpt-6.h5")
    assert names_in(comm, mpi_dir) == {"checkpoint", "ckpt-5.h5", "ckpt-6.h5"}


# ---- the communicator --------------------------------------------------------------------------------------------


def test_checkpoints_that_share_a_communicator(subcomm: Any, mpi_dir: Path, level: str) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    programs = [Program(comm, seed) for seed in (1, 2)]
    for _ in range(5):
        handles = [program.checkpoint.save_async(mpi_dir / f"p{n}") for n, program in enumerate(programs)]
        for program in programs:
            program.train()
    # In another order on each rank, where that is allowed.
    order = handles if level == "serialized" or comm.rank else handles[::-1]
    assert {handle.result() for handle in order} == {str(mpi_dir / "p0-5.h5"), str(mpi_dir / "p1-5.h5")}


@pytest.mark.usefixtures("level")
def test_freeing_the_communicator_completes_what_is_in_flight(subcomm: Any, mpi_dir: Path) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    own = comm.Dup()
    handle = Program(own, 1).checkpoint.save_async(mpi_dir / "ckpt")
    own.Free()
    comm.Barrier()
    assert Path(handle.path).exists()
    assert handle.result() == handle.path


@pytest.fixture(autouse=True)
def no_thread_is_left(subcomm: Any) -> Iterator[None]:
    """The threads end with the communicators of their test."""
    yield
    subcomm.free()
    names = [thread.name for thread in threading.enumerate() if thread.name == "distckpt-background"]
    assert names == []
