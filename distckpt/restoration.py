"""One restore on one rank: what its file holds, what was taken, what waits, and what this rank reports."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from distckpt.errors import RestoreMismatchError
from distckpt.graph.adapters.optimizer import Group, Slot
from distckpt.graph.adapters.root import COUNTER_KEY
from distckpt.graph.assignment import Assignment, assign
from distckpt.graph.binding import Binding, Mismatch, bind, is_of_other_rank, missing_values
from distckpt.graph.python_value import decode, holds_nothing
from distckpt.graph.rename import rename
from distckpt.graph.values import TensorValue
from distckpt.graph.view import LiveGraph
from distckpt.layout.keys import escape
from distckpt.layout.wording import rank_list
from distckpt.options import RestoreOptions
from distckpt.source import Source
from distckpt.status import Report, ValueMismatch


class LocalReport(msgspec.Struct, frozen=True, array_like=True):
    """What one rank contributes to a `Report`.

    Attributes:
        taken: One byte per key of `Restoration.keys`: 1 when this rank restored it.
        missing: Keys of its live values without a saved one.
        pending: Saved key to what it waits for.
        mismatched: (key, saved, live).
        ambiguous: One sentence each.
        warnings: What the user should know at once.
    """

    taken: bytes
    missing: list[str]
    pending: dict[str, str]
    mismatched: list[tuple[str, str, str]]
    ambiguous: list[str]
    warnings: list[str]


class Restoration:
    """One restore on one rank.

    Attributes:
        source: The open file.
        options: How to restore.
        with_counter: The save counter is restored too.
        keys: All saved keys, tensors first.
        hollow: Those of containers without any value inside.
        pending: Saved key to (key of the parent, name it waits for).
        quiet: The user expects that not everything matches.
    """

    def __init__(self, source: Source, options: RestoreOptions, *, with_counter: bool) -> None:
        manifest = source.manifest
        self.source = source
        self.options = options
        self.with_counter = with_counter
        self.keys = [variable.key for variable in manifest.variables] + list(manifest.python_state)
        self.hollow = frozenset(key for key, value in manifest.python_state.items() if _is_hollow(bytes(value)))
        self.pending: dict[str, tuple[str, str]] = {}
        self.quiet = options.expect_partial
        self._graph = rename(manifest.object_graph, options.rename or {})
        self._settled = set[str]() if with_counter else {COUNTER_KEY}
        self._dropped: set[str] = set()
        self._awaited: set[str] = set()
        self._holders: dict[str, weakref.ref[object]] = {}
        self._skipped: dict[str, Mismatch] = {}

    # ---- deciding and doing ----

    def plan(self, live: LiveGraph, claimed: set[tuple[int, str]]) -> tuple[Binding, Assignment]:
        """Match the live graph and decide what is still to restore. Local; changes nothing live.

        Args:
            live: A fresh walk.
            claimed: (id of a live object, name of its value) that a newer restore owns; this one's are added.
        """
        binding = bind(self._graph, live, self.hollow)
        self._leave_claimed(binding, claimed)
        claimed.update(_claims(binding))
        binding.mismatches = [m for m in binding.mismatches if m.key not in self._settled]
        manifest, cast = self.source.manifest, self.options.cast
        assignment = assign(binding, manifest, cast=cast, done=self._settled, skipped=self._skipped)
        self.pending = {key: waits for key, waits in binding.pending.items() if key not in self._settled}
        self._awaited = binding.awaited
        return binding, assignment

    def give_way(self, newer: Restoration, live: LiveGraph, claimed: set[tuple[int, str]]) -> None:
        """Drop the waiting values that a newer restore has taken, or waits for, too. Local.

        On a pipeline stage every restore waits for the layers of the other stages; only the newest has to.

        Args:
            newer: The newer restore.
            live: Its walk.
            claimed: As for `plan`.
        """
        self._leave_claimed(bind(self._graph, live, self.hollow), claimed)
        superseded = {key for key, waits in self.pending.items() if newer.pending.get(key) == waits}
        self._dropped |= superseded
        self._settled |= superseded
        self.pending = {key: waits for key, waits in self.pending.items() if key not in self._settled}

    def _leave_claimed(self, binding: Binding, claimed: set[tuple[int, str]]) -> None:
        """Take out of a binding, for good, what belongs to a newer restore."""
        if not claimed:
            return
        lost = {match.key for match in binding.matches if (id(match.node.obj), match.name) in claimed}
        self._settled |= lost
        binding.matches = [match for match in binding.matches if match.key not in lost]
        for new in binding.new_slots:
            if new.claim in claimed:
                self._settled.update((new.pair, *new.keys))
        binding.new_slots = [new for new in binding.new_slots if new.claim not in claimed]

    def settle(self, binding: Binding, assignment: Assignment) -> None:
        """Remember what an assignment restored, after it did."""
        self._settled |= assignment.consumed | assignment.emptied
        for match in binding.matches:
            if isinstance(match.node.obj, Slot):  # its pair is done, whatever slots training adds
                self._settled.add(match.node.key.rpartition("/")[0])
            in_place = isinstance(match.value, TensorValue) and match.value.in_place
            # Groups and slots of optimizers are stand-ins, made anew by every walk.
            if in_place and match.key in assignment.consumed and not isinstance(match.node.obj, Group | Slot):
                self._holders[match.key] = weakref.ref(match.node.obj)
        for mismatch in assignment.mismatches:
            self._skipped[mismatch.key] = mismatch
            self._settled.add(mismatch.key)

    def catch_up(self, live: LiveGraph, claimed: set[tuple[int, str]]) -> int:
        """Restore what waited and can be matched now; returns the number of values. Local.

        Raises:
            RestoreMismatchError: A value does not fit; nothing was changed.
        """
        before = self.pending, self._awaited
        binding, assignment = self.plan(live, claimed)
        if assignment.mismatches and self.options.on_mismatch == "error":
            self.pending, self._awaited = before  # for an object that fits
            raise RestoreMismatchError(describe_mismatches(self.source.path, assignment.mismatches))
        if assignment.consumed:
            self.source.read(assignment.reads, verify=self.options.verify)
            assignment.apply()
        self.settle(binding, assignment)
        if not self.pending:
            self.source.close()
        return len(assignment.consumed)

    def give_up_met(self, live: LiveGraph) -> list[str]:
        """Give up pending values whose live counterpart exists by now; returns their keys. Local."""
        if not self.pending:
            return []
        _, assignment = self.plan(live, set())
        met = sorted(assignment.consumed)
        self._dropped |= assignment.consumed
        self._settled |= assignment.consumed | assignment.emptied
        return met

    def waits_for(self, name: str) -> bool:
        """Whether some value waits for an attribute of this name."""
        return not self._awaited.isdisjoint((name, escape(name)))  # values wait under escaped names

    # ---- reporting ----

    def report(self, live: LiveGraph, binding: Binding, assignment: Assignment) -> LocalReport:
        """What this rank has to say after `plan`. Local."""
        taken = (assignment.consumed | self._settled) - self._skipped.keys() - self._dropped
        taken.update(other for first, other, _ in binding.combined if self.source.same_value(first, other))
        return LocalReport(
            taken=bytes(key in taken for key in self.keys),
            missing=missing_values(live, binding),
            pending={key: f"{name!r} of {parent or 'the root'}" for key, (parent, name) in self.pending.items()},
            mismatched=[(m.key, m.saved, m.live) for m in (*self._skipped.values(), *assignment.mismatches)],
            ambiguous=[*self._conflicts(binding), *self._reassigned(binding)],
            warnings=binding.warnings,
        )

    def _conflicts(self, binding: Binding) -> Iterator[str]:
        for key, first, other in binding.duplicates:
            pair = f"{first or 'the root'} and {other}"
            yield f"{key}: one saved object meets two live ones, {pair}; only the first is restored"
        for first, other, live in binding.combined:
            if not self.source.same_value(first, other):
                yield f"{live}: two saved values, {first} and {other}, meet one live object; the first is restored"

    def _reassigned(self, binding: Binding) -> Iterator[str]:
        for match in binding.matches:
            holder = self._holders.get(match.key)
            if holder is not None and holder() is not match.node.obj:
                yield f"{match.key}: reassigned: its object was replaced after it had been restored"


def _is_hollow(encoded: bytes) -> bool:
    return encoded.startswith(b"{") and holds_nothing(decode(encoded))


def _claims(binding: Binding) -> Iterator[tuple[int, str]]:
    """What a restore owns: values of live objects, and the state of pairs (optimizer, parameter)."""
    for match in binding.matches:
        yield id(match.node.obj), match.name
    for new in binding.new_slots:
        yield new.claim


def describe_mismatches(path: str, mismatches: Sequence[Mismatch] | Sequence[ValueMismatch]) -> str:
    """The message of a `RestoreMismatchError`."""
    lines = [f"  {m.key}: saved {m.saved}, live {m.live}" for m in mismatches[:20]]
    if len(mismatches) > len(lines):
        lines.append(f"  ... and {len(mismatches) - len(lines)} more")
    return (
        f"{path}: {len(mismatches)} saved value(s) do not fit the live ones. Nothing was changed.\n"
        + "\n".join(lines)
        + "\nGive the live objects the saved shape and dtype, or pass RestoreOptions(on_mismatch='skip'), "
        "RestoreOptions(cast=True) for dtypes, RestoreOptions(rename=...) for moved paths."
    )


def combine(restoration: Restoration, reports: list[LocalReport]) -> Report:
    """What all ranks agree about a restore; the same on all, given the same reports."""
    taken = np.bitwise_or.reduce([np.frombuffer(report.taken, np.uint8) for report in reports])
    by_value = [(key, bool(flag)) for key, flag in zip(restoration.keys, taken, strict=True) if key != COUNTER_KEY]
    unexpected = sorted(key for key, flag in by_value if not flag and key not in restoration.hollow)
    missing = sorted({key for report in reports for key in report.missing if key != COUNTER_KEY})
    waits = {key: text for report in reversed(reports) for key, text in report.pending.items()}
    world_size, size = restoration.source.manifest.world_size, len(reports)
    return Report(
        restored=sum(flag for _, flag in by_value),
        missing=tuple(missing),
        exempt=frozenset(
            [key for key in missing if is_of_other_rank(key, world_size)]
            + [key for key in unexpected if is_of_other_rank(key, size)]
        ),
        unexpected=tuple(unexpected),
        pending={key: waits[key] for key in unexpected if key in waits},
        mismatched=tuple(sorted(_mismatches(reports))),
        ambiguous=tuple(sorted({text for report in reports for text in report.ambiguous})),
    )


def _mismatches(reports: Sequence[LocalReport]) -> Iterator[ValueMismatch]:
    """Those of all ranks; what not all ranks have says which do."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, report in enumerate(reports):
        for mismatch in dict.fromkeys(report.mismatched):
            ranks.setdefault(mismatch, []).append(rank)
    for (key, saved, live), where in ranks.items():
        yield ValueMismatch(key, saved, live if len(where) == len(reports) else f"{live} (on {rank_list(where)})")
