"""Saves that are copied while the program computes: what waits, what is copied at once, what is found out."""

from __future__ import annotations

import os
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distckpt import Checkpoint, CollectiveError, SaveOptions, ShardedVariable
from distckpt.coordination.coordinator import Coordinator
from distckpt.layout.box import Box
from distckpt.saving.background_save import BackgroundSave
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.packing import LiveJobs
from distckpt.storage.snapshot import Snapshot, Watch, _SharedWork
from distckpt.storage.staging import HostBuffers
from distckpt.storage.transfer import WriteJob

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch about itself: the package uses torch.jit.script, which it deprecates
    from torch.distributed.optim import ZeroRedundancyOptimizer

PATIENCE = 30.0
OVERLAP = SaveOptions(overlap=True, durable=False)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The background does nothing before it is set."""
    event = threading.Event()
    begin = BackgroundSave.begin

    def held(flight: BackgroundSave, coordinator: Coordinator) -> None:
        assert event.wait(PATIENCE)
        begin(flight, coordinator)

    monkeypatch.setattr(BackgroundSave, "begin", held)
    yield event
    event.set()


@pytest.fixture
def process_group() -> Iterator[None]:
    """torch.distributed with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Program:
    """A model whose forward changes buffers, an average of its weights, and an optimizer."""

    def __init__(self, seed: int, optimizer: str = "AdamW", **settings: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
        self.average = nn.Linear(6, 40)
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), **settings)
        self.checkpoint = Checkpoint(model=self.model, average=self.average, optimizer=self.optimizer, step=0)
        self.train()

    def compute(self) -> None:
        """Forward and backward."""
        self.checkpoint.step += 1
        loss = self.model(torch.randn(8, 6)).square().sum()
        loss.backward()

    def train(self) -> None:
        self.compute()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.average.weight.lerp_(self.model[0].weight, 0.1)

    def values(self) -> list[object]:
        slots = [value for slots in self.optimizer.state.values() for value in slots.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.average.parameters(), *slots]
        return [*(tensor.detach().numpy().tobytes() for tensor in tensors), self.checkpoint.step]


def assert_holds(path: str, values: list[object], **settings: Any) -> None:
    twin = Program(99, **settings)
    assert twin.values() != values
    twin.checkpoint.restore(path).assert_consumed()
    assert twin.values() == values


