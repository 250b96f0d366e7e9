"""TensorFlow's tests of object-based checkpoints, one by one, in torch's words; see tests/ACCEPTANCE.md for the others.

They run on one rank here, and on 2 and 4 ranks from tests/mpi/test_acceptance.py: every rank does the same.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpoint, NoDependency, RestoreMismatchError, RestoreOptions, Trackable, latest_checkpoint
from distckpt.storage.state import read_state

Keys = Callable[[str], set[str]]
PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float, n: int = 2) -> torch.Tensor:
    return torch.full((n,), float(value))


def node(**attributes: Any) -> Trackable:
    made = Trackable()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def training(value: float, *, steps: int = 1, lr: float = 0.1) -> tuple[nn.Linear, torch.optim.Adam]:
    """A model filled with a value, then trained."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2)).sum().backward()
    optimizer.step()


def fails(assertion: Callable[[], object], *parts: str) -> None:
    """The assertion of a status fails, and its message has these parts."""
    with pytest.raises(AssertionError) as caught:
        assertion()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# ---- names -------------------------------------------------------------------------------------------------------


def test_row_4_only_slots_of_tracked_models(path: str, keys_of: Keys) -> None:
    tracked, other = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam([*tracked.parameters(), *other.parameters()])
    tracked(torch.ones(1)).sum().backward()
    optimizer.step()
    keys = keys_of(Checkpoint(model=tracked, optimizer=optimizer).save(path))
    assert {key for key in keys if "param_groups" not in key} == {
        "save_counter",
        "model/weight",
        "model/bias",
        *(f"optimizer/.slots/model/{p}/{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")),
    }


def test_row_12_and_13_paths_of_variables(path: str, keys_of: Keys) -> None:
    leaf = node(v=full(1), **{".ATTRIBUTES": full(1), ".slots": full(1)})
    assert keys_of(Checkpoint(leaf=leaf).write(path)) == {"leaf/v", "leaf/..ATTRIBUTES", "leaf/..slots"}


def test_row_72_attributes_of_the_root(path: str, keys_of: Keys) -> None:
    assert keys_of(Checkpoint(node(v1=full(1), v2=2)).write(path)) == {"v1", "v2"}


# ---- save and restore --------------------------------------------------------------------------------------------


def test_row_7_save_and_restore_with_an_optimizer(path: str) -> None:
    """At once, and into objects that come later: slots are there before the first step."""
    model, optimizer = training(3, lr=0.5)
    saved = Checkpoint(model=model, optimizer=optimizer)
    file = saved.save(path)
    weight, slot = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 9.0
    for _ in range(2):
        saved.save(path)
    assert saved.save_counter == 3
    saved.restore(file).assert_consumed()
    assert saved.save_counter == 1
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], slot)
    assert optimizer.param_groups[0]["lr"] == 0.5

    live = Checkpoint(here=0)
    status = Checkpoint.restore(live, Checkpoint(here=1, model=model, optimizer=optimizer).save(path), options=PARTIAL)
    fails(status.assert_consumed, "pending: waits for attribute 'model' of the root")
    live.model, _ = training(0, steps=0)
    assert torch.equal(live.model.weight, weight)
    fails(status.assert_consumed, "pending: waits for attribute 'optimizer' of the root")
    live.optimizer = torch.optim.Adam(live.model.parameters(), lr=9.0)
    assert torch.equal(live.optimizer.state[live.model.weight]["exp_avg"], slot)
    assert live.optimizer.param_groups[0]["lr"] == 0.5
    status.assert_consumed()


def test_row_17_slots_and_values_of_two_restores(path: str) -> None:
    """With slots, then without: the variable has the value of the second, its slots are of the first."""
    model, optimizer = training(1)
    slot = optimizer.state[model.weight]["exp_avg"].clone()
    with_slots = Checkpoint(here=1, model=model, optimizer=optimizer).save(path)
    model, _ = training(7, steps=0)
    without = Checkpoint(here=2, model=model).save(path)
    live = Checkpoint(here=0)
    first = live.restore(with_slots, options=PARTIAL)
    second = live.restore(without, options=PARTIAL)
    live.model, _ = training(0, steps=0)
    assert live.model.weight.unique().tolist() == [7]
    second.assert_consumed()
    first.assert_existing_objects_matched()
    fails(first.assert_consumed, "optimizer/.slots/model/bias/exp_avg", "optimizer")
    live.optimizer = torch.optim.Adam(live.model.parameters())
    assert torch.equal(live.optimizer.state[live.model.weight]["exp_avg"], slot)
    assert live.model.weight.unique().tolist() == [7]
    first.assert_consumed()


