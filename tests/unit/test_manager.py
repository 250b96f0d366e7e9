"""CheckpointManager and checkpoints_iterator on one rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt.follow
import distckpt.managed_directory
import distckpt.manager
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    CheckpointRecord,
    CheckpointWarning,
    CollectiveError,
    CorruptCheckpointError,
    RestoreMismatchError,
    RestoreOptions,
    SaveOptions,
    checkpoints_iterator,
    latest_checkpoint,
    load_variable,
)
from distckpt.cluster import PreemptionGuard
from distckpt.storage import commit
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.latest import complete_checkpoints, is_complete

HOUR = 3600.0


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make(value: float = 0.0) -> Checkpoint:
    return Checkpoint(w=torch.full((4,), value), step=0)


def names(paths: list[str]) -> list[str]:
    return [Path(path).name.removesuffix(".h5") for path in paths]


def files(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.h5"))


def spoil(path: str, key: str = "w") -> None:
    """Flip a bit of a variable's data."""
    offset = next(variable.offset for variable in open_checkpoint(path).manifest.variables if variable.key == key)
    with Path(path).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def state_of(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((directory / "checkpoint").read_bytes())
    return state


# ---- what is kept (rows 109-113)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=3)
    assert (manager.latest_checkpoint, manager.checkpoints) == (None, [])
    paths = [manager.save() for _ in range(4)]
    assert manager.checkpoints == paths[1:]
    assert manager.latest_checkpoint == latest_checkpoint(tmp_path) == paths[-1]
    assert files(tmp_path) == ["ckpt-2", "ckpt-3", "ckpt-4"]


def test_a_new_manager_with_a_limit_deletes_only_after_its_first_save(tmp_path: Path) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    paths = [manager.save() for _ in range(5)]
    assert manager.checkpoints == paths
    limited = CheckpointManager(checkpoint, tmp_path, max_to_keep=3)
    assert limited.checkpoints == paths
    assert limited.latest_checkpoint == paths[-1]
    assert len(files(tmp_path)) == 5
    paths.append(limited.save())
    assert limited.checkpoints == paths[-3:]
    assert files(tmp_path) == ["ckpt-4", "ckpt-5", "ckpt-6"]


def test_one_in_so_many_hours_over_three_managers(tmp_path: Path) -> None:
    clock, checkpoint = Clock(), make()

    def saved_at(manager: CheckpointManager, now: float) -> None:
        clock.now = now
        manager.save()

    first = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, clock=clock)
    saved_at(first, 5 * HOUR)
    saved_at(first, 6 * HOUR)
    second = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, keep_every_n_hours=1.5, clock=clock)
    assert names(second.checkpoints) == ["ckpt-1", "ckpt-2"]
    saved_at(second, 6.2 * HOUR)
    assert names(second.checkpoints) == ["ckpt-2", "ckpt-3"]
    saved_at(second, 6.7 * HOUR)
    assert names(second.checkpoints) == ["ckpt-3", "ckpt-4"]
    assert files(tmp_path) == ["ckpt-1", "ckpt-3", "ckpt-4"]
    third = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, keep_every_n_hours=1.5, clock=clock)
    assert third.latest_checkpoint == second.latest_checkpoint
    saved_at(third, 7 * HOUR)
    saved_at(third, 7.1 * HOUR)
    assert names(third.checkpoints) == ["ckpt-5", "ckpt-6"]
    assert files(tmp_path) == ["ckpt-1", "ckpt-4", "ckpt-5", "ckpt-6"]


def test_checkpoints_of_others_are_left_alone(tmp_path: Path) -> None:
    checkpoint = make()
    unmanaged = [checkpoint.save(tmp_path / "unusual_prefix") for _ in range(2)]
    twin = make(1.0)
    manager = CheckpointManager(twin, tmp_path, max_to_keep=2)
    twin.restore(manager.latest_checkpoint)
    assert twin.save_counter == 2
    paths = [manager.save() for _ in range(3)]
    assert manager.checkpoints == paths[1:]
    assert files(tmp_path) == ["ckpt-4", "ckpt-5", *names(unmanaged)]


