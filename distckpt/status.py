"""What a restore returns: what matched, as data and as assertions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from distckpt.checkpoint import Checkpoint
    from distckpt.restoration import Restoration
    from distckpt.restorer import Restorer


class ValueMismatch(NamedTuple):
    """A saved value that was skipped because it does not fit the live one.

    Attributes:
        key: Checkpoint key.
        saved: What the file has.
        live: What the program has.
    """

    key: str
    saved: str
    live: str


@dataclass(frozen=True, slots=True)
class Report:
    """What all ranks agree about a restore.

    Attributes:
        restored: Number of saved values that some rank took, the save counter not counted.
        missing: Keys of live values without a saved one.
        exempt: Those of `missing` that fail no assertion: per-rank values of ranks that the file has none for.
        unexpected: Keys of saved values that nobody took.
        pending: Those of `unexpected` whose parent is there, to what they wait for.
        mismatched: Values skipped by option.
        ambiguous: One saved node met by two live objects, or the reverse, or an object replaced after it was restored;
            one sentence each.
    """

    restored: int
    missing: tuple[str, ...] = ()
    exempt: frozenset[str] = frozenset()
    unexpected: tuple[str, ...] = ()
    pending: dict[str, str] = field(default_factory=dict)
    mismatched: tuple[ValueMismatch, ...] = ()
    ambiguous: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the log."""
        total = self.restored + len(self.unexpected)
        return (
            f"restored {self.restored} of {total} values, {len(self.pending)} pending, {len(self.missing)} missing, "
            f"{len(self.mismatched)} skipped"
        )

    def immediate_warnings(self, path: str) -> list[str]:
        """What must not wait until the first save."""
        messages = [f"{path}: {text}" for text in self.ambiguous]
        messages += [f"{path}: {key} skipped: saved {saved}, live {live}" for key, saved, live in self.mismatched]
        if self.unexpected and not self.restored:
            messages.append(f"{path}: nothing but the save counter matched. Saved: {_some(self.unexpected)}.")
        if self.exempt:
            # "rng/.rank/3" stands for all that rank 3 has there.
            holders = {re.sub(r"(\.rank/\d+)/.*", r"\1", key) for key in self.exempt}
            messages.append(
                f"{path}: per-rank values were saved on another number of ranks; not restored: {_some(holders)}."
            )
        return messages

    def partial_warnings(self, path: str) -> list[str]:
        """What stayed unmatched, for the first save."""
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
    ordered = sorted(keys)
    return ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")


class RestoreStatus:
    """The outcome of `restore` or `read`. The properties are local; the assertions are collective."""

    def __init__(
        self, restorer: Restorer, checkpoint: Checkpoint, restoration: Restoration | None, report: Report
    ) -> None:
        self._restorer = restorer
        self._checkpoint = checkpoint  # kept alive: the assertions walk it
        self._restoration = restoration
        self._report = report

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
        """Keys of saved values that nobody took, sorted."""
        return self._report.unexpected

    @property
    def pending(self) -> tuple[str, ...]:
        """Keys of saved values that wait for a name to appear on an existing object, sorted; part of `unexpected`."""
        return tuple(sorted(self._report.pending))

    @property
    def mismatched(self) -> tuple[ValueMismatch, ...]:
        """Saved values skipped because of `on_mismatch="skip"`, sorted."""
        return self._report.mismatched

    def assert_consumed(self) -> RestoreStatus:
        """Assert that every saved value was taken and every live value restored. Collective.

        Returns:
            This status.

        Raises:
            AssertionError: On all ranks, with up to 10 keys and what each waits for.
        """
        self._update("assert_consumed")
        self._require_live_matched()
        unexpected = [key for key in self._report.unexpected if key not in self._report.exempt]
        self._require(
            not unexpected,
            "saved values that nothing in the program took",
            [self._unexpected_line(key) for key in unexpected],
        )
        return self

    def assert_existing_objects_matched(self) -> RestoreStatus:
        """Assert that every live value was restored. Collective.

        Returns:
            This status.

        Raises:
            AssertionError: On all ranks, with up to 10 keys.
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
        self._require(
            self._report.restored > 0,
            "saved values, but nothing besides the save counter matched",
            [self._unexpected_line(key) for key in self._report.unexpected],
        )
        return self

    def expect_partial(self) -> RestoreStatus:
        """Give no warning about values that stay missing or pending. Local.

        Returns:
            This status.
        """
        if self._restoration is not None:
            self._restoration.quiet = True
        return self

    def initialize_or_restore(self) -> RestoreStatus:
        """Apply what was pending and can be applied now. Collective; here for programs that come from TensorFlow.

        Returns:
            This status.
        """
        if self._restoration is not None:
            self._report = self._restorer.refresh(self._restoration)
        return self

    def close(self) -> None:
        """Give up pending values and close the file. Local."""
        if self._restoration is not None:
            self._restorer.close(self._restoration)

    def _update(self, assertion: str) -> None:
        if self._restoration is None:
            raise AssertionError(f"{assertion}: restore(None) restored nothing")
        self._restoration.quiet = True
        self._report = self._restorer.refresh(self._restoration)

    def _require_live_matched(self) -> None:
        report = self._report
        self._require(not report.ambiguous, "ambiguous objects", list(report.ambiguous))
        self._require(
            not report.mismatched,
            "live values that were skipped because the saved ones do not fit",
            [f"{key}: saved {saved}, live {live}" for key, saved, live in report.mismatched],
        )
        missing = [key for key in report.missing if key not in report.exempt]
        self._require(not missing, "live values that the checkpoint does not have", missing)

    def _require(self, condition: bool, what: str, lines: list[str]) -> None:
        if condition:
            return
        shown = "".join(f"\n  {line}" for line in lines[:10])
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise AssertionError(f"{self.path}: {len(lines)} {what}:{shown}{more}")

    def _unexpected_line(self, key: str) -> str:
        waits_for = self._report.pending.get(key)
        return f"{key} (pending: waits for {waits_for})" if waits_for else f"{key} (missing in the program)"
