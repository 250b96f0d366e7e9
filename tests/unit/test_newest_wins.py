"""Several restores that wait: per object the newest call wins, in whatever order objects are attached."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, RestoreMismatchError, RestoreOptions, ShardedVariable, Trackable

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing but the save counter matched")
PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def dependency(value: float) -> Trackable:
    """Something to attach to two roots: a tensor, a number, a child."""
    made = Trackable()
    made.tensor, made.number, made.child = full(value), value, Trackable()
    made.child.x = full(value)
    return made


def values_of(made: Trackable) -> set[float]:
    return {made.number, *made.tensor.tolist(), *made.child.x.tolist()}


@pytest.mark.parametrize("restored", ["ab", "ba"])
@pytest.mark.parametrize("attached", ["ab", "ba"])
def test_two_roots_that_wait_for_one_object(restored: str, attached: str, path: str) -> None:
    """Row 18 of the acceptance list: the later call, not the later attachment."""
    files = {name: Checkpoint(dep=dependency(value)).write(f"{path}-{name}") for name, value in (("a", 1), ("b", 2))}
    roots = {name: Checkpoint() for name in "ab"}
    for name in restored:
        roots[name].read(files[name], options=PARTIAL)
    shared = dependency(0)
    for name in attached:
        roots[name].dep = shared
    assert values_of(shared) == {1 if restored == "ba" else 2}


class _Stateful:
    def __init__(self, **state: torch.Tensor) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class _WithExtraState(nn.Module):
    def __init__(self, **state: torch.Tensor) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.state)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("kind", [_Stateful, _WithExtraState])
def test_a_state_is_won_as_a_whole(kind: Any, path: str) -> None:
    """What the older file has beside it is no state of its own."""
    older = Checkpoint(x=kind(a=full(1), b=full(1))).write(f"{path}-older")
    newer = Checkpoint(x=kind(a=full(2))).write(f"{path}-newer")
    live = Checkpoint()
    live.read(older, options=PARTIAL)
    status = live.read(newer, options=PARTIAL)
    live.x = kind(c=full(0))
    assert {name: tensor.tolist() for name, tensor in live.x.state.items()} == {"a": [2, 2]}
    status.assert_consumed()


def _with_betas(value: float) -> Checkpoint:
    model = nn.Linear(1, 1)
    betas = (torch.tensor(value), torch.tensor(value / 2))
    return Checkpoint(m=model, o=torch.optim.Adam(model.parameters(), betas=betas, foreach=False))


def test_a_part_of_a_group_entry_that_waits_is_a_mismatch_where_the_optimizer_is_assigned(path: str) -> None:
    older, newer = (_with_betas(value).write(f"{path}-{value}") for value in (0.5, 0.75))
    twin = _with_betas(0.25)
    live = Checkpoint(m=twin.m)
    live.read(older, options=PARTIAL)
    live.read(newer, options=RestoreOptions(only=["o/param_groups/0/betas/0"], expect_partial=True))
    with pytest.raises(RestoreMismatchError, match="o/param_groups/0/betas: saved a state of which"):
        live.o = twin.o


def test_the_entries_of_a_group_are_won_one_by_one(path: str) -> None:
    older, newer = (_with_betas(value).write(f"{path}-{value}") for value in (0.5, 0.75))
    twin = _with_betas(0.25)
    live = Checkpoint(m=twin.m)
    live.read(older, options=PARTIAL)
    live.read(newer, options=RestoreOptions(only=["o/param_groups/0/betas"], expect_partial=True))
    live.o = twin.o
    assert [float(beta) for beta in twin.o.param_groups[0]["betas"]] == [0.75, 0.375]


def test_the_winner_stays_the_winner_when_other_parts_come_later(path: str) -> None:
    older = Checkpoint(dep=dependency(1), more=full(1)).write(f"{path}-older")
    newer = Checkpoint(dep=dependency(2)).write(f"{path}-newer")
    first, second = Checkpoint(), Checkpoint()
    first.read(older, options=PARTIAL)
    second.read(newer, options=PARTIAL)
    shared = dependency(0)
    second.dep = shared
    shared.tensor.fill_(9)  # training goes on
    first.dep = shared
    first.more = full(0)
    assert first.more.tolist() == [1, 1]
    assert shared.tensor.tolist() == [9, 9]
    assert shared.number == 2


def test_a_restore_that_needs_not_wait_wins_too(path: str) -> None:
    older = Checkpoint(dep=dependency(1)).write(f"{path}-older")
    newer = Checkpoint(dep=dependency(2)).write(f"{path}-newer")
    first = Checkpoint()
    first.read(older, options=PARTIAL)
    shared = dependency(0)
    Checkpoint(dep=shared).read(newer).assert_consumed()
    first.dep = shared
    assert values_of(shared) == {2}


def test_an_object_that_a_newer_restore_met_under_another_name(path: str) -> None:
    """Of one Checkpoint, too: the newer restore is long finished when the older one meets its object."""
    older = Checkpoint(here=1, late=full(1)).write(f"{path}-older")
    newer = Checkpoint(here=2, early=full(2)).write(f"{path}-newer")
    live = Checkpoint(here=0)
    live.read(older, options=PARTIAL)
    live.early = full(0)
    live.read(newer, options=PARTIAL)
    assert live.early.tolist() == [2, 2]
    live.late = live.early
    assert live.late.tolist() == [2, 2]


def test_objects_that_only_the_older_file_has_are_restored(path: str) -> None:
    older = Checkpoint(dep=dependency(1)).write(f"{path}-older")
    partial = Trackable()
    partial.tensor = full(2)
    newer = Checkpoint(dep=partial).write(f"{path}-newer")
    first, second = Checkpoint(), Checkpoint()
    first.read(older, options=PARTIAL)
    second.read(newer, options=PARTIAL)
    shared = dependency(0)
    second.dep = shared
    first.dep = shared
    assert shared.tensor.tolist() == [2, 2]
    assert (shared.number, shared.child.x.tolist()) == (1, [1, 1])


def _training(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.5)
    for parameter in model.parameters():
        parameter.data.fill_(value)
        if value:
            optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, value)}
    return model, optimizer


@pytest.mark.parametrize("attached", list(itertools.permutations(["model a", "model b", "optimizer a", "optimizer b"])))
def test_optimizer_state_of_two_roots(attached: tuple[str, ...], path: str) -> None:
    """Slots and rates, too; before their optimizer, after it, and in between."""
    files = {}
    for name, value in (("a", 1.0), ("b", 2.0)):
        model, optimizer = _training(value)
        files[name] = Checkpoint(model=model, optimizer=optimizer).write(f"{path}-{name}")
    roots = {name: Checkpoint() for name in "ab"}
    for name in "ab":
        roots[name].read(files[name], options=PARTIAL)
    model, optimizer = _training(0.0)
    for step in attached:
        kind, name = step.split()
        setattr(roots[name], kind, model if kind == "model" else optimizer)
    assert [parameter.item() for parameter in model.parameters()] == [2, 2]
    assert [optimizer.state[parameter]["momentum_buffer"].item() for parameter in model.parameters()] == [2, 2]
    assert optimizer.param_groups[0]["lr"] == 2


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: ShardedVariable(t, (2,), (0,))], ids=["tensor", "ShardedVariable"]
)
def test_attributes_of_two_checkpoints_with_one_root(wrap: Callable[[torch.Tensor], Any], path: str) -> None:
    """What is attached belongs to its Checkpoint, what is shared to nobody."""
    files = [Checkpoint(nn.Linear(1, 1), step=value, t=wrap(full(value))).write(f"{path}-{value}") for value in (1, 2)]
    root, shared = nn.Linear(1, 1), full(0)
    first, second = Checkpoint(root), Checkpoint(root)
    first.read(files[0], options=PARTIAL)
    second.read(files[1], options=PARTIAL)
    second.step, second.t = 0, wrap(shared)
    first.step, first.t = 0, wrap(shared)
    assert (first.step, second.step) == (1, 2)
    assert shared.tolist() == [2, 2]


def test_the_file_of_the_older_one_is_closed(path: str, open_files: Callable[[], list[str]]) -> None:
    older = Checkpoint(dep=dependency(1)).write(f"{path}-older")
    newer = Checkpoint(dep=dependency(2)).write(f"{path}-newer")
    first, second = Checkpoint(), Checkpoint()
    status = first.read(older, options=PARTIAL)
    second.read(newer, options=PARTIAL)
    assert {older, newer} <= set(open_files())
    second.dep = first.dep = dependency(0)
    assert values_of(first.dep) == {2}
    assert not {older, newer} & set(open_files())
    status.assert_consumed()
