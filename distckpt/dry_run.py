"""What a restore would do, found out without reading a tensor or changing anything. In one process."""

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
    """Where a checkpoint and a live object differ; as the properties of `RestoreStatus`, all sorted.

    Attributes:
        missing: Keys of live values that the file does not have.
        unexpected: Keys of saved values that nothing live takes.
        pending: Those of `unexpected` that would wait for a name to appear on an existing object.
        mismatched: Saved values that do not fit the live ones.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    pending: tuple[str, ...]
    mismatched: tuple[ValueMismatch, ...]


class DryRun:
    """A restore that is planned, and not carried out."""

    def __init__(self, source: Source, live: object, options: RestoreOptions) -> None:
        """Plan it. Local; changes nothing live.

        Args:
            source: The file.
            live: A `Checkpoint`, or what would be its positional root.
            options: How to restore.

        Raises:
            TypeError: The object cannot be checkpointed.
        """
        with_counter = source.manifest.save_counter is not None
        self._restoration = Restoration(source, options, with_counter=with_counter)
        self._live = _walk(live, with_counter=with_counter)
        self._binding, self._assignment = self._restoration.plan(self._live)

    def matches(self) -> dict[str, str]:
        """Key of each saved value that fits, to the key of the live one."""
        return {key: where for key, where in _live_keys(self._binding) if key in self._assignment.consumed}

    def diff(self) -> CheckpointDiff:
        """What the status of the restore would say."""
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
    """Saved keys and the keys of the live values that they are bound to."""
    for match in binding.matches:
        if match.key != COUNTER_KEY:
            yield match.key, match.node.attribute_key(match.name)
    for new in binding.new_slots:
        for slot, attributes in new.slots.items():
            key = slot_key(new.optimizer.key, new.parameter.key, slot)
            for name, saved in attributes.items():
                yield saved, key if name == OWN_VALUE else join(key, name)
