"""One save: as a rank asked for it, and as it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from distckpt.graph.view import LiveGraph
from distckpt.options import SaveOptions
from distckpt.request import Request
from distckpt.saving.output import Target
from distckpt.timing import Timer, Timing


@dataclass(frozen=True, slots=True)
class SaveCall:
    """A save as this rank asked for it.

    Attributes:
        operation: "save", "save_async" or "write".
        walk: Walks the live objects.
        target: Where the save goes.
        options: How to save.
        timer: Measures the steps on this rank.
    """

    operation: str
    walk: Callable[[], LiveGraph]
    target: Target
    options: SaveOptions
    timer: Timer = field(default_factory=Timer)

    @property
    def family(self) -> str:
        """Operations with the same layout: a file of `write` has no counter."""
        return "write" if self.operation == "write" else "save"

    def request(self) -> Request:
        """What all ranks must pass alike."""
        target = self.target
        return Request.of(
            self.operation, target.path, self.options, save_counter=target.counter, checkpoint_number=target.number
        )


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A committed checkpoint.

    Attributes:
        path: Path of the file.
        counter: The save counter from now on; 0 for a file made by `write`.
        timing: How long it took.
    """

    path: str
    counter: int
    timing: Timing
