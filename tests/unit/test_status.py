"""What a restore reports: four tuples, three assertions, their messages, and which warnings come when."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CheckpointWarning, RestoreMismatchError, RestoreOptions, RestoreStatus, Trackable

OpenFiles = Callable[[], list[str]]
PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def silent(action: Any) -> Any:
    """Run something that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


# ---- the four tuples ---------------------------------------------------------------------------------------------


def test_missing_unexpected_and_pending(path: str) -> None:
    saved = Checkpoint(
        m=nn.Linear(1, 1), gone={"x": full(1), "y": 2}, number=1, z={"known": 1, "t": full(1), "extra": 3}
    )
    live = Checkpoint(m=nn.Linear(1, 1, bias=False), mine=[full(0), 5], count=0, z={"known": 0, "t": full(0), "w": 0})
    status = live.restore(saved.save(path), options=PARTIAL)
    assert status.path == f"{path}-1.h5"
    assert status.missing == ("count", "mine/0", "mine/1", "z/w")
    assert status.unexpected == ("gone/x", "gone/y", "m/bias", "number", "z/extra")
    assert status.pending == status.unexpected  # every one of them has a parent that is there
    assert status.mismatched == ()


def test_values_below_an_object_that_never_came_are_pending_on_it(path: str) -> None:
    deep = Trackable()
    deep.a = Trackable()
    deep.a.b = {"x": full(1), "n": 1}
    status = Checkpoint(t=Trackable(), n=0).read(Checkpoint(t=deep, n=1).write(path), options=PARTIAL)
    assert status.pending == ("t/a/b/n", "t/a/b/x")
    with pytest.raises(AssertionError) as caught:
        status.assert_consumed()
    assert str(caught.value) == (
        f"{path}.h5: 2 saved values that nothing in the program took:\n"
        "  t/a/b/n (pending: waits for attribute 'a' of t)\n"
        "  t/a/b/x (pending: waits for attribute 'a' of t)"
    )


def test_values_of_ranks_that_are_not_there_are_exempt(path: str) -> None:
    """A file of one rank restored by a program that holds other per-rank values: nothing to see on one rank."""
    from distckpt import PerRank

    live = Checkpoint(p=PerRank(0), q=PerRank(full(0)))
    live.read(Checkpoint(p=PerRank(1), q=PerRank(full(1))).write(path), options=RestoreOptions(per_rank="error"))
    assert live.p.value == 1
    assert live.q.value.tolist() == [1, 1]


def test_the_tuples_are_from_the_restore_until_something_refreshes_them(path: str) -> None:
    live = Checkpoint(a=full(0))
    status = live.read(Checkpoint(a=full(1), b=full(1)).write(path), options=PARTIAL)
    assert status.pending == ("b",)
    live.b = full(0)
    assert live.b.tolist() == [1, 1]
    assert status.pending == ("b",)
    status.assert_consumed()
    assert status.pending == status.unexpected == ()
    live.c = full(0)
    assert status.missing == ()
    status.initialize_or_restore()
    assert status.missing == ("c",)


# ---- assertions --------------------------------------------------------------------------------------------------


def test_assertions_return_the_status(path: str) -> None:
    live = Checkpoint(a=full(0))
    status = live.restore(Checkpoint(a=full(1)).save(path))
    assert isinstance(status, RestoreStatus)
    assert status.assert_consumed().assert_existing_objects_matched().assert_nontrivial_match() is status
    assert status.expect_partial().initialize_or_restore() is status


_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # saved, live, which assertions pass: consumed, existing, nontrivial
    "the same": ({"a": 1, "t": full(1)}, {"a": 0, "t": full(0)}, "cen"),
    "more saved": ({"a": 1, "t": full(1)}, {"a": 0}, "en"),
    "more saved python": ({"a": 1, "t": full(1)}, {"t": full(0)}, "en"),
    "more live": ({"a": 1}, {"a": 0, "t": full(0)}, "n"),
    "more live python": ({"t": full(1)}, {"a": 0, "t": full(0)}, "n"),
    "nothing in common": ({"a": 1}, {"b": 0}, ""),
    "nothing live": ({"a": 1}, {}, "e"),
    "nothing saved": ({}, {"a": 1}, ""),
    "nothing at all": ({}, {}, "ce"),
    "objects without values": ({"a": 1, "m": nn.ReLU(), "l": []}, {"a": 0, "n": nn.Identity(), "d": {}}, "cen"),
    "only a module's buffer": ({"m": nn.BatchNorm1d(2, affine=False)}, {"m": nn.BatchNorm1d(2, affine=False)}, "cen"),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("method", ["save", "write"])
