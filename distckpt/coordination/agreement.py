"""Which error all ranks raise when a step fails on some of them. Texts travel between ranks, never exceptions."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import msgspec

from distckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RestoreMismatchError,
)

#: UTF-8 bytes of a text that travel; the rank where it happened shows the whole as the cause.
TEXT_LIMIT = 4096

# Errors that say something about the checkpoint and not about a rank: all ranks raise them as they are.
_RAISED_AS_THEY_ARE: dict[str, type[CheckpointError]] = {
    kind.__name__: kind for kind in (LayoutError, RestoreMismatchError, CorruptCheckpointError, CheckpointNotFoundError)
}


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """What travels of an exception.

    Attributes:
        raised_as: Name of the error that all ranks raise as it is; empty for any other exception.
        type_name: Name of its type.
        text: Its message and notes, cut at `TEXT_LIMIT`.
    """

    raised_as: str
    type_name: str
    text: str

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


def describe(error: BaseException) -> Failure:
    """Put an exception into words."""
    raised_as = next((name for name, kind in _RAISED_AS_THEY_ARE.items() if isinstance(error, kind)), "")
    return Failure(raised_as, type(error).__name__, _shortened(_message(error)))


def encode(error: BaseException | None) -> bytes:
    """Pack an exception for the other ranks; no bytes at all when there is none."""
    return b"" if error is None else msgspec.msgpack.encode(describe(error))


def decode(packed: Sequence[bytes]) -> dict[int, Failure]:
    """Unpack what the ranks sent, in rank order.

    Returns:
        Failing rank to failure.
    """
    return {rank: msgspec.msgpack.decode(text, type=Failure) for rank, text in enumerate(packed) if text}


def agreed_error(step: str, failures: dict[int, Failure], remedy: str) -> CheckpointError:
    """Choose the error that all ranks raise.

    Args:
        step: Name of the step that failed.
        failures: Failing rank to failure; not empty.
        remedy: The way out, shown with a `CollectiveError`.

    Returns:
        The checkpoint error of the lowest rank that has one, else a `CollectiveError` that lists all failures.
    """
    for _, failure in sorted(failures.items()):
        if failure.raised_as:
            return _RAISED_AS_THEY_ARE[failure.raised_as](failure.text)
    return CollectiveError(step, {rank: str(failure) for rank, failure in failures.items()}, remedy)


def clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of all ended functions that the exception went through, its causes included.

    While agreement is pending they would keep HDF5 objects alive, whose closing may be collective, and big buffers.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _message(error: BaseException) -> str:
    try:
        notes = (f"({note})" for note in getattr(error, "__notes__", ()))
        return " ".join(filter(None, (str(error), *notes)))
    except Exception:  # whatever a foreign exception's __str__ does, its rank must come to the agreement
        return "(its message cannot be shown)"


def _shortened(text: str) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= TEXT_LIMIT:
        return encoded.decode("utf-8")
    return encoded[: TEXT_LIMIT - 4].decode("utf-8", "ignore") + " ..."
