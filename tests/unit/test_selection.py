"""`RestoreOptions(only=..., skip_slots=...)`: the rest is neither touched nor missed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    RestoreMismatchError,
    RestoreOptions,
    RestoreStatus,
    Trackable,
    load_checkpoint,
)


def program(seed: int, *, steps: int = 2) -> Checkpoint:
    """A model of two parts, its optimizer and scheduler, and numbers."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1 + seed)
    for _ in range(steps):
        model["head"](model["encoder"](torch.ones(2))).sum().backward()
        optimizer.step()
        scheduler.step()
    return Checkpoint(
        model=model, optimizer=optimizer, scheduler=scheduler, step=seed, log=[seed, torch.full((1,), float(seed))]
    )


def snapshot(live: Checkpoint) -> dict[str, Any]:
    """Everything by saved key, as python values; taken without saving."""
    slots = {
        f"optimizer/.slots/model/{name.replace('.', '/')}/{slot}": value.tolist()
        for name, parameter in live.model.named_parameters()
        for slot, value in live.optimizer.state.get(parameter, {}).items()
    }
    return {
        **{f"model/{name.replace('.', '/')}": tensor.tolist() for name, tensor in live.model.state_dict().items()},
        **slots,
        "optimizer/param_groups/0": {k: v for k, v in live.optimizer.param_groups[0].items() if k != "params"},
        "scheduler": live.scheduler.state_dict(),
        "step": live.step,
        "log": repr(live.log),
    }


