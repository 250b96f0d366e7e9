"""Background saves: how long training waits, when the checkpoint is durable, and how much slower training is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from distckpt.bench.builders import background_builders, builders
from distckpt.bench.competitor import BackgroundCompetitor, Pending
from distckpt.bench.runner import Trial, agreed, extra_mib, finish_device_work, over_ranks, seconds, settle_disks
from distckpt.bench.samples import Samples, measure
from distckpt.bench.setting import Bench
from distckpt.bench.state import State
from distckpt.bench.training import TrainingLoop
from distckpt.bench.trials import FIRST, SaveTrial, called, delete, make_resident

#: `Trial.kind` of synchronous saves, measured for comparison.
_BLOCKING = "save"


def measure_background(bench: Bench, *, overlap: bool) -> list[Samples]:
    """Measure background saves. Collective over the process group.

    Args:
        bench: The setup that all cases share.
        overlap: Whether the competitors copy the state in the background, too.

    Returns:
        Samples of the stall of the first and of later saves; with `overlap` of the time until tensors may change; of
        the time until the checkpoint is durable; and of the time that a training loop loses meanwhile.
    """
    title = "overlap" if overlap else "async"
    state, directory = bench.gpt(bench.dim), bench.directory
    makers = background_builders(bench, overlap=overlap)
    competitors = [make(state) for make in makers]
    stalls: list[Trial] = [MemcpyTrial(state)] if "raw" in bench.setup.competitors else []
    for make, competitor in zip(makers, competitors, strict=True):
        stalls += [FirstStallTrial(make, state, directory), StallTrial(competitor, directory)]
    samples = measure(bench, f"{title}: stall", state, stalls, seconds)
    del stalls
    if overlap:
        safe = [SafeTrial(competitor, directory) for competitor in competitors]
        samples += measure(bench, f"{title}: until tensors may change", state, safe, seconds)
    durable = [*_whole_saves(bench, state), *(DurableTrial(competitor, directory) for competitor in competitors)]
    samples += measure(bench, f"{title}: until durable", state, durable, seconds)
    slowdown = [SlowdownTrial(competitor, directory) for competitor in competitors]
    return samples + measure(bench, f"{title}: training lost", state, slowdown, seconds_lost, "s lost")


def measure_background_memory(bench: Bench) -> list[Samples]:
    """Measure the memory of background saves. Collective over the process group.

    The first save allocates memory for a copy of the state; later ones reuse it.
    """
    state = bench.gpt(bench.dim)
    makers = background_builders(bench, overlap=False)
    trials = [DurableTrial(make(state), bench.directory) for make in makers]
    return measure(bench, "memory of async", state, trials, extra_mib, "MiB")


def _whole_saves(bench: Bench, state: State) -> list[Trial]:
    """Synchronous saves by the competitors that can also save in the background, and by "raw"."""
    names = [name for name in bench.setup.competitors if name in ("distckpt", "raw", "dcp", "torchsnapshot")]
    return [
        SaveTrial(build(state), bench.directory, "" if name == "raw" else _BLOCKING)
        for name in names
        for build in builders(bench, [name], saving=True)
    ]


class MemcpyTrial:
    """The lower limit of a stall: copy this rank's shards into buffers that were used before.

    Attributes:
        name: Name in the report.
        kind: Empty.
        is_rival: False.
        copies: The buffers, one for each shard.
    """

    def __init__(self, state: State) -> None:
        self.name = "raw memcpy"
        self.kind = ""
        self.is_rival = False
        self._state = state
        # GPUs copy at their full speed to pinned memory only.
        pinned = state.device.type == "cuda"
        self.copies = [torch.zeros(shard.shape, pin_memory=pinned) for shard in state.shards]

    def prepare(self) -> None:
        """Change the values as training would."""
        self._state.advance()

    def run(self) -> None:
        """Copy the shards, one after the other."""
        for copy, shard in zip(self.copies, self._state.shards, strict=True):
            copy.copy_(shard, non_blocking=True)
        finish_device_work()

    def clean(self) -> None:
        """Do nothing."""


class StallTrial:
    """Start a save; measures how long the training loop stands still.

    Attributes:
        name: Name in the report.
        kind: Distinguishes it from the other saves of its case.
        is_rival: As in `Competitor`.
    """

    def __init__(self, competitor: BackgroundCompetitor, directory: Path, kind: str = "") -> None:
        self.name = called(competitor.name, kind)
        self.kind = kind
        self.is_rival = competitor.is_rival
        self._competitor = competitor
        self._directory = directory
        self._count = 0
        self._pending: Pending

    def prepare(self) -> None:
        """Change the values as training would, and let the disk come to rest."""
        self._count += 1
        self._competitor.state.advance()
        settle_disks()
        # Memory for the copy, and for the pages of the file.
        make_resident(2 * self._competitor.state.local_nbytes)

    def run(self) -> None:
        """Start the save."""
        stem = self._directory / f"{self.name.replace(' ', '-')}-{self._count}"
        self._pending = self._competitor.start(stem)

    def clean(self) -> None:
        """Wait for the end of the save, and delete its files."""
        delete(self._pending.result())
        del self._pending


class FirstStallTrial(StallTrial):
    """Start the first save of a competitor, which has no buffers yet; makes a new competitor each time."""

    def __init__(self, build: Callable[[State], BackgroundCompetitor], state: State, directory: Path) -> None:
        super().__init__(build(state), directory, FIRST)
        self._build = build

    def prepare(self) -> None:
        """Make a new competitor."""
        self._competitor = self._build(self._competitor.state)
        super().prepare()


class SafeTrial(StallTrial):
    """Start a save, and wait until the tensors may change."""

    def run(self) -> None:
        """Start the save, and wait until the tensors may change."""
        super().run()
        self._pending.wait_staged()


class DurableTrial(StallTrial):
    """Start a save, and wait until it is durable, without training meanwhile."""

    def run(self) -> None:
        """Start the save, and wait until it is durable."""
        super().run()
        self._pending.result()


class SlowdownTrial(StallTrial):
    """Train while a save goes on.

    Attributes:
        lost: Seconds that the last run took longer than its steps take while nothing is saved.
    """

    def __init__(self, competitor: BackgroundCompetitor, directory: Path) -> None:
        super().__init__(competitor, directory)
        self.lost = 0.0
        self._loop = TrainingLoop(competitor.state.device)

    def prepare(self) -> None:
        """Also measure training steps while nothing is saved."""
        super().prepare()
        self._loop.calibrate()

    def run(self) -> None:
        """Start the save, and train until the checkpoint is durable."""
        super().run()
        self.lost = self._loop.train_during(self._pending)


def seconds_lost(trial: SlowdownTrial) -> float:
    """The seconds that training on the slowest rank lost while a save went on. Collective over the process group."""
    dist.barrier()
    agreed(trial.name, trial.run)
    return over_ranks(trial.lost, dist.ReduceOp.MAX)
