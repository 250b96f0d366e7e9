"""Retention: pure functions on a manager's records that decide which checkpoints it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal, get_args

import msgspec

Mode = Literal["min", "max"]


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that a manager has made and may delete.

    Attributes:
        name: File name within the manager's directory.
        time: Time of the save, in seconds since the epoch on rank 0's clock.
        step: Value of the step counter when it was saved; without a step counter the number in its name.
        metrics: The metrics passed to `save`; finite values only.
        durable: Whether it was saved durably: on disk when `save` returned, so that it survives a power cut.
    """

    name: str
    time: float
    step: int
    metrics: dict[str, float] = {}
    durable: bool = True


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The records of a manager, also stored in the state file.

    Attributes:
        checkpoints: The checkpoints that it may delete, oldest first.
        pinned: Names of checkpoints that it must not delete.
        last_preserved_time: Time of the newest checkpoint kept for good by `keep_every_n_hours`, in seconds; at first
            the time at which the manager began.
        last_preserved_step: Step of the newest checkpoint kept for good by `keep_every_n_steps`; 0 at first.
    """

    checkpoints: tuple[CheckpointRecord, ...] = ()
    pinned: tuple[str, ...] = ()
    last_preserved_time: float
    last_preserved_step: int = 0


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the best checkpoints.

    Attributes:
        metric: Name of the metric.
        mode: Whether the smallest ("min") or the largest values ("max") are the best.
        count: Number of checkpoints to keep.
    """

    metric: str
    mode: Mode
    count: int

    def __post_init__(self) -> None:
        """Reject bad values.

        Raises:
            ValueError: A value is not among those documented.
        """
        metric: object = self.metric
        if not isinstance(metric, str) or self.mode not in get_args(Mode):
            raise ValueError(f'keep_best: expected (metric, "min" or "max", count). Got {astuple(self)!r}.')
        _require_count("keep_best: count", self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Rules by which checkpoints are kept; one that no rule keeps is deleted. See `CheckpointManager`."""

    max_to_keep: int | None = None
    keep_every_n_hours: float | None = None
    keep_every_n_steps: int | None = None
    keep_best: Best | None = None
    keep: Callable[[CheckpointRecord], bool] | None = None

    def __post_init__(self) -> None:
        """Reject bad values.

        Raises:
            ValueError: A value is not among those documented.
        """
        _require_count("max_to_keep", self.max_to_keep)
        require_positive("keep_every_n_hours", self.keep_every_n_hours)
        _require_count("keep_every_n_steps", self.keep_every_n_steps)
        if self.keep is not None and not callable(self.keep):
            raise ValueError(f"keep: expected a function of a CheckpointRecord. Got {self.keep!r}.")


def as_best(keep_best: object) -> Best | None:
    """Convert the option `keep_best` as given by the user.

    Raises:
        ValueError: It is not a tuple of three, or a value is not among those documented.
    """
    if keep_best is None:
        return None
    if not isinstance(keep_best, tuple | list) or len(keep_best) != 3:
        raise ValueError(f'keep_best: expected (metric, "min" or "max", count). Got {keep_best!r}.')
    return Best(*keep_best)


def _require_count(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}: expected an integer > 0, or None. Got {value!r}.")


def require_positive(name: str, value: object) -> None:
    """Check that an option is None or a number above 0.

    Raises:
        ValueError: It is neither.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise ValueError(f"{name}: expected a number > 0, or None. Got {value!r}.")


def finite_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Convert metrics for a record: to floats, without infinities and NaN, which cannot be ranked.

    Raises:
        ValueError: `metrics` is not a mapping with str keys, or a value is not a number.
    """
    _require_names(metrics)
    numbers = {name: _as_float(name, value) for name, value in (metrics or {}).items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _require_names(metrics: object) -> None:
    if metrics is None or (isinstance(metrics, Mapping) and all(isinstance(name, str) for name in metrics)):
        return
    raise ValueError(f"metrics: expected a mapping with str keys, or None. Got {metrics!r:.100}.")


def _as_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"metrics[{name!r}]: expected a number. Got {value!r:.100}.") from error


# ---- changes of a history ----------------------------------------------------------------------------------------


def decode(entry: object) -> History:
    """Decode a history from the state file.

    Raises:
        msgspec.ValidationError: The entry is not a history.
    """
    return msgspec.convert(entry, type=History)


def encode(history: History) -> dict[str, Any]:
    """Encode a history for the state file."""
    fields: dict[str, Any] = msgspec.to_builtins(history)
    return fields


def present(history: History, names: Collection[str]) -> History:
    """The history with only the checkpoints among the names."""
    return msgspec.structs.replace(
        history,
        checkpoints=tuple(record for record in history.checkpoints if record.name in names),
        pinned=tuple(name for name in history.pinned if name in names),
    )


def after_clock_reset(history: History, now: float) -> History:
    """The history when the clock shows less than the time of a checkpoint that was kept for good.

    How old the checkpoints are is unknown then, so all of them are kept for good.
    """
    return msgspec.structs.replace(history, checkpoints=(), last_preserved_time=now)


def after_save(history: History, record: CheckpointRecord) -> History:
    """The history with a new checkpoint, the newest."""
    older = tuple(other for other in history.checkpoints if other.name != record.name)
    return msgspec.structs.replace(
        history,
        checkpoints=(*older, record),
        # If the step is smaller, training continues from an older checkpoint.
        last_preserved_step=min(history.last_preserved_step, record.step),
    )


def pin(history: History, name: str) -> History:
    """The history with a checkpoint pinned."""
    return msgspec.structs.replace(history, pinned=tuple(sorted({*history.pinned, name})))


def unpin(history: History, name: str) -> History:
    """The history with a checkpoint not pinned."""
    return msgspec.structs.replace(history, pinned=tuple(other for other in history.pinned if other != name))


def forget(history: History, names: Collection[str]) -> History:
    """The history without some checkpoints."""
    checkpoints = tuple(record for record in history.checkpoints if record.name not in names)
    return msgspec.structs.replace(history, checkpoints=checkpoints)


# ---- deletion ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result of applying a policy to a history.

    Attributes:
        history: The history without checkpoints that are now kept for good, but with those to delete.
        delete: Names of the checkpoints to delete, oldest first.
    """

    history: History
    delete: tuple[str, ...]


def sweep(history: History, policy: Policy) -> Sweep:
    """Decide which of the checkpoints beyond the newest `max_to_keep` are deleted.

    The newest durable checkpoint is never deleted, even if newer ones were saved without being made durable.
    """
    if policy.max_to_keep is None:
        return Sweep(history, ())
    aged = history.checkpoints[: -policy.max_to_keep]
    history = _preserve(history, aged, policy)
    managed = history.checkpoints
    safe = {*history.pinned, *_newest_durable(managed), *_best(managed, policy.keep_best)}
    left = [record for record in managed[: -policy.max_to_keep] if record.name not in safe]
    return Sweep(history, tuple(record.name for record in left if policy.keep is None or not policy.keep(record)))


def _preserve(history: History, aged: Collection[CheckpointRecord], policy: Policy) -> History:
    """Keep for good the aged checkpoints that are due by `keep_every_n_hours` or `keep_every_n_steps`."""
    hours, steps = policy.keep_every_n_hours, policy.keep_every_n_steps
    last_time, last_step = history.last_preserved_time, history.last_preserved_step
    preserved = set()
    for record in aged:
        if hours is not None and record.time - hours * 3600 >= last_time:
            preserved.add(record.name)
            last_time = record.time
        if steps is not None and record.step // steps > last_step // steps:
            preserved.add(record.name)
            last_step = record.step
    return msgspec.structs.replace(
        forget(history, preserved), last_preserved_time=last_time, last_preserved_step=last_step
    )


def _newest_durable(records: Collection[CheckpointRecord]) -> list[str]:
    return [record.name for record in records if record.durable][-1:]


def _best(records: Collection[CheckpointRecord], best: Best | None) -> list[str]:
    """Names of the best checkpoints; of equal ones the newer is better."""
    if best is None:
        return []
    sign = 1 if best.mode == "max" else -1
    ranked = [record for record in records if best.metric in record.metrics]
    ranked.sort(key=lambda record: sign * record.metrics[best.metric])
    return [record.name for record in ranked[-best.count :]]
