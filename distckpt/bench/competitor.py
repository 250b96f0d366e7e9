"""Interfaces of the checkpointers that are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

from distckpt.bench.state import State


class Competitor(ABC):
    """One way to save and restore one state. Every method but `show` is collective over the process group.

    Trials call `save` or `restore` in each round; `check_restore` also calls `show`.

    Attributes:
        is_rival: Whether it is another checkpointer, without which the run goes on if it fails.
        name: Name in the report.
        state: The state that is saved, or restored into.
    """

    is_rival = True

    def __init__(self, name: str, state: State) -> None:
        self.name = name
        self.state = state

    @abstractmethod
    def save(self, stem: Path) -> Path:
        """Save the state so that it survives a power cut.

        Args:
            stem: A path, without a suffix, that does not exist yet.

        Returns:
            The file or directory to restore from, and to delete.
        """

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Read a checkpoint back into memory.

        Args:
            path: The file or directory that `save` returned.
        """

    def show(self) -> None:  # noqa: B027  (most restore into the state itself)
        """Copy restored values into the state, if `restore` has not put them there. Local."""


class Pending(Protocol):
    """A save that goes on in the background."""

    def wait_staged(self) -> None:
        """Wait until the tensors of this rank may change. Local."""

    def is_done(self) -> bool:
        """Whether the save has ended, successfully or not. Collective over the process group."""

    def result(self) -> Path:
        """Wait until the checkpoint is durable. Collective over the process group.

        Returns:
            The file or directory to delete.
        """


class BackgroundCompetitor(ABC):
    """One way to save one state while training goes on.

    Attributes:
        is_rival: As in `Competitor`.
        name: Name in the report.
        state: The state that is saved.
    """

    is_rival = True

    def __init__(self, name: str, state: State) -> None:
        self.name = name
        self.state = state

    @abstractmethod
    def start(self, stem: Path) -> Pending:
        """Start to save the state so that it survives a power cut. Collective over the process group.

        Args:
            stem: A path, without a suffix, that does not exist yet.

        Returns:
            The save in progress.
        """