def without_manifest(path: str) -> bytes:
    manifest = open_checkpoint(path).manifest_bytes
    return Path(path).read_bytes().replace(manifest, b" " * len(manifest))


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": False, "amsgrad": True}], ids=str)
def test_training_through_50_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Each file is that of a synchronous save at the same moment, whenever the background gets to it."""
    program = Program(1, **settings)
    reference = Checkpoint(model=program.model, average=program.average, optimizer=program.optimizer)
    begin, opened = BackgroundSave.begin, threading.Event()

    def held(flight: BackgroundSave, coordinator: Coordinator) -> None:
        assert opened.wait(PATIENCE)
        begin(flight, coordinator)

    monkeypatch.setattr(BackgroundSave, "begin", held)
    for number in range(50):
        reference.step = program.checkpoint.step
        expected = reference.save(tmp_path / "a" / "ckpt", options=SaveOptions(durable=False))
        early = number % 3
        opened.set() if early else opened.clear()
        handle = program.checkpoint.save_async(tmp_path / "b" / "ckpt", options=OVERLAP)
        if early == 2:
            program.compute()  # meanwhile the background copies
        assert early or not handle._save._snapshot.is_complete
        program.train()
        opened.set()
        assert without_manifest(handle.result(PATIENCE)) == without_manifest(expected)


def test_saves_do_not_change_training(tmp_path: Path) -> None:
    left, right = Program(1), Program(1)
    for program in (left, right):
        torch.manual_seed(2)
        for _ in range(10):
            if program is left:
                handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
            program.train()
    handle.result(PATIENCE)
    assert left.values() == right.values()


def test_the_step_waits_for_the_copy_and_helps(tmp_path: Path, gate: threading.Event) -> None:
    program = Program(1)
    before = program.values()
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    program.compute()
    assert program.values() != before  # buffers have changed, and were copied at once
    assert not handle._save._snapshot.is_complete
    program.optimizer.step()  # the background does nothing at all
    assert handle._save._snapshot.is_complete
    gate.set()
    assert_holds(handle.result(PATIENCE), before)


def test_any_optimizer_waits(tmp_path: Path, gate: threading.Event) -> None:
    program = Program(1)
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    other.step()
    assert handle._save._snapshot.is_complete
    gate.set()
    handle.result(PATIENCE)


def test_wait_staged_waits(tmp_path: Path, gate: threading.Event) -> None:
    program = Program(1)
    before = program.values()
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    handle.wait_staged()
    with torch.no_grad():
        for parameter in program.model.parameters():
            parameter.zero_()
    gate.set()
    assert_holds(handle.result(PATIENCE), before)


def test_several_overlapped_saves_in_flight(tmp_path: Path, gate: threading.Event) -> None:
    program = Program(1)
    options = SaveOptions(overlap=True, max_in_flight=3)
    states, handles = [], []
    for _ in range(3):
        states.append(program.values())
        handles.append(program.checkpoint.save_async(tmp_path / "ckpt", options=options))
        program.train()
    gate.set()
    for state, handle in zip(states, handles, strict=True):
        assert_holds(handle.result(PATIENCE), state)


# ---- what is found out -------------------------------------------------------------------------------------------


def change_parameter(program: Program) -> str:
    with torch.no_grad():
        program.model[3].bias.add_(1)
    return "model/3/bias"


def change_slot(program: Program) -> str:
    program.optimizer.state[program.model[0].weight]["exp_avg"].mul_(2)
    return "optimizer/.slots/model/0/weight/exp_avg"


@pytest.mark.parametrize("change", [change_parameter, change_slot])
def test_a_change_before_the_copy_fails_the_save(tmp_path: Path, gate: threading.Event, change: Any) -> None:
    program = Program(1)
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    key = change(program)
    gate.set()
    expected = rf"step 'write'.*\n.*RuntimeError: changed before the save had copied it: {key}\. With overlap=True"
    with pytest.raises(CollectiveError, match=expected):
        handle.result(PATIENCE)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    values = program.values()
    assert_holds(program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP).result(PATIENCE), values)


def test_what_no_optimizer_owns_is_copied_at_once(tmp_path: Path, gate: threading.Event) -> None:
    program = Program(1)
    before = program.values()
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    program.average.weight.data.mul_(2)  # not even torch knows
    with torch.no_grad():
        program.average.bias.mul_(2)
        program.model[1].running_mean.add_(1)
    gate.set()
    assert_holds(handle.result(PATIENCE), before)


def test_a_parameter_in_a_sharded_variable_waits_for_the_step(tmp_path: Path, gate: threading.Event) -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], momentum=0.9)
    checkpoint = Checkpoint(rows=ShardedVariable(parameter, (4,), (0,)), optimizer=optimizer)
    handle = checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    assert not handle._save._snapshot.is_complete
    parameter.sum().backward()
    optimizer.step()
    gate.set()
    twin = torch.zeros(4)
    Checkpoint(rows=ShardedVariable(twin, (4,), (0,))).restore(handle.result(PATIENCE)).expect_partial()
    assert twin.eq(1).all()


@pytest.mark.usefixtures("process_group")
def test_slots_of_a_zero_redundancy_optimizer_wait_for_the_step(tmp_path: Path, gate: threading.Event) -> None:
    def make(value: float) -> tuple[nn.Parameter, ZeroRedundancyOptimizer, Checkpoint]:
        parameter = nn.Parameter(torch.full((4,), value))
        optimizer = ZeroRedundancyOptimizer([parameter], torch.optim.Adam, lr=value)
        parameter.square().sum().backward()
        optimizer.step()
        return parameter, optimizer, Checkpoint(rows=parameter, optimizer=optimizer)

    parameter, optimizer, checkpoint = make(1.0)
    (slots,) = optimizer.optim.state.values()
    before = [tensor.tolist() for tensor in (parameter, *slots.values())]
    handle = checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    assert not handle._save._snapshot.is_complete
    assert not optimizer.state  # as nothing but the inner optimizer has any
    optimizer.step()
    assert handle._save._snapshot.is_complete
    gate.set()
    parameter, optimizer, checkpoint = make(2.0)
    (slots,) = optimizer.optim.state.values()
    assert [tensor.tolist() for tensor in (parameter, *slots.values())] != before
    checkpoint.restore(handle.result(PATIENCE)).assert_consumed()
    (slots,) = optimizer.optim.state.values()
    assert [tensor.tolist() for tensor in (parameter, *slots.values())] == before


def test_an_error_of_a_copy_does_not_reach_the_step(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(1)
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)

    def broken(*_: object) -> None:
        raise OSError("memory is gone")

    monkeypatch.setattr("distckpt.storage.snapshot.ctypes.memmove", broken)
    program.train()
    gate.set()
    with pytest.raises(CollectiveError, match="memory is gone"):
        handle.result(PATIENCE)


@pytest.mark.parametrize("wait", ["step", "wait_staged"])
def test_ctrl_c_while_the_program_helps_to_copy_stops_the_program_not_the_save(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    program = Program(1)
    before = program.values()
    handle = program.checkpoint.save_async(tmp_path / "ckpt", options=OVERLAP)
    take = _SharedWork._take
    taken: list[bool] = []

    def interrupted(work: _SharedWork) -> Any:
        part = take(work)
        if not taken:
            taken.append(True)
            signal.raise_signal(signal.SIGINT)
        return part

    monkeypatch.setattr(_SharedWork, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (program.optimizer.step if wait == "step" else handle.wait_staged)()
    assert handle._save._snapshot.is_complete
    gate.set()
    assert_holds(handle.result(PATIENCE), before)


# ---- the snapshot itself -----------------------------------------------------------------------------------------


def test_memory_is_given_back_after_the_copies_into_it_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    buffers = HostBuffers()
    give_back = buffers.give_back

    def broken(*_: object) -> None:
        raise RuntimeError("an earlier kernel has failed")

    monkeypatch.setattr("distckpt.storage.snapshot.join", broken)
    monkeypatch.setattr("distckpt.storage.snapshot.DeviceCopies.finish", lambda _: order.append("wait"))
    monkeypatch.setattr(HostBuffers, "give_back", lambda _, buffer: (order.append("give back"), give_back(buffer)))
    tensor = torch.randn(3, 4).t()
    job = WriteJob("t", 0, (4, 3), Box.whole((4, 3)), tensor, 0)
    with pytest.raises(RuntimeError, match="an earlier kernel"):
        Snapshot(LiveJobs.of([job]), [False], Watch(), buffers, None)
    assert order == ["wait", "give back"]


def test_a_snapshot_that_copies_nothing_later_keeps_no_tensor_alive() -> None:
    """As on a rank whose replicas others write: it watches all of them, and the handle keeps the snapshot."""
    replica, watch = torch.randn(3), Watch()
    watch.add("replica", replica)
    snapshot = Snapshot(LiveJobs.of([]), [], watch, HostBuffers(), None)
    gone = weakref.ref(replica)
    del replica, watch
    assert snapshot.is_complete
    assert gone() is None


def test_threads_share_the_copies() -> None:
    tensors = [torch.randn(9 << 20), torch.randn(300, 200).t(), torch.randn(3), torch.empty(0)]
    jobs = [
        WriteJob(f"t{n}", 0, tuple(tensor.shape), Box.whole(tuple(tensor.shape)), tensor, 0)
        for n, tensor in enumerate(tensors)
    ]
    snapshot = Snapshot(LiveJobs.of(jobs), [True] * len(jobs), Watch(), HostBuffers(), None)
    assert not snapshot.is_complete
    threads = [threading.Thread(target=snapshot.complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot.is_complete
    copied = snapshot.jobs()
    for number, tensor in enumerate(tensors):
        assert torch.equal(copied[number].tensor, tensor)
        assert not tensor.numel() or copied[number].tensor.data_ptr() != tensor.data_ptr()


def test_a_forked_process_waits_for_no_copy_of_its_parent(gate: threading.Event, path: str) -> None:
    """It has neither the thread that copies nor the memory that is copied into."""
    program = Program(1)
    before = program.values()
    handle = program.checkpoint.save_async(path, options=OVERLAP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: there are threads
        child = os.fork()
    if child == 0:
        signal.alarm(5)
        program.optimizer.step()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    assert_holds(handle.result(PATIENCE), before)
