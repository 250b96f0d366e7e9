"""Ctrl-C waits until it can be agreed on."""

from __future__ import annotations

import signal
import threading

import pytest

from distckpt.coordination.interrupts import Interrupts


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _interrupt_in_nested(interrupts: Interrupts, reached: list[str]) -> None:
    with interrupts.held():
        _interrupt()
        reached.append("inner")
    reached.append("outer")


def test_held_interrupt_is_raised_at_the_end() -> None:
    interrupts, reached = Interrupts(), list[str]()
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        _interrupt_in_nested(interrupts, reached)
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_held_interrupt_is_raised_where_it_is_allowed() -> None:
    interrupts = Interrupts()
    with interrupts.held():
        _interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            pytest.fail("the body must not run")
        with interrupts.allowed():
            pass


def test_interrupt_in_an_allowed_region_is_raised_at_once_and_the_next_one_held() -> None:
    interrupts, reached = Interrupts(), list[str]()
    with interrupts.held():
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            _interrupt_and_go_on(reached)
        _interrupt()
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            pass
    assert reached == []


def _interrupt_and_go_on(reached: list[str]) -> None:
    _interrupt()
    reached.append("must not be reached")


def test_interrupt_held_within_an_allowed_region_is_raised_on_return_to_it() -> None:
    interrupts, reached = Interrupts(), list[str]()
    with interrupts.held(), pytest.raises(KeyboardInterrupt), interrupts.allowed():
        _interrupt_in_nested(interrupts, reached)
    assert reached == ["inner"]


def test_handlers_of_the_user_are_called_and_put_back() -> None:
    calls: list[int] = []

    def handler(number: int, _frame: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts().held():
            _interrupt()
            assert calls == []
        assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGCHLD])
def test_handlers_of_other_signals_that_raise_are_held_too(number: signal.Signals) -> None:
    """Many programs exit in a handler of SIGTERM, and data loaders raise an error where a worker has died."""

    def leave(*_: object) -> None:
        raise SystemExit(3)

    before, interrupts, reached = signal.signal(number, leave), Interrupts(), list[str]()
    try:
        with pytest.raises(SystemExit), interrupts.held():  # noqa: PT012 - see `reached`
            signal.raise_signal(number)
            reached.append("held")
            with pytest.raises(SystemExit), interrupts.allowed():
                pytest.fail("the body must not run")
            interrupts.postpone()
            reached.append("postponed")
        assert reached == ["held", "postponed"]
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)


def test_each_pending_signal_is_delivered_whatever_the_handlers_of_others_raise() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: called.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), Interrupts().held():  # noqa: PT012 - see `called`
            _interrupt()
            signal.raise_signal(signal.SIGTERM)
            assert called == []
        assert called == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_is_set_within_a_region_stays() -> None:
    def handler(*_: object) -> None:
        pytest.fail("not called")

    before = signal.getsignal(signal.SIGINT)
    try:
        with Interrupts().held():
            signal.signal(signal.SIGINT, handler)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_nothing_is_done_where_python_has_no_handler(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        interrupts = Interrupts()
        with interrupts.held(), interrupts.allowed():
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handler_alone() -> None:
    interrupts = Interrupts()
    handlers: list[object] = []

    def body() -> None:
        with interrupts.held(), interrupts.allowed():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_a_signal_that_is_pending_when_a_region_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts, install = Interrupts(), signal.signal

    def raise_first(*_: object) -> None:
        monkeypatch.setattr(signal, "signal", install)
        raise KeyboardInterrupt  # signal.signal() runs the handler of a pending signal before it does anything

    monkeypatch.setattr(signal, "signal", raise_first)
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        pass
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012 - see `reached`
        signal.raise_signal(signal.SIGINT)
        reached.append("end of the region")
    assert reached
