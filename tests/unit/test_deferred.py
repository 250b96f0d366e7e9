"""Values that wait for objects which do not exist yet: applied at assignment, by assertions, by `retry_pending()`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    NoDependency,
    PerRank,
    RestoreMismatchError,
    RestoreOptions,
    SaveOptions,
    Trackable,
)
from distckpt.saving import saver

PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float, n: int = 2) -> torch.Tensor:
    return torch.full((n,), float(value))


def saved(path: str, **attributes: Any) -> str:
    """A file with these attributes, and one that every live checkpoint has."""
    return Checkpoint(here=1, **attributes).save(path)


def waiting(file: str, options: RestoreOptions = PARTIAL) -> Checkpoint:
    """A checkpoint that has restored what it could."""
    live = Checkpoint(here=0)
    live.restore(file, options=options)
    assert live.here == 1
    return live


# ---- at assignment -----------------------------------------------------------------------------------------------


def test_assigning_restores(path: str) -> None:
    live = waiting(saved(path, t=full(3), n=5, log=[1, 2], d={"x": full(4)}, none=None))
    tensor, log = full(0), [9]
    live.t, live.n, live.log, live.d, live.none = tensor, 0, log, {"x": full(0)}, 7
    assert live.t is tensor
    assert tensor.tolist() == [3, 3]
    assert live.n == 5
    assert live.log is log
    assert log == [1, 2]
    assert live.d["x"].tolist() == [4, 4]
    assert live.none is None


def test_the_second_assignment_is_the_users_own(path: str) -> None:
    live = waiting(saved(path, t=full(3), n=5))
    live.n, live.t = 0, full(0)
    assert live.n == 5
    live.n, live.t = 6, full(7)
    assert live.n == 6
    assert live.t.tolist() == [7, 7]


def test_a_whole_subtree_comes_at_once(path: str) -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    live = waiting(saved(path, m=source))
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not torch.equal(model[0].weight, source[0].weight)
    live.m = model
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_subtree_that_grows(path: str) -> None:
    tree = Trackable()
    tree.a = Trackable()
    tree.a.b = Trackable()
    tree.a.b.x, tree.a.n = full(1), 2
    live = waiting(saved(path, t=tree))
    live.t = Trackable()
    live.t.a = Trackable()
    live.t.a.n = 0
    assert live.t.a.n == 2
    live.t.a.b = Trackable()
    live.t.a.b.x = full(0)
    assert live.t.a.b.x.tolist() == [1, 1]


def test_a_child_that_was_built_before_it_was_attached(path: str) -> None:
    tree = Trackable()
    tree.child = Trackable()
    tree.child.x = full(1)
    live = waiting(saved(path, t=tree))
    child = Trackable()
    child.x = full(0)
    live.t = Trackable()
    assert child.x.tolist() == [0, 0]
    live.t.child = child
    assert child.x.tolist() == [1, 1]


def test_names_that_need_escaping(path: str) -> None:
    source = Trackable()
    for name in ("a.b", "c/d", ""):
        setattr(source, name, full(1))
        setattr(source, f"n{name}", 1)
    live = waiting(saved(path, s=source))
    live.s = Trackable()
    for name in ("a.b", "c/d", ""):
        setattr(live.s, name, full(0))
        setattr(live.s, f"n{name}", 0)
        assert getattr(live.s, name).tolist() == [1, 1]
        assert getattr(live.s, f"n{name}") == 1


def test_tracking_by_name_restores_too(path: str) -> None:
    live = waiting(saved(path, t=full(3), u=full(4)))
    tensor = live.track(full(0), "t")
    assert tensor.tolist() == [3, 3]
    live.u = NoDependency(full(0))
    assert live.u.tolist() == [0, 0]


def test_a_cycle_that_is_closed_later(path: str) -> None:
    first, second = Trackable(), Trackable()
    first.other, second.other, second.x = second, first, full(1)
    live = waiting(saved(path, first=first))
    twin, twin_second = Trackable(), Trackable()
    twin.other, twin_second.other, twin_second.x = twin_second, twin, full(0)
    live.first = twin
    assert twin_second.x.tolist() == [1, 1]


def test_an_attribute_of_a_checkpoint_with_a_root_of_its_own(path: str) -> None:
    source = Checkpoint(nn.Linear(1, 1), step=5)
    source.t = full(3)
    model = nn.Linear(1, 1)
    live = Checkpoint(model)
    live.restore(source.save(path), options=PARTIAL)
    live.step = 0
    live.t = full(0)
    assert live.step == 5
    assert live.t.tolist() == [3, 3]


def test_an_attribute_of_a_trackable_root(path: str) -> None:
    source, root = Trackable(), Trackable()
    source.x, source.here, root.here = full(3), 1, 0
    live = Checkpoint(root)
    live.restore(Checkpoint(source).save(path), options=PARTIAL)
    assert root.here == 1
    root.x = full(0)
    assert root.x.tolist() == [3, 3]


def test_an_object_met_by_a_pending_name_that_was_already_restored_elsewhere(path: str) -> None:
    """The saved tie is honoured whichever edge comes first."""
    shared = full(3)
    live = waiting(saved(path, a=shared, b=shared))
    tensor = full(0)
    live.b = tensor
    assert tensor.tolist() == [3, 3]
    tensor.fill_(5)
    live.a = tensor
    assert tensor.tolist() == [5, 5]


# ---- what is no assignment ---------------------------------------------------------------------------------------


def test_modules_and_containers_tell_nobody(path: str) -> None:
    def parts(value: float) -> tuple[nn.Module, list[Any], dict[str, Any]]:
        module = nn.Module()
        module.register_parameter("p", nn.Parameter(full(value)))
        return module, [full(value), value], {"x": full(value), "y": value}

    module, sequence, mapping = parts(3)
    live = waiting(saved(path, m=module, l=sequence, d=mapping))
    live.m, live.l, live.d = nn.Module(), [], {}
    module, sequence, mapping = parts(0)
    live.m.register_parameter("p", module.p)
    live.l.extend(sequence)
    live.d.update(mapping)
    assert module.p.tolist() == [0, 0]
    assert live.retry_pending() == 5
    assert module.p.tolist() == [3, 3]
    assert (live.l[0].tolist(), live.l[1]) == ([3, 3], 3)
    assert (live.d["x"].tolist(), live.d["y"]) == ([3, 3], 3)
    assert live.retry_pending() == 0


@pytest.mark.parametrize("how", ["assert_consumed", "assert_existing_objects_matched", "initialize_or_restore"])
def test_the_status_catches_up(how: str, path: str) -> None:
    source, live = nn.ModuleList([nn.Linear(1, 1)]), Checkpoint(m=nn.ModuleList(), here=0)
    status = live.restore(saved(path, m=source), options=PARTIAL)
    live.m.append(nn.Linear(1, 1))
    assert not torch.equal(live.m[0].weight, source[0].weight)
    getattr(status, how)()
    assert torch.equal(live.m[0].weight, source[0].weight)


def test_without_a_restore_there_is_nothing_to_retry() -> None:
    assert Checkpoint(a=1).retry_pending() == 0


def test_a_growing_sequential(path: str) -> None:
    source = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    live = Checkpoint(m=nn.Sequential(), here=0)
    live.restore(None)
    status = live.restore(saved(path, m=source), options=PARTIAL)
    for index in range(2):
        live.m.append(nn.Linear(1, 1))
        assert live.retry_pending() == 2
        assert torch.equal(live.m[index].weight, source[index].weight)
    status.assert_consumed()


# ---- saves never apply anything ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["save", "write"])
def test_a_save_drops_a_waiting_value_whose_object_it_meets(method: str, path: str) -> None:
    source = nn.Module()
    source.p, source.q = nn.Parameter(full(3)), nn.Parameter(full(4))
    live = Checkpoint(m=nn.Module(), here=0)
    status = live.restore(saved(path, m=source, later=full(6)), options=PARTIAL)
    live.m.p = nn.Parameter(full(0))
    with pytest.warns(
        CheckpointWarning, match=r"^m/p: a saved value was waiting.*retry_pending\(\) before save"
    ) as caught:
        getattr(live, method)(f"{path}-2")
    assert len(caught) == 1
    assert live.m.p.tolist() == [0, 0]
    live.save(f"{path}-2")
    assert live.retry_pending() == 0
    assert live.m.p.tolist() == [0, 0]
    live.m.q = nn.Parameter(full(0))  # its value still waits
    assert live.retry_pending() == 1
    assert live.m.q.tolist() == [4, 4]
    live.later = full(0)
    assert live.later.tolist() == [6, 6]
    with pytest.raises(AssertionError, match="m/p"):
        status.assert_consumed()


def test_each_dropped_value_is_told_in_one_save(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the layout is that of the save before, of which the ranks only compare digests."""
    merges: list[Any] = []
    merge = saver.merge_messages

    def count(*args: Any, **options: Any) -> Any:
        merges.append(args)
        return merge(*args, **options)

    monkeypatch.setattr(saver, "merge_messages", count)
    source = nn.Module()
    source.p = nn.Parameter(full(3))
    file, live = saved(path, m=source), Checkpoint(m=nn.Module(), here=0)
    for _ in range(2):
        live.m = nn.Module()
        live.restore(file, options=PARTIAL)
        live.m.p = nn.Parameter(full(0))
        merges.clear()
        with pytest.warns(CheckpointWarning, match="^m/p: a saved value was waiting"):
            live.save(f"{path}-2")
        live.save(f"{path}-2")
        assert len(merges) == 1


