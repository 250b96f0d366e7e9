"""`CheckpointManager.save_async`: intervals, retention and records when a checkpoint is committed later."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distckpt.managed_directory
import distckpt.saving.writer
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    CheckpointRecord,
    CollectiveError,
    SaveOptions,
    latest_checkpoint,
)
from distckpt.coordination.coordinator import Coordinator
from distckpt.saving.background_save import BackgroundSave

PATIENCE = 30.0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The background does nothing before it is set."""
    event = threading.Event()
    begin = BackgroundSave.begin

    def held(flight: BackgroundSave, coordinator: Coordinator) -> None:
        assert event.wait(PATIENCE)
        begin(flight, coordinator)

    monkeypatch.setattr(BackgroundSave, "begin", held)
    yield event
    event.set()


def make(step: int = 0) -> Checkpoint:
    return Checkpoint(a=torch.full((4,), float(step)), step=step)


def numbers(directory: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in directory.glob("ckpt-*.h5"))


def test_old_checkpoints_are_deleted_when_the_new_one_is_committed(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=2)
    for number in range(1, 6):
        handle = manager.save_async()
        assert handle is not None
        assert handle.result(PATIENCE) == str(tmp_path / f"ckpt-{number}.h5") == manager.latest_checkpoint
        assert numbers(tmp_path) == [n for n in (number - 1, number) if n]
        assert manager.checkpoints == [str(tmp_path / f"ckpt-{n}.h5") for n in numbers(tmp_path)]
    again = CheckpointManager(make(), tmp_path, max_to_keep=2)
    assert again.checkpoints == manager.checkpoints


