"""`save_async` on one rank: what is copied when, what is seen when, and how failures come to light."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt.saving.background_save
import distckpt.saving.draft
import distckpt.saving.writer
from distckpt import Checkpoint, CheckpointError, CollectiveError, LayoutError, SaveOptions, latest_checkpoint
from distckpt.coordination import background
from distckpt.saving.background_save import BackgroundSave
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.verify import verify_file

PATIENCE = 30.0
ROOT = Path(__file__).resolve().parents[2]


class Gate:
    """Holds the background back."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, behind the gate."""

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(PATIENCE)
            return function(*args, **kwargs)

        return held


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The background copies nothing and makes no file before the gate is open."""
    made = Gate()
    monkeypatch.setattr(BackgroundSave, "begin", made.before(BackgroundSave.begin))
    yield made
    made.opened.set()


def checkpoint_of(value: float, **more: Any) -> Checkpoint:
    return Checkpoint(a=torch.full((300,), value), b=torch.full((5, 7), value)[:, ::2], step=int(value), **more)


def fill(checkpoint: Checkpoint, value: float) -> None:
    checkpoint.a.fill_(value)
    checkpoint.b.fill_(value)
    checkpoint.step = int(value)


def assert_holds(path: str, value: float) -> None:
    twin = checkpoint_of(-5)
    twin.read(path).expect_partial()
    assert twin.a.eq(value).all()
    assert twin.b.eq(value).all()
    assert twin.step == value


def fail(monkeypatch: pytest.MonkeyPatch, text: str = "no quota") -> None:
    def broken(*_: object) -> None:
        raise OSError(28, text)

    monkeypatch.setattr(distckpt.saving.writer, "fsync", broken)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))  # noqa: PTH208


def without_manifest(path: str) -> bytes:
    manifest = open_checkpoint(path).manifest_bytes
    return Path(path).read_bytes().replace(manifest, b" " * len(manifest))  # it is padded with blanks


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("checksums", [False, True])
def test_the_file_is_that_of_a_synchronous_save(tmp_path: Path, overlap: bool, checksums: bool) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 1).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    more = {
        "strided": torch.randn(40, 30).t(),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
    }
    checkpoint = Checkpoint(model=model, optimizer=optimizer, step=3, **more)
    options = SaveOptions(transport="posix", checksums=checksums, metadata={"why": "test"})
    expected = checkpoint.save(tmp_path / "a" / "ckpt", options=options)
    twin = Checkpoint(model=model, optimizer=optimizer, step=3, **more)
    handle = twin.save_async(
        tmp_path / "b" / "ckpt", options=SaveOptions(overlap=overlap, checksums=checksums, metadata={"why": "test"})
    )
    found = handle.result(PATIENCE)
    assert found == handle.path == str(tmp_path / "b" / "ckpt-1.h5")
    assert without_manifest(found) == without_manifest(expected)
    manifests = [open_checkpoint(path).manifest for path in (found, expected)]
    same = [
        {name: getattr(manifest, name) for name in set(manifest.__struct_fields__) - {"save_id", "time", "timing"}}
        for manifest in manifests
    ]
    assert same[0] == same[1]
    assert verify_file(found) == [] or not checksums


def test_the_program_may_change_everything_at_once(tmp_path: Path, gate: Gate) -> None:
    checkpoint = checkpoint_of(1)
    handle = checkpoint.save_async(tmp_path / "ckpt")
    handle.wait_staged()
    fill(checkpoint, 2)
    gate.opened.set()
    assert_holds(handle.result(PATIENCE), 1)
    assert (checkpoint.a == 2).all()


def test_the_program_may_change_directory(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is that of the call, also where the other directory has one of that name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = checkpoint_of(1)
    for number in (1, 2):  # the second file is made by the thread
        handle = checkpoint.save_async("runs/ckpt")
        assert gate.reached.wait(PATIENCE)
        monkeypatch.chdir(tmp_path / "there")
        gate.opened.set()
        assert handle.result(PATIENCE) == f"runs/ckpt-{number}.h5"
        assert names(tmp_path / "there" / "runs") == []
        monkeypatch.chdir(tmp_path / "here")
        assert latest_checkpoint("runs") == f"runs/ckpt-{number}.h5"
        gate.opened.clear()
        gate.reached.clear()


def test_nothing_is_seen_before_the_commit(tmp_path: Path, gate: Gate) -> None:
    checkpoint = checkpoint_of(1)
    first = checkpoint.save(tmp_path / "ckpt")
    state = (tmp_path / "checkpoint").read_bytes()
    handle = checkpoint.save_async(tmp_path / "ckpt")
    assert gate.reached.wait(PATIENCE)
    assert not handle.done()
    assert handle.timing is None
    assert checkpoint.save_counter == 1
    assert latest_checkpoint(tmp_path) == first
    assert (tmp_path / "checkpoint").read_bytes() == state
    assert not Path(handle.path).exists()
    with pytest.raises(TimeoutError, match=r"ckpt-2\.h5: not saved after 0\.01 s.*call result\(\) again"):
        handle.result(0.01)
    gate.opened.set()
    assert handle.result(PATIENCE) == handle.result() == str(tmp_path / "ckpt-2.h5")
    assert handle.done()
    assert checkpoint.save_counter == 2
    assert latest_checkpoint(tmp_path) == handle.path
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-2.h5"]


def test_the_counter_is_in_the_file(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(1)
    checkpoint.save(tmp_path / "ckpt")
    path = checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE)
    twin = checkpoint_of(5)
    twin.restore(path).assert_consumed()
    assert twin.save_counter == 2


def test_the_thread_takes_what_the_program_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def look(*_: object) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr(distckpt.saving.writer, "fsync", look)
    checkpoint_of(1).save_async(tmp_path / "ckpt").result(PATIENCE)
    assert found == [19]


def test_infinite_patience(tmp_path: Path) -> None:
    handle = checkpoint_of(1).save_async(tmp_path / "ckpt", options=SaveOptions(timeout=float("inf")))
    assert handle.result(float("inf")) == handle.path


@pytest.mark.parametrize("timeout", ["5", -1, float("nan"), [1]])
def test_a_timeout_is_seconds(tmp_path: Path, timeout: Any) -> None:
    handle = checkpoint_of(1).save_async(tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"timeout: expected seconds >= 0, or None for no limit. Got"):
        handle.result(timeout)
    assert handle.result(PATIENCE) == handle.path


def test_mpio_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(1)
    with pytest.raises(LayoutError, match=r"save_async: expected transport 'auto' or 'posix'.*Got 'mpio'"):
        checkpoint.save_async(tmp_path / "ckpt", options=SaveOptions(transport="mpio"))
    assert names(tmp_path) == []


# ---- the file is made in the background --------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_call_does_not_wait_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    checkpoint, gate = checkpoint_of(1), Gate()
    checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE)
    monkeypatch.setattr("distckpt.saving.draft.create_like", gate.before(distckpt.saving.draft.create_like))
    handle = checkpoint.save_async(tmp_path / "ckpt", options=SaveOptions(overlap=overlap))
    handle.wait_staged()  # the copy does not wait for it either
    fill(checkpoint, 2)
    assert gate.reached.wait(PATIENCE)
    time.sleep(0.05)
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5"]
    gate.opened.set()
    assert_holds(handle.result(PATIENCE), 1)
    assert handle.timing is not None
    assert handle.timing.steps["create"].max >= 0.05
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-2.h5"]


def test_the_file_is_made_in_the_call_when_its_form_is_new(tmp_path: Path, gate: Gate) -> None:
    options = SaveOptions(max_in_flight=4)
    checkpoint = checkpoint_of(1, note="short")
    handles, temporary = [], []
    for note in ("short", "shorter", "long" * 10000, "short"):
        checkpoint.note = note
        handles.append(checkpoint.save_async(tmp_path / "ckpt", options=options))
        temporary.append(len(names(tmp_path)))
    assert temporary == [1, 1, 2, 2]  # of a layout, and of a manifest that has outgrown the file before
    gate.opened.set()
    for handle, note in zip(handles, ("short", "shorter", "long" * 10000, "short"), strict=True):
        twin = checkpoint_of(2, note="")
        twin.restore(handle.result(PATIENCE)).assert_consumed()
        assert twin.note == note


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_no_space_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, asked: bool) -> None:
    checkpoint, options = checkpoint_of(1), SaveOptions(overlap=overlap)
    checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE)
    buffers = checkpoint._session.saver._buffers
    nbytes = buffers.nbytes
    with monkeypatch.context() as patch:
        patch.setattr("distckpt.storage.rawio._check_space", full)
        handle = checkpoint.save_async(tmp_path / "ckpt", options=options)
        while not handle.done():
            time.sleep(0.001)
    with pytest.raises(CollectiveError, match=r"step 'create' failed on 1 rank.*\n.*no space") as caught:
        handle.result() if asked else checkpoint.save(tmp_path / "ckpt")
    assert caught.value.failures == {0: f"OSError: [Errno 28] no space: '{tmp_path}'"}
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5"]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")
    assert checkpoint.save_counter == 1
    assert handle.timing is None
    fill(checkpoint, 2)
    assert_holds(checkpoint.save_async(tmp_path / "ckpt", options=options).result(PATIENCE), 2)
    assert buffers.nbytes == nbytes
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-2.h5"]


def full(*_: object) -> None:
    raise OSError(28, "no space")


# ---- several -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["save", "write", "restore", "read", "save_async"])
def test_the_next_call_waits(tmp_path: Path, gate: Gate, call: str) -> None:
    checkpoint = checkpoint_of(1)
    older = checkpoint.write(tmp_path / "older")
    fill(checkpoint, 2)
    handle = checkpoint.save_async(tmp_path / "ckpt")
    threading.Timer(0.1, gate.opened.set).start()
    if call in ("restore", "read"):
        getattr(checkpoint, call)(older)
        assert checkpoint.step == 1
    else:
        last = getattr(checkpoint, call)(tmp_path / "next")
        assert call != "save_async" or last.result(PATIENCE)
    assert gate.opened.is_set()
    assert handle.done()
    assert_holds(handle.path, 2)


def test_several_in_flight_end_in_order(tmp_path: Path, gate: Gate) -> None:
    checkpoint = checkpoint_of(1)
    options = SaveOptions(max_in_flight=3)
    handles = []
    for value in (1, 2, 3):
        fill(checkpoint, value)
        handles.append(checkpoint.save_async(tmp_path / "ckpt", options=options))
    fill(checkpoint, 4)
    assert [handle.path for handle in handles] == [str(tmp_path / f"ckpt-{n}.h5") for n in (1, 2, 3)]
    assert [handle.done() for handle in handles] == [False] * 3
    threading.Timer(0.1, gate.opened.set).start()
    last = checkpoint.save_async(tmp_path / "ckpt", options=options)  # waits for the first
    assert handles[0].done()
    assert last.result(PATIENCE) == str(tmp_path / "ckpt-4.h5")
    assert all(handle.done() for handle in handles)
    for value, handle in enumerate([*handles, last], 1):
        assert_holds(handle.path, value)
    assert checkpoint.save_counter == 4


@pytest.mark.parametrize(
    ("owner", "name"), [(distckpt.saving.draft, "create_like"), (distckpt.saving.background_save, "write_alone")]
)
def test_a_save_that_fails_takes_no_other_with_it(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    checkpoint = checkpoint_of(1)
    checkpoint.save(tmp_path / "ckpt")
    options = SaveOptions(max_in_flight=2)
    function, calls = getattr(owner, name), []

    def fails_at_first(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise OSError("no quota")
        function(*args)

    monkeypatch.setattr(owner, name, fails_at_first)
    first, second = (checkpoint.save_async(tmp_path / "ckpt", options=options) for _ in range(2))
    gate.opened.set()
    assert second.result(PATIENCE) == str(tmp_path / "ckpt-3.h5")
    with pytest.raises(CollectiveError, match="no quota"):
        first.result(PATIENCE)
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-4.h5")
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-3.h5", "ckpt-4.h5"]


# ---- failures ----------------------------------------------------------------------------------------------------


def test_a_failure_is_raised_by_the_result_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(1)
    with monkeypatch.context() as patch:
        fail(patch)
        handle = checkpoint.save_async(tmp_path / "ckpt")
        for _ in range(2):
            with pytest.raises(CollectiveError, match=r"step 'write' failed on 1 rank.*\n.*no quota") as caught:
                handle.result(PATIENCE)
            assert caught.value.failures == {0: f"OSError: [Errno 28] no quota: '{tmp_path}/ckpt-1.h5'"}
            assert isinstance(caught.value.__cause__, OSError)
    assert handle.done()
    assert checkpoint.save_counter == 0
    assert names(tmp_path) == []
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-1.h5")  # it was asked for, so nothing is raised


@pytest.mark.parametrize("call", ["save", "write", "restore", "read", "save_async"])
def test_a_failure_that_nobody_asked_for_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint = checkpoint_of(1)
    older = checkpoint.write(tmp_path / "older")
    with monkeypatch.context() as patch:
        fail(patch)
        handle = checkpoint.save_async(tmp_path / "ckpt")
        while not handle.done():
            pass
    target = older if call in ("restore", "read") else tmp_path / "next"
    fill(checkpoint, 2)
    with pytest.raises(CollectiveError, match="no quota"):
        getattr(checkpoint, call)(target)
    assert names(tmp_path) == ["older.h5"]
    assert checkpoint.step == 2
    last = getattr(checkpoint, call)(target)  # only once
    assert call != "save_async" or last.result(PATIENCE)


def test_a_failed_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(1)

    def broken(*_: object, **__: object) -> None:
        raise OSError("no state")

    with monkeypatch.context() as patch:
        patch.setattr("distckpt.saving.draft.record_save", broken)  # after the rename
        handle = checkpoint.save_async(tmp_path / "ckpt")
        with pytest.raises(CollectiveError, match="step 'commit' failed"):
            handle.result(PATIENCE)
    assert names(tmp_path) == []
    assert checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE) == str(tmp_path / "ckpt-1.h5")


def test_a_failure_keeps_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(1)
    with monkeypatch.context() as patch:
        fail(patch)
        handle = checkpoint.save_async(tmp_path / "ckpt")
        with pytest.raises(CollectiveError):
            handle.result(PATIENCE)
    buffers = checkpoint._session.saver._buffers
    before = buffers.nbytes
    checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE)
    assert buffers.nbytes == before


# ---- memory ------------------------------------------------------------------------------------------------------


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow(tmp_path: Path) -> None:
    nbytes = 8 << 20
    checkpoint = Checkpoint(a=torch.zeros(nbytes // 4), b=torch.zeros(3))
    options = SaveOptions(durable=False)
    before = resident_nbytes()
    for number in range(100):
        handle = checkpoint.save_async(tmp_path / "ckpt", options=options)
        if number == 1:
            settled = resident_nbytes()
        if number > 1:
            Path(tmp_path / f"ckpt-{number - 1}.h5").unlink()
    handle.result(PATIENCE)
    assert settled - before < nbytes + (16 << 20)
    assert resident_nbytes() - settled < nbytes / 2


def test_the_memory_of_a_save_in_inference_mode_is_used_again_outside(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(1)
    for value in (1, 2):
        fill(checkpoint, value)
        with torch.inference_mode(value == 1):
            path = checkpoint.save_async(tmp_path / "ckpt").result()
        assert_holds(path, value)


def test_a_save_waits_for_memory(tmp_path: Path, gate: Gate) -> None:
    checkpoint = checkpoint_of(1)
    options = SaveOptions(max_in_flight=3)
    first = checkpoint.save_async(tmp_path / "ckpt", options=options)
    threading.Timer(0.1, gate.opened.set).start()
    tight = SaveOptions(max_in_flight=3, host_memory=checkpoint._session.saver._buffers.nbytes)
    fill(checkpoint, 2)
    second = checkpoint.save_async(tmp_path / "ckpt", options=tight)
    assert gate.opened.is_set()
    assert_holds(first.result(PATIENCE), 1)
    assert_holds(second.result(PATIENCE), 2)


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(1)
    with pytest.raises(
        CollectiveError, match=r"step 'stage'.*\n.*MemoryError.*needs \d+ bytes.*host_memory allows 10\."
    ):
        checkpoint.save_async(tmp_path / "ckpt", options=SaveOptions(host_memory=10))
    assert names(tmp_path) == []
    assert_holds(checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE), 1)


def test_a_larger_state_gets_a_larger_buffer_and_a_smaller_one_gives_it_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=torch.zeros(10))
    sizes = []
    for numel in (10, 80 << 20, 10):
        checkpoint.a = torch.full((numel,), 3, dtype=torch.uint8)
        path = checkpoint.save_async(tmp_path / "ckpt").result(PATIENCE)
        sizes.append(checkpoint._session.saver._buffers.nbytes)
        twin = Checkpoint(a=torch.zeros(numel, dtype=torch.uint8))
        twin.restore(path).assert_consumed()
        assert (twin.a == 3).all()
    assert sizes[0] == sizes[2] < 1000
    assert sizes[1] >= 80 << 20


# ---- other processes ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_at_its_exit(tmp_path: Path, gate: Gate) -> None:
    handle = checkpoint_of(1).save_async(tmp_path / "ckpt")
    child = os.fork()
    if child == 0:
        background._finish_all()  # registered for the exit
        os._exit(0)
    ended, deadline = 0, time.monotonic() + PATIENCE
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
    gate.opened.set()
    assert (ended, status) == (child, 0)
    assert handle.result(PATIENCE) == handle.path


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_where_to_ask(tmp_path: Path, gate: Gate) -> None:
    handle = checkpoint_of(1).save_async(tmp_path / "ckpt")
    child = os.fork()
    if child == 0:
        try:
            handle.result(PATIENCE)
        except CheckpointError as error:
            os._exit(7 if "forked from the one that saves" in str(error) else 1)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    gate.opened.set()
    assert os.waitstatus_to_exitcode(status) == 7
    assert handle.result(PATIENCE) == handle.path


AT_EXIT = """
import atexit, sys, torch
from distckpt import Checkpoint
checkpoint, prefix = Checkpoint(a=torch.zeros(4)), sys.argv[1]
def save_once_more():
    try:
        checkpoint.save_async(prefix).result(5)
    except Exception as error:
        print(error)
    checkpoint.save(prefix)