def test_a_save_leaves_what_still_waits(path: str) -> None:
    live = waiting(saved(path, t=full(3)))
    live.save(f"{path}-2")
    live.t = full(0)
    assert live.t.tolist() == [3, 3]


# ---- mismatches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [full(0, 3), torch.zeros(2, dtype=torch.int64), 5, nn.Linear(1, 1)], ids=repr)
def test_a_waiting_value_that_does_not_fit_is_raised_by_the_assignment(wrong: Any, path: str) -> None:
    live = waiting(saved(path, t=full(3), u=full(4)))
    before = repr(wrong)
    with pytest.raises(RestoreMismatchError, match="  t: saved"):
        live.t = wrong
    assert live.t is wrong
    assert repr(live.t) == before
    live.t = full(0)  # an object that fits
    assert live.t.tolist() == [3, 3]
    live.u = full(0)
    assert live.u.tolist() == [4, 4]


def test_a_waiting_value_that_does_not_fit_can_be_skipped(path: str) -> None:
    options = RestoreOptions(on_mismatch="skip", expect_partial=True)
    live = waiting(saved(path, t=full(3), u=full(4)), options)
    live.t = full(0, 3)
    assert live.t.tolist() == [0, 0, 0]
    live.u = full(0)
    assert live.u.tolist() == [4, 4]


