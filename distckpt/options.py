"""Options of save and restore: frozen, checked at construction, every default suits most people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

Transport = Literal["auto", "mpio", "posix"]
Replicas = Literal["check", "check_all", "first"]
OnMismatch = Literal["error", "skip"]
PerRankPolicy = Literal["keep", "error"]


def _require_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}. Got {value!r}.")


def _require_timeout(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"timeout: expected seconds > 0. Got {value!r}.")
    if isinstance(value, int) and value > sys.float_info.max:
        raise ValueError(f"timeout: expected seconds up to {sys.float_info.max:g}, or math.inf. Got a larger integer.")


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1. Got {value!r}.")


def _require_bools(options: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False. Got {value!r}.")


def _require_str_mapping(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: expected a mapping with str keys, or None. Got {value!r}.")


def _require_strs_by_str(name: str, value: Mapping[str, str] | None) -> None:
    _require_str_mapping(name, value)
    if value is not None and not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{name}: expected str values. Got {value!r}.")


def _require_strs(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}: expected a sequence of str, or None. Got {value!r}.")


Options = TypeVar("Options", "SaveOptions", "RestoreOptions")


def given_or_default(options: Options | None, kind: type[Options]) -> Options:
    """The options that a user passed, or the defaults.

    Raises:
        TypeError: They are of another kind.
    """
    if options is None:
        return kind()
    if not isinstance(options, kind):
        raise TypeError(f"options: expected {kind.__name__} or None. Got {type(options).__name__}.")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How to save. All ranks pass the same options.

    Attributes:
        timeout: Seconds to wait for all ranks to arrive; it does not bound the write itself.
        transport: "mpio" writes large pieces through parallel HDF5, "posix" with `pwrite` at the datasets' offsets;
            both give the same file. "auto" is "mpio" when h5py has MPI and there is more than one rank.
        collective: With "mpio": collective instead of independent transfers (Lustre, GPFS).
        hints: With "mpio": MPI-IO hints, such as {"cb_nodes": "8"}.
        durable: fsync file and directory before the checkpoint becomes visible.
        checksums: Store an xxh3-64 checksum of every piece.
        replicas: "check" compares small replicated values whole and a sample of large ones, "check_all" hashes
            everything, "first" trusts the lowest rank that holds a value.
        overlap: `save_async` only: return before the parameters of tracked optimizers and their slots are copied. They
            are copied while the program goes on; each `torch.optim.Optimizer.step()` first waits for that. A tensor
            that is changed earlier makes the save fail, as far as torch counts its changes: those through
            `Tensor.data` are not counted.
        host_memory: `save_async` only: most bytes of host memory for the copies of a rank's state. A save waits for
            those before it where it would need more; None sets no limit beyond `max_in_flight`.
        max_in_flight: `save_async` only: how many saves may be unfinished when it returns.
        metadata: Python values to store beside the state, readable without restoring.
    """

    timeout: float = 600.0
    transport: Transport = "auto"
    collective: bool = False
    hints: Mapping[str, str] | None = None
    durable: bool = True
    checksums: bool = True
    replicas: Replicas = "check"
    overlap: bool = False
    host_memory: int | None = None
    max_in_flight: int = 1
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Reject bad values at construction.

        Raises:
            ValueError: A value is not among those documented above.
        """
        _require_timeout(self.timeout)
        _require_choice("transport", self.transport, get_args(Transport))
        _require_choice("replicas", self.replicas, get_args(Replicas))
        _require_bools(self, ("collective", "durable", "checksums", "overlap"))
        _require_count("max_in_flight", self.max_in_flight)
        if self.host_memory is not None:
            _require_count("host_memory", self.host_memory)
        _require_strs_by_str("hints", self.hints)
        _require_str_mapping("metadata", self.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions:
    """How to restore. All ranks pass the same options.

    Attributes:
        timeout: Seconds to wait for all ranks to arrive.
        strict: Raise `RestoreMismatchError` where one saved node meets two live objects, or two differing saved
            values one live tensor; otherwise a warning.
        on_mismatch: "error" raises when kind, shape or dtype differ, "skip" leaves such live values alone.
        cast: Convert between floating-point types, and between integer types, where saved and live dtype differ, as
            `Tensor.to` does: values are rounded, and integers that the live type has no room for wrap around.
        rename: Saved key prefix to live key prefix, whole components; the longest match wins.
        only: Saved key prefixes, whole components: just what is below them is restored, asserted and warned about. A
            shared object is below every path that leads to it. The save counter is restored if it is named.
        skip_slots: Leave the optimizers' state alone, and out of the assertions; their options are restored.
        per_rank: On another number of ranks: "keep" the live per-rank values that have no saved one, or "error".
        expect_partial: Give no warning about values that stay missing or pending.
        verify: Compare checksums while reading.
        threads: Most threads that read on a rank; None for one per core that its node has for each rank, up to 8.
    """

    timeout: float = 600.0
    strict: bool = False
    on_mismatch: OnMismatch = "error"
    cast: bool = False
    rename: Mapping[str, str] | None = None
    only: Sequence[str] | None = None
    skip_slots: bool = False
    per_rank: PerRankPolicy = "keep"
    expect_partial: bool = False
    verify: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        """Reject bad values at construction.

        Raises:
            ValueError: A value is not among those documented above.
        """
        _require_timeout(self.timeout)
        _require_choice("on_mismatch", self.on_mismatch, get_args(OnMismatch))
        _require_choice("per_rank", self.per_rank, get_args(PerRankPolicy))
        _require_bools(self, ("strict", "cast", "skip_slots", "expect_partial", "verify"))
        _require_strs_by_str("rename", self.rename)
        _require_strs("only", self.only)
        if self.threads is not None:
            _require_count("threads", self.threads)
