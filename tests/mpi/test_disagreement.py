"""Ranks that call differently, hold different things, or do not come: one error on all, before any byte is written."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from distckpt import (
    Checkpoint,
    CheckpointNotFoundError,
    CheckpointWarning,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    PerRank,
    RankTimeoutError,
    RestoreMismatchError,
    RestoreOptions,
    RNGState,
    SaveOptions,
    ShardedVariable,
    Trackable,
    latest_checkpoint,
)
from distckpt.coordination.coordinator import Coordinator
from distckpt.storage import parallel_reading

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)


@pytest.fixture
def three(subcomm: Any, mpi_dir: Path) -> Any:  # noqa: ARG001  # skip when all ranks have set that up
    """A communicator of three ranks; the others have nothing to do."""
    comm = subcomm(3)
    if comm is None:
        pytest.skip("tests three ranks")
    return comm


def same_error(comm: Any, kind: type[BaseException], call: Callable[[], object]) -> str:
    """The text of the error that the call raises, the same on all ranks."""
    with pytest.raises(kind) as error:
        call()
    texts = comm.allgather(str(error.value))
    assert len(set(texts)) == 1, texts
    assert type(error.value) is kind
    return texts[0]


def assert_empty(comm: Any, directory: Path) -> None:
    comm.Barrier()
    assert list(directory.iterdir()) == []


# ---- calls -------------------------------------------------------------------------------------------------------


def test_different_prefixes(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "sub" / f"ckpt{three.rank}"))
    for rank in (1, 2):
        assert (
            f"path differs. Rank 0 passed '{mpi_dir}/sub/ckpt0', rank {rank} passed '{mpi_dir}/sub/ckpt{rank}'" in text
        )
    assert_empty(three, mpi_dir)
    assert checkpoint.save(mpi_dir / "ckpt") == str(mpi_dir / "ckpt-1.h5")


def test_different_options(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    last = three.rank == 2
    for mine, names in [
        (SaveOptions(durable=not last), ["durable", "True", "False"]),
        (SaveOptions(replicas="first" if last else "check"), ["replicas", "'first'", "'check'"]),
        (SaveOptions(metadata={"epoch": 3 if last else 2}), ["metadata", "('epoch', 3)", "('epoch', 2)"]),
        (SaveOptions(transport="posix", checksums=not last), ["checksums"]),
    ]:
        text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=mine))  # noqa: B023
        assert all(name in text for name in names), text
        assert "rank 2" in text
    assert_empty(three, mpi_dir)
    path = checkpoint.save(mpi_dir / "ckpt", options=SaveOptions(timeout=100 + three.rank))  # each rank's own affair
    text = same_error(
        three, LayoutError, lambda: checkpoint.restore(path, options=RestoreOptions(verify=three.rank > 0))
    )
    assert "verify differs. Rank 0 passed False, rank 1 passed True." in text
    checkpoint.restore(path).assert_consumed()


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_none_on_some_ranks(three: Any, mpi_dir: Path, known: bool) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    if known:
        checkpoint.save(mpi_dir / "ckpt")
    path: Any = None if three.rank == 1 else mpi_dir / "ckpt-1"
    assert "rank 1 passed None" in same_error(three, LayoutError, lambda: checkpoint.restore(path))
    assert "rank 1 passed None" in same_error(three, LayoutError, lambda: checkpoint.read(path))
    assert "rank 1 passed None" in same_error(three, LayoutError, lambda: checkpoint.save(path))
    assert "rank 1 passed None" in same_error(three, LayoutError, lambda: checkpoint.write(path))
    assert checkpoint.save_counter == int(known)
    assert checkpoint.save(mpi_dir / "ckpt") == str(mpi_dir / f"ckpt-{1 + known}.h5")


def test_none_on_all_ranks(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    status = checkpoint.restore(None)
    with pytest.raises(AssertionError, match="restored nothing"):
        status.assert_consumed()
    assert status.expect_partial() is status
    assert status.initialize_or_restore() is status
    path: Any = None
    assert "TypeError" in same_error(three, CollectiveError, lambda: checkpoint.save(path))
    assert_empty(three, mpi_dir)


@pytest.mark.parametrize("first", ["save", "write", "restore"])
@pytest.mark.parametrize("second", ["save", "write", "restore"])
def test_different_calls(three: Any, mpi_dir: Path, first: str, second: str) -> None:
    if first == second:
        return
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    call = getattr(checkpoint, first if three.rank == 0 else second)
    text = same_error(three, LayoutError, lambda: call(path))
    assert f"{first} on rank 0" in text
    assert f"{second} on rank 1, 2" in text
    three.Barrier()
    assert sorted(file.name for file in mpi_dir.iterdir()) == ["checkpoint", "ckpt-1.h5"]
    assert checkpoint.save(mpi_dir / "ckpt", options=FAST) == str(mpi_dir / "ckpt-2.h5")


@pytest.mark.parametrize("earlier_saves", [0, 1])
@pytest.mark.parametrize("callers", [[0], [1], [0, 2], [1, 2]], ids=str)
def test_only_some_ranks_save(three: Any, mpi_dir: Path, callers: list[int], earlier_saves: int) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    for _ in range(earlier_saves):
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    three.Barrier()
    absent = tuple(rank for rank in range(3) if rank not in callers)
    if three.rank in callers:
        with pytest.raises(RankTimeoutError) as error:
            checkpoint.save(mpi_dir / "ckpt", options=SaveOptions(timeout=0.5))
        assert error.value.absent == absent
        assert f"{len(absent)} of 3 ranks did not come within 0.5 s: rank {', '.join(map(str, absent))}" in str(
            error.value
        )
    three.Barrier()
    assert checkpoint.save_counter == earlier_saves
    assert len(list(mpi_dir.glob("*.h5"))) == earlier_saves
    three.Barrier()
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    assert path == str(mpi_dir / f"ckpt-{earlier_saves + 1}.h5")
    twin = Checkpoint(comm=three, x=torch.zeros(2))
    twin.restore(path).assert_consumed()
    assert torch.equal(twin.x, torch.ones(2))


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_python_values_that_differ(three: Any, mpi_dir: Path, known: bool) -> None:
    checkpoint = Checkpoint(comm=three, step=1, nested={"lr": 0.5})
    if known:
        checkpoint.write(mpi_dir / "model", options=FAST)
    checkpoint.step = 7 if three.rank == 1 else 6
    checkpoint.nested["lr"] = 0.25 if three.rank == 2 else 0.5
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt"))
    assert "step: value differs. Expected 6, as on ranks 0, 2. Got 7 on rank 1." in text
    assert "nested" in text
    assert "0.25" in text
    assert "PerRank" in text
    checkpoint.step = 6
    checkpoint.nested["lr"] = 0.5
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    twin = Checkpoint(comm=three, step=0, nested={"lr": 0.0})
    twin.restore(path).assert_consumed()
    assert (twin.step, twin.nested) == (6, {"lr": 0.5})


def differ_at(rank: int, shape: tuple[int, ...], *, everywhere: bool) -> torch.Tensor:
    """A replica that differs on rank 1: everywhere, or in an element that the sample leaves out."""
    tensor = torch.arange(float(np.prod(shape))).reshape(shape)
    if rank == 1:
        tensor.view(-1)[slice(None) if everywhere else slice(5000, 5001)] += 1
    return tensor


SMALL, LARGE = (10, 10), (512, 512)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("shape", [SMALL, LARGE, (1 << 18,)], ids=str)
def test_replicas_that_have_diverged(three: Any, mpi_dir: Path, shape: tuple[int, ...], known: bool) -> None:
    checkpoint = Checkpoint(comm=three, weight=torch.zeros(shape))
    if known:
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    with torch.no_grad():
        checkpoint.weight += differ_at(three.rank, shape, everywhere=True)
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST))
    assert "weight: replicas differ. Expected the bytes of ranks 0, 2. Got others on rank 1." in text
    assert "PerRank" in text
    assert len(list(mpi_dir.glob("*.h5"))) == known
    text = same_error(
        three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=SaveOptions(replicas="check_all"))
    )
    assert "weight: replicas differ" in text


def test_a_difference_that_the_sample_misses_is_found_by_check_all(three: Any, mpi_dir: Path) -> None:
    weight = differ_at(three.rank, LARGE, everywhere=False)
    checkpoint = Checkpoint(comm=three, weight=weight)
    checkpoint.save(mpi_dir / "ckpt", options=FAST)
    everything = SaveOptions(durable=False, replicas="check_all")
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=everything))
    assert "weight: replicas differ. Expected the bytes of ranks 0, 2. Got others on rank 1." in text
    weight.copy_(differ_at(0, LARGE, everywhere=False))
    checkpoint.save(mpi_dir / "ckpt", options=everything)
    weight.copy_(differ_at(three.rank, LARGE, everywhere=False))  # the layout is known now
    same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=everything))


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
def test_first_trusts_the_lowest_rank(three: Any, mpi_dir: Path, shape: tuple[int, ...]) -> None:
    live = differ_at(three.rank, shape, everywhere=True)
    checkpoint = Checkpoint(comm=three, weight=live, step=three.rank)
    for _ in range(2):
        path = checkpoint.save(mpi_dir / "ckpt", options=SaveOptions(durable=False, replicas="first"))
    twin = Checkpoint(comm=three, weight=torch.zeros(shape), step=9)
    twin.restore(path).assert_consumed()
    assert torch.equal(twin.weight, differ_at(0, shape, everywhere=True))
    assert twin.step == 0
    assert torch.equal(live, differ_at(three.rank, shape, everywhere=True))  # saving leaves the replicas as they are


def test_buffers_may_differ_and_one_warning_says_so(three: Any, mpi_dir: Path) -> None:
    model = torch.nn.BatchNorm1d(40_000)
    model.running_mean.fill_(three.rank + 1)
    checkpoint = Checkpoint(comm=three, model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paths = []
        for _ in range(3):
            paths.append(checkpoint.save(mpi_dir / "ckpt", options=FAST))
            model.running_mean += 1
    assert [warning.category for warning in caught] == [CheckpointWarning] * (three.rank == 0)
    if three.rank == 0:
        assert "1 module buffer(s) differ between ranks (model/running_mean)" in str(caught[0].message)
        assert Path(caught[0].filename) == Path(__file__)
    for number, path in enumerate(paths):
        twin = torch.nn.BatchNorm1d(40_000)
        Checkpoint(comm=three, model=twin).restore(path).assert_consumed()
        assert torch.equal(twin.running_mean, torch.full((40_000,), 1.0 + number))  # rank 0's, whole
    with torch.no_grad():
        model.weight += three.rank  # parameters may not
    assert "model/weight: replicas differ" in same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt"))


# ---- layouts -----------------------------------------------------------------------------------------------------


class Pair(Trackable):
    def __init__(self, a: object, b: object) -> None:
        self.a = a
        self.b = b


def test_ties_on_some_ranks_only(three: Any, mpi_dir: Path) -> None:
    shared = torch.ones(2)
    pair = Pair(shared, shared if three.rank == 0 else torch.ones(2))
    checkpoint = Checkpoint(comm=three, pair=pair)
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt"))
    assert "pair/a" in text
    assert "pair/b" in text
    assert_empty(three, mpi_dir)
    pair.b = pair.a
    path = checkpoint.save(mpi_dir / "ckpt")
    with h5py.File(path) as file:
        assert "pair/a" in file
        assert "pair/b" not in file


def rows(rank: int, starts: list[int], stops: list[int]) -> ShardedVariable:
    return ShardedVariable(torch.ones(stops[rank] - starts[rank], 2), (9, 2), (starts[rank], 0))


LAYOUT_PROBLEMS: dict[str, tuple[Callable[[int], object], list[str]]] = {
    "gap": (lambda rank: rows(rank, [0, 3, 7], [3, 6, 9]), ["x: ", "on no rank", "(6, 0)"]),
    "overlap": (lambda rank: rows(rank, [0, 2, 6], [3, 6, 9]), ["x: ", "overlap", "rank 0", "rank 1"]),
    "dtype": (lambda rank: torch.ones(3, dtype=torch.float64 if rank == 2 else torch.float32), ["x: ", "float64"]),
    "shape": (lambda rank: torch.ones(3 + (rank == 1)), ["x: ", "(3,)", "(4,)", "ShardedVariable", "PerRank"]),
    "global shape": (
        lambda rank: ShardedVariable(torch.ones(3), (9 + 3 * (rank == 1),), (3 * rank,)),
        ["x: ", "(9,)", "(12,)"],
    ),
    "kind": (lambda rank: torch.ones(3) if rank else 4, ["x"]),
    "a module on one rank": (
        lambda rank: torch.nn.Linear(2, 2) if rank == 1 else torch.ones(3),
        ["x/.value: a tensor on ranks 0, 2", "another kind of object elsewhere"],
    ),
    "a state on one rank": (
        lambda rank: Odd(None) if rank == 1 else torch.nn.Linear(2, 2),
        ["x/.state: a python value on rank 1", "another kind of object elsewhere"],
    ),
    "per rank": (
        lambda rank: PerRank(torch.ones(2)) if rank else torch.ones(2),
        ["x: PerRank on some ranks, but not on rank 0"],
    ),
    "python value per rank": (lambda rank: PerRank(3) if rank else 3, ["x: a python value on rank 0", "PerRank"]),
    "sparse on one rank": (lambda rank: torch.eye(3).to_sparse() if rank == 1 else torch.eye(3), ["rank 1: x: "]),
    "meta on two ranks": (lambda rank: torch.ones(3, device="meta" if rank else "cpu"), ["ranks 1-2: x: "]),
    "state that only pickle could store": (lambda rank: Odd() if rank == 2 else Odd(None), ["rank 2: x/what: "]),
    "key": (lambda rank: {1.5: torch.ones(2)} if rank == 1 else {"a": torch.ones(2)}, ["rank 1: x"]),
}


class Odd:
    def __init__(self, *state: object) -> None:
        self.state = state[0] if state else object()

    def state_dict(self) -> dict[str, object]:
        return {"what": self.state}

    def load_state_dict(self, _state: dict[str, object]) -> None:
        """Nothing."""


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", LAYOUT_PROBLEMS)
def test_layouts_that_do_not_fit(three: Any, mpi_dir: Path, name: str, known: bool) -> None:
    make, words = LAYOUT_PROBLEMS[name]
    checkpoint = Checkpoint(comm=three, y=torch.ones(2))
    if known:
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    checkpoint.x = make(three.rank)
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST))
    assert all(word in text for word in words), text
    three.Barrier()
    assert len(list(mpi_dir.glob("*"))) == 2 * known
    del checkpoint.x
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    assert path == str(mpi_dir / f"ckpt-{1 + known}.h5")
    if three.rank == 0:
        with h5py.File(path) as file:
            assert "x" not in file


def test_parameter_groups_that_differ(three: Any, mpi_dir: Path) -> None:
    """The options of a group would otherwise be stored once for the members that any rank has in it."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    members = [[model.weight], [model.bias]]
    groups = [{"params": own} for own in (members[::-1] if three.rank == 1 else members)]
    checkpoint = Checkpoint(comm=three, m=model, o=torch.optim.SGD(groups, lr=0.1))
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST))
    assert "o/param_groups: m/bias is in group 0 on rank 1 and in group 1 on ranks 0, 2. Give every rank" in text, text
    assert_empty(three, mpi_dir)