def test_files_of_the_same_prefix_made_without_the_manager(tmp_path: Path) -> None:
    checkpoint = make()
    checkpoint.save(tmp_path / "ckpt")
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert manager.checkpoints == []
    manager.save()
    checkpoint.save(tmp_path / "ckpt")
    manager.save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-3", "ckpt-4"]


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    clock, checkpoint = Clock(10 * HOUR), make()
    first = CheckpointManager(checkpoint, tmp_path, max_to_keep=1, keep_every_n_hours=1, clock=clock)
    for hour in (10, 11, 12):
        clock.now = hour * HOUR
        first.save()
    assert (names(first.checkpoints), files(tmp_path)) == (["ckpt-3"], ["ckpt-2", "ckpt-3"])
    clock.now = 5 * HOUR
    second = CheckpointManager(checkpoint, tmp_path, max_to_keep=1, clock=clock)
    with pytest.warns(CheckpointWarning, match="the clock was set back"):
        assert second.checkpoints == []
    for _ in range(2):
        clock.now += HOUR
        second.save()
    assert (names(second.checkpoints), files(tmp_path)) == (["ckpt-5"], ["ckpt-2", "ckpt-3", "ckpt-5"])


def test_the_best_the_milestones_and_those_of_a_predicate(tmp_path: Path) -> None:
    checkpoint = make()
    seen: list[CheckpointRecord] = []

    def keep(record: CheckpointRecord) -> bool:
        seen.append(record)
        return record.name == "ckpt-2.h5"

    manager = CheckpointManager(
        checkpoint,
        tmp_path,
        max_to_keep=1,
        keep_best=("loss", "min", 1),
        keep_every_n_steps=100,
        keep=keep,
        step_counter="step",
    )
    losses = [5.0, 9.0, 1.0, 4.0, 2.0, float("nan"), 8.0]
    for step, loss in zip(range(40, 1000, 40), losses, strict=False):
        checkpoint.step = step
        manager.save(metrics={"loss": torch.tensor(loss)})
    # 3 is the first from step 100 on, 5 the first from step 200 on; 1 and 4 were the best for a while.
    assert files(tmp_path) == ["ckpt-2", "ckpt-3", "ckpt-5", "ckpt-7"]
    assert names(manager.checkpoints) == ["ckpt-2", "ckpt-7"]
    assert {record.step for record in seen} == {40, 80, 160, 240}
    assert seen[0].metrics == {"loss": 5.0}


# ---- names and numbers (rows 96-99, 103, 114, 115, 117, 118)


def test_what_was_saved_while_the_predicate_failed_is_known_after_a_restart(tmp_path: Path) -> None:
    def fail(_: CheckpointRecord) -> bool:
        raise RuntimeError("no opinion")

    manager = CheckpointManager(make(), tmp_path, max_to_keep=1, keep=fail)
    manager.save()
    for save in (manager.save, lambda: manager.save_async().result()):  # type: ignore[union-attr]  # no interval
        with pytest.raises(CollectiveError, match="no opinion"):
            save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3"]
    CheckpointManager(make(), tmp_path, max_to_keep=1).save()
    assert files(tmp_path) == ["ckpt-4"]


def test_metrics_under_another_name_than_that_of_the_best_are_warned_of_once(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1, keep_best=("loss", "min", 1))
    manager.save()
    manager.save(metrics={"loss": 1.0, "accuracy": 0.5})
    with pytest.warns(CheckpointWarning, match=r"expected 'loss' among them.*Got 'val_loss', 'accuracy'\.") as warned:
        manager.save(metrics={"val_loss": 2.0, "accuracy": 0.5})
    assert [warning.filename for warning in warned] == [__file__]
    manager.save(metrics={"val_loss": 3.0})
    assert files(tmp_path) == ["ckpt-2", "ckpt-4"]


def test_custom_numbers(tmp_path: Path) -> None:
    step = torch.tensor(0)
    checkpoint = Checkpoint(step=step)
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    for expected in (0, 2, 4, 6, 8):
        path = manager.save(checkpoint_number=step)
        assert path == str(tmp_path / f"ckpt-{expected}.h5")
        step += 2
    assert checkpoint.save_counter == 5
    assert load_variable(path, "save_counter").item() == 5
    last = manager.save(32)
    assert last == manager.latest_checkpoint == latest_checkpoint(tmp_path)
    assert manager.checkpoints == [path, last]
    assert files(tmp_path) == ["ckpt-32", "ckpt-8"]
    assert names([manager.save()]) == ["ckpt-33"]
    assert checkpoint.save_counter == 33


@pytest.mark.parametrize("number", [0, 6, 7])
def test_a_number_must_be_above_those_on_disk(tmp_path: Path, number: int) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    manager.save(7)
    with pytest.raises(CollectiveError, match=r"expected a number above that of 'ckpt-7\.h5'"):
        manager.save(number)
    assert (files(tmp_path), checkpoint.save_counter, names(manager.checkpoints)) == (["ckpt-7"], 1, ["ckpt-7"])
    assert manager.save(8) == manager.latest_checkpoint


