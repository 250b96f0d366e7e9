"""The result of a restore: what matched, as data and as assertions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from distckpt.timing import Timing
from distckpt.words import listing

if TYPE_CHECKING:
    from distckpt.checkpoint import Checkpoint
    from distckpt.graph.match import Mismatch
    from distckpt.restoring.restoration import Restoration
    from distckpt.restoring.restorer import Restorer


T = TypeVar("T")

#: Most keys named in one message.
_MAX_SHOWN = 10
#: Most keys that an unmatched one is compared with.
_MAX_COMPARED = 2_000


class ValueMismatch(NamedTuple):
    """A saved value that was skipped because it does not fit the live one.

    Attributes:
        key: Checkpoint key.
        saved: The saved value, in words: its shape and dtype, or its type.
        live: The live value, in words.
    """

    key: str
    saved: str
    live: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a restore over all ranks; the same on each.

    Attributes:
        restored: Number of saved values that some rank took, not counting the save counter.
        missing: Keys of live values without a saved one.
        exempt: Keys of `missing` and `unexpected` that fail no assertion: per-rank values of ranks that exist only in
            the program or only in the file.
        unexpected: Keys of saved values that no rank took.
        pending: Those of `unexpected` whose parent exists, to what they wait for.
        mismatched: Values that do not fit; skipped if the options say so.
        ambiguous: Saved nodes that match two live objects, or the reverse, and objects replaced after they were
            restored; one sentence each.
        disputed: Tensors that ranks of one mesh shard differently; one sentence each.
        warnings: What else the user should know, with the ranks where not all say so.
    """

    restored: int
    missing: tuple[str, ...] = ()
    exempt: frozenset[str] = frozenset()
    unexpected: tuple[str, ...] = ()
    pending: dict[str, str] = field(default_factory=dict)
    mismatched: tuple[ValueMismatch, ...] = ()
    ambiguous: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def after(self, taken: Collection[str], filled: Collection[str], skipped: Iterable[Mismatch]) -> Report:
        """The report when one rank has restored more since, and has skipped what does not fit.

        Live values that are new since and have no saved one are not added to `missing`.

        Args:
            taken: Keys of all saved values that it has taken so far.
            filled: Keys of the live values that it has restored since.
            skipped: The values that it has skipped so far.
        """
        known = {mismatch.key for mismatch in self.mismatched}
        more = [ValueMismatch(m.key, m.saved, m.live) for m in skipped if m.key not in known]
        unexpected = tuple(key for key in self.unexpected if key not in taken)
        settled = {*taken, *(mismatch.key for mismatch in more)}
        return replace(
            self,
            restored=self.restored + len(self.unexpected) - len(unexpected),
            missing=tuple(key for key in self.missing if key not in filled),
            unexpected=unexpected,
            pending={key: waits for key, waits in self.pending.items() if key not in settled},
            mismatched=tuple(sorted([*self.mismatched, *more])),
        )

    def summary(self) -> str:
        """The counts in one line, for the log."""
        total = self.restored + len(self.unexpected)
        return (
            f"restored {self.restored} of {total} values, {len(self.pending)} pending, {len(self.missing)} missing, "
            f"{len(self.mismatched)} skipped"
        )

    def immediate_warnings(self, path: str) -> list[str]:
        """Warnings to issue at once, not at the first save."""
        messages = [*self.warnings, *(f"{path}: {text}" for text in self.ambiguous)]
        messages += [f"{path}: {key} skipped: saved {saved}, live {live}" for key, saved, live in self.mismatched]
        if self.unexpected and not self.restored:
            messages.append(f"{path}: nothing but the save counter matched. Saved: {_some(self.unexpected)}.")
        if self.exempt:
            # "rng/.rank/3" stands for all values of rank 3 there.
            holders = {re.sub(r"(\.rank/\d+)/.*", r"\1", key) for key in self.exempt}
            messages.append(
                f"{path}: per-rank values were saved on another number of ranks; not restored: {_some(holders)}."
            )
        return messages

    def partial_warnings(self, path: str) -> list[str]:
        """Warnings about unmatched values, to issue at the first save."""
        lost = [key for key in self.unexpected if key not in self.exempt]
        absent = [key for key in self.missing if key not in self.exempt]
        hint = "Call expect_partial() on the status of restore() if that is meant."
        messages = []
        if lost:
            messages.append(f"{path}: {len(lost)} saved value(s) were not restored: {_some(lost)}. {hint}")
        if absent:
            messages.append(f"{path}: {len(absent)} live value(s) were not in the file: {_some(absent)}. {hint}")
        return messages


def _some(keys: Iterable[str]) -> str:
    return listing(sorted(keys), _MAX_SHOWN)


