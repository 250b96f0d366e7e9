"""The error that all ranks raise when a step fails on some of them. Ranks exchange texts, never exceptions."""

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

#: Most UTF-8 bytes of a text sent to other ranks; the rank that failed shows the whole text as the cause.
TEXT_LIMIT = 4096

# Errors about the checkpoint, not about a rank: all ranks raise them with their own type.
_RAISED_AS_THEY_ARE: dict[str, type[CheckpointError]] = {
    kind.__name__: kind for kind in (LayoutError, RestoreMismatchError, CorruptCheckpointError, CheckpointNotFoundError)
}


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An exception as sent to other ranks.

    Attributes:
        raised_as: Name of the error type, if all ranks raise the error with this type; else empty.
        type_name: Name of the exception's type.
        text: Its message and notes, cut at `TEXT_LIMIT`.
    """

    raised_as: str
    type_name: str
    text: str

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


def describe(error: BaseException) -> Failure:
    """Describe an exception for other ranks."""
    raised_as = next((name for name, kind in _RAISED_AS_THEY_ARE.items() if isinstance(error, kind)), "")
    return Failure(raised_as, type(error).__name__, _shortened(_message(error)))


def encode(error: BaseException | None) -> bytes:
    """Encode an exception for the other ranks; no bytes for None."""
    return b"" if error is None else msgspec.msgpack.encode(describe(error))


def decode(packed: Sequence[bytes]) -> dict[int, Failure]:
    """Decode the encoded exceptions of all ranks, in rank order.

    Returns:
        For each rank that failed: its failure.
    """
    return {rank: msgspec.msgpack.decode(text, type=Failure) for rank, text in enumerate(packed) if text}


def agreed_error(step: str, failures: dict[int, Failure], remedy: str) -> CheckpointError:
    """Choose the error that all ranks raise.

    Args:
        step: Name of the step that failed.
        failures: For each rank that failed: its failure; not empty.
        remedy: Advice to the user, shown with a `CollectiveError`.

    Returns:
        The checkpoint error of the lowest rank that has one, else a `CollectiveError` that lists all failures.
    """
    for _, failure in sorted(failures.items()):
        if failure.raised_as:
            return _RAISED_AS_THEY_ARE[failure.raised_as](failure.text)
    return CollectiveError(step, {rank: str(failure) for rank, failure in failures.items()}, remedy)


def clear_frames(error: BaseException | None) -> None:
    """Clear the local variables of all ended functions in the tracebacks of an exception and its causes.

    During the agreement they would keep alive HDF5 objects, whose closing may be collective, and large buffers.
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
    except Exception:  # even if the exception's __str__ fails, this rank must take part in the agreement
        return "(its message cannot be shown)"


def _shortened(text: str) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= TEXT_LIMIT:
        return encoded.decode("utf-8")
    return encoded[: TEXT_LIMIT - 4].decode("utf-8", "ignore") + " ..."