def test_which_assertions_pass(case: str, method: str, path: str) -> None:
    """The counter counts for none of them."""
    saved, live, passing = _CASES[case]
    file = getattr(Checkpoint(**saved), method)(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        status = Checkpoint(**live).restore(file)
    assertions = {
        "c": status.assert_consumed,
        "e": status.assert_existing_objects_matched,
        "n": status.assert_nontrivial_match,
    }
    for name, assertion in assertions.items():
        if name in passing:
            assert assertion() is status
        else:
            with pytest.raises(AssertionError, match=rf"^{file}: \d+ "):
                assertion()


def test_messages_name_ten_keys_and_count_the_rest(path: str) -> None:
    live = Checkpoint(x={f"k{i:02}": full(0) for i in range(12)}, n=0)
    status = live.read(Checkpoint(n=1, y={f"k{i:02}": full(0) for i in range(15)}).write(path))
    with pytest.raises(AssertionError) as caught:
        status.assert_existing_objects_matched()
    first, *_, tenth, last = str(caught.value).splitlines()
    assert first == f"{path}.h5: 12 live values that the checkpoint does not have:"
    assert tenth.startswith("  x/k09 (renamed? the saved y/k09 has no counterpart")
    assert last == "  ... and 2 more"
    live.x.clear()
    with pytest.raises(AssertionError) as caught:
        status.assert_consumed()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}.h5: 15 saved values that nothing in the program took:"
    assert lines[1] == "  y/k00 (pending: waits for attribute 'y' of the root)"
    assert lines[10].startswith("  y/k09")
    assert str(caught.value).endswith("... and 5 more")


def test_a_renamed_path_is_guessed(path: str) -> None:
    """By its ending first; a value that has a counterpart is nobody's new name."""
    names = ("fc1", "fc2", "norm")
    file = Checkpoint(model=nn.ModuleDict({name: nn.Linear(1, 1) for name in names}), taken=full(1)).write(path)
    live = Checkpoint(model=nn.ModuleDict({name: nn.Linear(1, 1) for name in ("fc1", "fc_2")}), taken=full(0))
    status = live.read(file, options=PARTIAL)
    with pytest.raises(AssertionError) as caught:
        status.assert_existing_objects_matched()
    how = "has no counterpart either, see RestoreOptions(rename=...))"
    assert str(caught.value).splitlines()[1:] == [
        f"  model/fc_2/bias (renamed? the saved model/fc2/bias {how}",
        f"  model/fc_2/weight (renamed? the saved model/fc2/weight {how}",
    ]
    del live.model["fc_2"]
    with pytest.raises(AssertionError) as caught:
        status.assert_consumed()
    assert str(caught.value).splitlines()[1] == "  model/fc2/bias (pending: waits for attribute 'fc2' of model)"
    live.model["fc__2"] = nn.Linear(1, 1, bias=False)
    live.read(file, options=RestoreOptions(rename={"model/fc2": "model/fc__2"}, expect_partial=True))


def test_a_status_outlives_its_checkpoint(path: str) -> None:
    model = nn.Linear(2, 2)
    file = Checkpoint(m=nn.Linear(2, 2)).write(path)
    status = Checkpoint(m=model).read(file)
    status.assert_consumed()
    status.initialize_or_restore()
    status.close()


def test_a_program_that_trains_on_still_passes(path: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(m=model, o=optimizer, step=3, log=[1])
    status = checkpoint.restore(checkpoint.save(path))
    optimizer.step()
    checkpoint.step = 4
    checkpoint.log = [5]
    optimizer.param_groups[0]["lr"].fill_(7)
    status.assert_consumed()
    assert checkpoint.step == 4
    assert checkpoint.log == [5]
    assert optimizer.param_groups[0]["lr"] == 7


def test_an_object_that_was_replaced_is_not_restored_again_and_reported(path: str) -> None:
    live = Checkpoint(t=full(0), m=nn.Linear(1, 1))
    status = live.read(Checkpoint(t=full(1), m=nn.Linear(1, 1)).write(path))
    status.assert_consumed()
    live.t = full(5)
    live.m.weight = nn.Parameter(torch.full((1, 1), 9.0))
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match=r"(?s)m/weight: reassigned.*t: reassigned"):
            assertion()
    assert live.t.tolist() == [5, 5]
    assert live.m.weight.item() == 9


