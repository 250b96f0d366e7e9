"""How long steps took: measured, compared, told in words and stored."""

from __future__ import annotations

import logging
import re
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distckpt.checkpoint
import distckpt.restoring.restoration
import distckpt.restoring.restorer
import distckpt.saving.background_save
import distckpt.saving.draft
import distckpt.saving.output
import distckpt.saving.saver
import distckpt.saving.writer
import distckpt.source
import distckpt.timing
import distckpt.wire
from distckpt import Checkpoint, CollectiveError, SaveOptions
from distckpt.layout.records import Manifest
from distckpt.source import Source
from distckpt.storage import manifest as manifests
from distckpt.timing import AGREE, DURABLE_SAVE_STEPS, RESTORE_STEPS, SAVE_STEPS, StepTiming, Timer, Timing, compare
from tests.checkpoint_files import make_manifest

NAN = float("nan")
ManifestOf = Callable[[str], Manifest]


class Clock:
    """Stands for the module `time`: nothing takes time but what is slow on purpose."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, function: Callable[..., Any], seconds: float = 1.0) -> Callable[..., Any]:
        """The function, which takes that long."""

        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slowed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(distckpt.timing, "time", made)
    return made


def assert_slow(timing: Timing | None, step: str) -> None:
    """One step took a second, and all others no time."""
    assert timing is not None
    assert timing.seconds == 1
    assert timing.steps == {name: StepTiming(*[float(name == step)] * 3, slowest_rank=0) for name in timing.own}
    assert timing.own == {name: name == step for name in timing.steps}


def checkpoint() -> Checkpoint:
    return Checkpoint(a=torch.arange(1000.0), b=torch.ones(20, 30)[:, ::2], step=1)


# ---- measuring and comparing -------------------------------------------------------------------------------------


def test_compare_names_the_slowest_rank_of_each_step() -> None:
    rows = np.array([[0.1, 3.0, 5.0], [0.4, 1.0, 5.0], [0.2, 2.0, 5.0], [0.3, 4.0, 6.0]])
    assert compare(["walk", "write", "fsync"], rows) == {
        "walk": StepTiming(0.1, 0.3, 0.4, slowest_rank=1),
        "write": StepTiming(1.0, 3.0, 4.0, slowest_rank=3),
        "fsync": StepTiming(5.0, 5.0, 6.0, slowest_rank=3),
    }


def test_compare_leaves_out_ranks_that_did_not_do_a_step() -> None:
    rows = np.array([[0.5, NAN, NAN], [NAN, NAN, 0.25], [NAN, NAN, 0.75]])
    assert compare(["merge", "stage", "plan"], rows) == {
        "merge": StepTiming(0.5, 0.5, 0.5, slowest_rank=0),
        "plan": StepTiming(0.25, 0.75, 0.75, slowest_rank=2),
    }


def test_the_rank_that_all_wait_for_is_the_one_that_waited_least() -> None:
    assert compare([AGREE], np.array([[9.0], [0.0], [5.0]]))[AGREE] == StepTiming(0.0, 5.0, 9.0, slowest_rank=1)


def test_a_timer_adds_up_the_parts_of_a_step_and_measures_those_that_fail(clock: Clock) -> None:
    timer = Timer()
    for seconds in (2.0, 3.0):
        with timer.step("write"):
            clock.slow(bool, seconds)()
    with pytest.raises(OSError, match="injected"), timer.step("fsync"):
        clock.slow(_broken, 0.1234567)()
    timer.collect(lambda row: np.stack([row, row + 1]), ["walk", "write", "fsync"])
    with timer.step("commit"):
        clock.slow(bool, 4.0)()
    timer.add_own("commit")
    assert timer.on_this_rank(timer.timing()) == Timing(
        9.123457,
        {
            "write": StepTiming(5.0, 6.0, 6.0, slowest_rank=1),
            "fsync": StepTiming(0.123457, 1.123457, 1.123457, slowest_rank=1),
            "commit": StepTiming(4.0, 4.0, 4.0, slowest_rank=0),
        },
        own={"write": 5.0, "fsync": pytest.approx(0.1234567), "commit": 4.0},
    )


def test_a_timer_of_another_rank_than_0_knows_only_its_own_times() -> None:
    timer = Timer()
    with timer.step("write"):
        pass
    timer.collect(lambda _: None, ["write"])
    assert timer.timing().steps == {}
    found = Timing(2.0, {"write": StepTiming(0.1, 0.1, 1.5, 0)})
    timing = timer.on_this_rank(found)
    assert (timing.seconds, timing.steps) == (found.seconds, found.steps)
    assert list(timing.own) == ["write"]


def test_measuring_costs_next_to_nothing() -> None:
    def save() -> None:
        timer = Timer()
        for name in DURABLE_SAVE_STEPS:
            with timer.step(name):
                pass
        timer.collect(lambda row: np.stack([row, row]), DURABLE_SAVE_STEPS)
        timer.timing().of_file_in_words(1 << 30)

    # 60 microseconds on an idle core.
    assert min(timeit.repeat(save, number=10, repeat=50)) / 10 < 500e-6


# ---- in words ----------------------------------------------------------------------------------------------------


def test_the_slowest_rank_is_named_for_the_longest_step_that_ranks_share() -> None:
    steps = {
        "walk": StepTiming(0.01, 0.01, 0.0123, 2),
        "create": StepTiming(0.9, 0.9, 0.9, 0),  # by rank 0 alone
        "write": StepTiming(0.2, 0.3, 0.55, 3),
    }
    timing = Timing(1.5, steps)
    assert timing.in_words() == "walk 0.012, create 0.900, write 0.550 (slowest: rank 3)"
    assert timing.of_file_in_words(3 << 30) == f"3.0 GiB in 1.500 s (2.0 GiB/s): {timing.in_words()}"


def test_the_last_rank_to_come_is_named_where_waiting_takes_longest() -> None:
    write = StepTiming(0.2, 0.3, 0.5, 3)
    late = {AGREE: StepTiming(0.0, 9.0, 10.0, 1), "write": write}
    assert Timing(11.0, late).in_words() == "agree 10.000 (last: rank 1), write 0.500 (slowest: rank 3)"
    in_time = {AGREE: StepTiming(0.0, 0.1, 0.2, 1), "write": write}
    assert Timing(11.0, in_time).in_words() == "agree 0.200, write 0.500 (slowest: rank 3)"


def test_one_rank_is_not_named() -> None:
    assert Timing(1.0, {"write": StepTiming(0.5, 0.5, 0.5, 0)}).in_words() == "write 0.500"


# ---- in the manifest ---------------------------------------------------------------------------------------------

EXAMPLE = Timing(0.5, {"walk": StepTiming(0.1, 0.2, 0.3, 5), "write": StepTiming(1e-06, 0.25, 0.5, 0)})


def test_the_timing_is_added_to_an_encoded_manifest() -> None:
    known = make_manifest([], timing=EXAMPLE)
    unsealed = manifests.encode_unsealed(make_manifest([]))
    assert b"".join(manifests.sealed(unsealed, EXAMPLE)) == manifests.encode(known)
    assert manifests.decode(manifests.encode(known)).timing == EXAMPLE
    assert manifests.decode(manifests.encode(make_manifest([]))).timing is None


def test_a_manifest_without_the_field_is_read() -> None:
    body = manifests.encode(make_manifest([])).split(b",", 1)[1].replace(b',"timing":null', b"")
    assert b"timing" not in body
    assert manifests.decode(b"".join(manifests._with_checksum([body]))) == make_manifest([])


def test_room_is_set_aside_for_the_longest_timing() -> None:
    worst = StepTiming(9_999_999.999999, 9_999_999.999999, 9_999_999.999999, 9_999_999)
    timing = Timing(99_999_999.999999, dict.fromkeys((*DURABLE_SAVE_STEPS, "commit"), worst))
    empty = make_manifest([])
    parts = manifests.sealed(manifests.encode_unsealed(empty), timing)
    assert sum(map(len, parts)) <= manifests.encode_unsealed(empty).max_nbytes <= manifests.max_nbytes(empty)


# ---- of saves ----------------------------------------------------------------------------------------------------

#: Function to be slowed, and the step that it is part of.
PARTS = [
    (distckpt.checkpoint, "walk", "walk"),
    (distckpt.saving.saver, "capture", "digest"),
    (distckpt.wire, "merge", "merge"),
    (distckpt.saving.saver, "decode_reply", "plan"),
    (distckpt.saving.output, "next_number", "create"),
    (distckpt.saving.writer, "open_shared", "open"),
    (distckpt.saving.writer, "write_together", "exchange"),
    (distckpt.saving.writer, "write_posix", "write"),
    (distckpt.saving.writer, "fsync", "fsync"),
    (distckpt.saving.draft, "record_save", "commit"),
]


@pytest.mark.parametrize(("owner", "name", "step"), PARTS, ids=[step for _, _, step in PARTS])
def test_each_part_of_a_save_counts_for_its_step(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: str
) -> None:
    monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name)))
    saved = checkpoint()
    saved.save(path)
    assert_slow(saved.save_timing, step)


def test_a_save_tells_its_timing_in_the_file_and_in_one_line(
    path: str, manifest_of: ManifestOf, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoint()
    assert saved.save_timing is None
    with caplog.at_level(logging.INFO, "distckpt"):
        first, second = saved.save(path), saved.save(path)
    timing, stored = saved.save_timing, manifest_of(second).timing
    assert timing is not None
    assert stored is not None
    unchanged = [step for step in SAVE_STEPS if step not in {"merge", "plan", "stage"}]
    assert list(stored.steps) == unchanged
    assert list(timing.steps) == list(timing.own) == [*unchanged, "fsync", "commit"]
    assert {step: timing.steps[step] for step in unchanged} == stored.steps
    assert stored.seconds <= timing.seconds
    assert stored.own == {}
    assert list(manifest_of(first).timing.steps) == [step for step in SAVE_STEPS if step != "stage"]  # type: ignore[union-attr]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-1] == f"saved {second}: {timing.of_file_in_words(Path(second).stat().st_size)}"
    assert re.fullmatch(rf"saved {first}: [\d.]+ KiB in 0\.\d+ s \(.*/s\): walk 0\.\d+, .*, commit 0\.\d+", lines[-2])


def test_a_file_of_write_has_a_timing_too(path: str, manifest_of: ManifestOf) -> None:
    saved = checkpoint()
    stored = manifest_of(saved.write(path)).timing
    assert stored is not None
    assert saved.save_timing is not None
    assert saved.save_timing.steps["write"] == stored.steps["write"]


def test_a_save_that_fails_leaves_the_timing_of_the_last_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint()
    saved.save(path)
    before = saved.save_timing
    with monkeypatch.context() as patch:
        patch.setattr(distckpt.saving.draft, "record_save", _broken)
        with pytest.raises(CollectiveError):
            saved.save(path)
    assert saved.save_timing is before
    saved.save(path)
    assert saved.save_timing is not before


def _broken(*_: object, **__: object) -> None:
    raise OSError("injected")


def test_a_clock_that_stands_still_fails_nothing(path: str, clock: Clock) -> None:
    saved = checkpoint()
    saved.restore(saved.save(path))
    assert clock.now == 1000
    assert saved.save_timing is not None
    assert saved.save_timing.seconds == 0


# ---- in the background -------------------------------------------------------------------------------------------

BACKGROUND_PARTS = [
    (distckpt.saving.background_save.Snapshot, "__init__", "stage"),
    (distckpt.saving.writer, "write_posix", "write"),
    (distckpt.saving.writer, "fsync", "fsync"),
    (distckpt.saving.draft, "commit", "commit"),
]


@pytest.mark.parametrize(("owner", "name", "step"), BACKGROUND_PARTS, ids=[step for *_, step in BACKGROUND_PARTS])
def test_each_part_of_a_save_in_the_background_counts_for_its_step(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: str
) -> None:
    monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name)))
    handle = checkpoint().save_async(path)
    handle.result()
    assert_slow(handle.timing, step)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_save_in_the_background_tells_its_timing(
    path: str, manifest_of: ManifestOf, caplog: pytest.LogCaptureFixture, overlap: bool
) -> None:
    model = torch.nn.Linear(30, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = Checkpoint(model=model, optimizer=optimizer)
    with caplog.at_level(logging.INFO, "distckpt"):
        handle = saved.save_async(path, options=SaveOptions(overlap=overlap))
        file = handle.result()
    timing, stored = handle.timing, manifest_of(file).timing
    assert timing is saved.save_timing is not None
    assert stored is not None
    steps = [step for step in DURABLE_SAVE_STEPS if step != "exchange"]
    assert list(stored.steps) == steps
    assert list(timing.steps) == [*steps, "commit"]
    assert {step: timing.steps[step] for step in steps} == stored.steps
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"saved {file}: {timing.of_file_in_words(Path(file).stat().st_size)}"]


def test_the_copy_that_an_overlapped_save_makes_later_is_staging(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(300, 400, bias=False)
    saved = Checkpoint(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    monkeypatch.setattr(
        distckpt.saving.background_save.Snapshot,
        "_copy_part",
        clock.slow(distckpt.saving.background_save.Snapshot._copy_part),
    )
    handle = saved.save_async(path, options=SaveOptions(overlap=True))
    handle.result()
    assert_slow(handle.timing, "stage")


def test_a_save_in_the_background_that_fails_has_no_timing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(distckpt.saving.draft, "commit", _broken)
        handle = saved.save_async(path)
        with pytest.raises(CollectiveError):
            handle.result()
    assert handle.timing is None
    assert saved.save_timing is None


# ---- of restores -------------------------------------------------------------------------------------------------

RESTORE_PARTS = [
    (distckpt.checkpoint, "walk", "walk"),
    (distckpt.source, "open_checkpoint", "open"),
    (distckpt.restoring.restoration, "bind", "plan"),
    (distckpt.restoring.restorer, "read_together", "exchange"),
    (Source, "read", "read"),
    (distckpt.restoring.restorer.Assignment, "apply", "assign"),
]


@pytest.mark.parametrize(("owner", "name", "step"), RESTORE_PARTS, ids=[step for _, _, step in RESTORE_PARTS])
def test_each_part_of_a_restore_counts_for_its_step(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: str
) -> None:
    file, twin = checkpoint().save(path), checkpoint()
    monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name)))
    timing = twin.restore(file).timing
    assert_slow(timing, step)
    assert list(timing.steps) == list(RESTORE_STEPS)  # type: ignore[union-attr]


def test_a_restore_tells_its_timing_in_its_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    file, twin = checkpoint().save(path), checkpoint()
    with caplog.at_level(logging.INFO, "distckpt"):
        status = twin.restore(file)
    timing = status.timing
    assert timing is not None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f" from {file} in {timing.seconds:.3f} s: {timing.in_words()}")
    status.assert_consumed()
    assert status.timing is timing
    assert twin.restore(None).timing is None