def test_all_problems_are_in_one_error(three: Any, mpi_dir: Path) -> None:
    variables = {f"v{index}": make(three.rank) for index, (make, _) in enumerate(list(LAYOUT_PROBLEMS.values())[:5])}
    checkpoint = Checkpoint(comm=three, step=three.rank, **variables)
    text = same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt"))
    assert all(f"{name}: " in text for name in ["step", *variables]), text


# ---- steady state ------------------------------------------------------------------------------------------------


class Counted:
    """Counts the calls of a function, and makes them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Gatherings of all ranks' layouts."""
    counted = Counted(Coordinator.merge_parts)
    monkeypatch.setattr(Coordinator, "merge_parts", lambda *args, **kwargs: counted(*args, **kwargs))
    return counted


def test_an_unchanged_layout_is_not_merged_again(three: Any, mpi_dir: Path, merges: Counted) -> None:
    tensor = torch.zeros(50_000)
    model = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    shard = torch.zeros(2)
    sharded = ShardedVariable(shard, (6,), (2 * three.rank,))
    checkpoint = Checkpoint(comm=three, tensor=tensor, model=model, shard=sharded, step=0, log={"loss": [1.0]})
    for step in range(1, 5):
        checkpoint.step = step
        checkpoint.log["loss"].append(float(step))
        tensor += 1
        shard += three.rank + 1
        path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
        assert merges.calls == 1
        twin = Checkpoint(
            comm=three,
            tensor=tensor - 1,
            model=torch.nn.Linear(3, 3),
            shard=ShardedVariable(shard - 1, (6,), (2 * three.rank,)),
            step=0,
            log={},
        )
        twin.restore(path).assert_consumed()
        assert (twin.step, twin.log, twin.save_counter) == (step, checkpoint.log, step)
        assert torch.equal(twin.tensor, tensor)
        assert torch.equal(twin.shard.tensor, shard)
        assert torch.equal(twin.model.weight, model.weight)


