"""Which checkpoints a manager keeps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import retention
from distckpt.retention import Best, CheckpointRecord, History, Policy, as_best, sweep

HOUR = 3600.0


def record(number: int, **changes: Any) -> CheckpointRecord:
    fields = {"name": f"ckpt-{number}.h5", "time": number * HOUR, "step": number, **changes}
    return CheckpointRecord(**fields)


def history(*records: CheckpointRecord, **changes: Any) -> History:
    return History(checkpoints=records, **{"last_preserved_time": 0.0, **changes})


def numbers(names: Any) -> list[int]:
    return [int(name.removeprefix("ckpt-").removesuffix(".h5")) for name in names]


@dataclass
class Life:
    """A manager without files: what is there, and what happened to it."""

    policy: Policy
    history: History = field(default_factory=history)
    deleted: list[str] = field(default_factory=list)

    def save(self, saved: CheckpointRecord) -> None:
        self.history = retention.after_save(self.history, saved)
        self.sweep()

    def sweep(self) -> None:
        swept = sweep(self.history, self.policy)
        self.history = retention.forget(swept.history, swept.delete)
        self.deleted += swept.delete

    @property
    def managed(self) -> list[str]:
        return [saved.name for saved in self.history.checkpoints]


def live(policy: Policy, records: list[CheckpointRecord]) -> Life:
    life = Life(policy)
    for saved in records:
        life.save(saved)
    return life


# ---- each policy by example


def test_the_newest_are_kept() -> None:
    life = live(Policy(max_to_keep=3), [record(number) for number in range(1, 6)])
    assert numbers(life.managed) == [3, 4, 5]
    assert numbers(life.deleted) == [1, 2]


def test_without_a_limit_all_are_kept_and_nothing_is_marked() -> None:
    policy = Policy(max_to_keep=None, keep_every_n_hours=1, keep_every_n_steps=1)
    life = live(policy, [record(number) for number in range(1, 6)])
    assert numbers(life.managed) == [1, 2, 3, 4, 5]
    assert (life.history.last_preserved_time, life.history.last_preserved_step) == (0.0, 0)


def test_one_in_so_many_hours_is_kept_for_good() -> None:
    policy = Policy(max_to_keep=1, keep_every_n_hours=1.5)
    life = live(policy, [record(number, time=number * HOUR / 2) for number in range(10)])
    assert numbers(life.managed) == [9]
    assert numbers(life.deleted) == [0, 1, 2, 4, 5, 7, 8]


def test_the_first_at_or_after_each_multiple_of_so_many_steps_is_kept_for_good() -> None:
    policy = Policy(max_to_keep=1, keep_every_n_steps=100)
    life = live(policy, [record(step) for step in (40, 80, 120, 160, 200, 240, 450, 460, 500, 501)])
    assert numbers(life.managed) == [501]
    assert numbers(life.deleted) == [40, 80, 160, 240, 460]


def test_multiples_count_again_after_the_steps_went_back() -> None:
    life = live(Policy(max_to_keep=1, keep_every_n_steps=100), [record(step) for step in (100, 200, 300)])
    assert life.deleted == []
    for number, step in enumerate((150, 190, 210, 250), 1000):
        life.save(record(number, step=step))
    assert numbers(life.deleted) == [1000, 1001]
    assert numbers(life.managed) == [1003]


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 4, 6]), ("max", [1, 5, 6])])
def test_the_best_are_kept(mode: Any, kept: list[int]) -> None:
    losses = {1: 9.0, 2: 1.0, 3: 5.0, 4: 1.0, 5: 7.0, 6: 4.0}
    records = [record(number, metrics={"loss": loss}) for number, loss in losses.items()]
    life = live(Policy(max_to_keep=1, keep_best=Best("loss", mode, 2)), records)
    assert numbers(life.managed) == kept


def test_of_equal_checkpoints_the_newer_is_better() -> None:
    records = [record(number, metrics={"loss": 1.0}) for number in (1, 2, 3)]
    life = live(Policy(max_to_keep=1, keep_best=Best("loss", "min", 1)), [*records, record(4)])
    assert numbers(life.managed) == [3, 4]


def test_a_checkpoint_without_the_metric_is_none_of_the_best() -> None:
    records = [record(1, metrics={"other": 0.0}), record(2, metrics={"loss": 8.0}), record(3), record(4)]
    life = live(Policy(max_to_keep=1, keep_best=Best("loss", "min", 2)), records)
    assert numbers(life.managed) == [2, 4]


def test_a_predicate_keeps() -> None:
    life = live(Policy(max_to_keep=1, keep=lambda saved: saved.step % 2 == 0), [record(number) for number in range(6)])
    assert numbers(life.managed) == [0, 2, 4, 5]


def test_a_pin_keeps_until_it_is_gone() -> None:
    life = live(Policy(max_to_keep=2), [record(1), record(2)])
    life.history = retention.pin(life.history, "ckpt-1.h5")
    for number in (3, 4):
        life.save(record(number))
    assert numbers(life.managed) == [1, 3, 4]
    life.history = retention.unpin(life.history, "ckpt-1.h5")
    life.save(record(5))
    assert numbers(life.managed) == [4, 5]


def test_the_newest_durable_checkpoint_is_kept() -> None:
    records = [record(1), record(2), *(record(number, durable=False) for number in range(3, 7))]
    life = live(Policy(max_to_keep=2), records)
    assert numbers(life.managed) == [2, 5, 6]
    life.save(record(7))
    assert numbers(life.managed) == [6, 7]


def test_a_file_that_vanished_keeps_no_place() -> None:
    old = retention.pin(history(*(record(number) for number in range(1, 5))), "ckpt-1.h5")
    left = retention.present(old, {"ckpt-2.h5", "ckpt-4.h5", "other-1.h5"})
    assert numbers(saved.name for saved in left.checkpoints) == [2, 4]
    assert left.pinned == ()


def test_a_clock_that_was_set_back_frees_all() -> None:
    left = retention.after_clock_reset(history(record(1), pinned=("a",), last_preserved_time=50.0), 10.0)
    assert left == History(pinned=("a",), last_preserved_time=10.0)


# ---- any policy, any sequence of saves


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return Policy(
        max_to_keep=draw(st.none() | st.integers(1, 4)),
        keep_every_n_hours=draw(st.none() | st.floats(0.5, 5)),
        keep_every_n_steps=draw(st.none() | st.integers(1, 7)),
        keep_best=draw(
            st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3))
        ),
        keep=draw(st.sampled_from([None, lambda saved: saved.step % 3 == 0])),
    )


@st.composite
def sequences(draw: st.DrawFn) -> list[CheckpointRecord]:
    """Records of a training: the time goes on, the steps may fall back."""
    gaps = draw(st.lists(st.tuples(st.floats(0, 3), st.integers(-4, 5)), min_size=1, max_size=25))
    records, time, step = [], 0.0, 0
    for number, (hours, steps) in enumerate(gaps, 1):
        time, step = time + hours * HOUR, max(0, step + steps)
        metrics = draw(st.just({}) | st.fixed_dictionaries({"loss": st.integers(0, 9).map(float)}))
        records.append(record(number, time=time, step=step, metrics=metrics, durable=draw(st.booleans())))
    return records


def pinned_names(records: list[CheckpointRecord]) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from([saved.name for saved in records]))


@given(policies(), sequences())
def test_there_is_always_a_durable_checkpoint(policy: Policy, records: list[CheckpointRecord]) -> None:
    life, on_disk = Life(policy), set[str]()
    for saved in records:
        had_durable = any(old.durable and old.name in on_disk for old in records)
        on_disk.add(saved.name)
        before = len(life.deleted)
        life.save(saved)
        # Deletions come one at a time, so it is enough that the last leaves one.
        on_disk.difference_update(life.deleted[before:])
        assert saved.name in on_disk
        if had_durable or saved.durable:
            assert any(old.durable and old.name in on_disk for old in records)


@given(st.data(), policies(), sequences())
def test_what_a_policy_keeps_is_not_deleted(
    data: st.DataObject, policy: Policy, records: list[CheckpointRecord]
) -> None:
    old = history(*records, pinned=tuple(data.draw(pinned_names(records))))
    swept = sweep(old, policy)
    deleted = set(swept.delete)
    assert len(deleted) == len(swept.delete)
    assert deleted <= {saved.name for saved in records}
    assert not deleted & set(old.pinned)
    left = retention.forget(swept.history, swept.delete)
    assert left.checkpoints[-1:] == tuple(records[-1:])
    if policy.max_to_keep is None:
        assert not deleted
        return
    assert not deleted & {saved.name for saved in records[-policy.max_to_keep :]}
    if policy.keep is not None:
        assert not deleted & {saved.name for saved in records if policy.keep(saved)}
    if policy.keep_best is not None:
        sign = 1 if policy.keep_best.mode == "min" else -1
        lost = [sign * saved.metrics["loss"] for saved in records if saved.name in deleted and saved.metrics]
        kept = [sign * saved.metrics["loss"] for saved in left.checkpoints if saved.metrics]
        assert len([loss for loss in kept if not lost or loss <= min(lost)]) >= min(policy.keep_best.count, len(lost))


@given(policies(), sequences())
def test_what_no_policy_keeps_is_deleted(policy: Policy, records: list[CheckpointRecord]) -> None:
    life = live(policy, records)
    life.sweep()
    if policy.max_to_keep is None:
        return
    best = policy.keep_best.count if policy.keep_best else 0
    chosen = len([name for name in life.managed if policy.keep and policy.keep(by_name(records)[name])])
    assert len(life.managed) <= policy.max_to_keep + best + chosen + 1  # one for the newest durable


def by_name(records: list[CheckpointRecord]) -> dict[str, CheckpointRecord]:
    return {saved.name: saved for saved in records}


@given(sequences(), st.floats(0.5, 5), st.integers(1, 3))
def test_those_kept_by_the_hour_are_far_apart(records: list[CheckpointRecord], hours: float, limit: int) -> None:
    life = live(
        Policy(max_to_keep=limit, keep_every_n_hours=hours), [msgspec.structs.replace(r, durable=True) for r in records]
    )
    gone = {*life.deleted, *life.managed}
    times = [0.0, *(saved.time for saved in records if saved.name not in gone)]
    assert all(later - earlier >= hours * HOUR * (1 - 1e-9) for earlier, later in pairwise(times))


@given(st.lists(st.integers(1, 40), min_size=1, unique=True).map(sorted), st.integers(1, 12))
def test_one_for_each_multiple_that_was_passed(steps: list[int], multiple: int) -> None:
    life = live(Policy(max_to_keep=1, keep_every_n_steps=multiple), [record(step) for step in steps])
    preserved = [step for step in steps[:-1] if f"ckpt-{step}.h5" not in life.deleted]
    first_of_block = {step // multiple: step for step in reversed(steps)}
    assert preserved == [step for step in steps[:-1] if step >= multiple and first_of_block[step // multiple] == step]


@given(st.data(), sequences())
def test_a_history_survives_the_state_file(data: st.DataObject, records: list[CheckpointRecord]) -> None:
    old = history(*records, pinned=tuple(sorted(data.draw(pinned_names(records)))))
    assert retention.decode(json.loads(json.dumps(retention.encode(old)))) == old


def test_unknown_fields_of_a_newer_version_are_ignored() -> None:
    entry = retention.encode(history(record(1)))
    assert retention.decode({**entry, "new": 1}) == history(record(1))
    with pytest.raises(msgspec.ValidationError):
        retention.decode({"checkpoints": 3})


# ---- what users pass


def test_metrics_are_recorded_as_finite_floats() -> None:
    metrics = {"a": 1, "b": torch.tensor(2.5), "c": np.float32(0.5), "d": math.nan, "e": -math.inf, "f": True}
    assert retention.finite_metrics(metrics) == {"a": 1.0, "b": 2.5, "c": 0.5, "f": 1.0}
    assert retention.finite_metrics(None) == {}


@pytest.mark.parametrize("value", ["high", None, torch.ones(2), [1], 10**400], ids=repr)
def test_metrics_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"metrics\['loss'\]: expected a number"):
        retention.finite_metrics({"loss": value})


@pytest.mark.parametrize("metrics", [{1: 2.0}, [1.0], "loss", 0])
def test_metrics_that_are_no_mapping_of_names(metrics: Any) -> None:
    with pytest.raises(ValueError, match=r"^metrics: expected a mapping with str keys, or None\. Got "):
        retention.finite_metrics(metrics)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_to_keep", 0),
        ("max_to_keep", -1),
        ("max_to_keep", 2.0),
        ("max_to_keep", True),
        ("keep_every_n_hours", 0),
        ("keep_every_n_hours", "1"),
        ("keep_every_n_hours", math.nan),
        ("keep_every_n_steps", 0),
        ("keep", 3),
    ],
)
def test_bad_policies(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected"):
        Policy(**{option: value})


@pytest.mark.parametrize("value", [("loss", "min"), ("loss", "lowest", 1), (1, "min", 1), ("loss", "max", 0), "loss"])
def test_bad_best(value: Any) -> None:
    with pytest.raises(ValueError, match="keep_best"):
        as_best(value)


def test_best() -> None:
    assert as_best(None) is None
    assert as_best(("loss", "min", 3)) == Best("loss", "min", 3)
