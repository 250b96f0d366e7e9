"""Everything distckpt raises, and its one warning category.

Each error is a `CheckpointError`, and also the built-in that a caller would naturally catch.
"""

from __future__ import annotations

from collections.abc import Mapping


class CheckpointError(RuntimeError):
    """Base of everything distckpt raises on purpose."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint file does not exist. The same on all ranks."""

    def __str__(self) -> str:
        # OSError.__str__ would print "[Errno ...]" forms; the message is the whole story.
        return str(self.args[0]) if self.args else ""


class LayoutError(CheckpointError, ValueError):
    """What the ranks want to save cannot be one checkpoint: they disagree, shards leave gaps or overlap, or a value
    cannot be stored. Raised on all ranks, before any byte is written.
    """


class RestoreMismatchError(CheckpointError, ValueError):
    """Saved and live values differ in kind, shape or dtype. Raised on all ranks, before any live value changes."""


class CorruptCheckpointError(CheckpointError):
    """The file is no complete checkpoint, or the bytes of a variable do not match their checksum."""


class CollectiveError(CheckpointError):
    """A step failed on at least one rank; every rank raises this same error.

    Attributes:
        step: Name of the step that failed ("capture", "write", "fsync", ...).
        failures: Failing rank to "Type: message", the same on all ranks.
    """

    def __init__(self, step: str, failures: Mapping[int, str], remedy: str = "") -> None:
        self.step = step
        self.failures = dict(failures)
        lines = [f"rank {rank}: {text}" for rank, text in sorted(self.failures.items())[:10]]
        if len(self.failures) > len(lines):
            lines.append(f"... and {len(self.failures) - len(lines)} more ranks")
        listing = "\n  ".join(lines)
        ending = f"\n{remedy}" if remedy else ""
        super().__init__(f"step '{step}' failed on {len(self.failures)} rank(s):\n  {listing}{ending}")


class RankTimeoutError(CheckpointError, TimeoutError):
    """Some ranks did not come to a collective call in time.

    Attributes:
        absent: The ranks that did not come, ascending; the same on all ranks that did. Empty when this rank itself
            came after the others had given up.
    """

    def __init__(self, message: str, absent: tuple[int, ...] = ()) -> None:
        self.absent = absent
        super().__init__(message)

    def __str__(self) -> str:
        # TimeoutError is an OSError, whose __str__ knows nothing of our message.
        return str(self.args[0])


class CheckpointWarning(UserWarning):
    """Category of every warning distckpt gives; shown on rank 0."""