def test_values_that_only_other_ranks_hold_arrive(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three)
    if three.rank == 1:
        checkpoint.mine = "a"
        checkpoint.weight = torch.zeros(3)
    checkpoint.seed = PerRank(three.rank)
    for step, text in enumerate("abcc"):
        if three.rank == 1:
            checkpoint.mine = text
            checkpoint.weight += 1
        checkpoint.seed.value = 10 * step + three.rank
        path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
        twin = Checkpoint(comm=three, mine="", weight=torch.zeros(3), seed=PerRank(-1))
        twin.restore(path).assert_consumed()
        assert (twin.mine, twin.seed.value) == (text, 10 * step + three.rank)
        assert torch.equal(twin.weight, torch.full((3,), step + 1.0))


def test_later_variables_are_merged_once(three: Any, mpi_dir: Path, merges: Counted) -> None:
    checkpoint = Checkpoint(comm=three, a=torch.ones(2))
    calls = []
    for step in range(6):
        if step == 2:
            checkpoint.b = torch.full((3,), 2.0)
        if step == 4 and three.rank == 2:
            checkpoint.c = torch.full((4,), 3.0)  # on one rank: the others hear of it too
        path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
        calls.append(merges.calls)
    assert calls == [1, 1, 2, 2, 3, 3]
    twin = Checkpoint(comm=three, a=torch.zeros(2), b=torch.zeros(3), c=torch.zeros(4))
    twin.restore(path).assert_consumed()
    assert [twin.a[0].item(), twin.b[0].item(), twin.c[0].item()] == [1.0, 2.0, 3.0]
    with pytest.raises(AssertionError, match=r"do(es)? not have:\n  b\n  c$"):
        twin.restore(mpi_dir / "ckpt-1").assert_existing_objects_matched()