@pytest.mark.parametrize("number", [-1, 1.5, "3", torch.tensor(2.0)], ids=repr)
def test_bad_numbers(tmp_path: Path, number: Any) -> None:
    with pytest.raises(CollectiveError, match="checkpoint_number: expected"):
        CheckpointManager(make(), tmp_path).save(number)
    assert files(tmp_path) == []


def test_custom_names_do_not_meet(tmp_path: Path) -> None:
    checkpoint = make()
    one = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, checkpoint_name="ckpt_name")
    assert one.save(5) == str(tmp_path / "ckpt_name-5.h5")
    two = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    assert two.save(5) == str(tmp_path / "ckpt-5.h5")
    two.save(6)
    one.save(6)
    assert files(tmp_path) == ["ckpt-6", "ckpt_name-5", "ckpt_name-6"]
    assert names(CheckpointManager(checkpoint, tmp_path, checkpoint_name="ckpt_name").checkpoints) == [
        "ckpt_name-5",
        "ckpt_name-6",
    ]


def test_the_name_of_the_state_file(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, checkpoint_name="checkpoint")
    assert manager.save() == str(tmp_path / "checkpoint-1.h5")
    assert latest_checkpoint(tmp_path) == manager.latest_checkpoint


def test_a_relative_directory_stays_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = CheckpointManager(make(), "runs/a")
    assert manager.directory == "runs/a"
    assert manager.save() == "runs/a/ckpt-1.h5" == latest_checkpoint("runs/a")
    assert manager.checkpoints == ["runs/a/ckpt-1.h5"]
    assert str(tmp_path) not in (tmp_path / "runs/a/checkpoint").read_text()


def test_a_directory_may_be_moved(tmp_path: Path) -> None:
    old = CheckpointManager(make(1.0), tmp_path / "old", max_to_keep=2)
    for _ in range(2):
        old.save()
    old.pin(str(tmp_path / "old" / "ckpt-1"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    twin = make()
    new = CheckpointManager(twin, tmp_path / "new", max_to_keep=2)
    assert new.checkpoints == [str(tmp_path / "new" / f"ckpt-{number}.h5") for number in (1, 2)]
    assert new.restore_or_initialize() == new.checkpoints[-1]
    assert torch.equal(twin.w, torch.full((4,), 1.0))
    for _ in range(2):
        new.save()
    assert files(tmp_path / "new") == ["ckpt-1", "ckpt-3", "ckpt-4"]


def test_paths_may_be_path_like(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path / "a")
    path = manager.save()
    assert isinstance(path, str)
    manager.pin(Path(path))
    assert manager.latest_checkpoint == path == latest_checkpoint(tmp_path / "a")


# ---- when to save (rows 119-121)


def test_interval_of_steps(tmp_path: Path) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, checkpoint_interval=2, step_counter="step")
    saved = []
    for checkpoint.step in (0, 1, 2, 2, 3):
        saved.append(manager.save())
    assert [path is not None for path in saved] == [True, False, True, False, False]
    assert manager.save(check_interval=False) is not None
    assert manager.save(check_interval=False) is None
    assert checkpoint.save_counter == 3


def test_interval_from_a_given_step(tmp_path: Path) -> None:
    step = torch.tensor(10)
    manager = CheckpointManager(make(), tmp_path, checkpoint_interval=2, step_counter=step, last_checkpoint_step=10)
    assert manager.save() is None
    step += 1
    assert manager.save() is None
    step += 1
    assert manager.save() is not None


def test_interval_from_the_restored_step(tmp_path: Path) -> None:
    CheckpointManager(Checkpoint(step=7), tmp_path).save()
    checkpoint = Checkpoint(step=0)
    manager = CheckpointManager(checkpoint, tmp_path, checkpoint_interval=2, step_counter=lambda: checkpoint.step)
    assert manager.restore_or_initialize() is not None
    assert checkpoint.step == 7
    assert manager.save(check_interval=False) is None
    checkpoint.step = 8
    assert manager.save() is None
    checkpoint.step = 9
    assert manager.save() is not None


def test_interval_of_seconds(tmp_path: Path) -> None:
    clock = Clock(0.0)
    manager = CheckpointManager(make(), tmp_path, checkpoint_interval_seconds=60, clock=clock)
    saved = []
    for now in (0.0, 59.0, 60.0, 100.0, 121.0):
        clock.now = now
        saved.append(manager.save())
    assert [path is not None for path in saved] == [True, False, True, False, True]
    twin = CheckpointManager(make(), tmp_path, checkpoint_interval_seconds=60, clock=clock)
    twin.restore_or_initialize()
    assert twin.save() is None


@pytest.mark.parametrize(("mtbf", "saved"), [(1e12, [1]), (1e-6, [1, 2, 3, 4, 5])])
def test_auto_interval(tmp_path: Path, mtbf: float, saved: list[int]) -> None:
    clock, checkpoint = Clock(), make()
    manager = CheckpointManager(
        checkpoint, tmp_path, checkpoint_interval="auto", mtbf=mtbf, step_counter="step", clock=clock
    )
    assert manager.save_seconds is None
    found = []
    for checkpoint.step in range(1, 6):
        clock.now += 10.0
        if manager.save() is not None:
            found.append(checkpoint.step)
            clock.now += 1.0
    assert found == saved
    assert manager.save_seconds is not None
    assert 0 < manager.save_seconds < 10
    assert manager.save(check_interval=False) is None or saved == [1]


def test_the_guard_takes_the_save_time_of_a_manager(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path)
    with PreemptionGuard(manager=manager) as guard:
        assert guard.margin == 45.0
        manager.save()
        assert manager.save_seconds is not None
        assert guard.margin == 1.5 * manager.save_seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_interval": "auto"}, "mtbf: expected a number of seconds > 0. Got None"),
        ({"checkpoint_interval": "automatic", "mtbf": 100}, "checkpoint_interval: expected a number > 0"),
        ({"checkpoint_interval": "auto", "mtbf": -1}, "mtbf: expected a number of seconds > 0. Got -1"),
        ({"mtbf": 100}, 'mtbf: expected checkpoint_interval="auto" with it. Got None'),
        ({"checkpoint_interval": "often", "step_counter": "step"}, "checkpoint_interval: expected a number > 0"),
    ],
)
def test_bad_auto_intervals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CheckpointManager(make(), tmp_path, **options)