def test_row_25_and_54_attributes_added_between_saves(tmp_path: Path) -> None:
    """Restoring an older checkpoint leaves newer objects unchanged; the state file names the newest."""
    live = Checkpoint()
    for i in range(10):
        setattr(live, f"var_{i}", full(i))
        file = live.save(tmp_path / "ckpt")
        assert file == latest_checkpoint(tmp_path) == str(tmp_path / f"ckpt-{i + 1}.h5")
    for i in range(10):
        getattr(live, f"var_{i}").fill_(-i)
    live.restore(tmp_path / "ckpt-6", options=PARTIAL)
    assert [getattr(live, f"var_{i}")[0].item() for i in range(10)] == [0, 1, 2, 3, 4, 5, -6, -7, -8, -9]
    live.restore(tmp_path / "ckpt-10").assert_consumed()
    assert [getattr(live, f"var_{i}")[0].item() for i in range(10)] == list(range(10))
    state = read_state(tmp_path)
    assert state is not None
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-10.h5")


def test_row_53_a_checkpoint_deletes_nothing(tmp_path: Path) -> None:
    live = Checkpoint(x=full(1))
    for _ in range(10):
        live.save(tmp_path / "ckpt")
    assert len(list(tmp_path.glob("ckpt-*.h5"))) == 10


def test_row_36_one_tensor_as_two(path: str) -> None:
    """A fused tensor whose halves are tracked: into two tensors, into one, and back into the fused one, later."""

    def fused(value: float) -> Trackable:
        whole = full(value, 4)
        return node(_whole=NoDependency(whole), left=whole[:2], right=whole[2:])

    source = fused(0)
    source._whole.copy_(torch.arange(4.0))
    file = Checkpoint(t=source, here=1).write(path)
    two = Checkpoint(t=node(left=full(9), right=full(9)), here=0)
    two.read(file).assert_consumed()
    assert (two.t.left.tolist(), two.t.right.tolist()) == ([0, 1], [2, 3])
    one = Checkpoint(t=node(left=full(9)), here=0)
    fails(one.read(file, options=PARTIAL).assert_consumed, "t/right (pending: waits for attribute 'right' of t)")
    assert one.t.left.tolist() == [0, 1]
    back = Checkpoint(here=0)
    status = back.read(two.write(path), options=PARTIAL)
    back.t = fused(9)
    assert back.t._whole.tolist() == [0, 1, 2, 3]
    status.assert_consumed()


def test_row_44_names_of_ones_own(tmp_path: Path) -> None:
    live = Checkpoint(step=0)
    for live.step in range(4):
        assert live.write(tmp_path / f"step-{live.step}x") == str(tmp_path / f"step-{live.step}x.h5")
    live.read(tmp_path / "step-1x").assert_consumed()
    assert (live.step, live.save_counter) == (1, 0)


def test_row_48_what_waits_is_no_missing_object(path: str) -> None:
    live = Checkpoint(here=0)
    status = live.restore(Checkpoint(here=1, dep=node(v=full(3))).save(path), options=PARTIAL)
    status.assert_existing_objects_matched()
    fails(status.assert_consumed, "dep/v")
    live.dep = node()
    status.assert_existing_objects_matched()
    fails(status.assert_consumed, "dep/v (pending: waits for attribute 'v' of dep)")
    live.dep.v = full(0)
    assert live.dep.v.tolist() == [3, 3]
    status.assert_existing_objects_matched().assert_consumed()


def test_row_52_a_checkpoint_inside_a_cycle(path: str) -> None:
    def make(value: float) -> Checkpoint:
        made = Checkpoint(first=node(v=full(value)))
        made.first.second = node(owner=made, v=full(value), first=made.first)
        return made

    saved, live = make(1), make(0)
    live.restore(saved.save(path)).assert_consumed()
    assert (live.first.v.tolist(), live.first.second.v.tolist()) == ([1, 1], [1, 1])
    later = Checkpoint(first=node(v=full(0)))
    status = later.restore(saved.save(path), options=PARTIAL)
    later.first.second = node(owner=later, v=full(0), first=later.first)
    assert later.first.second.v.tolist() == [1, 1]
    status.assert_consumed()