def test_a_layout_that_was_there_before_is_right_after_a_failed_save(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three, a=torch.ones(2))
    checkpoint.save(mpi_dir / "ckpt", options=FAST)
    checkpoint.b = torch.zeros(3 + three.rank)
    same_error(three, LayoutError, lambda: checkpoint.save(mpi_dir / "ckpt"))
    del checkpoint.b
    checkpoint.a += 1
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    twin = Checkpoint(comm=three, a=torch.zeros(2))
    twin.restore(path).assert_consumed()
    assert torch.equal(twin.a, torch.full((2,), 2.0))


def test_save_and_write_in_turn(three: Any, mpi_dir: Path, merges: Counted) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.zeros(2), step=0)
    for step in range(1, 4):
        checkpoint.x += 1
        checkpoint.step = step
        saved = checkpoint.save(mpi_dir / "ckpt", options=FAST)
        written = checkpoint.write(mpi_dir / "model", options=FAST)
        assert merges.calls == 2
        for path, restore in ((saved, Checkpoint.restore), (written, Checkpoint.read)):
            twin = Checkpoint(comm=three, x=torch.zeros(2), step=0)
            restore(twin, path).assert_consumed()
            assert (twin.step, twin.x[0].item()) == (step, step)
        assert checkpoint.save_counter == step
    assert latest_checkpoint(mpi_dir) == saved


