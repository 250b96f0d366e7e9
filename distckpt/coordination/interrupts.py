"""Delay of Ctrl-C and other signals until a rank may leave without other ranks waiting for it for ever."""

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


#: Signals that are held back if Python has a handler for them, which may raise: Ctrl-C; what schedulers send, at which
#: many programs exit; and the end of a child, at which torch's data loaders raise an error if it was a worker of one.
#: Not SIGALRM: programs and tests bound the time of a call by it.
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


class _Interrupt:
    """One signal of `Interrupts`. Main thread only.

    Args:
        number: The signal.

    Attributes:
        raised: Its handler was called last time in an `allowed()` region, and has raised.
    """

    def __init__(self, number: signal.Signals) -> None:
        self._number = number
        # The handler found by the outermost held(); None outside of it.
        self._handler: _Handler | None = None
        self._allowed = False
        self._pending = False
        self.raised = False

    def postpone(self) -> None:
        """See `Interrupts.postpone`."""
        self.raised = False
        self._pending = self._handler is not None

    def begin(self, *, allow: bool) -> _Undo:
        """Begin a region; `Interrupts` calls it."""
        if self._handler is None:
            return _Undo.NOTHING if allow else self._install()
        undo = _Undo.ALLOW if self._allowed else _Undo.HOLD
        self._allowed = allow
        if allow:
            self._deliver()
        return undo

    def end(self, undo: _Undo) -> None:
        """End a region; `Interrupts` calls it."""
        if undo is _Undo.UNINSTALL and self._handler is not None:
            handler, self._handler = self._handler, None
            if signal.getsignal(self._number) == self._on_signal:  # the user's code may have set another one meanwhile
                signal.signal(self._number, handler)
            if self._pending:
                self._pending = False
                handler(self._number, None)
        elif undo is not _Undo.NOTHING:
            self._allowed = undo is _Undo.ALLOW
            if self._allowed:
                self._deliver()

    def _install(self) -> _Undo:
        handler = signal.getsignal(self._number)
        if not callable(handler):
            return _Undo.NOTHING
        # signal.signal() first runs the handler of a pending signal, which may raise; the region has not begun then.
        signal.signal(self._number, self._on_signal)
        self._handler, self.raised = handler, False
        return _Undo.UNINSTALL

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._pending = True
        if self._allowed:
            self._deliver()

    def _deliver(self) -> None:
        if self._pending and self._handler is not None:
            self._pending = False
            self._allowed = False  # a second exception would interrupt the agreement about this one
            self.raised = True
            self._handler(self._number, None)
            self.raised = False


#: The signals that a region has begun to hold or let through, and how to end that.
_Begun = list[tuple[_Interrupt, _Undo]]


class Interrupts:
    """Holds signals back while other ranks depend on this one.

    Python calls a handler between any two instructions, also between two collectives, where an exception such as
    KeyboardInterrupt would leave the other ranks waiting. Within `held()` it waits for the next `allowed()` region, or
    for the end of `held()`. Both do nothing outside the main thread, which alone gets signals, and to signals without a
    Python handler.
    """

    def __init__(self) -> None:
        self._signals = [_Interrupt(number) for number in _NUMBERS]
        self._held: list[_Interrupt] = []  # those that the outermost held() holds; none outside of it

    def held(self) -> Region:
        """Hold signals back. Regions nest; the outermost one delivers pending signals at its end."""
        return Region(self, allow=False)

    def allowed(self) -> Region:
        """Let signals through within `held()`, pending ones at once."""
        return Region(self, allow=True)

    def postpone(self) -> None:
        """Hold back again an interrupt that was let through too early; the next `allowed()` region delivers it."""
        for interrupt in [one for one in self._signals if one.raised] or self._signals[:1]:
            interrupt.postpone()

    def begin(self, *, allow: bool) -> _Begun:
        """Begin a region; `Region` calls it."""
        begun: _Begun = []
        if threading.get_ident() != threading.main_thread().ident or (allow and not self._held):
            return begun
        try:
            for interrupt in self._held or self._signals:
                undo = interrupt.begin(allow=allow)
                if undo is not _Undo.NOTHING:
                    begun.append((interrupt, undo))
        except BaseException:  # from a handler; the region has not begun
            self.end(begun)
            raise
        self._held = self._held or [interrupt for interrupt, _ in begun]
        return begun

    def end(self, begun: _Begun) -> None:
        """End a region; `Region` calls it. All pending signals are delivered, whatever their handlers raise."""
        if not begun:
            return
        *others, (interrupt, undo) = begun
        if undo is _Undo.UNINSTALL:
            self._held = []
        try:
            interrupt.end(undo)
        finally:
            self.end(others)


class Region:
    """A context manager of `Interrupts`. A class, not a generator, since it is entered several times per exchange."""

    __slots__ = ("_allow", "_begun", "_interrupts")

    def __init__(self, interrupts: Interrupts, *, allow: bool) -> None:
        self._interrupts = interrupts
        self._allow = allow
        self._begun: _Begun = []

    def __enter__(self) -> None:
        self._begun = self._interrupts.begin(allow=self._allow)

    def __exit__(self, *_error: object) -> None:
        self._interrupts.end(self._begun)


#: The one instance of a process, as a signal has one handler per process.
INTERRUPTS = Interrupts()
