"""distckpt itself as a competitor, through its public API only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import distckpt
from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.state import SLOTS, State


class Distckpt(Competitor):
    """One `Checkpoint` of the state, reused for all saves as in a training loop."""

    is_rival = False

    def __init__(self, state: State, *, verify: bool = True, checksums: bool = True) -> None:
        """Make the Checkpoint. Local.

        Args:
            state: The state that is saved, or restored into.
            verify: Compare checksums while restoring.
            checksums: Store checksums.
        """
        super().__init__("distckpt" + " unverified" * (not verify) + " without checksums" * (not checksums), state)
        self._save_options = distckpt.SaveOptions(checksums=checksums)
        self._restore_options = distckpt.RestoreOptions(verify=verify)
        self._checkpoint = distckpt.Checkpoint(state=state.tensors)

    def save(self, stem: Path) -> Path:
        """Save. distckpt numbers its files itself, so all saves have the same prefix."""
        return Path(self._checkpoint.save(stem.parent / "distckpt", options=self._save_options))

    def restore(self, path: Path) -> None:
        """Restore into the live tensors."""
        self._checkpoint.restore(path, options=self._restore_options)


class DistckptAsync(BackgroundCompetitor):
    """One `Checkpoint`, saved with `save_async`."""

    is_rival = False

    def __init__(self, state: State, *, overlap: bool) -> None:
        """Make the Checkpoint. Local.

        Args:
            state: The state that is saved; with `overlap` as weights and their Adam slots.
            overlap: Return before the state is copied; the next optimizer step waits for the copy.
        """
        super().__init__("distckpt", state)
        self._options = distckpt.SaveOptions(overlap=overlap)
        tracked = _as_training_has_it(state) if overlap else {"state": state.tensors}
        self._checkpoint = distckpt.Checkpoint(**tracked)

    def start(self, stem: Path) -> DistckptPending:
        """Start a save, with the same prefix for all saves."""
        return DistckptPending(self._checkpoint.save_async(stem.parent / "distckpt", options=self._options))


class DistckptPending:
    """A save in progress."""

    def __init__(self, handle: distckpt.SaveHandle) -> None:
        self._handle = handle

    def wait_staged(self) -> None:
        """Wait for the copy, as the optimizer step does. Local."""
        self._handle.wait_staged()

    def is_done(self) -> bool:
        """Whether the save has ended. Collective without THREAD_MULTIPLE, else local."""
        return self._handle.done()

    def result(self) -> Path:
        """Wait for the commit."""
        return Path(self._handle.result())


def _as_training_has_it(state: State) -> dict[str, Any]:
    """The same tensors as parameters and an optimizer's slots, since a save copies only those in the background."""
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in state.tensors.items() if not name.endswith(SLOTS)}
    optimizer = torch.optim.Adam(weights.values())
    for name, weight in weights.items():
        slots = {slot: state.tensors[f"{name}.{slot}"] for slot in SLOTS}
        optimizer.state[weight] = {"step": torch.tensor(1.0), **slots}
    return {"weights": weights, "optimizer": optimizer}