@pytest.mark.parametrize("options", [SaveOptions(checksums=False, durable=False), FAST], ids=["none", "checksums"])
def test_checksums_come_and_go(three: Any, mpi_dir: Path, options: SaveOptions) -> None:
    other = SaveOptions(checksums=not options.checksums, durable=False)
    checkpoint = Checkpoint(comm=three, x=torch.zeros(200_000))
    for mine in (options, other, options):
        checkpoint.x += 1
        path = checkpoint.save(mpi_dir / "ckpt", options=mine)
        twin = Checkpoint(comm=three, x=torch.zeros(200_000))
        twin.restore(path).assert_consumed()
        assert torch.equal(twin.x, checkpoint.x)


def test_different_assertions_are_one_error(three: Any, mpi_dir: Path) -> None:
    """Else one rank would raise for values that nobody took, and the others go on."""
    path = Checkpoint(comm=three, a=torch.ones(2), b=1).write(mpi_dir / "ckpt", options=FAST)
    status = Checkpoint(comm=three, a=torch.zeros(2)).read(path)
    names = ["assert_consumed", "assert_existing_objects_matched", "initialize_or_restore"]
    text = same_error(three, LayoutError, getattr(status, names[three.rank]))
    assert "the ranks are in different calls" in text
    assert all(name in text for name in names)
    status.assert_existing_objects_matched()