def test_a_save_that_failed_leaves_the_interval_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, checkpoint_interval=2, step_counter="step")
    with monkeypatch.context() as patch:
        patch.setattr("distckpt.saving.draft.commit", raising(OSError("no quota")))
        with pytest.raises(CollectiveError, match="no quota"):
            manager.save()
    assert manager.checkpoints == []
    assert manager.save() is not None


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


# ---- restore (row 116)


def test_restore_or_initialize(tmp_path: Path) -> None:
    checkpoint, calls = make(1.0), []
    manager = CheckpointManager(checkpoint, tmp_path, init_fn=lambda: calls.append(1))
    assert manager.status is None
    assert manager.restore_or_initialize() is None
    assert len(calls) == 1
    assert manager.status is not None
    manager.status.expect_partial()
    path = manager.save()
    checkpoint.w.fill_(5.0)
    assert manager.restore_or_initialize() == path
    assert len(calls) == 1
    assert torch.equal(checkpoint.w, torch.full((4,), 1.0))
    manager.status.assert_consumed()
    twin = make()
    assert CheckpointManager(twin, tmp_path).restore_or_initialize() == path
    assert torch.equal(twin.w, checkpoint.w)


def four_saves(directory: Path) -> list[str]:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, directory)
    paths = []
    for value in range(4):
        checkpoint.w.fill_(value)
        paths.append(manager.save())
    return paths


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    paths = four_saves(tmp_path)
    spoil(paths[3])
    os.truncate(paths[2], 5000)
    spoil(paths[1])
    twin = make(9.0)
    manager = CheckpointManager(twin, tmp_path, init_fn=raising(AssertionError("there is a good one")))
    with pytest.warns(CheckpointWarning) as caught:
        assert manager.restore_or_initialize() == paths[0]
    texts = [str(warning.message) for warning in caught]
    assert [text.split(":")[0] for text in texts] == [
        "falling back to an older checkpoint",
        f"{paths[2]} is passed over",
        "falling back to an older checkpoint",
    ]
    assert paths[3] in texts[0]
    assert paths[1] in texts[2]
    assert torch.equal(twin.w, torch.zeros(4))
    assert manager.latest_checkpoint == paths[0]
    assert manager.status is not None
    manager.status.assert_consumed()
    assert names([manager.save()]) == ["ckpt-5"]


def test_the_fallback_goes_from_newest_to_oldest_over_all_names(tmp_path: Path) -> None:
    checkpoint = make()
    paths = [checkpoint.save(tmp_path / name) for name in ("a", "b", "a", "b", "b", "a")]
    spoil(paths[-1])
    manager = CheckpointManager(make(), tmp_path, checkpoint_name="b")
    assert list(complete_checkpoints(tmp_path)) == paths[::-1]
    with pytest.warns(CheckpointWarning, match="falling back"):
        assert manager.restore_or_initialize() == paths[-2]
    for path in paths:
        Path(path).unlink()
    assert manager.restore_or_initialize() is None