def test_row_55_numbers_in_a_new_container_are_state(path: str) -> None:
    """Not TensorFlow's answer: plain numbers are saved, so new ones are missing; containers without any are not."""
    live = Checkpoint(v=full(0), fresh={"n": 1}, empty=[{}, []])
    status = live.restore(Checkpoint(v=full(1)).save(path), options=PARTIAL)
    assert status.missing == ("fresh",)
    fails(status.assert_existing_objects_matched, "1 live values that the checkpoint does not have", "fresh")
    live.fresh.clear()
    status.assert_consumed()


def test_row_61_and_65_a_root_and_its_keywords_interchange(path: str) -> None:
    """Saved with a root and attached objects; restored with the roles swapped, and with keywords alone."""
    saved = Checkpoint(node(a=full(1)), b=node(x=full(2)))
    file = saved.save(path)
    swapped = Checkpoint(node(b=node(x=full(0))), a=full(0))
    swapped.restore(file).assert_consumed()
    assert (swapped.a.tolist(), swapped.save_counter) == ([1, 1], 1)
    keywords = Checkpoint(a=full(0), b=node(x=full(0)))
    keywords.restore(file).assert_consumed()
    assert keywords.b.x.tolist() == [2, 2]
    back = Checkpoint(node(a=full(0)), b=node(x=full(0)))
    back.restore(keywords.save(path)).assert_consumed()
    assert back.b.x.tolist() == [2, 2]


def test_row_64_only_what_holds_values_waits(path: str) -> None:
    saved = Checkpoint(here=1, hollow=node(deep=node(list=[], module=nn.ReLU())), full=node(hollow=node(), x=full(1)))
    live = Checkpoint(here=0)
    status = live.read(saved.write(path), options=PARTIAL)
    assert status.pending == ("full/x",)
    live.full = node(x=full(0))
    status.assert_consumed()
    assert status.pending == ()


def test_row_83_what_holds_when(path: str) -> None:
    """A deferred restore, step by step: nontrivial, existing, consumed."""
    model, optimizer = training(1)
    live = Checkpoint(here=0)
    status = live.restore(Checkpoint(here=1, model=model, optimizer=optimizer).save(path), options=PARTIAL)
    live.model, _ = training(0, steps=0)
    status.assert_nontrivial_match().assert_existing_objects_matched()
    fails(status.assert_consumed, "optimizer/.slots/model/bias/exp_avg", "optimizer/param_groups/0")
    live.optimizer = torch.optim.Adam(live.model.parameters(), lr=9.0)
    status.assert_existing_objects_matched().assert_consumed()
    train(live.model, live.optimizer)
    status.assert_consumed()
    assert live.optimizer.state[live.model.weight]["step"] == 2


def test_row_87_what_is_lost_is_named(path: str) -> None:
    """One parameter of two, and the optimizer's state for the other."""
    model, optimizer = training(1)
    bare = nn.Linear(2, 1, bias=False)
    live = Checkpoint(model=bare, optimizer=torch.optim.Adam(bare.parameters()))
    status = live.restore(Checkpoint(model=model, optimizer=optimizer).save(path), options=PARTIAL)
    lost = {"model/bias", *(f"optimizer/.slots/model/bias/{slot}" for slot in ("step", "exp_avg", "exp_avg_sq"))}
    assert set(status.unexpected) == lost
    fails(status.assert_consumed, *lost)


def test_row_88_a_compiled_model_is_restored_before_its_first_call(path: str, keys_of: Keys) -> None:
    model, optimizer = training(1)
    file = Checkpoint(model=model, optimizer=optimizer).save(path)
    inner, inner_optimizer = training(0, steps=0)
    compiled: Any = torch.compile(inner, backend="eager")
    live = Checkpoint(model=compiled, optimizer=inner_optimizer)
    live.restore(file).assert_consumed()
    assert torch.equal(compiled(torch.ones(2)), model(torch.ones(2)))
    assert not any("_orig_mod" in key for key in keys_of(live.save(path)))


