"""An exception on each rank at each step of save and restore: one error on all ranks, nothing lost, and the next works.

The tables below are the test. Each row says which function fails, and in which step the ranks must agree on it.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distckpt.checkpoint
import distckpt.exchange.reading
import distckpt.exchange.writing
import distckpt.restoring.restoration
import distckpt.restoring.restorer
import distckpt.saving.draft
import distckpt.saving.output
import distckpt.saving.saver
import distckpt.saving.writer
import distckpt.source
import distckpt.storage.rawio
import distckpt.wire
from distckpt import Checkpoint, RestoreOptions, SaveOptions, ShardedVariable, latest_checkpoint
from distckpt.coordination import coordinator
from distckpt.errors import CollectiveError, RankTimeoutError
from distckpt.exchange import aggregation, taking
from distckpt.saving.agreed_layout import AgreedLayout
from distckpt.storage import checksum, creation, hdf5, manifest, mpio, packing, rawio, skeleton, state, units
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.verify import verify_file

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(120)]

SIZE = 3
ROOT, EVERY, OTHERS = [0], [0, 1, 2], [1, 2]
BOTH = ("posix", "mpio")


@pytest.fixture(autouse=True)
def all_pieces_through_hdf5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpio.split_pieces, "__defaults__", (0,))


# ---- the state ---------------------------------------------------------------------------------------------------


class Meter:
    """A user's object with a state of its own."""

    def __init__(self, value: float) -> None:
        self.values = torch.full((3,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.clone(), "count": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class Program:
    """What a rank trains: replicated and sharded tensors, optimizer state, python values."""

    def __init__(self, comm: Any, seed: int, n_small: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()
        self.meter = Meter(seed)
        own = [torch.full((2,), float(seed + comm.rank + number)) for number in range(n_small)]
        self.small = [ShardedVariable(tensor, (2 * comm.size,), (2 * comm.rank,)) for tensor in own]
        rows = torch.full((2, 3), float(10 * seed + comm.rank))
        self.checkpoint = Checkpoint(
            comm=comm,
            model=self.model,
            optimizer=self.optimizer,
            meter=self.meter,
            small=self.small,
            rows=ShardedVariable(rows, (2 * comm.size, 3), (2 * comm.rank, 0)),
            columns=ShardedVariable(rows.clone(), (2, 3 * comm.size), (0, 3 * comm.rank)),
            large=ShardedVariable(torch.full((1, 9000), float(seed)), (comm.size, 9000), (comm.rank, 0)),
            step=seed,
        )

    def train(self) -> None:
        """Changes values, not the layout."""
        self.optimizer.step()
        for shard in self.shards():
            shard.tensor += 1
        self.checkpoint.step += 1

    def shards(self) -> list[ShardedVariable]:
        return [self.checkpoint.rows, self.checkpoint.columns, self.checkpoint.large]

    def values(self) -> list[object]:
        slots = [slot["momentum_buffer"] for slot in self.optimizer.state.values()]
        sharded = [shard.tensor for shard in (*self.shards(), *self.small)]
        tensors = [*self.model.parameters(), *slots, self.meter.values, *sharded]
        return [*(tensor.detach().numpy().tobytes() for tensor in tensors), self.checkpoint.step]


# ---- what happened -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a call ended on one rank; without the exception, which would keep files open."""

    kind: str
    text: str = ""
    step: str = ""
    failures: tuple[tuple[int, str], ...] = ()


def outcome_of(call: Callable[[], object]) -> Outcome:
    try:
        call()
    except CollectiveError as error:
        return Outcome("CollectiveError", str(error), error.step, tuple(error.failures.items()))
    except BaseException as error:
        return Outcome(type(error).__name__, str(error))
    return Outcome("ok")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Libraries' objects are not visited by each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # the names alone, and some vanish


@dataclass(frozen=True)
class Fault:
    """One row of a table.

    Attributes:
        step: The step that must fail.
        owner: Module or class in which a function is replaced by one that raises.
        name: The function.
        ranks: The ranks on which it fails, one after the other.
        transports: The transports of the save.
        layouts: "new": the first save of a Checkpoint; "known": a later one.
        together: It fails on all `ranks` at once.
        collective: Collective transfers.
        n_small: Number of small sharded variables.
    """

    step: str
    owner: Any
    name: str
    ranks: list[int]
    transports: tuple[str, ...] = ("posix",)
    layouts: tuple[str, ...] = ("new", "known")
    together: bool = False
    collective: bool = False
    n_small: int = 0

    def __str__(self) -> str:
        owner = self.owner.__name__.removeprefix("distckpt.").rpartition(".")[2]
        return f"{self.step}-{owner}.{self.name}" + "-collective" * self.collective

    def rounds(self) -> list[list[int]]:
        return [self.ranks] if self.together else [[rank] for rank in self.ranks]

    def inject(self, patch: pytest.MonkeyPatch, rank: int, kind: type[BaseException]) -> None:
        text = f"injected on rank {rank}"
        error = OSError(28, text) if kind is OSError else kind(text)
        patch.setattr(self.owner, self.name, Raise(error))


class Raise:
    """A function that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_args: object, **_kwargs: object) -> None:
        raise self.error


def assert_agreed(comm: Any, fault: Fault, failing: list[int], mine: Outcome, kind: type[BaseException]) -> None:
    """All ranks raised the same `CollectiveError`, which names the step and the ranks; an interrupted one its own."""
    outcomes = comm.allgather(mine)
    collective = [outcome for outcome in outcomes if outcome.kind == "CollectiveError"]
    if issubclass(kind, Exception):
        assert len(collective) == comm.size, outcomes
    else:
        assert [outcome.kind for outcome in outcomes] == [
            kind.__name__ if rank in failing else "CollectiveError" for rank in range(comm.size)
        ]
    assert len(set(collective)) <= 1, collective
    for agreed in collective[:1]:
        assert agreed.step == fault.step, agreed
        assert [rank for rank, _ in agreed.failures] == failing
        for rank, text in agreed.failures:
            assert text.startswith(kind.__name__), text
            assert f"injected on rank {rank}" in text


def names_in(comm: Any, directory: Path) -> set[str]:
    """What is in the directory when all ranks are done."""
    comm.Barrier()
    return set(comm.bcast(os.listdir(directory) if comm.rank == 0 else None))  # noqa: PTH208


def assert_usable(comm: Any, program: Program, directory: Path, number: int, options: SaveOptions) -> None:
    """The next save works, and so does a restore of it into a differing twin."""
    path = program.checkpoint.save(directory / "ckpt", options=options)
    assert path == str(directory / f"ckpt-{number}.h5")
    assert program.checkpoint.save_counter == number
    assert names_in(comm, directory) == {"checkpoint", *(f"ckpt-{n + 1}.h5" for n in range(number))}
    assert (verify_file(path) if comm.rank == 0 else []) == []
    twin = Program(comm, 77, len(program.small))
    assert twin.values() != program.values()
    twin.checkpoint.restore(path).assert_consumed()
    assert twin.values() == program.values()
    assert twin.checkpoint.save_counter == number


# ---- save --------------------------------------------------------------------------------------------------------

NEW, KNOWN = ("new",), ("known",)
MANY = 90  # small variables, whose shards the ranks write for one another
SAVE_FAULTS = [
    Fault("capture", distckpt.checkpoint, "walk", EVERY),
    Fault("capture", Meter, "state_dict", EVERY),
    Fault("capture", distckpt.saving.saver, "capture", EVERY),
    Fault("layout", distckpt.wire, "merge", ROOT, layouts=NEW),
    Fault("layout", distckpt.saving.output.Output, "adopt", ROOT, layouts=NEW),
    Fault("plan", distckpt.saving.saver, "AgreedLayout", EVERY, layouts=NEW),
    Fault("create", distckpt.saving.output.Output, "update_values", ROOT),
    Fault("create", distckpt.saving.output, "next_number", ROOT),
    Fault("create", distckpt.saving.output, "sweep", ROOT, layouts=NEW),
    Fault("create", distckpt.saving.output, "_choose_transport", ROOT),
    Fault("create", rawio, "reserve", ROOT),
    Fault("create", skeleton, "_create_datasets", ROOT, layouts=NEW),
    Fault("create", skeleton, "_read_runs", ROOT, layouts=NEW),
    Fault("create", creation, "rebuild", ROOT),
    Fault("create", manifest, "encode_layout", ROOT, layouts=NEW),
    Fault("create", manifest, "encode_unsealed", ROOT),
    Fault("share", coordinator, "_array_type", ROOT, layouts=NEW),
    Fault("open", distckpt.saving.writer, "open_shared", EVERY),
    Fault("open", AgreedLayout, "jobs", EVERY, transports=BOTH),
    Fault("open", packing, "_small_parts", EVERY, layouts=NEW),
    Fault("aggregate", aggregation, "aggregators", EVERY, layouts=NEW),
    Fault("aggregate", aggregation, "_own", EVERY, layouts=NEW, n_small=MANY),
    Fault("aggregate", aggregation, "_decode", EVERY, layouts=NEW, n_small=MANY),
    Fault("aggregate", aggregation.Assembly, "of", ROOT, layouts=NEW, n_small=MANY),
    Fault("aggregate", aggregation, "_Writing", EVERY, transports=BOTH, n_small=MANY),
    Fault("aggregate", packing, "digest", EVERY, n_small=MANY),
    Fault("aggregate", aggregation.Assembly, "put_together", ROOT, transports=BOTH, n_small=MANY),
    Fault("exchange", distckpt.exchange.writing, "_is_narrow", EVERY, transports=BOTH),
    Fault("exchange", distckpt.exchange.writing, "_encode_boxes", EVERY),
    Fault("exchange", mpio.PieceBytes, "get", EVERY),
    Fault("exchange", distckpt.exchange.writing, "plan_rounds", EVERY),
    Fault("exchange", distckpt.exchange.writing, "pieces_of", EVERY),
    Fault("exchange", mpio.PieceBytes, "flushed", EVERY, transports=BOTH),
    Fault("exchange", distckpt.exchange.writing, "shared_parts", EVERY, transports=BOTH),
    Fault("exchange", distckpt.exchange.writing, "write_unit", EVERY, transports=BOTH),
    Fault("divide", mpio, "split_pieces", EVERY, transports=("mpio",)),
    Fault("open parallel HDF5", mpio, "ParallelFile", EVERY, transports=("mpio",), together=True),
    Fault("write", rawio, "write_vector", EVERY),
    Fault("write", packing, "write_runs", EVERY, transports=BOTH),
    Fault("write", mpio._Transfer, "_open", EVERY, transports=("mpio",)),
    Fault("open parallel HDF5", mpio.ParallelFile, "prepare_collective", EVERY, transports=("mpio",), collective=True),
    Fault("write", mpio._Transfer, "_open", EVERY, transports=("mpio",), collective=True),
    Fault("write", mpio, "_finish", EVERY, transports=("mpio",), collective=True),
    Fault("write", ChecksumLog, "write", EVERY, transports=BOTH),
    Fault("fsync", distckpt.saving.draft, "sealed", ROOT),
    Fault("fsync", distckpt.saving.draft, "write_manifest", ROOT),
    Fault("fsync", distckpt.saving.writer, "fsync", EVERY, transports=BOTH),
    Fault("commit", distckpt.saving.draft, "commit", ROOT, transports=BOTH),
    Fault("commit", distckpt.storage.rawio, "sync_directory", ROOT),
    Fault("commit", distckpt.saving.draft, "record_save", ROOT),
    Fault("commit", state, "write_state", ROOT),
]
INTERRUPTED = {
    "walk",
    "merge",
    "AgreedLayout",
    "_Writing",
    "reserve",
    "open_shared",
    "get",
    "write",
    "fsync",
    "commit",
    "record_save",
}
SAVE_CASES = [
    pytest.param(fault, transport, kind, id=f"{fault}-{transport}-{kind.__name__}")
    for fault in SAVE_FAULTS
    for transport in fault.transports
    for kind in (OSError, KeyboardInterrupt)
    if kind is OSError or fault.name in INTERRUPTED
]


@pytest.mark.parametrize(("fault", "transport", "kind"), SAVE_CASES)
def test_a_failing_save_is_the_same_error_on_all_ranks_and_changes_nothing(
    subcomm: Any,
    mpi_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    transport: Any,
    kind: type[BaseException],
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    options = SaveOptions(transport=transport, collective=fault.collective, durable=fault.step in ("fsync", "commit"))
    for layout in fault.layouts:
        for failing in fault.rounds():
            directory = mpi_dir / f"{layout}-{failing[0]}"
            program = Program(comm, 1, fault.n_small)
            program.checkpoint.save(directory / "ckpt", options=options)
            if layout == "new":
                program = Program(comm, 2, fault.n_small)
            else:
                program.train()
            gc.collect()  # what an earlier round has left, such as a restored twin, may have a file open
            before, counter, files = program.values(), program.checkpoint.save_counter, open_files()
            with monkeypatch.context() as patch:
                if comm.rank in failing:
                    fault.inject(patch, comm.rank, kind)
                outcome = outcome_of(lambda: program.checkpoint.save(directory / "ckpt", options=options))  # noqa: B023
            assert_agreed(comm, fault, failing, outcome, kind)
            assert names_in(comm, directory) == {"checkpoint", "ckpt-1.h5"}
            assert latest_checkpoint(directory) == str(directory / "ckpt-1.h5")
            assert (program.values(), program.checkpoint.save_counter) == (before, counter)
            assert open_files() == files
            assert_usable(comm, program, directory, 2, options)


def test_a_failing_write_leaves_the_file_that_was_there(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    path = program.checkpoint.write(mpi_dir / "model")
    for owner, name in ((distckpt.saving.writer, "fsync"), (rawio, "write_vector"), (distckpt.saving.draft, "commit")):
        program.train()
        with monkeypatch.context() as patch:
            if comm.rank == 0:
                patch.setattr(owner, name, Raise(OSError("injected")))
            options = SaveOptions(transport="posix")
            outcome = outcome_of(lambda: program.checkpoint.write(mpi_dir / "model", options=options))  # noqa: B023
        assert (outcome.kind, outcome.failures[0][0]) == ("CollectiveError", 0)
        assert names_in(comm, mpi_dir) == {"model.h5"}
        twin = Program(comm, 5)
        twin.checkpoint.read(path).assert_consumed()
        assert twin.checkpoint.step == 1
    program.checkpoint.write(mpi_dir / "model")
    twin.checkpoint.read(path).assert_consumed()
    assert twin.values() == program.values()


def test_all_failing_ranks_are_named(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    with monkeypatch.context() as patch:
        if comm.rank > 0:
            patch.setattr(distckpt.saving.writer, "fsync", Raise(ValueError(f"from {comm.rank}")))
        with pytest.raises(CollectiveError) as error:
            program.checkpoint.save(mpi_dir / "ckpt")
    assert error.value.failures == {1: "ValueError: from 1", 2: "ValueError: from 2"}
    assert isinstance(error.value.__cause__, ValueError) == (comm.rank > 0)


# ---- restore -----------------------------------------------------------------------------------------------------


class Numpy:
    """NumPy without memory for arrays."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def __call__(self) -> Numpy:
        return self

    def empty(self, *_args: object, **_kwargs: object) -> None:
        raise MemoryError(f"injected on rank {MPI.COMM_WORLD.rank}")


RESTORE_FAULTS = [
    Fault("capture", distckpt.checkpoint, "walk", EVERY),
    Fault("capture", Meter, "state_dict", EVERY),
    Fault("open", distckpt.source, "open_checkpoint", ROOT),
    Fault("open", distckpt.source, "resolve", ROOT),
    Fault("open", hdf5, "_offsets", ROOT),
    Fault("open the file on every rank", distckpt.source.manifests, "decode", OTHERS),
    Fault("open the file on every rank", distckpt.source, "open_shared", EVERY),
    Fault("match", distckpt.restoring.restoration, "bind", EVERY),
    Fault("match", distckpt.restoring.restoration, "assign", EVERY),
    Fault("read", taking.Own, "of", EVERY),
    Fault("read", distckpt.exchange.reading, "hulls_that_meet", EVERY),
    Fault("read", taking.Own, "wishes", EVERY),
    Fault("read", distckpt.exchange.reading, "decode_wishes", EVERY),
    Fault("read", taking, "plan_rounds", EVERY),
    Fault("read", distckpt.source.Source, "unit_reader", EVERY),
    Fault("read", units.UnitReader, "read", EVERY),
    Fault("read", taking, "shared_parts", EVERY),
    Fault("read", distckpt.restoring.restorer, "threads_of_rank", EVERY),
    Fault("read", distckpt.source, "read_in_threads", EVERY),
    Fault("read", rawio, "read_vector", EVERY),
    Fault("read", checksum.ChecksumReader, "_read", EVERY),
    Fault("assign", Meter, "load_state_dict", EVERY),
    Fault("assign", distckpt.restoring.restoration.Restoration, "settle", EVERY),
    Fault("report", distckpt.restoring.restorer, "warn", ROOT),
]
#: From these steps on, live values are undefined.
READING = {"read", "assign", "report"}
RESTORE_CASES = [
    pytest.param(fault, kind, id=f"{fault}-{kind.__name__}")
    for fault in RESTORE_FAULTS
    for kind in (OSError, KeyboardInterrupt)
    if kind is OSError or fault.name in {"walk", "open_checkpoint", "open_shared", "bind", "read_in_threads", "settle"}
]


@pytest.mark.parametrize(("fault", "kind"), RESTORE_CASES)
def test_a_failing_restore_is_the_same_error_on_all_ranks(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, kind: type[BaseException]
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    options = SaveOptions(durable=False, transport="posix")
    saved = Program(comm, 1)
    path = saved.checkpoint.save(mpi_dir / "ckpt", options=options)
    for rank in fault.ranks:
        program = Program(comm, 5)
        gc.collect()
        before, files = program.values(), open_files()
        with monkeypatch.context() as patch:
            if comm.rank == rank:
                fault.inject(patch, rank, kind)
            outcome = outcome_of(lambda: program.checkpoint.restore(path))  # noqa: B023
        if fault.owner is hdf5 and kind is OSError:  # whatever HDF5 says of a file, it is damaged
            assert outcome.kind == "CorruptCheckpointError"
            assert len(set(comm.allgather(outcome))) == 1
        else:
            assert_agreed(comm, fault, [rank], outcome, kind)
        assert open_files() == files
        if fault.step not in READING:
            assert program.values() == before
        assert program.checkpoint.save_counter == 0
        program.checkpoint.restore(path).assert_consumed()
        assert program.values() == saved.values()
        assert program.checkpoint.save_counter == 1
    assert_usable(comm, program, mpi_dir, 2, options)


def test_a_rank_without_memory_for_shared_arrays(subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    saved = Program(comm, 1)
    path = saved.checkpoint.save(mpi_dir / "ckpt")
    program = Program(comm, 5)
    with monkeypatch.context() as patch:
        if comm.rank == 1:
            patch.setattr(coordinator, "np", Numpy())
        outcome = outcome_of(lambda: program.checkpoint.save(mpi_dir / "ckpt"))
    assert_agreed(comm, Fault("share", np, "empty", EVERY), [1], outcome, MemoryError)
    program.checkpoint.restore(path).assert_consumed()
    assert_usable(comm, program, mpi_dir, 2, SaveOptions())


def test_values_that_a_failed_restore_left_waiting_are_not_applied_later(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    path = Program(comm, 1).checkpoint.save(mpi_dir / "ckpt")
    twin = Checkpoint(comm=comm, step=0)  # everything else of the file would wait for its name
    for rank in range(SIZE):
        with monkeypatch.context() as patch:
            if comm.rank == rank:
                patch.setattr(distckpt.restoring.restorer.Assignment, "apply", Raise(OSError("injected")))
            outcome = outcome_of(lambda: twin.restore(path))
        assert outcome.kind == "CollectiveError"
    twin.model = torch.nn.Linear(4, 3)
    before = twin.model.weight.clone()
    assert twin.retry_pending() == 0
    assert torch.equal(twin.model.weight, before)


def test_a_failing_assertion_is_the_same_error_on_all_ranks(
    subcomm: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    status = program.checkpoint.restore(program.checkpoint.save(mpi_dir / "ckpt"))
    for rank in range(SIZE):
        fault = Fault("capture", distckpt.checkpoint, "walk", EVERY)
        with monkeypatch.context() as patch:
            if comm.rank == rank:
                fault.inject(patch, rank, OSError)
            outcome = outcome_of(status.assert_consumed)
        assert_agreed(comm, fault, [rank], outcome, OSError)
    status.assert_consumed()


# ---- Ctrl-C at any moment ----------------------------------------------------------------------------------------


PATIENCE = 0.7


class Interrupter:
    """Sends a signal to this process once, after a delay."""

    def __init__(self, delay: float, number: signal.Signals) -> None:
        self._thread = threading.Thread(target=self._run, args=(delay, number))
        self._thread.start()

    @staticmethod
    def _run(delay: float, number: signal.Signals) -> None:
        time.sleep(delay)
        os.kill(os.getpid(), number)

    def wait(self) -> None:
        """Until the signal has been handled."""
        self._thread.join()
        time.sleep(0.001)


@pytest.fixture
def signals_raise() -> Iterator[None]:
    # mpirun's ranks may have inherited an ignored SIGINT. Many programs raise SystemExit in a handler of SIGTERM.
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, previous, strict=True):
        signal.signal(number, handler)


# Python drops an interrupt that comes in a destructor, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("signals_raise")
@pytest.mark.parametrize("operation", ["save", "restore", "assert"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_at_any_moment_separates_no_rank_from_the_others(
    subcomm: Any, mpi_dir: Path, operation: str, number: signal.Signals
) -> None:
    comm = subcomm(SIZE)
    if comm is None:
        return
    program = Program(comm, 1)
    path = program.checkpoint.save(mpi_dir / "ckpt", options=SaveOptions(durable=False))
    patient = RestoreOptions(timeout=PATIENCE)
    status = program.checkpoint.restore(path, options=patient)
    dice = random.Random(comm.bcast(random.randrange(1 << 30)))
    for _ in range(30):
        victim, delay = dice.randrange(SIZE), dice.uniform(0, 0.03)
        transport: Any = dice.choice(BOTH)
        counter = program.checkpoint.save_counter
        outcome = Outcome("KeyboardInterrupt")  # where it comes before the call
        try:
            interrupter = Interrupter(delay, number) if comm.rank == victim else None
            if operation == "save":
                # A rank interrupted before all have come has left: the others wait for it until the timeout.
                options = SaveOptions(durable=False, transport=transport, timeout=PATIENCE)
                outcome = outcome_of(lambda: program.checkpoint.save(mpi_dir / "ckpt", options=options))  # noqa: B023
            elif operation == "assert":
                outcome = outcome_of(status.assert_consumed)
            else:
                outcome = outcome_of(lambda: program.checkpoint.restore(path, options=patient))
            if interrupter:
                interrupter.wait()
        except KeyboardInterrupt:
            pass
        outcomes = comm.allgather(outcome)
        others = {outcome.kind for rank, outcome in enumerate(outcomes) if rank != victim}
        assert len(others) == 1, outcomes
        assert others <= {"ok", CollectiveError.__name__, RankTimeoutError.__name__}
        assert outcomes[victim].kind in ("ok", "KeyboardInterrupt", RankTimeoutError.__name__), outcomes
        counters = set(comm.allgather(program.checkpoint.save_counter))
        assert len(counters) == 1, (outcomes, counters)
        if operation == "save":
            assert counters == {counter + ("ok" in others)}
            assert names_in(comm, mpi_dir) == {"checkpoint", *(f"ckpt-{n + 1}.h5" for n in range(*counters))}
    program.checkpoint.restore(latest_checkpoint(mpi_dir)).assert_consumed()
