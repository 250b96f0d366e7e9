"""Agreement before a collective call: all ranks must ask for the same operation, path and options."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import xxhash

from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import LayoutError
from distckpt.graph.python_value import UnsupportedValueError, encode
from distckpt.options import RestoreOptions, SaveOptions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One collective call as this rank made it.

    Attributes:
        operation: "save", "write", "restore", "read", or a method of the status or of the manager.
        fields: Name to value, as it was passed: path, counter and every option.
    """

    operation: str
    fields: dict[str, object]

    @classmethod
    def of(cls, operation: str, path: object, options: SaveOptions | RestoreOptions, **more: object) -> Request:
        """Describe a call. The timeout is left out, since ranks may differ in it.

        Calls no method of the values, so that it cannot fail.
        """
        names = [option.name for option in dataclasses.fields(options) if option.name != "timeout"]
        return cls(operation, {"path": path, **more, **{name: getattr(options, name) for name in names}})

    def encode(self) -> bytes:
        """Encode for the wire, each value as text. The values are the user's: their methods may raise anything."""
        words = {name: _in_words(name, value) for name, value in self.fields.items()}
        return msgspec.msgpack.encode((self.operation, words))


def digest_of(encoded: bytes) -> int:
    """A 64-bit hash of an encoded request."""
    return xxhash.xxh3_64_intdigest(encoded)


def asked_once(name: str, ask: Callable[[], T]) -> T:
    """Call a method of a user's object only once, since a second answer may differ. Errors get a note with `name`."""
    try:
        return ask()
    except Exception as error:
        error.add_note(f"while {name} was put into words, to be compared with that of the other ranks")
        raise


def _in_words(name: str, value: Any) -> str:
    return asked_once(name, lambda: _words_of(value))


def _words_of(value: Any) -> str:
    # Mappings are equal whatever their order, and sequences whatever their type. None in place of a path stays None,
    # since other ranks may have passed a path.
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if hasattr(value, "items"):
        return repr(sorted(value.items()))
    return repr(list(value)) if isinstance(value, list | tuple) else repr(value)


def check_agreement(requests: Sequence[bytes]) -> None:
    """Compare the requests of all ranks. Rank 0 only.

    Args:
        requests: `Request.encode()` of each rank.

    Raises:
        LayoutError: Some rank made another call than rank 0.
    """
    decoded = [msgspec.msgpack.decode(data, type=tuple[str, dict[str, str]]) for data in requests]
    operation, fields = decoded[0]
    problems = []
    for rank, (other_operation, other_fields) in enumerate(decoded):
        if other_operation != operation:
            problems.append(f"rank 0 called {operation}, rank {rank} called {other_operation}")
            continue
        problems += [
            f"{operation}: {name} differs. Rank 0 passed {fields[name]}, rank {rank} passed {value}."
            for name, value in other_fields.items()
            if value != fields[name]
        ]
    if problems:
        more = f"\n... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise LayoutError(
            "\n".join(problems[:20]) + more + "\nAll ranks must make the same call with the same arguments."
        )


def encode_metadata(options: SaveOptions) -> bytes:
    """The user's metadata as an encoded python value.

    Raises:
        LayoutError: It holds something that only pickle could store.
    """
    metadata = None if options.metadata is None else dict(options.metadata)
    try:
        return encode(metadata)
    except UnsupportedValueError as error:
        raise LayoutError(f"SaveOptions.metadata: {error}. Use numbers, strings and containers of those.") from error


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """The outcome of local work. An error is kept until all ranks can agree on it; raised at once, it would hang them.

    Attributes:
        result: The value that the work returned; None if it raised.
        error: The error that it raised; None if it returned.
    """

    result: T | None
    error: BaseException | None

    @classmethod
    def of(cls, work: Callable[[], T]) -> Attempt[T]:
        """Do the work, and catch whatever it raises."""
        try:
            return cls(work(), None)
        except BaseException as error:  # KeyboardInterrupt too: a rank that leaves here would hang the others
            return cls(None, error)

    def require(self) -> None:
        """Raise the error of the work, if there is one."""
        if self.error is not None:
            raise self.error

    @property
    def value(self) -> T:
        """The value that the work returned. Only to be used if the work did not raise."""
        assert self.result is not None
        return self.result


def meet(coordinator: Coordinator, request: Request, error: BaseException | None, timeout: float) -> None:
    """Wait for all ranks, and check that they make the same call. Collective over the communicator.

    Args:
        coordinator: Coordinator of the ranks that make the call.
        request: This rank's call.
        error: An error that this rank had before; then all ranks raise.
        timeout: Seconds to wait.

    Raises:
        RankTimeoutError: Some ranks did not come.
        LayoutError: The ranks made different calls.
        CollectiveError: A rank came with an error.
    """
    asked = Attempt.of(request.encode)
    error = error or asked.error
    shared = digest_of(asked.value) if error is None else secrets.randbits(64)
    if coordinator.arrive(request.operation, shared, 0, timeout) and error is None:
        return
    with coordinator.step("capture"):
        if error is not None:
            raise error
    coordinator.merge("compare calls", asked.value, compare)


def compare(requests: list[bytes]) -> list[bytes]:
    """`check_agreement` with an empty answer for every rank. Rank 0 only."""
    check_agreement(requests)
    return [b""] * len(requests)