def test_managers_of_one_directory_restore_checkpoints_of_their_own(tmp_path: Path) -> None:
    """Such as those of a student and its teacher, which fit each other."""

    def managers(value: float) -> list[CheckpointManager]:
        return [CheckpointManager(make(value), tmp_path, checkpoint_name=name) for name in ("student", "teacher")]

    saved = []
    for value, manager in enumerate(managers(0.0), start=1):
        manager.checkpoint.w.fill_(value)
        saved.append(manager.save())
    for value, manager in enumerate(managers(5.0), start=1):
        assert manager.checkpoint.w[0] == 5
        assert manager.latest_checkpoint == manager.restore_or_initialize() == saved[value - 1]
        assert manager.checkpoint.w[0] == value
    by_program = make(7.0).save(tmp_path / "preempted")
    assert [manager.restore_or_initialize() for manager in managers(5.0)] == [by_program] * 2
    for path in (saved[0], by_program):
        Path(path).unlink()
    assert managers(5.0)[0].restore_or_initialize() == saved[1]


def test_files_of_the_name_count_whatever_the_state_file_knows(tmp_path: Path) -> None:
    """They were copied beside those of another manager, or the job ended before the state file was written."""
    make().save(tmp_path / "best")
    shutil.copy(make(3.0).save(tmp_path / "elsewhere" / "ckpt"), tmp_path / "ckpt-4.h5")
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path)
    assert manager.latest_checkpoint == manager.restore_or_initialize() == str(tmp_path / "ckpt-4.h5")
    assert checkpoint.w[0] == 3.0
    os.truncate(tmp_path / "ckpt-4.h5", 5000)
    (tmp_path / "best-1.h5").unlink()
    with (
        pytest.warns(CheckpointWarning, match="passed over"),
        pytest.raises(CorruptCheckpointError, match="no checkpoint can be restored"),
    ):
        CheckpointManager(make(), tmp_path).restore_or_initialize()


def test_when_all_are_damaged_nothing_starts_anew(tmp_path: Path) -> None:
    paths = four_saves(tmp_path)[-2:]
    for path in tmp_path.glob("ckpt-[12].h5"):
        path.unlink()
    spoil(paths[1])
    os.truncate(paths[0], 5000)
    calls: list[int] = []
    manager = CheckpointManager(make(), tmp_path, init_fn=lambda: calls.append(1))
    message = re.compile(r"no checkpoint can be restored.*start anew.*ckpt-4.*ckpt-3", re.DOTALL)
    with pytest.warns(CheckpointWarning), pytest.raises(CorruptCheckpointError, match=message):
        manager.restore_or_initialize()
    assert calls == []


def test_what_was_removed_by_hand_is_gone_after_a_restore_that_found_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(Checkpoint(x=1), tmp_path / "run")
    path = manager.save()
    assert (manager.latest_checkpoint, manager.checkpoints) == (path, [path])
    shutil.rmtree(tmp_path / "run")
    assert manager.restore_or_initialize() is None
    assert (manager.latest_checkpoint, manager.checkpoints) == (None, [])
    assert manager.save() == str(tmp_path / "run" / "ckpt-2.h5")


def test_files_of_write_are_no_checkpoints(tmp_path: Path) -> None:
    make().write(tmp_path / "export-3")
    manager = CheckpointManager(make(), tmp_path)
    assert manager.latest_checkpoint is None
    assert manager.restore_or_initialize() is None


def test_a_mismatch_is_no_damage(tmp_path: Path) -> None:
    four_saves(tmp_path)
    twin = Checkpoint(w=torch.ones(5), step=0)
    manager = CheckpointManager(twin, tmp_path)
    with pytest.raises(RestoreMismatchError):
        manager.restore_or_initialize()
    with pytest.warns(CheckpointWarning, match="w skipped"):
        assert manager.restore_or_initialize(RestoreOptions(on_mismatch="skip")) == str(tmp_path / "ckpt-4.h5")
    assert twin.save_counter == 4


def test_numbers_go_on_without_a_restore(tmp_path: Path) -> None:
    four_saves(tmp_path)
    manager = CheckpointManager(make(), tmp_path, max_to_keep=2)
    assert names([manager.save()]) == ["ckpt-5"]
    assert files(tmp_path) == ["ckpt-4", "ckpt-5"]


