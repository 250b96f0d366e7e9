"""What every way of saving and restoring must offer to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from distckpt.bench.state import State


class Competitor(ABC):
    """One way to save and restore one state. Every method but `show` is collective over the process group.

    Attributes:
        name: How the report calls it.
        state: What is saved, and restored into.
    """

    def __init__(self, name: str, state: State) -> None:
        self.name = name
        self.state = state

    @abstractmethod
    def save(self, stem: Path) -> Path:
        """Save the state so that it survives a power cut.

        Args:
            stem: Where: a path that nothing has yet, without a suffix.

        Returns:
            What to restore from, and to delete: a file or a directory.
        """

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Read what `save` returned back into memory.

        Args:
            path: The file or directory.
        """

    def show(self) -> None:  # noqa: B027  (most restore into the state itself)
        """Bring what `restore` read into the state, where it is not there already. Local."""