def test_a_waiting_value_is_cast(path: str) -> None:
    live = waiting(saved(path, t=full(3)), RestoreOptions(cast=True, expect_partial=True))
    live.t = full(0).double()
    assert live.t.tolist() == [3, 3]


# ---- files that are gone, and several restores -------------------------------------------------------------------


def test_the_file_may_be_deleted_while_values_wait(path: str) -> None:
    file = saved(path, t=full(3), big=full(4, 100_000))
    live = waiting(file)
    Path(file).unlink()
    live.t, live.big = full(0), full(0, 100_000)
    assert live.t.tolist() == [3, 3]
    assert live.big.unique().tolist() == [4]


def test_damage_is_found_late_too(path: str) -> None:
    from distckpt import CorruptCheckpointError

    file = saved(path, big=full(4, 100_000))
    live = waiting(file)
    data = Path(file).read_bytes()
    position = data.index(full(4, 1000).numpy().tobytes()) + 8000
    with Path(file).open("r+b") as f:
        f.seek(position)
        f.write(b"\x01")
    with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(file)}: big: "):
        live.big = full(0, 100_000)


@pytest.mark.parametrize("order", ["values first", "optimizer first"])
def test_two_restores_that_wait_for_the_same(order: str, path: str) -> None:
    """The newer one wins, for tensors, numbers and slots, and stays the winner."""

    def source(value: float) -> Checkpoint:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.5)
        for parameter in model.parameters():
            parameter.data.fill_(value)
            optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, value)}
        return Checkpoint(m=model, o=optimizer, n=value, here=1)

    older, newer = source(1.0), source(2.0)
    older.only_in_older = full(1)
    file, newer_file = older.save(path), newer.save(f"{path}-newer")
    live = waiting(file)
    live.restore(newer_file, options=PARTIAL)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.5)
    if order == "values first":
        live.m, live.o, live.n = model, optimizer, 0
    else:
        live.o, live.n, live.m = optimizer, 0, model
        live.retry_pending()
    live.only_in_older = full(0)
    assert live.only_in_older.tolist() == [1, 1]
    live.retry_pending()
    assert live.n == 2
    assert [parameter.item() for parameter in model.parameters()] == [2, 2]
    assert optimizer.param_groups[0]["lr"] == 2
    assert [optimizer.state[p]["momentum_buffer"].item() for p in model.parameters()] == [2, 2]