def test_five_lives(tmp_path: Path) -> None:  # row 198
    for life in range(5):
        checkpoint = make(-1.0)
        manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2, step_counter="step")
        checkpoint.restore(manager.latest_checkpoint)
        assert checkpoint.step == 3 * life
        for _ in range(3):
            checkpoint.step += 1
            checkpoint.w.fill_(checkpoint.step)
            manager.save(checkpoint_number=checkpoint.step)
        assert names(manager.checkpoints) == [f"ckpt-{checkpoint.step - 1}", f"ckpt-{checkpoint.step}"]
        assert checkpoint.save_counter == checkpoint.step
        assert torch.equal(load_variable(manager.latest_checkpoint, "w"), checkpoint.w)


# ---- pins


def test_pins_survive_restarts(tmp_path: Path) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    pinned = manager.save()
    manager.pin(pinned)
    again = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    for _ in range(2):
        again.save()
    assert (files(tmp_path), names(again.checkpoints)) == (["ckpt-1", "ckpt-3"], ["ckpt-1", "ckpt-3"])
    again.unpin(pinned.removesuffix(".h5"))
    assert files(tmp_path) == ["ckpt-1", "ckpt-3"]
    last = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    last.save()
    assert files(tmp_path) == ["ckpt-4"]
    last.unpin(pinned)


def test_a_pin_needs_no_state_file(tmp_path: Path) -> None:
    paths = four_saves(tmp_path)
    make().save(tmp_path / "other")
    (tmp_path / "checkpoint").unlink()
    CheckpointManager(make(), tmp_path).pin(paths[0])
    assert sorted(state_of(tmp_path)["prefixes"]) == ["ckpt", "other"]


def test_a_namesake_in_another_directory_unpins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(make(), tmp_path / "a", max_to_keep=1)
    manager.pin(str(manager.save()))
    with pytest.raises(CollectiveError, match=r"unpin: expected a checkpoint of this manager, .*/a/ckpt-<number>\.h5"):
        manager.unpin(tmp_path / "b" / "ckpt-1")
    manager.save()
    assert files(tmp_path / "a") == ["ckpt-1", "ckpt-2"]
    monkeypatch.chdir(tmp_path / "a")
    manager.unpin("ckpt-1")
    manager.save()
    assert files(tmp_path / "a") == ["ckpt-3"]


def test_what_cannot_be_pinned(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path / "a")
    manager.save()
    with pytest.raises(CheckpointNotFoundError, match="ckpt-7"):
        manager.pin(tmp_path / "a" / "ckpt-7")
    with pytest.raises(CollectiveError, match=r"pin: expected a checkpoint of this manager, .*ckpt-<number>\.h5"):
        manager.pin(make().save(tmp_path / "b" / "ckpt"))
    with pytest.raises(CollectiveError, match="pin: expected a checkpoint of this manager"):
        manager.pin(make().save(tmp_path / "a" / "other"))
    with pytest.raises(CollectiveError, match="TypeError"):
        manager.pin(3)  # type: ignore[arg-type]


# ---- one durable checkpoint at any instant


def test_the_new_checkpoint_is_there_and_recorded_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    remove, removed = distckpt.managed_directory.remove_checkpoints, []

    def checked(directory: str, doomed: tuple[str, ...]) -> list[str]:
        newest = f"ckpt-{len(removed) + 1}.h5"
        assert newest not in doomed
        assert is_complete(tmp_path / newest) is None
        assert newest in [entry["name"] for entry in state_of(tmp_path)["managers"]["ckpt"]["checkpoints"]]
        removed.append(list(doomed))
        return remove(directory, doomed)

    monkeypatch.setattr("distckpt.managed_directory.remove_checkpoints", checked)
    for _ in range(3):
        manager.save()
    assert removed == [[], ["ckpt-1.h5"], ["ckpt-2.h5"]]


