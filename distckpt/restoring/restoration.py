"""One restore on one rank: what its file holds, what was restored, what is pending, and what this rank reports."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from distckpt.errors import CorruptCheckpointError, RestoreMismatchError
from distckpt.graph.adapters.optimizer import Group, Slot
from distckpt.graph.adapters.root import COUNTER_KEY
from distckpt.graph.assignment import Assignment, assign
from distckpt.graph.binding import bind, is_of_other_rank, missing_values
from distckpt.graph.claims import Claims
from distckpt.graph.match import Binding, Mismatch
from distckpt.graph.python_value import decode, holds_nothing
from distckpt.graph.rename import rename
from distckpt.graph.selection import select
from distckpt.graph.sharding import process_number
from distckpt.graph.values import TensorValue
from distckpt.graph.view import LiveGraph
from distckpt.layout.keys import escape
from distckpt.layout.meshes import Sharding, Shardings, disagreements
from distckpt.options import RestoreOptions
from distckpt.restoring.status import Report, ValueMismatch
from distckpt.source import Source
from distckpt.words import rank_list, texts_of_ranks


class LocalReport(msgspec.Struct, frozen=True, array_like=True):
    """What one rank contributes to a `Report`.

    Attributes:
        taken: One byte per key of `Restoration.keys`: 1 if this rank restores it now, or did before, else 0.
        missing: Keys of this rank's live values without a saved one.
        pending: Saved key to what its value waits for, in words.
        mismatched: (key, saved, live) of each value that does not fit, the last two in words.
        ambiguous: Ambiguous matches, one sentence each.
        shardings: How this rank shards the tensors that it is about to read.
        warnings: See `Binding.warnings`.
    """

    taken: bytes
    missing: list[str]
    pending: dict[str, str]
    mismatched: list[tuple[str, str, str]]
    ambiguous: list[str]
    shardings: Shardings
    warnings: list[str]


#: Restores of this process with pending values, of any Checkpoint.
_waiting: weakref.WeakSet[Restoration] = weakref.WeakSet()
_uids = itertools.count()


class Restoration:
    """One restore on one rank.

    The `Restorer` calls `plan`, `report` and, when the assignment has been applied, `settle`. Saved values without a
    live counterpart are then pending, and the file stays open. After each later walk `catch_up` restores those whose
    counterparts have appeared. A pending value is given up if a newer restore takes or awaits the same one
    (`give_way`), or if a save stores another value in its place (`give_up_met`). With nothing pending, `finish` closes
    the file. All methods are local.

    Attributes:
        source: The open file.
        options: Options of the restore.
        with_counter: Whether the save counter is restored too.
        keys: The saved keys that the options select, tensors first.
        hollow: The saved keys of containers without any value inside.
        pending: Saved key to (key of the live parent, what the value waits for there, in words).
        unmatched: Warnings about unmatched values, for the first save; cleared by an assertion or `expect_partial`.
        agreed: What all ranks reported at the restore; None before.
    """

    def __init__(self, source: Source, options: RestoreOptions, *, with_counter: bool) -> None:
        """Local; reads nothing but the manifest, so that it ends alike on all ranks.

        Args:
            source: The open file.
            options: Options of the restore.
            with_counter: Whether the save counter is restored too.

        Raises:
            CorruptCheckpointError: A python value is damaged.
        """
        manifest = source.manifest
        self.source = source
        self.options = options
        self.with_counter = with_counter
        self.hollow = frozenset(key for key in manifest.python_state if _is_hollow(source, key))
        self.pending: dict[str, tuple[str, str]] = {}
        self.unmatched: list[str] = []
        self.agreed: Report | None = None
        graph, renames = manifest.object_graph, options.rename or {}
        self._selection = select(
            graph, rename(graph, renames), only=options.only, skip_slots=options.skip_slots, rename=renames
        )
        stored = (*(variable.key for variable in manifest.variables), *manifest.python_state)
        self.keys = [key for key in stored if key in self._selection.keys]
        self._uid = next(_uids)  # a newer restore has a higher one
        self._taken_by_newer = Claims()  # the live values that newer restores have set
        #: Saved keys, and keys of slot pairs, with which this restore is done: restored, skipped or given up.
        self._settled = set[str]() if with_counter else {COUNTER_KEY}
        self._dropped: set[str] = set()  # keys given up because of a save
        self._superseded: dict[str, weakref.ref[Restoration]] = {}  # key to the newer restore that waits for it now
        self._awaited: set[str] = set()  # names of attributes that pending values wait for
        self._holders: dict[str, weakref.ref[object]] = {}  # key to the object restored in place: it may be replaced
        self._optimizers: weakref.WeakSet[object] = weakref.WeakSet()  # those that got options
        self._skipped: dict[str, Mismatch] = {}  # by key
        self._caught_up: set[str] = set()  # keys of the live values that `catch_up` has restored

    # ---- deciding and doing ----

    def plan(self, live: LiveGraph) -> tuple[Binding, Assignment]:
        """Match the live graph, of a fresh walk, and decide what is left to restore. Local; changes nothing live."""
        binding = bind(self._selection, live, self.hollow)
        self._leave_to_newer(binding)
        binding.mismatches = [m for m in binding.mismatches if m.key not in self._settled]
        manifest, cast = self.source.manifest, self.options.cast
        assignment = assign(
            binding, manifest, cast=cast, done=self._settled, skipped=self._skipped, optimizers=self._optimizers
        )
        self.pending = {key: waits for key, waits in binding.pending.items() if key not in self._settled}
        self._awaited = binding.awaited
        return binding, assignment

    def give_way(self, newer: Restoration, live: LiveGraph) -> None:
        """Drop the pending values that a newer restore of the same Checkpoint has taken, or waits for as well. Local.

        On a pipeline stage every restore waits for the layers of the other stages; only the newest needs to.

        Args:
            newer: The newer restore.
            live: The live graph of its walk.
        """
        self._leave_to_newer(bind(self._selection, live, self.hollow))
        superseded = {key for key, waits in self.pending.items() if newer.pending.get(key) == waits}
        self._superseded.update(dict.fromkeys(superseded, weakref.ref(newer)))
        self._settled |= superseded
        self.pending = {key: waits for key, waits in self.pending.items() if key not in self._settled}

    def _leave_to_newer(self, binding: Binding) -> None:
        """Remove from a binding, and for good, the values that newer restores have taken."""
        if not self._taken_by_newer:
            return
        lost = {match.key for match in binding.matches if match.claim in self._taken_by_newer}
        self._settled |= lost
        binding.matches = [match for match in binding.matches if match.key not in lost]
        for new in binding.new_slots:
            if new.claim in self._taken_by_newer:
                self._settled.update((new.pair, *new.keys))
        binding.new_slots = [new for new in binding.new_slots if new.claim not in self._taken_by_newer]

    def _tell_older(self, binding: Binding) -> None:
        """Tell older restores with pending values what this one has taken: for each object the newest call wins."""
        for older in _waiting:
            if older._uid < self._uid:
                older._taken_by_newer.add(match.claim for match in binding.matches)
                older._taken_by_newer.add(new.claim for new in binding.new_slots)

    def settle(self, binding: Binding, assignment: Assignment) -> None:
        """Record what an assignment has restored. Called after it was applied."""
        consumed = assignment.consumed
        self._settled.update(consumed, assignment.pairs)
        for match in binding.matches:
            obj, value = match.node.obj, match.value
            # Groups and slots of optimizers are stand-ins, made anew by every walk.
            if type(obj) is Slot:
                self._settled.add(match.node.key.rpartition("/")[0])  # the pair, even if training adds slots to it
            elif match.key in consumed and type(obj) is Group:
                self._optimizers.add(obj.optimizer)
            elif type(value) is TensorValue and value.in_place and match.key in consumed:
                self._holders[match.key] = weakref.ref(obj)
        for mismatch in assignment.mismatches:
            self._skipped[mismatch.key] = mismatch
            self._settled.add(mismatch.key)
        self._tell_older(binding)

    def wait(self) -> None:
        """Start to wait: from now on newer restores report here what they take. Local."""
        _waiting.add(self)

    def finish(self) -> None:
        """Give up all pending values and close the file. Local."""
        self.pending.clear()
        _waiting.discard(self)
        self.source.close()

    def catch_up(self, live: LiveGraph) -> int:
        """Restore the pending values that have a live counterpart now; returns their number. Local.

        Raises:
            RestoreMismatchError: A value does not fit; nothing was changed.
        """
        before = self.pending, self._awaited
        binding, assignment = self.plan(live)
        if assignment.mismatches and self.options.on_mismatch == "error":
            self.pending, self._awaited = before  # go on waiting, for an object that fits
            raise RestoreMismatchError(describe_mismatches(self.source.path, assignment.mismatches))
        if assignment.consumed:
            with self.source.named_in_errors():
                self.source.read(assignment.reads, verify=self.options.verify)
            assignment.apply()
        self.settle(binding, assignment)
        taken = (match for match in binding.matches if match.key in assignment.consumed)
        self._caught_up.update(match.node.attribute_key(match.name) for match in taken)
        return len(assignment.consumed)

    def give_up_met(self, live: LiveGraph) -> list[str]:
        """Give up the pending values that have a live counterpart now; returns their keys. Local."""
        if not self.pending:
            return []
        _, assignment = self.plan(live)
        met = sorted(assignment.consumed)
        self._dropped |= assignment.consumed
        self._settled |= assignment.consumed | assignment.pairs
        return met

    def waits_for(self, name: str) -> bool:
        """Whether a pending value waits for an attribute of this name."""
        return not self._awaited.isdisjoint((name, escape(name)))  # values wait under escaped names

    # ---- reporting ----

    @property
    def taken(self) -> set[str]:
        """The saved keys whose values this rank has restored so far, or has left to newer restores. Local."""
        taken = self._settled.difference(self._skipped, self._dropped)
        return taken.difference(key for key, newer in self._superseded.items() if _still_waits(newer(), key))

    def update_unmatched(self) -> None:
        """Leave out of the warnings what this rank has restored since. Local."""
        if self.unmatched and self.agreed is not None:
            self.unmatched[:] = self.update(self.agreed).partial_warnings(self.source.path)

    def update(self, report: Report) -> Report:
        """A report of this restore, with what this rank has restored since. Local."""
        return report.after(self.taken, self._caught_up, self._skipped.values())

    def report(self, live: LiveGraph, binding: Binding, assignment: Assignment) -> LocalReport:
        """This rank's part of the report, from the results of `plan`. Local."""
        taken = assignment.consumed | self.taken
        taken.update(other for first, other, _ in binding.combined if self.source.same_value(first, other))
        return LocalReport(
            taken=bytes([key in taken for key in self.keys]),
            missing=[key for key in missing_values(live, binding) if self._selection.covers(key)],
            pending={key: f"{what} of {parent or 'the root'}" for key, (parent, what) in self.pending.items()},
            mismatched=[(m.key, m.saved, m.live) for m in (*self._skipped.values(), *assignment.mismatches)],
            ambiguous=[*self._conflicts(binding), *self._reassigned(binding)],
            shardings=Shardings.of(process_number(), self.keys, _shardings(assignment)),
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
        for match in binding.matches if self._holders else ():
            holder = self._holders.get(match.key)
            if holder is not None and holder() is not match.node.obj:
                yield f"{match.key}: reassigned: its object was replaced after it had been restored"


def _shardings(assignment: Assignment) -> dict[str, Sharding]:
    return {read.key: found for read in assignment.reads if (found := read.target.sharding) is not None}


def _still_waits(restoration: Restoration | None, key: str) -> bool:
    return restoration is not None and key in restoration.pending


def _is_hollow(source: Source, key: str) -> bool:
    """Whether a saved python value is a container without any value inside."""
    try:
        return holds_nothing(decode(bytes(source.manifest.python_state[key])))
    except ValueError as error:
        raise CorruptCheckpointError(f"{source.path}: {key}: {error}") from error


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
    """Combine the reports of all ranks, in rank order. Local; equal reports give an equal result on every rank."""
    taken = np.bitwise_or.reduce([np.frombuffer(report.taken, np.uint8) for report in reports])
    keys = restoration.keys
    left = [keys[index] for index in np.flatnonzero(taken == 0).tolist()]
    left = [key for key in left if key != COUNTER_KEY]
    unexpected = sorted(key for key in left if key not in restoration.hollow)
    missing = sorted({key for report in reports for key in report.missing if key != COUNTER_KEY})
    waits = {key: text for report in reversed(reports) for key, text in report.pending.items()}
    world_size, size = restoration.source.manifest.world_size, len(reports)
    return Report(
        restored=len(keys) - keys.count(COUNTER_KEY) - len(left),
        missing=tuple(missing),
        exempt=frozenset(
            [key for key in missing if is_of_other_rank(key, world_size)]
            + [key for key in unexpected if is_of_other_rank(key, size)]
        ),
        unexpected=tuple(unexpected),
        pending={key: waits[key] for key in unexpected if key in waits},
        mismatched=tuple(sorted(_mismatches(reports))),
        ambiguous=tuple(sorted({text for report in reports for text in report.ambiguous})),
        disputed=tuple(disagreements(keys, [report.shardings for report in reports])),
        warnings=tuple(texts_of_ranks([report.warnings for report in reports])),
    )


def _mismatches(reports: Sequence[LocalReport]) -> Iterator[ValueMismatch]:
    """The mismatches of all ranks. One that only some ranks have names those ranks."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, report in enumerate(reports):
        for mismatch in dict.fromkeys(report.mismatched):
            ranks.setdefault(mismatch, []).append(rank)
    for (key, saved, live), where in ranks.items():
        yield ValueMismatch(key, saved, live if len(where) == len(reports) else f"{live} (on {rank_list(where)})")