def test_row_92_a_model_and_its_optimizer_from_two_files(path: str) -> None:
    """A file without the optimizer leaves its state missing; restore(None) later undoes nothing."""
    model, optimizer = training(1)
    model_file = Checkpoint(model=model).write(f"{path}-model")
    optimizer_file = Checkpoint(model=model, optimizer=optimizer).write(f"{path}-optimizer")
    live_model, live_optimizer = training(2)
    live = Checkpoint(model=live_model, optimizer=live_optimizer)
    fails(live.read(model_file, options=PARTIAL).assert_existing_objects_matched, "optimizer/.slots/model")
    live.read(optimizer_file, options=RestoreOptions(only=["optimizer"])).assert_consumed()
    live.restore(None)
    assert torch.equal(live_model.weight, model.weight)
    for slot, value in optimizer.state[model.weight].items():
        assert torch.equal(live_optimizer.state[live_model.weight][slot], value)


# ---- containers --------------------------------------------------------------------------------------------------


def test_row_135_one_object_at_two_indices(path: str) -> None:
    shared = full(5)
    live = [full(0), full(1)]
    live = [live[0], live[1], live[0]]
    Checkpoint(l=live).read(Checkpoint(l=[shared, full(6), shared]).write(path)).assert_consumed()
    assert [tensor[0].item() for tensor in live] == [5, 6, 5]
    assert live[0] is live[2]


def test_row_131_to_133_and_150_151_lists_may_change(path: str, keys_of: Keys) -> None:
    """Not TensorFlow's answer: nothing is poisoned, a save stores what the list holds then."""
    layers = [full(0), full(1), full(2)]
    live = Checkpoint(l=layers, numbers=[3, 1, 2])
    del layers[0]
    layers.insert(0, full(7))
    layers.reverse()
    live.numbers.sort()
    live.numbers[1:1] = [9]
    file = live.write(path)
    assert keys_of(file) == {"l/0", "l/1", "l/2", "numbers"}
    twin = Checkpoint(l=[full(-1), full(-1), full(-1)], numbers=[])
    twin.read(file).assert_consumed()
    assert [tensor[0].item() for tensor in twin.l] == [2, 1, 7]
    assert twin.numbers == [1, 9, 2, 3]


def test_row_138_copies_track_children_of_their_own(path: str) -> None:
    original = node(x=full(1), child=node(y=full(2)))
    shallow, deep = copy.copy(original), copy.deepcopy(original)
    shallow.x, deep.more = full(3), full(4)
    file = Checkpoint(o=original, s=shallow, d=deep).write(path)
    live = Checkpoint(
        o=node(x=full(0), child=node(y=full(0))), s=node(x=full(0)), d=node(x=full(0), child=node(y=full(0)))
    )
    live.d.more, live.s.child = full(0), live.o.child
    live.read(file).assert_consumed()
    assert [live.o.x[0].item(), live.s.x[0].item(), live.d.x[0].item(), live.d.more[0].item()] == [1, 3, 1, 4]
    assert live.d.child.y is not live.o.child.y


class _Point(NamedTuple):
    x: Any
    y: Any


class _Named(_Point):
    def norm(self) -> float:
        return float(self.x.sum())


class _Pair(tuple):  # type: ignore[type-arg]
    __slots__ = ()


def test_row_141_to_143_tuples(path: str, keys_of: Keys) -> None:
    def make(value: float) -> dict[str, Any]:
        return {"point": _Point(full(value), 1), "named": _Named(full(value), 1), "pair": _Pair((full(value), 1))}

    file = Checkpoint(**make(3)).write(path)
    assert keys_of(file) == {"point/x", "point/y", "named/x", "named/y", "pair/0", "pair/1"}
    live = Checkpoint(**make(0))
    kept = live.named
    live.read(file).assert_consumed()
    assert live.named is kept
    assert (kept.norm(), live.pair[0].tolist(), live.point.x.tolist()) == (6, [3, 3], [3, 3])


def test_row_146_a_module_in_a_tuple_of_its_own(path: str) -> None:
    def make(value: float) -> Trackable:
        made = node(v=full(value))
        made.s = (made, [made])
        return made

    live = make(0)
    Checkpoint(m=live).read(Checkpoint(m=make(1)).write(path)).assert_consumed()
    assert live.v.tolist() == [1, 1]


