"""Simulation of a first save, an unchanged save and a restore of a virtual job.

It runs the real code of rank 0, and of single other ranks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import msgspec
import numpy as np

from distckpt.bench.memory import peak_nbytes
from distckpt.bench.scale.ranks import VirtualRanks, VirtualSession
from distckpt.bench.scale.virtual import Job, Stage, layouts_of
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts
from distckpt.layout.box import Box
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.collector import collector_off
from distckpt.layout.merge import Merged
from distckpt.layout.plan import ReadPlanner
from distckpt.layout.records import CHECKSUM_ALGORITHM, FORMAT, FORMAT_VERSION, Manifest
from distckpt.options import SaveOptions
from distckpt.request import Request, digest_of
from distckpt.source import Found
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import StoredChecksums
from distckpt.storage.hdf5 import OpenedCheckpoint
from distckpt.wire import balance_of, decode_reply, encode_message, encode_replies, merge_messages, weights_of

T = TypeVar("T")

_PATH = "runs/simulated/ckpt"
#: Positions of datasets in the file are multiples of this, as HDF5 aligns large ones.
_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost for one job size. Bytes per rank are means over all ranks but rank 0.

    Attributes:
        ranks: Number of ranks that save.
        variables: Number of tensors over all ranks.
        layout: One of `LAYOUTS`.
        shards: Number of boxes in the file, over all variables.
        merge_seconds: First save: time in which rank 0 decodes, merges, plans and encodes.
        merge_nbytes: First save: memory of rank 0 beyond that in use before.
        sent_nbytes: First save: bytes that a rank sends.
        received_nbytes: First save: bytes that a rank receives.
        unchanged_nbytes: Unchanged save: bytes of all messages of the arrival, both ways.
        unchanged_seconds: Unchanged save: time of a captain and of rank 0 in the arrival, without the network.
        restore_ranks: Number of ranks that restore.
        manifest_nbytes: Restore: bytes of the manifest.
        broadcast_nbytes: Restore: bytes that each rank receives when the file is opened.
        open_seconds: Restore: time in which rank 0 decodes and checks the manifest.
        plan_seconds: Restore: time in which the slowest of a few ranks decodes the manifest and plans its reads.
        plan_nbytes: Restore: memory of one rank for this, the largest of the same ranks.
    """

    ranks: int
    variables: int
    layout: str
    shards: int
    merge_seconds: float
    merge_nbytes: int
    sent_nbytes: float
    received_nbytes: float
    unchanged_nbytes: float
    unchanged_seconds: float
    restore_ranks: int
    manifest_nbytes: int
    broadcast_nbytes: int
    open_seconds: float
    plan_seconds: float
    plan_nbytes: int


Announce = Callable[[str], None]


def _unheard(step: str) -> None:
    """Ignore the announcement."""


class Simulation:
    """Rank 0 of a virtual job. Call `first_save`, then `prepare_unchanged_save`, then `unchanged_save`.

    Attributes:
        job: The job.
        ranks: The other ranks.
        session: The session in which they arrive.
        request: The call that all ranks make.
    """

    def __init__(self, job: Job, announce: Announce = _unheard) -> None:
        self.job = job
        self._announce = announce
        self.ranks = VirtualRanks(job.ranks)
        self.session = VirtualSession(self.ranks)
        self._coordinator = Coordinator.over(self.session)
        self.request = Request.of("save", _PATH, SaveOptions(), save_counter=0, checkpoint_number=None)

    def messages(self) -> Iterator[Parts]:
        """The messages of all ranks in a first save, in rank order."""
        request = self.request.encode()
        return (encode_message(request, layout) for layout in layouts_of(self.job))

    def first_save(self) -> Merged:
        """Merge and plan; afterwards `ranks.replies()` gives the reply to each rank."""
        merged: list[Merged] = []

        def merge(messages: Sequence[Parts]) -> list[Parts]:
            self._announce("first save, merge and plan")
            merged.append(merge_messages(messages, trust_lowest=False))
            return encode_replies(merged[0])

        self._announce("first save, messages of all ranks")
        self.ranks.values = self.messages
        with collector_off():
            self.ranks.merge(self._coordinator, "layout", merge)
        return merged[0]

    def prepare_unchanged_save(self) -> None:
        """Do the local work of each rank before its arrival: compare its layout with the agreed one."""
        brought = self.session.brought = []
        request = digest_of(self.request.encode())
        for layout, reply in zip(layouts_of(self.job), self.ranks.replies(), strict=True):
            plan = decode_reply(reply)
            brought.append((request ^ plan.plan_id, balance_of(layout, weights_of(plan))))

    def unchanged_save(self) -> bool:
        """Arrive; returns whether the ranks agreed."""
        return self.session.meets()