# ---- ranks that hold different things ----------------------------------------------------------------------------


def test_per_rank_values_on_fewer_and_on_more_ranks(subcomm: Any, mpi_dir: Path) -> None:
    comms = {size: subcomm(size) for size in (2, 3)}
    for size, comm in comms.items():
        if comm is not None:
            checkpoint = Checkpoint(
                comm=comm, seed=PerRank(10 + comm.rank), noise=PerRank(torch.full((2,), comm.rank + 1.0))
            )
            checkpoint.write(mpi_dir / f"from-{size}", options=FAST)
    MPI.COMM_WORLD.Barrier()
    small, large = comms[2], comms[3]
    if small is not None:
        twin = Checkpoint(comm=small, seed=PerRank(0), noise=PerRank(torch.zeros(2)))
        with expected_warning(small, "per-rank values were saved on another number of ranks"):
            status = twin.read(mpi_dir / "from-3")
        status.assert_consumed()
        assert (twin.seed.value, twin.noise.value[0].item()) == (10 + small.rank, small.rank + 1)
        assert status.unexpected == ("noise/.rank/2", "seed/.rank/2")
    if large is not None:
        twin = Checkpoint(comm=large, seed=PerRank(99), noise=PerRank(torch.zeros(2)))
        strict = RestoreOptions(per_rank="error")
        text = same_error(large, RestoreMismatchError, lambda: twin.read(mpi_dir / "from-2", options=strict))
        assert "2 rank(s) cannot be restored on 3" in text
        assert twin.seed.value == 99
        with expected_warning(large, "per-rank values were saved on another number of ranks"):
            status = twin.read(mpi_dir / "from-2")
        status.assert_consumed()
        assert status.missing == ("noise/.rank/2", "seed/.rank/2")
        assert twin.seed.value == (99 if large.rank == 2 else 10 + large.rank)
        assert twin.noise.value[0].item() == (0 if large.rank == 2 else large.rank + 1)


