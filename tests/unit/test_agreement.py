"""Which error all ranks raise, and what travels of an exception."""

from __future__ import annotations

import gc
import weakref

import pytest

from distckpt.coordination.agreement import TEXT_LIMIT, agreed_error, clear_frames, decode, describe, encode
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RestoreMismatchError,
)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Held:
    """Stands for an HDF5 object."""


def _agreed(errors: dict[int, BaseException], remedy: str = "") -> CheckpointError:
    packed = [encode(errors.get(rank)) for rank in range(4)]
    return agreed_error("write", decode(packed), remedy)


@pytest.mark.parametrize("kind", [LayoutError, RestoreMismatchError, CorruptCheckpointError, CheckpointNotFoundError])
def test_errors_about_the_checkpoint_are_raised_as_they_are(kind: type[CheckpointError]) -> None:
    error = _agreed({2: kind("model/w: gap\nin two lines")})
    assert type(error) is kind
    assert str(error) == "model/w: gap\nin two lines"


def test_lowest_rank_with_such_an_error_wins() -> None:
    error = _agreed({0: OSError("disk"), 1: CorruptCheckpointError("one"), 3: LayoutError("three")})
    assert type(error) is CorruptCheckpointError
    assert str(error) == "one"


def test_any_other_error_is_a_collective_error_naming_all_ranks() -> None:
    error = _agreed({0: OSError(28, "No space left"), 2: MemoryError(), 3: CheckpointError("no")}, "Free some space.")
    assert isinstance(error, CollectiveError)
    assert error.step == "write"
    assert error.failures == {0: "OSError: [Errno 28] No space left", 2: "MemoryError", 3: "CheckpointError: no"}
    assert "Free some space." in str(error)


def test_no_error_is_no_bytes() -> None:
    assert encode(None) == b""
    assert decode([b"", b""]) == {}


@pytest.mark.parametrize("letter", ["a", "ü", "\N{FACE WITH TEARS OF JOY}"])
def test_long_texts_are_cut_between_letters(letter: str) -> None:
    text = describe(ValueError(letter * 5000)).text
    assert len(text.encode()) <= TEXT_LIMIT
    assert text == letter * (len(text) - 4) + " ..."


def test_messages_that_cannot_be_shown_or_encoded() -> None:
    assert str(describe(Unprintable())) == "Unprintable: (its message cannot be shown)"
    assert decode([encode(ValueError("\udcff"))])[0].text == "?"


def _fail_holding(references: list[weakref.ref[Held]]) -> None:
    ours = Held()
    references.append(weakref.ref(ours))
    int("no number")


def _fail_with_cause(references: list[weakref.ref[Held]]) -> None:
    try:
        _fail_holding(references)
    except ValueError as error:
        raise OSError("outer") from error


def test_clear_frames_frees_what_ended_functions_held() -> None:
    references: list[weakref.ref[Held]] = []
    gc.disable()
    try:
        _fail_with_cause(references)
    except OSError as error:
        assert references[0]() is not None
        clear_frames(error)
        assert references[0]() is None
    finally:
        gc.enable()


def test_clear_frames_ends_on_a_circle_of_causes() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    clear_frames(first)