def changed(before: dict[str, Any], live: Checkpoint) -> set[str]:
    after = snapshot(live)
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def read(file: str, live: Checkpoint, **options: Any) -> RestoreStatus:
    """Read without a word: no warning, and all assertions hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = live.read(file, options=RestoreOptions(**options))
        status.assert_consumed()
        live.write(f"{file}-again")
    return status


_ONLY: list[tuple[list[str], list[str]]] = [
    # what is named, what changes
    (["model"], ["model/"]),
    (["/model/"], ["model/"]),
    (["model/encoder"], ["model/encoder/"]),
    (["model/encoder/weight"], ["model/encoder/weight"]),
    (["model/encoder", "step"], ["model/encoder/", "step"]),
    (["step"], ["step"]),
    (["log"], ["log"]),
    (["scheduler"], ["scheduler"]),
    (["optimizer"], ["optimizer/"]),
    (["optimizer/param_groups"], ["optimizer/param_groups/0"]),
    (["optimizer/.slots"], ["optimizer/.slots/"]),
    (["optimizer/.slots/model/head"], ["optimizer/.slots/model/head/"]),
    (["model", "optimizer"], ["model/", "optimizer/"]),
    ([""], ["model/", "optimizer/", "scheduler", "step", "log"]),
    ([], []),
]


@pytest.mark.parametrize(("only", "expected"), _ONLY, ids=str)
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
def test_only_what_is_named_changes(only: list[str], expected: list[str], fresh: bool, path: str) -> None:
    saved, live = program(2), program(3, steps=0 if fresh else 4)
    file, before = saved.write(path), snapshot(live)
    if not only:
        with pytest.raises(AssertionError, match="nothing besides the save counter matched"):
            live.read(file, options=RestoreOptions(only=only)).assert_nontrivial_match()
    else:
        read(file, live, only=only)
    if not fresh:  # Adam's counts of steps, too
        assert all(any(key.startswith(prefix) for prefix in expected) for key in changed(before, live))
    assert {key.partition("/")[0] for key in changed(before, live)} == {name.partition("/")[0] for name in expected}
    wanted = {key: value for key, value in snapshot(saved).items() if any(key.startswith(name) for name in expected)}
    assert wanted == {key: snapshot(live)[key] for key in wanted}


def test_just_the_model_from_a_full_checkpoint(path: str) -> None:
    saved, model = program(2), program(3).model
    status = read(saved.write(path), Checkpoint(model=model), only=["model"])
    assert torch.equal(model["head"].weight, saved.model["head"].weight)
    assert (status.missing, status.unexpected, status.pending) == ((), (), ())


def test_two_checkpoints_into_two_sub_trees(path: str) -> None:
    encoder, head, live = program(2), program(3), program(4)
    read(encoder.write(f"{path}-encoder"), live, only=["model/encoder"])
    read(head.write(f"{path}-head"), live, only=["model/head", "optimizer/.slots/model/head"])
    assert torch.equal(live.model["encoder"].weight, encoder.model["encoder"].weight)
    assert torch.equal(live.model["head"].weight, head.model["head"].weight)
    slots = live.optimizer.state[live.model["head"].bias], head.optimizer.state[head.model["head"].bias]
    assert torch.equal(slots[0]["exp_avg"], slots[1]["exp_avg"])
    assert live.step == 4


def test_one_file_into_two_places(path: str) -> None:
    """A renamed part is asserted under its live name."""
    saved = Checkpoint(net=nn.Linear(1, 1), other=1)
    live = Checkpoint(student=nn.Linear(1, 1), teacher=nn.Linear(1, 1), mine=0)
    file = saved.write(path)
    for name in ("student", "teacher"):
        read(file, live, only=["net"], rename={"net": name})
        assert torch.equal(getattr(live, name).weight, saved.net.weight)


def test_what_is_named_must_match(path: str) -> None:
    file = program(2).write(path)
    live = Checkpoint(model=nn.ModuleDict({"encoder": nn.Linear(2, 2), "new": nn.Linear(1, 1)}), mine=0)
    status = live.read(file, options=RestoreOptions(only=["model"], expect_partial=True))
    assert status.missing == ("model/new/bias", "model/new/weight")
    assert status.pending == status.unexpected == ("model/head/bias", "model/head/weight")
    renamed = RestoreOptions(only=["model"], rename={"model/head": "model/new"}, on_mismatch="skip")
    with pytest.warns(UserWarning, match="model/head/weight skipped"):
        live.read(file, options=renamed)
    assert live.model["new"].bias.item() != 0


def test_a_mismatch_elsewhere_does_not_matter(path: str) -> None:
    file = Checkpoint(a=torch.ones(2), b=torch.ones(2), c=1).write(path)
    live = Checkpoint(a=torch.zeros(2), b=torch.zeros(3), c=nn.Linear(1, 1))
    with pytest.raises(RestoreMismatchError):
        live.read(file)
    read(file, live, only=["a"])
    assert live.a.tolist() == [1, 1]


def test_a_shared_object_is_below_all_its_paths(path: str) -> None:
    """The file has it under another key."""
    encoder = nn.Linear(1, 1)
    saved = Checkpoint(encoder=encoder, model=nn.Sequential(encoder, nn.Linear(1, 1)))
    live = Checkpoint(model=nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    file = saved.write(path)
    with load_checkpoint(file) as reader:
        assert "model/0/weight" not in list(reader)
    read(file, live, only=["model"])
    assert torch.equal(live.model[0].weight, encoder.weight)


def test_a_child_that_knows_its_parent(path: str) -> None:
    def make(value: float) -> Checkpoint:
        parent = Trackable()
        parent.child, parent.x = Trackable(), torch.full((1,), value)
        parent.child.parent, parent.child.x = parent, torch.full((1,), value)
        return Checkpoint(p=parent)

    live = make(0)
    read(make(1).write(path), live, only=["p/child"])
    assert (live.p.child.x.item(), live.p.x.item()) == (1, 0)


def test_values_that_come_later(path: str) -> None:
    live = Checkpoint(log=[1, torch.zeros(1)])
    options = RestoreOptions(only=["model", "log"], expect_partial=True)
    status = live.read(program(2).write(path), options=options)
    live.step = 7
    assert live.step == 7
    live.model = program(3).model
    assert torch.equal(live.model["head"].weight, program(2).model["head"].weight)
    status.assert_consumed()


def test_the_counter_is_restored_when_it_is_named(path: str) -> None:
    saved = Checkpoint(a=1)
    for _ in range(3):
        file = saved.save(path)
    live = Checkpoint(a=0)
    live.restore(file, options=RestoreOptions(only=["a"])).assert_consumed()
    assert (live.a, live.save_counter) == (1, 0)
    live.restore(file, options=RestoreOptions(only=["save_counter"]))
    assert live.save_counter == 3


@pytest.mark.parametrize("name", ["modle", "model/hea", "optimizer/.slots/model/hea", "model/head/weight/x", "0"])
def test_a_prefix_that_names_nothing(name: str, path: str, open_files: Callable[[], list[str]]) -> None:
    live = program(3)
    file, before = program(2).write(path), snapshot(live)
    with pytest.raises(ValueError, match=f"only: nothing in the checkpoint has the key or prefix '{name}'"):
        live.read(file, options=RestoreOptions(only=["model", name]))
    assert not changed(before, live)
    assert file not in open_files()


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
def test_one_slot_of_several_is_refused(fresh: bool, path: str) -> None:
    """With just some of them an optimizer could not step."""
    file, live = program(2).write(path), program(3, steps=0 if fresh else 4)
    before = snapshot(live)
    slot = "optimizer/.slots/model/head/weight/exp_avg"
    with pytest.raises(ValueError, match=rf"only: .*{slot}'.*Pass 'optimizer/.slots/model/head/weight'"):
        live.read(file, options=RestoreOptions(only=[slot]))
    assert changed(before, live) == set()
    read(file, live, only=[slot, slot.replace("avg", "avg_sq"), slot.replace("exp_avg", "step")])


class _Stateful:
    def __init__(self, value: float) -> None:
        self.state: dict[str, Any] = {"a": torch.full((1,), value), "b": torch.full((1,), value)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class _WithExtraState(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.extra: dict[str, Any] = {"a": torch.full((1,), value), "b": torch.full((1,), value)}

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.extra)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "options",
    [
        {"only": ["other", "x/a"]},
        {"only": ["other", "x/.state", "x/a"]},
        {"only": ["other", "x/.state"]},
        {"only": ["other", "y/.extra_state/a"]},
        {"only": ["other", "y/.extra_state"], "rename": {"y/.extra_state/a": "z"}},
        {"rename": {"x/a": "x/c"}},
        {"rename": {"x/.state": "z"}},
    ],
)
def test_a_part_of_a_state_is_a_mismatch(options: dict[str, Any], path: str) -> None:
    file = Checkpoint(x=_Stateful(1), y=_WithExtraState(1), other=torch.ones(1)).write(path)
    live = Checkpoint(x=_Stateful(0), y=_WithExtraState(0), other=torch.zeros(1))
    with pytest.raises(RestoreMismatchError, match=r"(?m)^  [xy]\S*: saved a"):
        live.read(file, options=RestoreOptions(**options))
    assert live.other.tolist() == [0]
    with pytest.warns(CheckpointWarning, match="skipped"):
        live.read(file, options=RestoreOptions(on_mismatch="skip", expect_partial=True, **options))
    assert live.other.tolist() == [1]


def _with_betas(value: float) -> tuple[torch.optim.Adam, Checkpoint]:
    model = nn.Linear(1, 1)
    betas = (torch.tensor(value), torch.tensor(value / 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(value), betas=betas, foreach=False)
    return optimizer, Checkpoint(m=model, o=optimizer, other=torch.full((1,), value))


BETAS = "o/param_groups/0/betas"


@pytest.mark.parametrize(
    "options",
    [
        {"only": ["other", f"{BETAS}/0"]},
        {"only": ["other", f"{BETAS}/0", f"{BETAS}/1"]},
        {"rename": {f"{BETAS}/0": "zz"}},
        {"rename": {f"{BETAS}/1": f"{BETAS}/7"}},
        {"rename": {BETAS: "zz"}},
    ],
)
def test_a_part_of_a_group_entry_is_a_mismatch(options: dict[str, Any], path: str) -> None:
    file = _with_betas(0.5)[1].write(path)
    optimizer, live = _with_betas(0.25)
    with pytest.raises(RestoreMismatchError, match=rf"(?m)^  {BETAS}: saved a state of which only"):
        live.read(file, options=RestoreOptions(**options))
    assert live.other.tolist() == [0.25]
    with pytest.warns(CheckpointWarning, match="skipped"):
        live.read(file, options=RestoreOptions(on_mismatch="skip", expect_partial=True, **options))
    assert live.other.tolist() == [0.5]
    assert [float(beta) for beta in optimizer.param_groups[0]["betas"]] == [0.25, 0.125]


def test_a_whole_group_entry_is_no_part(path: str) -> None:
    file = _with_betas(0.5)[1].write(path)
    optimizer, live = _with_betas(0.25)
    (group,) = optimizer.param_groups
    live.read(file, options=RestoreOptions(only=[BETAS])).assert_consumed()
    assert [float(beta) for beta in group["betas"]] == [0.5, 0.25]
    assert float(group["lr"]) == 0.25
    live.read(file, options=RestoreOptions(only=[BETAS.replace("betas", "lr")])).assert_consumed()
    assert float(group["lr"]) == 0.5


@pytest.mark.parametrize("only", ["a", ".state", "b"])
def test_a_part_of_the_state_of_the_root_is_a_mismatch(only: str, path: str) -> None:
    file = Checkpoint(_Stateful(1), step=1).write(path)
    root = _Stateful(0)
    live = Checkpoint(root, step=0)
    with pytest.raises(RestoreMismatchError, match=r"\.state: saved a state of which only or rename leaves out "):
        live.read(file, options=RestoreOptions(only=["step", only]))
    assert (live.step, root.state["a"].tolist()) == (0, [0])
    live.read(file, options=RestoreOptions(only=["step"])).assert_consumed()
    assert (live.step, root.state["a"].tolist()) == (1, [0])


def test_the_error_of_a_prefix_says_what_is_there(path: str) -> None:
    file = program(2).write(path)
    for option in ({"only": ["modle"]}, {"rename": {"modle": "net"}}):
        with pytest.raises(ValueError, match=r"'modle'\. Similar: model"):
            program(3).read(file, options=RestoreOptions(**option))
    with pytest.raises(ValueError, match=r"'zzz'\. There is: .*model.*optimizer"):
        program(3).read(file, options=RestoreOptions(only=["zzz"]))


# ---- optimizers without their state ------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_steps", [0, 2])
@pytest.mark.parametrize("live_steps", [0, 4])
def test_skip_slots(saved_steps: int, live_steps: int, path: str) -> None:
    """Row 76: the slots stay what they are, and nobody misses them; then a full restore."""
    saved, live = program(2, steps=saved_steps), program(3, steps=live_steps)
    file, before = saved.write(path), snapshot(live)
    read(file, live, skip_slots=True)
    assert not any(key.startswith("optimizer/.slots") for key in changed(before, live))
    assert "model/head/weight" in changed(before, live)
    assert live.optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]
    live.read(file).assert_consumed()
    assert snapshot(live) == snapshot(saved)


def test_skip_slots_of_another_optimizer(path: str) -> None:
    """Other slot names are no mismatch then."""
    live = program(3)
    live.optimizer = torch.optim.SGD(live.model.parameters(), momentum=0.9)
    live.model["head"].weight.sum().backward()
    live.optimizer.step()
    file = program(2).write(path)
    with pytest.raises(RestoreMismatchError, match="slots"):
        live.read(file)
    read(file, live, skip_slots=True)
    assert set(live.optimizer.state[live.model["head"].weight]) == {"momentum_buffer"}


def test_skipped_slots_do_not_wait(path: str) -> None:
    live = Checkpoint(log=[1, torch.zeros(1)])
    status = live.read(program(2).write(path), options=RestoreOptions(skip_slots=True, expect_partial=True))
    fresh = program(3, steps=0)
    for name in ("optimizer", "model", "scheduler", "step"):
        setattr(live, name, getattr(fresh, name))
    status.assert_consumed()
    assert not live.optimizer.state


def test_the_reader_compares_what_is_named(path: str) -> None:
    with load_checkpoint(program(2).write(path)) as reader:
        live = Checkpoint(model=program(3).model, mine=0)
        options = RestoreOptions(only=["model"])
        assert set(reader.match(live, options=options)) == {key for key in reader if key.startswith("model/")}
        difference = reader.diff(live, options=options)
        assert (difference.missing, difference.unexpected) == ((), ())
        assert reader.diff(live).missing == ("mine",)