def test_an_object_that_was_deleted_leaves_its_value_taken(path: str) -> None:
    live = Checkpoint(t=full(0), n=0)
    status = live.read(Checkpoint(t=full(1), n=1).write(path))
    del live.t, live.n
    status.assert_consumed()


# ---- warnings ----------------------------------------------------------------------------------------------------


def test_nothing_to_say_nothing_said(path: str) -> None:
    live = Checkpoint(a=full(0), n=0)
    silent(lambda: live.restore(Checkpoint(a=full(1), n=1).save(path)))
    silent(lambda: live.save(path))


def test_what_is_missing_or_pending_is_warned_about_at_the_first_save(path: str) -> None:
    live = Checkpoint(a=full(0), mine=0)
    file = Checkpoint(a=full(1), b=full(1)).save(path)
    silent(lambda: live.restore(file))
    with pytest.warns(CheckpointWarning) as caught:
        live.save(path)
    texts = [str(warning.message) for warning in caught]
    hint = "Call expect_partial() on the status of restore() if that is meant."
    assert texts == [
        f"{file}: 1 saved value(s) were not restored: b. {hint}",
        f"{file}: 1 live value(s) were not in the file: mine. {hint}",
    ]
    assert all(issubclass(warning.category, UserWarning) for warning in caught)
    silent(lambda: live.save(path))


@pytest.mark.parametrize("how", ["option", "expect_partial", "assertion", "failed assertion"])
def test_whoever_asked_is_not_warned(how: str, path: str) -> None:
    live = Checkpoint(a=full(0), mine=0)
    file = Checkpoint(a=full(1), b=full(1)).save(path)
    status = silent(lambda: live.restore(file, options=RestoreOptions(expect_partial=how == "option")))
    if how == "expect_partial":
        status.expect_partial()
    elif how == "assertion":
        status.assert_nontrivial_match()
    elif how == "failed assertion":
        with pytest.raises(AssertionError):
            status.assert_consumed()
    silent(lambda: live.save(path))