def test_the_newest_durable_one_stays_until_there_is_a_newer(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    manager.save()
    for _ in range(2):
        manager.save(options=SaveOptions(durable=False))
    assert files(tmp_path) == ["ckpt-1", "ckpt-3"]
    manager.save()
    assert files(tmp_path) == ["ckpt-4"]


@pytest.mark.parametrize("function", ["write_entry", "remove_checkpoints"])
def test_a_process_that_ends_between_save_and_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    manager.save()
    with monkeypatch.context() as patch:
        patch.setattr(f"distckpt.managed_directory.{function}", raising(OSError("gone")))
        with pytest.raises(CollectiveError, match=r"delete old checkpoints(.|\n)*gone(.|\n)*checkpoint is complete"):
            manager.save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-2"]
    after = CheckpointManager(make(), tmp_path, max_to_keep=1)
    assert after.latest_checkpoint == str(tmp_path / "ckpt-2.h5")
    after.save()
    # A checkpoint that was not recorded any more is nobody's, so it stays.
    assert files(tmp_path) == (["ckpt-2", "ckpt-3"] if function == "write_entry" else ["ckpt-3"])


@pytest.mark.parametrize("function", ["write_entry", "remove_checkpoints"])
def test_deletion_is_made_up_for_by_the_same_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    manager.save()
    with monkeypatch.context() as patch:
        patch.setattr(f"distckpt.managed_directory.{function}", raising(OSError("full")))
        with pytest.raises(CollectiveError, match="full"):
            manager.save()
    manager.save()
    assert files(tmp_path) == ["ckpt-3"]


def test_a_file_that_cannot_be_removed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    manager.save()
    unlink = Path.unlink

    def refusing(path: Path, missing_ok: bool = False) -> None:
        if path.name == "ckpt-1.h5":
            raise PermissionError("held")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refusing)
        manager.save()
        manager.save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-3"]
    assert names(manager.checkpoints) == ["ckpt-1", "ckpt-3"]
    manager.save()
    assert files(tmp_path) == ["ckpt-4"]


def test_a_predicate_that_fails_deletes_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1, keep=raising(KeyError("epoch")))
    manager.save()
    with pytest.raises(CollectiveError, match="epoch"):
        manager.save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-2"]


# ---- the records in the state file


def test_what_others_keep_in_the_state_file_stays(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path)
    manager.save()
    state = state_of(tmp_path)
    state["of others"] = {"a": 1}
    state["managers"]["best"] = {"checkpoints": []}
    state["managers"]["ckpt"]["of a newer version"] = 3
    (tmp_path / "checkpoint").write_text(json.dumps(state))
    manager.save()
    after = state_of(tmp_path)
    assert after["of others"] == {"a": 1}
    assert after["managers"]["best"] == {"checkpoints": []}
    assert after["managers"]["ckpt"]["of a newer version"] == 3
    assert [entry["name"] for entry in after["managers"]["ckpt"]["checkpoints"]] == ["ckpt-1.h5", "ckpt-2.h5"]


