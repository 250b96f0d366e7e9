"""What every way of saving and restoring must offer to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

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


class Pending(Protocol):
    """A save that goes on in the background."""

    def wait_staged(self) -> None:
        """Wait until the tensors of this rank may change. Local."""

    def is_done(self) -> bool:
        """Whether the save has ended, well or not. Collective over the process group."""

    def result(self) -> Path:
        """Wait until the checkpoint is durable. Collective over the process group.

        Returns:
            What to delete: a file or a directory.
        """


class BackgroundCompetitor(ABC):
    """One way to save one state while training goes on.

    Attributes:
        name: How the report calls it.
        state: What is saved.
    """

    def __init__(self, name: str, state: State) -> None:
        self.name = name
        self.state = state

    @abstractmethod
    def start(self, stem: Path) -> Pending:
        """Begin to save the state so that it survives a power cut. Collective over the process group.

        Args:
            stem: Where: a path that nothing has yet, without a suffix.

        Returns:
            The save that goes on.
        """