def test_a_newer_restore_that_finds_its_object_drops_what_waits_for_it(path: str) -> None:
    source = nn.Module()
    source.p, source.later = nn.Parameter(full(1)), nn.Parameter(full(1))
    file = saved(path, m=source)
    live = Checkpoint(m=nn.Module(), here=0)
    live.restore(file, options=PARTIAL)
    newer = nn.Module()
    newer.p = nn.Parameter(full(2))
    live.m.p = nn.Parameter(full(0))
    live.restore(Checkpoint(m=newer, here=2).save(f"{path}-newer")).assert_consumed()
    live.m.later = nn.Parameter(full(0))
    assert live.retry_pending() == 1
    assert live.m.later.tolist() == [1, 1]
    assert live.m.p.tolist() == [2, 2]
    assert live.here == 2


def test_a_failed_restore_drops_nothing(path: str) -> None:
    live = waiting(saved(path, t=full(3)))
    wrong = Checkpoint(here=full(1), t=full(9)).save(f"{path}-wrong")
    with pytest.raises(RestoreMismatchError):
        live.restore(wrong)
    live.t = full(0)
    assert live.t.tolist() == [3, 3]


def test_parts_of_two_files(path: str) -> None:
    """The model from one file, the rest from another."""
    model_file = Checkpoint(m=nn.Linear(1, 1)).write(path)
    source = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.5, momentum=0.5)
    source(torch.ones(1)).sum().backward()
    optimizer.step()
    other_file = Checkpoint(m=source, o=optimizer, n=1).write(f"{path}-2")
    model = nn.Linear(1, 1)
    live = Checkpoint(m=model)
    live.read(other_file, options=PARTIAL)
    live.read(model_file).assert_consumed()
    weight = model.weight.detach().clone()
    live.o, live.n = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.5), 0
    assert torch.equal(live.o.state[model.weight]["momentum_buffer"], torch.ones(1, 1))
    assert live.n == 1
    assert torch.equal(model.weight, weight)


def test_the_counter_waits_for_nothing(path: str) -> None:
    """A `read` that waits, beside a `restore` that waits: the first must not touch the counter later."""
    for _ in range(4):
        file = saved(path, a=full(1))
    live = Checkpoint(here=0)
    live.read(file, options=PARTIAL)
    first = Checkpoint(here=1, b=full(2)).save(f"{path}-one")
    live.restore(first, options=PARTIAL)
    live.b, live.a = full(0), full(0)
    assert (live.a.tolist(), live.b.tolist()) == ([1, 1], [2, 2])
    assert live.save_counter == 1


def test_per_rank_values_wait_too(path: str) -> None:
    live = waiting(saved(path, p=PerRank(5), q=PerRank(full(3))))
    live.p, live.q = PerRank(0), PerRank(full(0))
    assert live.p.value == 5
    assert live.q.value.tolist() == [3, 3]


def test_a_deep_copy_waits_for_nothing(path: str) -> None:
    live = waiting(saved(path, t=full(3)))
    twin = copy.deepcopy(live)
    twin.t = full(0)
    assert twin.t.tolist() == [0, 0]
    live.t = full(0)
    assert live.t.tolist() == [3, 3]


def test_a_file_without_checksums_serves_late_values(path: str) -> None:
    source = Checkpoint(here=1, t=full(3))
    live = waiting(source.save(path, options=SaveOptions(checksums=False)))
    live.t = full(0)
    assert live.t.tolist() == [3, 3]