def test_only_own_files_of_the_directory_are_ever_deleted(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make().save(tmp_path / "ckpt")
    make().save(runs / "other")
    manager = CheckpointManager(make(), runs, max_to_keep=1)
    manager.save()
    state = state_of(runs)
    entries = state["managers"]["ckpt"]["checkpoints"]
    for name in ("../ckpt-1.h5", str(tmp_path / "ckpt-1.h5"), "other-1.h5", "checkpoint", "ckpt-9.h5"):
        entries.insert(0, {**entries[-1], "name": name})
    state["managers"]["ckpt"]["pinned"] = ["../ckpt-1.h5"]
    (runs / "checkpoint").write_text(json.dumps(state))
    again = CheckpointManager(make(), runs, max_to_keep=1)
    assert names(again.checkpoints) == ["ckpt-1"]
    again.save()
    assert (files(runs), files(tmp_path)) == (["ckpt-2", "other-1"], ["ckpt-1"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: json.dumps({**state, "managers": {"ckpt": {"checkpoints": 3}}}),
        lambda state: json.dumps(state)[:-20],
    ],
    ids=["entry", "file"],
)
@pytest.mark.filterwarnings("ignore:.*looking at all checkpoints:distckpt.CheckpointWarning")
def test_damaged_records_are_given_up(tmp_path: Path, damage: Callable[[Any], str]) -> None:
    four_saves(tmp_path)
    (tmp_path / "checkpoint").write_text(damage(state_of(tmp_path)))
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    with pytest.warns(CheckpointWarning, match="the manager's records are damaged"):
        assert manager.checkpoints == []
    for _ in range(2):
        manager.save()
    assert files(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3", "ckpt-4", "ckpt-6"]


def test_a_file_that_vanished_is_no_more_managed(tmp_path: Path) -> None:
    paths = four_saves(tmp_path)
    Path(paths[1]).unlink()
    manager = CheckpointManager(make(), tmp_path, max_to_keep=3)
    assert names(manager.checkpoints) == ["ckpt-1", "ckpt-3", "ckpt-4"]
    Path(paths[2]).unlink()
    manager.save()
    assert names(manager.checkpoints) == ["ckpt-1", "ckpt-4", "ckpt-5"]
    Path(manager.checkpoints[-1]).unlink()
    manager.save(5)
    assert names(manager.checkpoints) == ["ckpt-1", "ckpt-4", "ckpt-5"]


# ---- construction


def test_the_constructor_touches_nothing_and_the_first_look_sweeps(tmp_path: Path) -> None:
    stale = tmp_path / Path(commit.temp_path(tmp_path / "ckpt-1.h5")).name
    stale.touch()
    old = time.time() - 2 * commit.STALE_AGE
    os.utime(stale, (old, old))
    fresh = Path(commit.temp_path(tmp_path / "ckpt-2.h5"))
    fresh.touch()
    manager = CheckpointManager(make(), tmp_path)
    CheckpointManager(make(), tmp_path / "absent")
    assert stale.exists()
    assert not (tmp_path / "absent").exists()
    assert manager.latest_checkpoint is None
    assert (stale.exists(), fresh.exists()) == (False, True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_to_keep", 0),
        ("keep_every_n_hours", -1),
        ("keep_every_n_steps", 0),
        ("keep_best", ("loss", "low", 1)),
        ("keep", 1),
        ("checkpoint_name", "a/b"),
        ("checkpoint_name", ""),
        ("checkpoint_name", "ckpt.h5"),
        ("checkpoint_name", 3),
        ("checkpoint_interval", 5),
        ("checkpoint_interval_seconds", 0),
        ("step_counter", 5),
        ("step_counter", 2.5),
        ("init_fn", 5),
        ("last_checkpoint_step", "x"),
    ],
)
def test_bad_options(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected"):
        CheckpointManager(make(), tmp_path, **{option: value})


def test_a_manager_is_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a distckpt\.Checkpoint\. Got a Linear"):
        CheckpointManager(torch.nn.Linear(1, 1), tmp_path)  # type: ignore[arg-type]


def test_a_bad_metric_is_refused_before_the_save(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, keep_best=("loss", "min", 1))
    with pytest.raises(CollectiveError, match=r"metrics\['loss'\]: expected a number"):
        manager.save(metrics={"loss": "low"})
    assert files(tmp_path) == []


# ---- watching a directory (row 185)


@pytest.fixture
def polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distckpt.follow, "_POLL_INTERVAL", 0.01)


def test_the_iterator_ends_when_the_timeout_has_passed(tmp_path: Path) -> None:
    started = time.monotonic()
    assert list(checkpoints_iterator(tmp_path / "absent", timeout=0.2)) == []
    assert list(checkpoints_iterator(tmp_path, timeout=0)) == []
    assert time.monotonic() - started >= 0.2


def test_the_iterator_gives_the_newest_each_time(tmp_path: Path) -> None:
    checkpoint = make()
    checkpoint.save(tmp_path / "ckpt")
    found = checkpoints_iterator(tmp_path, timeout=0)
    assert next(found) == str(tmp_path / "ckpt-1.h5")
    for _ in range(2):
        checkpoint.save(tmp_path / "ckpt")
    assert list(found) == [str(tmp_path / "ckpt-3.h5")]


@pytest.mark.usefixtures("polling")
def test_the_iterator_waits(tmp_path: Path) -> None:
    path = make().save(tmp_path / "made" / "ckpt")
    appear = threading.Timer(0.2, (tmp_path / "made").rename, [tmp_path / "run"])
    appear.start()
    assert next(checkpoints_iterator(tmp_path / "run", timeout=60)) == path.replace("/made/", "/run/")
    appear.join()


@pytest.mark.usefixtures("polling")
def test_the_iterator_asks_whether_to_go_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def ended() -> bool:
        calls.append(1)
        return len(calls) > 3

    assert list(checkpoints_iterator(tmp_path, timeout=0.02, timeout_fn=ended)) == []
    assert len(calls) == 4
    make().save(tmp_path / "ckpt")
    started = time.monotonic()
    assert len(list(checkpoints_iterator(tmp_path, timeout=60, timeout_fn=ended))) == 1
    assert time.monotonic() - started < 30
    assert len(calls) == 5


def test_the_iterator_keeps_its_distance(tmp_path: Path) -> None:
    checkpoint = make()
    checkpoint.save(tmp_path / "ckpt")
    found = checkpoints_iterator(tmp_path, min_interval_secs=0.3, timeout=0)
    next(found)
    started = time.monotonic()
    checkpoint.save(tmp_path / "ckpt")
    assert names([next(found)]) == ["ckpt-2"]
    assert time.monotonic() - started >= 0.2


def test_the_iterator_passes_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    paths = four_saves(tmp_path)
    os.truncate(paths[-1], 5000)
    with pytest.warns(CheckpointWarning, match=r"ckpt-4\.h5 is passed over"):
        assert list(checkpoints_iterator(tmp_path, timeout=0)) == [paths[-2]]
