"""Delay of Ctrl-C until a rank may leave without other ranks waiting for it for ever."""

from __future__ import annotations

import enum
import signal
import threading
from collections.abc import Callable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class _Undo(enum.Enum):
    """The action at the end of a region."""

    NOTHING = enum.auto()
    HOLD = enum.auto()
    ALLOW = enum.auto()
    UNINSTALL = enum.auto()


class Interrupts:
    """Holds SIGINT back while other ranks depend on this one.

    Python raises KeyboardInterrupt between any two instructions, also between two collectives, where it would leave
    the other ranks waiting. Within `held()` it waits for the next `allowed()` region, or for the end of `held()`. Both
    do nothing outside the main thread, which alone gets signals, and if SIGINT has no Python handler.
    """

    def __init__(self) -> None:
        # The handler found by the outermost held(); None outside of it.
        self._handler: _Handler | None = None
        self._allowed = False
        self._pending = False

    def held(self) -> Region:
        """Hold interrupts back. Regions nest; the outermost one delivers a pending interrupt at its end."""
        return Region(self, allow=False)

    def allowed(self) -> Region:
        """Let interrupts through within `held()`, a pending one at once."""
        return Region(self, allow=True)

    def postpone(self) -> None:
        """Hold back again an interrupt that was let through too early; the next `allowed()` region delivers it."""
        self._pending = self._handler is not None

    def begin(self, *, allow: bool) -> _Undo:
        """Begin a region; `Region` calls it."""
        if threading.get_ident() != threading.main_thread().ident:
            return _Undo.NOTHING
        if self._handler is None:
            return _Undo.NOTHING if allow else self._install()
        undo = _Undo.ALLOW if self._allowed else _Undo.HOLD
        self._allowed = allow
        if allow:
            self._deliver()
        return undo

    def end(self, undo: _Undo) -> None:
        """End a region; `Region` calls it."""
        if undo is _Undo.UNINSTALL and self._handler is not None:
            handler, self._handler = self._handler, None
            signal.signal(signal.SIGINT, handler)
            if self._pending:
                self._pending = False
                handler(signal.SIGINT, None)
        elif undo is not _Undo.NOTHING:
            self._allowed = undo is _Undo.ALLOW
            if self._allowed:
                self._deliver()

    def _install(self) -> _Undo:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            return _Undo.NOTHING
        # signal.signal() first runs the handler of a pending signal, which may raise; the region has not begun then.
        signal.signal(signal.SIGINT, self._on_signal)
        self._handler = handler
        return _Undo.UNINSTALL

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._pending = True
        if self._allowed:
            self._deliver()

    def _deliver(self) -> None:
        if self._pending and self._handler is not None:
            self._pending = False
            self._allowed = False  # a second exception would interrupt the agreement about this one
            self._handler(signal.SIGINT, None)


class Region:
    """A context manager of `Interrupts`. A class, not a generator, since it is entered several times per exchange."""

    __slots__ = ("_allow", "_interrupts", "_undo")

    def __init__(self, interrupts: Interrupts, *, allow: bool) -> None:
        self._interrupts = interrupts
        self._allow = allow
        self._undo = _Undo.NOTHING

    def __enter__(self) -> None:
        self._undo = self._interrupts.begin(allow=self._allow)

    def __exit__(self, *_error: object) -> None:
        self._interrupts.end(self._undo)


#: The one instance of a process, as SIGINT has one handler per process.
INTERRUPTS = Interrupts()