def expected_warning(comm: Any, text: str) -> Any:
    """One `CheckpointWarning` on rank 0; none elsewhere, where a warning is an error."""
    return pytest.warns(CheckpointWarning, match=text) if comm.rank == 0 else warnings.catch_warnings()


def test_random_numbers_go_on_per_rank(three: Any, mpi_dir: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item(), np.random.randn(), random.gauss(0, 1)

    random.seed(three.rank)
    np.random.seed(three.rank)
    torch.manual_seed(three.rank)
    draw()
    checkpoint = Checkpoint(comm=three, rng=RNGState())
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    expected = [draw() for _ in range(3)]
    assert len(set(three.allgather(expected[0]))) == 3
    checkpoint.restore(path).assert_consumed()
    assert [draw() for _ in range(3)] == expected


def stage(rank: int, seed: int) -> dict[str, Any]:
    """A pipeline stage: each rank holds other layers, and an optimizer over them at the same path."""
    torch.manual_seed(10 * seed + rank)
    layers = {f"layer{rank}": torch.nn.Linear(3, 3), f"norm{rank}": torch.nn.LayerNorm(3)}
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    sum((parameter * torch.rand_like(parameter)).sum() for parameter in parameters).backward()
    optimizer.step()
    return {"optimizer": optimizer, **layers}


def state_of(parts: dict[str, Any]) -> list[bytes]:
    layers = [part for name, part in parts.items() if name != "optimizer"]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    slots = [slot for parameter in parameters for slot in parts["optimizer"].state[parameter].values()]
    return [tensor.detach().numpy().tobytes() for tensor in (*parameters, *slots)]


def test_pipeline_stages_are_one_checkpoint(three: Any, mpi_dir: Path) -> None:
    saved = stage(three.rank, 1)
    checkpoint = Checkpoint(comm=three, step=4, **saved)
    for _ in range(2):
        path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    found = stage(three.rank, 2)
    twin = Checkpoint(comm=three, step=0, **found)
    assert state_of(found) != state_of(saved)
    status = twin.restore(path)
    status.assert_consumed()
    assert (status.missing, status.unexpected, status.pending) == ((), (), ())
    assert state_of(found) == state_of(saved)
    assert twin.step == 4


def test_all_stages_on_one_rank(three: Any, mpi_dir: Path) -> None:
    saved = stage(three.rank, 1)
    path = Checkpoint(comm=three, **saved).write(mpi_dir / "model", options=FAST)
    expected = three.gather({name: part.state_dict() for name, part in saved.items() if name != "optimizer"})
    if three.rank == 0:
        modules: dict[str, torch.nn.Module] = {}
        for rank in range(3):
            modules |= {f"layer{rank}": torch.nn.Linear(3, 3), f"norm{rank}": torch.nn.LayerNorm(3)}
        Checkpoint(comm=MPI.COMM_SELF, **modules).read(path).assert_existing_objects_matched().expect_partial()
        for states in expected:
            for name, state in states.items():
                assert all(torch.equal(modules[name].state_dict()[key], value) for key, value in state.items())


# ---- restore -----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_the_same_error_on_all_ranks(three: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=three, x=torch.ones(2))
    checkpoint.save(mpi_dir / "ckpt", options=FAST)
    text = same_error(three, CheckpointNotFoundError, lambda: checkpoint.restore(mpi_dir / "ckpt"))
    assert "ckpt-1.h5" in text  # the hint at the number
    text = same_error(three, CheckpointNotFoundError, lambda: checkpoint.restore(mpi_dir))
    assert "latest_checkpoint" in text
    same_error(three, CheckpointNotFoundError, lambda: checkpoint.restore(mpi_dir / "nowhere" / "ckpt-1"))


def test_a_mismatch_on_one_rank_is_raised_on_all_before_anything_changes(three: Any, mpi_dir: Path) -> None:
    path = Checkpoint(comm=three, a=torch.ones(2), b=torch.ones(4), step=5).save(mpi_dir / "ckpt", options=FAST)
    shape, dtype = (3, torch.float32) if three.rank == 1 else (4, torch.float64 if three.rank == 2 else torch.float32)
    twin = Checkpoint(comm=three, a=torch.zeros(2), b=torch.zeros(shape, dtype=dtype), step=0)
    text = same_error(three, RestoreMismatchError, lambda: twin.restore(path))
    assert "b: saved a tensor of shape (4,) and dtype float32, live a tensor of shape (3,)" in text
    assert "float64" in text
    assert (twin.a.sum().item(), twin.step, twin.save_counter) == (0, 0, 0)
    skipping = RestoreOptions(on_mismatch="skip")
    with expected_warnings_on_root(three):
        status = twin.restore(path, options=skipping)
    assert {mismatch.key for mismatch in status.mismatched} == {"b"}
    assert len(set(three.allgather(status.mismatched))) == 1
    assert (twin.a.sum().item(), twin.step, twin.save_counter) == (2, 5, 1)


def expected_warnings_on_root(comm: Any) -> Any:
    return pytest.warns(CheckpointWarning, match="b skipped") if comm.rank == 0 else warnings.catch_warnings()


def test_a_damaged_variable_is_named_on_all_ranks_though_one_rank_reads_it(three: Any, mpi_dir: Path) -> None:
    own = ShardedVariable(torch.full((4,), 1.0), (12,), (4 * three.rank,))
    checkpoint = Checkpoint(comm=three, good=torch.ones(3), bad=own)
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    newer = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    if three.rank == 0:
        with h5py.File(newer, "r") as file:
            offset = file["bad"].id.get_offset()
        with Path(newer).open("r+b") as raw:
            raw.seek(offset + 5 * 4)  # in the shard of rank 1
            raw.write(b"\xff")
    three.Barrier()
    twin = Checkpoint(comm=three, good=torch.zeros(3), bad=ShardedVariable(torch.zeros(4), (12,), (4 * three.rank,)))
    text = same_error(three, CorruptCheckpointError, lambda: twin.restore(newer))
    assert text.startswith(f"{newer}: bad: ")
    assert twin.save_counter == 0
    twin.restore(path).assert_consumed()
    assert torch.equal(twin.bad.tensor, torch.ones(4))
    twin.restore(newer, options=RestoreOptions(verify=False)).assert_consumed()  # on request


def test_damage_that_one_of_a_ranks_threads_finds_is_an_error_on_all_ranks(
    three: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_reading, "SHARE_NBYTES", 1 << 20)
    n = 300_000  # more than 1 MiB: for any thread

    def shards(value: float) -> dict[str, ShardedVariable]:
        return {f"v{i}": ShardedVariable(torch.full((n,), value + i), (3 * n,), (n * three.rank,)) for i in range(6)}

    checkpoint = Checkpoint(comm=three, state=shards(1))
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    newer = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    if three.rank == 0:
        with h5py.File(newer, "r") as file:
            offset = file["state/v4"].id.get_offset()
        with Path(newer).open("r+b") as raw:
            raw.seek(offset + (n + 5) * 4)  # in the shard of rank 1
            raw.write(b"\xff")
    three.Barrier()
    live = shards(-1)
    twin = Checkpoint(comm=three, state=live)
    threads = RestoreOptions(threads=3)
    text = same_error(three, CorruptCheckpointError, lambda: twin.restore(newer, options=threads))
    assert text.startswith(f"{newer}: state/v4: ")
    assert twin.save_counter == 0
    twin.restore(path, options=threads).assert_consumed()
    assert all(torch.equal(live[f"v{i}"].tensor, torch.full((n,), 1.0 + i)) for i in range(6))