def test_what_was_restored_before_the_first_save_is_not_warned_about(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(2), c=full(3)).write(path)
    live = Checkpoint(a=full(0))
    live.read(file)
    live.b = full(0)
    with pytest.warns(CheckpointWarning) as caught:
        live.save(f"{path}-next")
    assert [str(each.message).partition(" Call")[0] for each in caught] == [
        f"{file}: 1 saved value(s) were not restored: c."
    ]
    live.read(file)
    live.c = full(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.save(f"{path}-next")
    assert (live.b.tolist(), live.c.tolist()) == ([2, 2], [3, 3])


def test_a_restore_of_which_only_the_counter_matched_is_warned_about_at_once(path: str) -> None:
    file = Checkpoint(a=1, b=full(1)).save(path)
    with pytest.warns(CheckpointWarning, match=r"nothing but the save counter matched\. Saved: a, b\.") as caught:
        status = Checkpoint(x=0).restore(file)
    assert len(caught) == 1
    status.expect_partial()
    silent(lambda: Checkpoint(x=0).restore(Checkpoint().save(path)))  # there was nothing to match


def test_warnings_point_at_the_caller(path: str) -> None:
    file = Checkpoint(a=1).save(path)
    with pytest.warns(CheckpointWarning) as caught:
        Checkpoint(x=0).restore(file)
    assert Path(caught[0].filename) == Path(__file__)
    live = Checkpoint(a=0, b=0)
    live.restore(file)
    with pytest.warns(CheckpointWarning) as caught:
        live.save(path)
    assert Path(caught[0].filename) == Path(__file__)


def test_warnings_are_never_given_by_the_garbage_collector(path: str) -> None:
    live = Checkpoint(a=full(0), mine=0)
    live.restore(Checkpoint(a=full(1), b=full(1)).save(path))

    def drop() -> None:
        nonlocal live
        del live

    silent(drop)


def module(value: float) -> nn.Module:
    made = nn.Module()
    made.x = nn.Parameter(full(value))
    return made


# ---- the file ----------------------------------------------------------------------------------------------------


def test_one_descriptor_while_something_waits_and_none_afterwards(path: str, open_files: OpenFiles) -> None:
    file = Checkpoint(a=full(1), b=full(2), c=3).save(path)
    live = Checkpoint(a=full(0))
    status = live.restore(file)
    assert open_files().count(file) == 1
    live.b = full(0)
    assert open_files().count(file) == 1
    live.c = 0
    assert open_files().count(file) == 0
    status.assert_consumed()
    live.restore(file).assert_consumed()
    assert open_files().count(file) == 0


def test_retry_pending_refreshes_the_status(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(2), c=full(3), m=nn.Linear(2, 2)).write(path)
    live = Checkpoint(a=full(0), m=nn.Module())
    status = live.read(file, options=RestoreOptions(expect_partial=True, on_mismatch="skip"))
    waiting = ("b", "c", "m/bias", "m/weight")
    assert status.pending == status.unexpected == waiting
    live.b = full(0)
    assert live.b.tolist() == [2, 2]
    assert status.pending == status.unexpected == waiting
    live.m.bias = nn.Parameter(full(0))  # a module tells nobody
    live.m.weight = nn.Parameter(full(0))
    assert live.retry_pending() == 1
    assert status.pending == ("c",)
    assert status.unexpected == ("c", "m/weight")
    assert [mismatch.key for mismatch in status.mismatched] == ["m/weight"]
    live.c = full(0)
    assert live.retry_pending() == 0
    assert (status.pending, status.unexpected) == ((), ("m/weight",))
    status.assert_nontrivial_match()
    assert (status.pending, status.unexpected) == ((), ("m/weight",))


def test_a_missing_value_that_gets_a_saved_one_is_no_longer_missing(path: str) -> None:
    file = Checkpoint(b=full(2), c=full(3), here=1).write(path)
    live = Checkpoint(a=full(0), here=0)
    status = live.read(file)
    assert (status.missing, status.unexpected) == (("a",), ("b", "c"))
    live.b = live.a  # one tensor, whose key stays "a"
    assert live.a.tolist() == [2, 2]
    assert live.retry_pending() == 0
    assert (status.missing, status.unexpected) == ((), ("c",))
    live.c = full(0)
    silent(lambda: live.save(f"{path}-2"))
    status.assert_consumed()


def test_a_retry_that_fails_shows_what_other_restores_have_applied(path: str) -> None:
    live = Checkpoint(m=nn.Module(), n=nn.Module(), here=0)
    older = live.read(Checkpoint(m=module(2), here=1).write(f"{path}-m"), options=PARTIAL)
    newer = live.read(Checkpoint(n=module(3), here=1).write(f"{path}-n"), options=PARTIAL)  # the first that is tried
    live.m.x, live.n.x = nn.Parameter(torch.zeros(5)), nn.Parameter(full(0))
    with pytest.raises(RestoreMismatchError, match="m/x"):
        live.retry_pending()
    assert live.n.x.tolist() == [3, 3]
    assert (older.pending, newer.pending, newer.unexpected) == (("m/x",), (), ())


@pytest.mark.parametrize("how", ["close", "root", "superseded"])
def test_other_ways_to_close_the_file(how: str, path: str, open_files: OpenFiles) -> None:
    file = Checkpoint(a=full(1), m=module(2)).save(path)
    live = Checkpoint(a=full(0), m=nn.Module())
    status = live.restore(file, options=PARTIAL)
    assert open_files().count(file) == 1
    live.m.x = nn.Parameter(full(0))  # a module tells nobody
    if how == "close":
        status.close()
        status.close()
        assert live.retry_pending() == 0
        with pytest.raises(AssertionError, match="m/x"):
            status.assert_consumed()
    elif how == "root":
        del live, status
    else:
        live.read(Checkpoint(a=full(5), m=module(6)).write(f"{path}-newer"))
        assert live.retry_pending() == 0
        assert live.m.x.tolist() == [6, 6]
    assert open_files().count(file) == 0