class RestoreStatus:
    """The result of `restore` or `read`.

    The properties are local; they show the state after the restore, or after the last collective method, less what
    `Checkpoint.retry_pending` has found restored on this rank since. New live values that the file does not have come
    into `missing` with the next collective method. The assertions are collective: each first retries
    the pending values, then checks. They return the status, so that calls chain.
    """

    def __init__(
        self,
        restorer: Restorer,
        checkpoint: Checkpoint,
        restoration: Restoration | None,
        report: Report,
        timing: Timing | None = None,
    ) -> None:
        self._restorer = restorer
        self._checkpoint = checkpoint  # kept alive: the assertions walk it
        self._restoration = restoration
        self._report = report
        self._timing = timing

    @property
    def path(self) -> str | None:
        """The restored file; None after `restore(None)`."""
        return None if self._restoration is None else self._restoration.source.path

    @property
    def missing(self) -> tuple[str, ...]:
        """Keys of live values that the file does not have, sorted."""
        return self._report.missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Keys of saved values that no rank took, sorted."""
        return self._report.unexpected

    @property
    def pending(self) -> tuple[str, ...]:
        """Keys of saved values that wait for a name to appear on an existing object, sorted; part of `unexpected`."""
        return tuple(sorted(self._report.pending))

    @property
    def mismatched(self) -> tuple[ValueMismatch, ...]:
        """Saved values skipped because of `on_mismatch="skip"`, sorted."""
        return self._report.mismatched

    @property
    def timing(self) -> Timing | None:
        """How long the restore took, step by step; None after `restore(None)`."""
        return self._timing

    def assert_consumed(self) -> RestoreStatus:
        """Assert that every saved value was taken and every live value restored. Collective.

        Returns:
            This status.

        Raises:
            AssertionError: On all ranks; names up to 10 keys, what each waits for, and what it may be called now.
        """
        self._update("assert_consumed")
        self._require_live_matched()
        unexpected = [key for key in self._report.unexpected if key not in self._report.exempt]
        self._require_none(unexpected, "saved values that nothing in the program took", self._unexpected_line)
        return self

    def assert_existing_objects_matched(self) -> RestoreStatus:
        """Assert that every live value was restored. Collective.

        Returns:
            This status.

        Raises:
            AssertionError: On all ranks; names up to 10 keys.
        """
        self._update("assert_existing_objects_matched")
        self._require_live_matched()
        return self

    def assert_nontrivial_match(self) -> RestoreStatus:
        """Assert that something besides the save counter was restored. Collective.

        Returns:
            This status.

        Raises:
            AssertionError: On all ranks.
        """
        self._update("assert_nontrivial_match")
        if not self._report.restored:
            what = "saved values, but nothing besides the save counter matched"
            self._fail(self._report.unexpected, what, self._unexpected_line)
        return self

    def expect_partial(self) -> RestoreStatus:
        """Suppress the warnings about values that stay missing or pending. Local.

        Returns:
            This status.
        """
        if self._restoration is not None:
            self._restoration.unmatched.clear()
        return self

    def initialize_or_restore(self) -> RestoreStatus:
        """Restore the pending values that have a live counterpart now. Collective; for programs ported from TensorFlow.

        Returns:
            This status.
        """
        if self._restoration is not None:
            self._report = self._restorer.refresh("initialize_or_restore", self._restoration)
        return self

    def close(self) -> None:
        """Give up the pending values and close the file. Local."""
        if self._restoration is not None:
            self._restorer.close(self._restoration)

    def update_locally(self) -> None:
        """Take into account what this rank has restored since. Local; called after `Checkpoint.retry_pending`."""
        if self._restoration is not None:
            self._report = self._restoration.update(self._report)

    def _update(self, assertion: str) -> None:
        if self._restoration is None:
            raise AssertionError(f"{assertion}: restore(None) restored nothing")
        self._restoration.unmatched.clear()
        self._report = self._restorer.refresh(assertion, self._restoration)

    def _require_live_matched(self) -> None:
        report = self._report
        self._require_none(report.ambiguous, "ambiguous objects", str)
        what = "live values that were skipped because the saved ones do not fit"
        self._require_none(report.mismatched, what, "{0.key}: saved {0.saved}, live {0.live}".format)
        missing = [key for key in report.missing if key not in report.exempt]
        self._require_none(missing, "live values that the checkpoint does not have", self._missing_line)

    def _require_none(self, found: Sequence[T], what: str, line_of: Callable[[T], str]) -> None:
        if found:
            self._fail(found, what, line_of)

    def _fail(self, found: Sequence[T], what: str, line_of: Callable[[T], str]) -> NoReturn:
        """Raise AssertionError with the total and a line for each of the first items."""
        shown = "".join(f"\n  {line_of(item)}" for item in found[:_MAX_SHOWN])
        more = f"\n  ... and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
        raise AssertionError(f"{self.path}: {len(found)} {what}:{shown}{more}")

    def _unexpected_line(self, key: str) -> str:
        waits_for = self._report.pending.get(key)
        state = f"pending: waits for {waits_for}" if waits_for else "missing in the program"
        guess = _renamed("live", key, self._report.missing)
        return f"{key} ({state}; {guess})" if guess else f"{key} ({state})"

    def _missing_line(self, key: str) -> str:
        guess = _renamed("saved", key, self._report.unexpected)
        return f"{key} ({guess})" if guess else key


def _renamed(kind: str, key: str, unmatched: Sequence[str]) -> str:
    """A hint at the unmatched key on the other side that resembles `key` most; empty without one."""
    same_ending = [other for other in unmatched if other.rpartition("/")[2] == key.rpartition("/")[2]]
    near = difflib.get_close_matches(key, (same_ending or unmatched)[:_MAX_COMPARED], n=1)
    return f"renamed? the {kind} {near[0]} has no counterpart either, see RestoreOptions(rename=...)" if near else ""