atexit.register(save_once_more)  # runs after the end of the thread
checkpoint.save_async(prefix).result()
"""


def test_a_save_after_the_end_of_the_thread_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "ckpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "the thread in the background has ended: the program exits" in done.stdout
    assert names(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-2.h5"]


class Split:
    """An object of the user's that saves its state in two parts."""

    def __init__(self, fused: torch.Tensor) -> None:
        self.fused = fused

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"left": self.fused[:2].clone(), "right": self.fused[2:].clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.fused = torch.cat([state["left"], state["right"]])


def test_a_custom_value_is_saved_as_it_was_at_the_call(tmp_path: Path, gate: Gate) -> None:
    live = Split(torch.arange(4.0))
    handle = Checkpoint(s=live).save_async(tmp_path / "ckpt")
    live.fused.fill_(9.0)
    gate.opened.set()
    twin = Split(torch.zeros(4))
    Checkpoint(s=twin).restore(handle.result()).assert_consumed()
    assert twin.fused.tolist() == [0, 1, 2, 3]


def test_the_object_graph_is_that_of_a_synchronous_save(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(1, s=Split(torch.arange(4.0)))
    saved = open_checkpoint(checkpoint.save(tmp_path / "ckpt")).manifest
    later = open_checkpoint(checkpoint.save_async(tmp_path / "ckpt").result()).manifest
    assert later.object_graph == saved.object_graph
    assert [variable.key for variable in later.variables] == [variable.key for variable in saved.variables]
