"""distckpt itself, through nothing but its public names."""

from __future__ import annotations

from pathlib import Path

import distckpt
from distckpt.bench.competitor import Competitor
from distckpt.bench.state import State


class Distckpt(Competitor):
    """One `Checkpoint` of the state, used again and again as a training loop does."""

    def __init__(self, state: State, *, verify: bool = True) -> None:
        """Make the Checkpoint. Local.

        Args:
            state: What is saved, and restored into.
            verify: Compare checksums while restoring.
        """
        super().__init__("distckpt" if verify else "distckpt unverified", state)
        self._options = distckpt.RestoreOptions(verify=verify)
        self._checkpoint = distckpt.Checkpoint(state=state.tensors)

    def save(self, stem: Path) -> Path:
        """Save with the default options. It numbers its files itself, so one prefix serves all saves."""
        return Path(self._checkpoint.save(stem.parent / "distckpt"))

    def restore(self, path: Path) -> None:
        """Restore into the live tensors."""
        self._checkpoint.restore(path, options=self._options)