def manifest_of(merged: Merged, ranks: int) -> Manifest:
    """The manifest of a file with a merged layout."""
    sizes = manifests.sizes_of(merged.variables)
    offsets = np.cumsum([0, *(-(-sizes // _ALIGNMENT) * _ALIGNMENT)]).tolist()
    variables = [
        msgspec.structs.replace(variable, offset=offset)
        for variable, offset in zip(merged.variables, offsets, strict=False)
    ]
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        save_id="0" * 32,
        save_counter=1,
        world_size=ranks,
        time=time.time(),
        host="simulated",
        transport="posix",
        versions={},
        checksums=CHECKSUM_ALGORITHM,
        metadata=None,
        object_graph=merged.object_graph,
        variables=variables,
        python_state={key: msgspec.Raw(value) for key, value in merged.python_state.items()},
        file_nbytes=offsets[-1],
    )


def open_manifest(encoded: bytes) -> OpenedCheckpoint:
    """Decode and check a manifest, as rank 0 does when it opens a file for a restore."""
    manifest = manifests.decode(encoded)
    offsets = np.array([variable.offset for variable in manifest.variables], np.int64)
    problems = manifests.problems(manifest)
    sizes = manifests.sizes_of(manifest.variables)
    problems += manifests.extent_problems(manifest.variables, sizes, offsets, manifest.file_nbytes)
    if problems:
        raise ValueError(f"expected a manifest that fits its file. Got {problems[:3]}.")
    index = index_checksums(manifest.variables)
    checksums = StoredChecksums(index.total, manifest.file_nbytes)
    return OpenedCheckpoint(_PATH, manifest, encoded, offsets, index, checksums, manifest.file_nbytes)


def plan_reads(found: bytes, keys: Sequence[str], boxes: Sequence[Sequence[Box]]) -> int:
    """Decode the broadcast of an opened file and plan the reads, as each rank does in a restore.

    Args:
        found: The broadcast.
        keys: Keys of the tensors that the rank holds.
        boxes: The boxes that it holds of each tensor.

    Returns:
        The number of boxes to read.
    """
    opened = msgspec.msgpack.decode(found, type=Found).on_this_rank()
    planner = ReadPlanner(opened.manifest.variables, opened.index)
    numbers = {variable.key: number for number, variable in enumerate(opened.manifest.variables)}
    return sum(len(planner.items(numbers[key], box)) for key, own in zip(keys, boxes, strict=True) for box in own)


@dataclass(frozen=True, slots=True)
class _Measured(Generic[T]):
    """The result of a function, its time in seconds, and its peak memory in bytes."""

    value: T
    seconds: float
    nbytes: int


def _measure(run: Callable[[], T]) -> _Measured[T]:
    values: list[T] = []
    seconds: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        values.append(run())
        seconds.append(time.perf_counter() - start)

    with collector_off():
        nbytes = peak_nbytes(timed)
    return _Measured(values[0], seconds[0], nbytes)


def simulate(job: Job, announce: Announce = _unheard) -> Cost:
    """Simulate a first save, an unchanged save, and a restore on half of the ranks.

    Run it in a new process: memory left by earlier work makes the measured memory meaningless.

    Args:
        job: The job that saves.
        announce: Called with the name of each step as it begins.

    Raises:
        ValueError: The ranks do not agree about an unchanged layout, or the manifest is wrong: a bug.
    """
    simulation = Simulation(job, announce)
    ranks, others = simulation.ranks, max(1, job.ranks - 1)
    first = _measure(simulation.first_save)
    sent, received = ranks.sent / others, ranks.received / others
    announce("unchanged save, plans of all ranks")
    simulation.prepare_unchanged_save()
    ranks.forget()
    with collector_off():
        agreed = simulation.unchanged_save()
    if not agreed:
        raise ValueError("an unchanged save: expected ranks that agree. Got some that do not.")
    restore = _simulate_restore(first.value, job, announce)
    return Cost(
        ranks=job.ranks,
        variables=len(first.value.variables),
        layout=job.layout,
        shards=sum(len(variable.shards) for variable in first.value.variables),
        merge_seconds=first.seconds - ranks.seconds,
        merge_nbytes=first.nbytes,
        sent_nbytes=sent,
        received_nbytes=received,
        unchanged_nbytes=simulation.session.nbytes / others,
        unchanged_seconds=simulation.session.seconds,
        restore_ranks=restore.ranks,
        manifest_nbytes=restore.manifest_nbytes,
        broadcast_nbytes=restore.broadcast_nbytes,
        open_seconds=restore.opening.seconds,
        plan_seconds=max(planning.seconds for planning in restore.plannings),
        plan_nbytes=max(planning.nbytes for planning in restore.plannings),
    )


@dataclass(frozen=True, slots=True)
class _Restore:
    ranks: int
    manifest_nbytes: int
    broadcast_nbytes: int
    opening: _Measured[OpenedCheckpoint]
    plannings: list[_Measured[int]]


def _simulate_restore(merged: Merged, saved: Job, announce: Announce) -> _Restore:
    announce("restore, manifest on rank 0")
    encoded = manifests.encode(manifest_of(merged, saved.ranks))
    opening = _measure(lambda: open_manifest(encoded))
    found = msgspec.msgpack.encode(Found.of(opening.value))
    job = replace(saved, ranks=max(1, saved.ranks // 2))
    plannings = []
    for stage in {0, job.stages - 1}:
        holder = Stage(job, stage)
        for rank in {holder.ranks[0], holder.ranks[-1]}:
            announce(f"restore, plan of rank {rank}")
            boxes = holder.boxes(rank)
            plannings.append(_measure(functools.partial(plan_reads, found, holder.keys, boxes)))
    return _Restore(job.ranks, len(encoded), len(found), opening, plannings)