@pytest.mark.parametrize("container", [list, tuple, dict], ids=lambda kind: kind.__name__)
def test_row_152_and_168_elements_that_opt_out(container: Any, path: str, keys_of: Keys) -> None:
    def make(value: float) -> Any:
        elements = [full(value), NoDependency(full(value)), value]
        return container(zip("abc", elements, strict=True)) if container is dict else container(elements)

    names = "abc" if container is dict else "012"
    file = Checkpoint(c=make(1), alone=[NoDependency(print)], mixed=(NoDependency(full(1)), 5)).write(path)
    assert keys_of(file) == {f"c/{names[0]}", f"c/{names[2]}", "mixed/1"}
    if container is tuple:
        return  # the number in it cannot change
    live = make(0)
    Checkpoint(c=live, mixed=(NoDependency(full(0)), 5)).read(file).assert_consumed()
    first, second, third = live.values() if container is dict else live
    assert (first.tolist(), second.value.tolist(), third) == ([1, 1], [0, 0], 1)


def test_row_163_containers_in_a_module_are_torchs_own(path: str, keys_of: Keys) -> None:
    """A plain list of modules is no part of a module for torch, nor for us; in a Trackable it is."""
    module = nn.Module()
    module.listed = nn.ModuleList([nn.Linear(1, 1, bias=False)])
    module.named = nn.ModuleDict({"k": nn.Linear(1, 1, bias=False)})
    module.plain = [nn.Linear(1, 1, bias=False)]
    assert keys_of(Checkpoint(m=module).write(path)) == {"m/listed/0/weight", "m/named/k/weight"}
    assert set(module.state_dict()) == {"listed.0.weight", "named.k.weight"}
    assert keys_of(Checkpoint(t=node(plain=module.plain)).write(path)) == {"t/plain/0/weight"}


def test_row_164_modules_in_lists_of_lists(path: str) -> None:
    def make(value: float) -> Trackable:
        return node(models=[nn.Sequential(training(value, steps=0)[0]), [training(value, steps=0)[0]]])

    live = make(0)
    Checkpoint(t=live).read(Checkpoint(t=make(4)).write(path)).assert_consumed()
    assert live.models[0][0].weight.unique().tolist() == live.models[1][0].weight.unique().tolist() == [4]


def test_row_169_and_170_dicts_may_change(path: str, keys_of: Keys) -> None:
    """A value may be replaced, and a key that is gone is gone."""
    live = Checkpoint(d={"a": full(1), "b": full(2)})
    live.d["a"] = full(3)
    live.d.pop("b")
    live.d["c"] = full(4)
    file = live.write(path)
    assert keys_of(file) == {"d/a", "d/c"}
    twin = Checkpoint(d=collections.OrderedDict(a=full(0), c=full(0)))
    twin.read(file).assert_consumed()
    assert (twin.d["a"].tolist(), twin.d["c"].tolist()) == ([3, 3], [4, 4])


# ---- python state ------------------------------------------------------------------------------------------------


class _Arrays:
    """A holder whose attributes are arrays and NumPy scalars, recreated from the file."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def test_row_159_and_161_a_holder_recreated_from_the_file(path: str) -> None:
    files = []
    for scale in (1, 2):
        source = _Arrays()
        vars(source).update(a=np.arange(3.0) * scale, s=np.float64(scale), i=np.int32(scale))
        files.append(Checkpoint(state=source).save(path))
    live = _Arrays()
    for file, scale in zip(files, (1, 2), strict=True):
        Checkpoint(state=live).restore(file).assert_consumed()
        assert (live.a.tolist(), live.s, live.i) == ([0, scale, 2 * scale], scale, scale)  # type: ignore[attr-defined]
        assert type(live.i) is np.int32  # type: ignore[attr-defined]


def test_row_162_python_state_that_nobody_has(path: str) -> None:
    source = _Arrays()
    vars(source)["n"] = 1
    status = Checkpoint(v=full(0), state=node()).restore(
        Checkpoint(v=full(1), state=node(inner=source)).save(path), options=PARTIAL
    )
    fails(status.assert_consumed, "state/inner/.state (pending: waits for attribute 'inner' of state)")


def test_row_67_shapes_that_do_not_fit(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(1, 3)).save(path)
    live = Checkpoint(a=full(0), b=full(0, 4))
    with pytest.raises(RestoreMismatchError, match=r"b: saved a tensor of shape \(3,\).*live a tensor of shape \(4,\)"):
        live.restore(file)
    assert isinstance(RestoreMismatchError(), ValueError)
    assert live.a.tolist() == [0, 0]
