"""A training loop to measure the slowdown by a save: a small model whose ranks wait for each other in every step."""

from __future__ import annotations

import itertools
import statistics
import time

import torch
import torch.distributed as dist

from distckpt.bench.competitor import Pending
from distckpt.bench.runner import finish_device_work, over_ranks

_WIDTH = 256
_WARM_STEPS = 10
_QUIET_STEPS = 50


class TrainingLoop:
    """Trains two layers, with one collective per step, as if to reduce gradients.

    `calibrate` measures the steps without a save; `train_during` then measures the time lost during one.

    Args:
        device: Device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        layers = torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.ReLU(), torch.nn.Linear(_WIDTH, _WIDTH)
        self._model = torch.nn.Sequential(*layers).to(device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)
        self._batch = torch.ones(_WIDTH, _WIDTH, device=device)
        self._quiet = 0.0

    def calibrate(self) -> None:
        """Measure the time of a step while nothing is saved. Collective over the process group."""
        for _ in range(_WARM_STEPS):
            self._step(None)
        times = [time.perf_counter()]
        for _ in range(_QUIET_STEPS):
            self._step(None)
            times.append(time.perf_counter())
        self._quiet = statistics.median(after - before for before, after in itertools.pairwise(times))

    def train_during(self, pending: Pending) -> float:
        """Train until a save has ended on all ranks. Collective over the process group.

        Args:
            pending: The save. The optimizer waits until the tensors may change.

        Returns:
            Seconds by which the steps took longer than the same number of steps while nothing is saved.
        """
        start = time.perf_counter()
        steps = 1
        while not self._step(pending):
            steps += 1
        return time.perf_counter() - start - steps * self._quiet

    def _step(self, pending: Pending | None) -> bool:
        """Train one step; returns whether the save has ended on all ranks."""
        self._model(self._batch).square().mean().backward()
        if pending is not None:
            pending.wait_staged()
        self._optimizer.step()
        self._optimizer.zero_grad()
        finish_device_work()
        return over_ranks(pending is None or pending.is_done(), dist.ReduceOp.MIN) > 0
