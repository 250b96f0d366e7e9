"""Plan a restore without reading tensors or changing anything, to see what it would do. In one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distckpt.checkpoint import Checkpoint
from distckpt.graph.adapters.registry import adapter_for, unwrap
from distckpt.graph.adapters.root import COUNTER_KEY
from distckpt.graph.match import Binding
from distckpt.graph.view import LiveGraph, walk
from distckpt.layout.keys import join, slot_key
from distckpt.layout.records import OWN_VALUE
from distckpt.options import RestoreOptions
from distckpt.restoring.restoration import Restoration, combine
from distckpt.restoring.status import ValueMismatch
from distckpt.source import Source


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """The differences between a checkpoint and a live object, as the properties of `RestoreStatus`; all sorted.

    Attributes:
        missing: Keys of live values that the file does not have.
        unexpected: Keys of saved values that no live object takes.
        pending: Those of `unexpected` that would wait for a name to appear on an existing object.
        mismatched: Saved values that do not fit the live ones.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    pending: tuple[str, ...]
    mismatched: tuple[ValueMismatch, ...]


class DryRun:
    """A restore that is planned but not carried out. The constructor plans; `matches` and `diff` report."""

    def __init__(self, source: Source, live: object, options: RestoreOptions) -> None:
        """Plan the restore. Local; changes no live object.

        Args:
            source: The open checkpoint file.
            live: A `Checkpoint`, or an object that would be its positional root.
            options: Options of the restore.

        Raises:
            TypeError: The object cannot be checkpointed.
        """
        with_counter = source.manifest.save_counter is not None
        self._restoration = Restoration(source, options, with_counter=with_counter)
        self._live = _walk(live, with_counter=with_counter)
        self._binding, self._assignment = self._restoration.plan(self._live)

    def matches(self) -> dict[str, str]:
        """For the key of each saved value that fits: the key of the live value."""
        return {key: where for key, where in _live_keys(self._binding) if key in self._assignment.consumed}

    def diff(self) -> CheckpointDiff:
        """The differences that the status of the restore would report."""
        report = combine(self._restoration, [self._restoration.report(self._live, self._binding, self._assignment)])
        return CheckpointDiff(report.missing, report.unexpected, tuple(sorted(report.pending)), report.mismatched)


def _walk(live: object, *, with_counter: bool) -> LiveGraph:
    if isinstance(live, Checkpoint):
        return live._walk(with_counter=with_counter)
    root = unwrap(live)
    adapter = adapter_for(root)
    if adapter is None:
        raise TypeError(f"a {type(root).__qualname__} cannot be checkpointed, so nothing can match it.")
    return walk(root, adapter, 0)


def _live_keys(binding: Binding) -> Iterator[tuple[str, str]]:
    """Pairs of a saved key and the key of the live value bound to it."""
    for match in binding.matches:
        if match.key != COUNTER_KEY:
            yield match.key, match.node.attribute_key(match.name)
    for new in binding.new_slots:
        for slot, attributes in new.slots.items():
            key = slot_key(new.optimizer.key, new.parameter.key, slot)
            for name, saved in attributes.items():
                yield saved, key if name == OWN_VALUE else join(key, name)