def test_the_program_may_change_directory(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative directory is that of the call."""
    monkeypatch.chdir(tmp_path)
    manager = CheckpointManager(make(), "runs", max_to_keep=1)
    manager.save()
    handle = manager.save_async()
    assert handle is not None
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    gate.set()
    assert handle.result(PATIENCE) == manager.latest_checkpoint == "runs/ckpt-2.h5"
    assert numbers(tmp_path / "runs") == [2]
    assert CheckpointManager(make(), tmp_path / "runs", max_to_keep=1).checkpoints == [str(tmp_path / "runs/ckpt-2.h5")]
    assert not list((tmp_path / "there").iterdir())


def test_the_only_checkpoint_stays_until_the_next_is_committed(tmp_path: Path, gate: threading.Event) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    first = manager.save()
    handles = [manager.save_async(options=SaveOptions(max_in_flight=3)) for _ in range(3)]
    assert manager.latest_checkpoint == first == latest_checkpoint(tmp_path)
    assert manager.checkpoints == [first]
    gate.set()
    for handle in handles:
        assert handle is not None
        handle.result(PATIENCE)
    assert numbers(tmp_path) == [4]


def test_at_every_moment_there_is_a_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    manager.save()
    ended = threading.Event()
    missing: list[str] = []

    def watch() -> None:
        while not ended.is_set():
            if not any(name.startswith("ckpt-") for name in os.listdir(tmp_path)):  # noqa: PTH208
                missing.append("none")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(30):
        handle = manager.save_async(options=SaveOptions(max_in_flight=2))
    assert handle is not None
    handle.result(PATIENCE)
    ended.set()
    watcher.join()
    assert missing == []


def test_a_failed_save_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    first = manager.save()

    def broken(*_: object) -> None:
        raise OSError("no quota")

    with monkeypatch.context() as patch:
        patch.setattr(distckpt.saving.writer, "fsync", broken)
        handle = manager.save_async()
        assert handle is not None
        with pytest.raises(CollectiveError, match="no quota"):
            handle.result(PATIENCE)
    assert manager.latest_checkpoint == first
    assert numbers(tmp_path) == [1]
    handle = manager.save_async()
    assert handle is not None
    handle.result(PATIENCE)
    assert numbers(tmp_path) == [2]


def test_intervals_count_from_a_save_that_goes_on(tmp_path: Path, gate: threading.Event) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, step_counter="step", checkpoint_interval=10)
    checkpoint.step = 10
    handle = manager.save_async()
    assert handle is not None
    checkpoint.step = 15
    assert manager.save_async() is None
    assert manager.save() is None  # does not wait
    assert not handle.done()
    gate.set()
    handle.result(PATIENCE)
    checkpoint.step = 19
    assert manager.save_async() is None
    checkpoint.step = 20
    handle = manager.save_async()
    assert handle is not None
    handle.result(PATIENCE)


def test_intervals_do_not_count_from_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make()
    manager = CheckpointManager(checkpoint, tmp_path, step_counter="step", checkpoint_interval=10)

    def broken(*_: object) -> None:
        raise OSError("no quota")

    checkpoint.step = 10
    with monkeypatch.context() as patch:
        patch.setattr(distckpt.saving.writer, "fsync", broken)
        handle = manager.save_async()
        assert handle is not None
        while not handle.done():
            pass
    checkpoint.step = 11
    with pytest.raises(CollectiveError, match="no quota"):  # nobody had asked
        manager.save_async()
    assert manager.save() == str(tmp_path / "ckpt-1.h5")


def test_records_are_those_of_the_moment_of_the_call(tmp_path: Path, gate: threading.Event) -> None:
    checkpoint = make()
    now = [100.0]
    kept: list[CheckpointRecord] = []
    manager = CheckpointManager(
        checkpoint,
        tmp_path,
        max_to_keep=1,
        step_counter="step",
        clock=lambda: now[0],
        keep=lambda r: bool(kept.append(r)),
    )
    for step in (7, 8):
        checkpoint.step, now[0] = step, 100.0 + step
        handle = manager.save_async(metrics={"loss": step}, options=SaveOptions(max_in_flight=2))
    checkpoint.step, now[0] = 9, 500.0
    gate.set()
    assert handle is not None
    handle.result(PATIENCE)
    assert [(record.step, record.time, record.metrics) for record in kept] == [(7, 107.0, {"loss": 7.0})]


def test_a_restore_waits(tmp_path: Path, gate: threading.Event) -> None:
    checkpoint = make(3)
    manager = CheckpointManager(checkpoint, tmp_path)
    handle = manager.save_async()
    assert handle is not None
    checkpoint.step = 4
    threading.Timer(0.1, gate.set).start()
    assert manager.restore_or_initialize() == handle.path
    assert checkpoint.step == 3


def test_numbers_of_the_callers_choice(tmp_path: Path, gate: threading.Event) -> None:
    manager = CheckpointManager(make(), tmp_path)
    options = SaveOptions(max_in_flight=4)
    handles = [manager.save_async(number, options=options) for number in (100, None)]
    with pytest.raises(CollectiveError, match=r"expected a number above that of 'ckpt-101\.h5'"):
        manager.save_async(50, options=options)
    gate.set()
    assert [handle.result(PATIENCE) for handle in handles if handle] == [
        str(tmp_path / "ckpt-100.h5"),
        str(tmp_path / "ckpt-101.h5"),
    ]


def test_pins_while_a_save_goes_on(tmp_path: Path) -> None:
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    first = manager.save()
    assert first is not None
    for _ in range(10):
        handle = manager.save_async(options=SaveOptions(durable=False))
        manager.pin(first)
    assert handle is not None
    handle.result(PATIENCE)
    assert numbers(tmp_path) == [1, 11]
    assert CheckpointManager(make(), tmp_path, max_to_keep=1).checkpoints == manager.checkpoints


def test_a_pin_never_comes_to_what_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin that succeeds keeps the checkpoint, also while a save in the background deletes old ones."""
    manager = CheckpointManager(make(), tmp_path, max_to_keep=1)
    first = str(manager.save())
    removing, go_on = threading.Event(), threading.Event()
    remove = distckpt.managed_directory.remove_checkpoints

    def remove_slowly(directory: str, names: tuple[str, ...]) -> list[str]:
        removing.set()
        assert go_on.wait(PATIENCE)
        return remove(directory, names)

    monkeypatch.setattr(distckpt.managed_directory, "remove_checkpoints", remove_slowly)
    handle = manager.save_async()
    assert handle is not None
    assert removing.wait(PATIENCE)
    threading.Timer(0.3, go_on.set).start()
    with pytest.raises(CheckpointNotFoundError, match="ckpt-1"):
        manager.pin(first)
    handle.result(PATIENCE)
    assert numbers(tmp_path) == [2]
