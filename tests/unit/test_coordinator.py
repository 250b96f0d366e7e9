"""The coordinator of a process without mpi4py: the same verbs, the same errors, nobody to talk to."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import mmap
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import msgspec
import numpy as np
import pytest

from distckpt.coordination import checks, session
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts
from distckpt.errors import CheckpointError, CollectiveError, LayoutError
from tests.bare import bare

ROOT = Path(__file__).resolve().parents[2]


class Held:
    """Stands for an HDF5 object or a big buffer."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    monkeypatch.setattr(session, "find_spec", lambda _name: None)
    monkeypatch.setattr(checks, "expected_size", lambda: None)
    return Coordinator()


def test_importing_and_constructing_loads_no_mpi() -> None:
    code = (
        "from distckpt.coordination.coordinator import Coordinator; Coordinator();"
        "sys.exit(any(name.startswith(('mpi4py', 'h5py', 'torch')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", bare() + code], check=False).returncode == 0


@pytest.mark.parametrize("comm", ["COMM_WORLD", 3, object(), [None]])
def test_what_is_no_communicator(comm: object) -> None:
    with pytest.raises(TypeError, match="expected an mpi4py intracommunicator") as raised:
        Coordinator(comm)
    assert type(comm).__name__ in str(raised.value)


def test_alone_is_rank_0_of_1(alone: Coordinator) -> None:
    assert (alone.rank, alone.size, alone.communicator) == (0, 1, None)
    assert alone.arrive("save", 2**64 - 1, 0, 1.0)
    assert not alone.arrive("save", 0, 1, 1.0)


def test_verbs_alone(alone: Coordinator) -> None:
    assert alone.on_root("find", lambda: {"a": [1, 2]}, dict[str, list[int]]) == {"a": [1, 2]}
    assert alone.on_root("read", lambda: b"x" * 100_000, bytes) == b"x" * 100_000
    assert alone.on_root("commit", lambda: None, type(None)) is None
    assert alone.merge("layout", b"abc", lambda values: [values[0] * 2]) == b"abcabc"
    parts = Parts(b"common", b"own")
    turned = alone.merge_parts("layout", parts, lambda values: [Parts(bytes(values[0].own), values[0].common)])
    assert turned == (b"own", b"common")
    assert alone.gather_all("report", b"abc") == [b"abc"]
    np.testing.assert_array_equal(alone.gather_rows(np.array([1.0, 2.0])), [[1.0, 2.0]])
    np.testing.assert_array_equal(alone.share(np.arange(3)), np.arange(3))
    np.testing.assert_array_equal(alone.any(np.array([True, False])), [1, 0])
    with alone.watchdog("close", 60.0):
        pass


@pytest.mark.parametrize("timeout", [math.inf, sys.maxsize])
def test_a_watchdog_may_wait_for_ever(alone: Coordinator, timeout: float) -> None:
    with alone.watchdog("close", timeout):
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "distckpt-watchdog-close"]
        thread.join(timeout=0.2)
        assert thread.is_alive()


def test_launched_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", lambda _name: None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(CheckpointError, match="mpi4py is not installed"):
        Coordinator().arrive("save", 0, 0, 1.0)


def test_step_raises_the_agreed_error_with_its_cause(alone: Coordinator) -> None:
    cause = OSError(28, "No space left on device")
    with pytest.raises(CollectiveError) as raised, alone.step("write", remedy="Free some space."):
        raise cause
    assert raised.value.failures == {0: "OSError: [Errno 28] No space left on device"}
    assert raised.value.step == "write"
    assert "Free some space." in str(raised.value)
    assert raised.value.__cause__ is cause


def test_functions_raise_the_agreed_error(alone: Coordinator) -> None:
    def fail(*_values: object) -> list[bytes]:
        raise LayoutError("model/w: gap")

    for call in (lambda: alone.on_root("find", fail, int), lambda: alone.merge("layout", b"", fail)):
        with pytest.raises(LayoutError, match="model/w: gap") as raised:
            call()
        assert isinstance(raised.value.__cause__, LayoutError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_exits_are_raised_as_they_are(alone: Coordinator, kind: type[BaseException]) -> None:
    def leave() -> int:
        raise kind("now")

    with pytest.raises(kind, match="now"), alone.step("write"):
        leave()
    with pytest.raises(kind, match="now"):
        alone.on_root("find", leave, int)


def test_interrupt_between_steps_is_raised_in_the_next_one(alone: Coordinator) -> None:
    reached = []
    with alone.uninterrupted():
        with alone.step("capture"):
            pass
        signal.raise_signal(signal.SIGINT)
        reached.append("between")
        with pytest.raises(KeyboardInterrupt), alone.step("write"):
            reached.append("write")
    assert reached == ["between"]


def test_results_that_do_not_fit_their_type(alone: Coordinator) -> None:
    with pytest.raises(msgspec.ValidationError):
        alone.on_root("find", lambda: "text", int)  # type: ignore[arg-type, return-value]
    with pytest.raises(CollectiveError, match="TypeError: Encoding objects of type object is unsupported"):
        alone.on_root("find", object, object)


def test_one_reply_per_rank(alone: Coordinator) -> None:
    with pytest.raises(CollectiveError, match=r"expected one reply per rank, 1 in all\. Got 2"):
        alone.merge("layout", b"", lambda _values: [b"", b""])


@pytest.mark.parametrize("array", [None, np.array(["text"]), np.array([object()], dtype=object)])
def test_only_numbers_are_shared(alone: Coordinator, array: np.ndarray | None) -> None:
    with pytest.raises(CollectiveError, match="expected an array of numbers on rank 0"):
        alone.share(array)


def _hold_and_fail(references: list[weakref.ref[Held]]) -> None:
    ours = Held()
    references.append(weakref.ref(ours))
    raise OSError("disk")


def test_memory_of_a_lone_rank_begins_at_a_page(alone: Coordinator) -> None:
    # Elsewhere copies out of the page cache into it can take several times as long.
    memory = alone.shared_memory(1 << 20)
    assert memory is not None
    (part,) = memory.parts
    assert np.frombuffer(part, np.uint8).ctypes.data % mmap.PAGESIZE == 0
    assert len(part) == 1 << 20


def test_step_frees_what_the_body_held_before_agreeing(alone: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Held]] = []
    alive: list[bool] = []
    collectives = alone._connect("test")
    monkeypatch.setattr(
        collectives, "any_set", lambda flag: (alive.append(references[-1]() is not None), flag)[1], raising=True
    )
    for clear_frames in (False, True):
        with pytest.raises(CollectiveError), alone.step("write", clear_frames=clear_frames):
            _hold_and_fail(references)
    assert alive == [True, False]


def test_a_dropped_error_keeps_nothing_alive(alone: Coordinator) -> None:
    references: list[weakref.ref[Held]] = []
    gc.disable()
    try:
        for call in (
            lambda: alone.on_root("find", lambda: _hold_and_fail(references), type(None)),
            lambda: alone.merge("layout", b"", lambda _values: _hold_and_fail(references) or []),
        ):
            with contextlib.suppress(CollectiveError):
                call()
        with contextlib.suppress(CollectiveError), alone.step("write"):
            _hold_and_fail(references)
        assert [reference() for reference in references] == [None, None, None]
    finally:
        gc.enable()


def test_copies_share_and_pickles_are_refused(alone: Coordinator) -> None:
    assert copy.deepcopy(alone).communicator is alone.communicator
    assert copy.copy(alone).rank == 0
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(alone)
