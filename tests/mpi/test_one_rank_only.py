"""What only one rank has, or has more of: warnings about it are heard, and containers of python values are replicas."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    CollectiveError,
    LayoutError,
    PerRank,
    RestoreOptions,
    SaveOptions,
    Trackable,
    load_checkpoint,
)

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)
FIRST = SaveOptions(durable=False, replicas="first")


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        call()
    return [str(warning.message) for warning in caught if warning.category is CheckpointWarning]


# ---- what is left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [0, 1])
def test_a_container_that_only_one_rank_leaves_out_is_warned_of_once(comm: Any, mpi_dir: Path, owner: int) -> None:
    checkpoint = Checkpoint(comm=comm, step=1, part=Trackable())
    assert warned(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST)) == []
    if comm.rank == owner:
        checkpoint.part.config = {"seen": {1, 2}, "name": "a"}
    first = warned(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST))
    assert warned(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST)) == []
    if comm.rank:
        assert first == []
    else:
        (text,) = first
        assert text.startswith(f"rank {owner}: part/config: left out: a builtins.dict cannot be checkpointed")


def test_optimizer_state_that_only_one_rank_leaves_out(comm: Any, mpi_dir: Path) -> None:
    owned, stray = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([owned, stray] if comm.rank == 1 else [owned])
    owned.grad = stray.grad = torch.ones(2)
    optimizer.step()
    checkpoint = Checkpoint(comm=comm, w=owned, optimizer=optimizer)
    first = warned(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST))
    if comm.rank == 0:
        (text,) = first
        assert text.startswith("rank 1: 1 optimizer parameter(s) have state but belong to no tracked object")


class Replacing:
    """A program whose saves replace a value that waits for `model.bias`, on some ranks."""

    def __init__(self, comm: Any, mpi_dir: Path, owners: range) -> None:
        saved = Checkpoint(comm=comm, model=torch.nn.Linear(2, 2))
        self.path = saved.write(mpi_dir / "model", options=FIRST)
        self.owns = comm.rank in owners
        self.checkpoint = Checkpoint(comm=comm, model=torch.nn.Module(), step=1)
        all_own = len(owners) == comm.size
        self.expected = [f"{'' if all_own else 'rank 1: '}model/bias: a saved value was waiting"] * (comm.rank == 0)

    def wait(self) -> None:
        """Read, so that the value waits for a new module, and give the module its own."""
        self.checkpoint.model = torch.nn.Module()
        warned(lambda: self.checkpoint.read(self.path, options=RestoreOptions(expect_partial=True)))
        if self.owns:
            self.checkpoint.model.bias = torch.nn.Parameter(torch.zeros(2))

    def heard(self, call: Callable[[], object]) -> list[str]:
        """The beginnings of the warnings of a call."""
        return [text.partition(" for this")[0] for text in warned(call)]


@pytest.fixture(params=["rank 1", "all ranks"])
def replacing(request: pytest.FixtureRequest, comm: Any, mpi_dir: Path) -> Replacing:
    return Replacing(comm, mpi_dir, range(1, 2) if request.param == "rank 1" else range(comm.size))


def test_a_waiting_value_that_a_save_replaces_is_warned_of_once(replacing: Replacing, mpi_dir: Path) -> None:
    checkpoint = replacing.checkpoint
    for _ in range(2):  # the second time no layout has changed
        replacing.wait()
        assert replacing.heard(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST)) == replacing.expected
        assert replacing.heard(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST)) == []


@pytest.mark.parametrize("method", ["save", "write"])
def test_a_waiting_value_that_a_failed_save_replaced_is_warned_of_in_the_next(
    comm: Any, replacing: Replacing, mpi_dir: Path, method: str
) -> None:
    checkpoint = replacing.checkpoint
    replacing.wait()
    checkpoint.step = comm.rank

    def fail() -> None:
        with pytest.raises(LayoutError, match="step"):
            checkpoint.save(mpi_dir / "ckpt", options=FAST)

    assert replacing.heard(fail) == []
    checkpoint.step = 1
    assert replacing.heard(lambda: getattr(checkpoint, method)(mpi_dir / "ckpt", options=FAST)) == replacing.expected
    assert replacing.heard(lambda: checkpoint.save(mpi_dir / "ckpt", options=FAST)) == []


@pytest.mark.filterwarnings("error::distckpt.CheckpointWarning")
def test_a_warning_that_is_an_error_fails_one_save(replacing: Replacing, mpi_dir: Path) -> None:
    checkpoint = replacing.checkpoint
    replacing.wait()
    with pytest.raises(CollectiveError, match="model/bias: a saved value was waiting"):
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    checkpoint.save(mpi_dir / "ckpt", options=FAST)


# ---- containers of python values ---------------------------------------------------------------------------------


def a_deque(n: int) -> Any:
    return collections.deque(range(n), maxlen=5)


def a_defaultdict(n: int) -> Any:
    return collections.defaultdict(int, {f"k{i}": i for i in range(n)})


@pytest.mark.parametrize("make", [a_deque, a_defaultdict])
@pytest.mark.parametrize("lengths", [(2, 3), (3, 2), (0, 1), (1, 0)], ids=str)
def test_other_elements_on_other_ranks_are_refused(
    comm: Any, mpi_dir: Path, make: Callable[[int], Any], lengths: tuple[int, int]
) -> None:
    checkpoint = Checkpoint(comm=comm, history=make(2))
    checkpoint.save(mpi_dir / "ckpt", options=FAST)
    checkpoint.history = make(lengths[comm.rank == 1])
    with pytest.raises(LayoutError, match=r"history: elements differ\. Expected \d, as on rank.* PerRank") as error:
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.parametrize("make", [a_deque, a_defaultdict])
@pytest.mark.parametrize("lengths", [(2, 3), (3, 2), (0, 1), (1, 0)], ids=str)
def test_the_lowest_ranks_elements_on_request(
    comm: Any, mpi_dir: Path, make: Callable[[int], Any], lengths: tuple[int, int]
) -> None:
    checkpoint = Checkpoint(comm=comm, history=make(lengths[comm.rank == 1]))
    for _ in range(2):  # the second save goes by the first one's layout
        path = checkpoint.save(mpi_dir / "ckpt", options=FIRST)
    with load_checkpoint(path) as reader:
        assert sum(key.startswith("history/") for key in reader) == lengths[0]


def test_each_rank_has_a_deque_of_its_own(comm: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=comm, history=PerRank(a_deque(2 + comm.rank)))
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    twin = Checkpoint(comm=comm, history=PerRank(a_deque(0)))
    twin.restore(path).assert_consumed()
    assert twin.history.value == a_deque(2 + comm.rank)


def test_lists_of_tensors_are_joined(comm: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=comm, stages=[torch.ones(2) for _ in range(1 + comm.rank)])
    path = checkpoint.save(mpi_dir / "ckpt", options=FAST)
    with load_checkpoint(path) as reader:
        assert {f"stages/{i}" for i in range(comm.size)} <= set(reader)


# ---- restores ----------------------------------------------------------------------------------------------------


def test_a_restore_warns_of_what_only_another_rank_finds(comm: Any, mpi_dir: Path) -> None:
    """Pipeline stages: the one on rank 1 has param groups of its own."""

    def make(n_groups: int) -> Checkpoint:
        stage = torch.nn.ModuleDict({f"{comm.rank}{i}": torch.nn.Linear(2, 2) for i in range(2)})
        groups = [list(module.parameters()) for module in stage.values()]
        if comm.rank != 1 or n_groups == 1:
            groups = [[parameter for group in groups for parameter in group]]
        optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
        return Checkpoint(comm=comm, stage=stage, optimizer=optimizer)

    path = make(1).save(mpi_dir / "ckpt", options=FAST)
    heard = warned(lambda: make(2).restore(path))
    assert len(heard) == (comm.rank == 0)
    for text in heard:
        assert text.startswith("rank 1: optimizer/param_groups: 1 saved parameter group(s) have no live group")


# ---- containers that are empty on a rank -------------------------------------------------------------------------


class Experts:
    """A container of tensors on one rank, and an empty one on the others."""

    def __init__(self, comm: Any, owner: int, kind: type, value: float) -> None:
        self.tensors = [torch.full((2,), value)] if comm.rank == owner else []
        self.container: Any = self.tensors if kind is list else {str(i): t for i, t in enumerate(self.tensors)}
        self.checkpoint = Checkpoint(comm=comm, x=self.container, step=value)


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_container_that_is_empty_on_a_rank_is_that_of_the_other(
    comm: Any, mpi_dir: Path, owner: int, kind: type
) -> None:
    saved, live = Experts(comm, owner, kind, 3.0), Experts(comm, owner, kind, 5.0)
    for _ in range(2):  # the second save goes by the first one's layout
        path = saved.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    with load_checkpoint(path) as reader:
        assert set(reader) == {"x/0", "step", "save_counter"}
    live.checkpoint.restore(path).assert_consumed()
    assert live.checkpoint.step == 3.0
    assert [tensor.tolist() for tensor in live.tensors] == [[3.0, 3.0]] * (comm.rank == owner)
    if comm.rank != owner:
        saved.checkpoint.x = [1] if kind is list else {"0": 1}
    with pytest.raises(LayoutError, match=r"x: a python value on ranks? .* and another kind of object elsewhere"):
        saved.checkpoint.save(mpi_dir / "ckpt", options=FAST)
