"""FSDP2: what a training loop does around saves and restores leaves nothing out and nothing stale."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distckpt
from distckpt.saving.background_save import BackgroundSave

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("process_group")]


def make(seed: int, comm: object) -> distckpt.Checkpoint:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    return distckpt.Checkpoint(comm=comm, model=model, optimizer=optimizer)


def train(ckpt: distckpt.Checkpoint) -> None:
    ckpt.optimizer.zero_grad()
    ckpt.model(torch.linspace(0, 1, 12).view(2, 6)).square().sum().backward()
    ckpt.optimizer.step()


def evaluate(ckpt: distckpt.Checkpoint) -> torch.Tensor:
    with torch.no_grad():  # leaves the root's parameters gathered: no backward follows
        return ckpt.model(torch.ones(1, 6))


def state(ckpt: distckpt.Checkpoint) -> list[torch.Tensor]:
    ckpt.model.reshard()
    tensors = list(ckpt.model.parameters())
    tensors += [slot for parameter in tensors for slot in ckpt.optimizer.state[parameter].values()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def test_a_save_after_an_evaluation_has_every_slot(mpi_dir: Path, comm: object, agree: Callable[..., None]) -> None:
    ckpt, twin = make(1, comm), make(2, comm)
    train(ckpt)
    train(twin)
    expected = state(ckpt)
    assert not any(torch.equal(a, b) for a, b in zip(expected, state(twin), strict=True) if a.dim())
    evaluate(ckpt)
    path = ckpt.save(mpi_dir / "ckpt")
    twin.restore(path).assert_consumed()
    agree(all(torch.equal(a, b) for a, b in zip(expected, state(twin), strict=True)))


def test_a_restore_after_an_evaluation_is_what_the_next_forward_uses(
    mpi_dir: Path, comm: object, agree: Callable[..., None]
) -> None:
    ckpt, twin = make(1, comm), make(2, comm)
    train(ckpt)
    train(twin)
    path = ckpt.save(mpi_dir / "ckpt")
    expected = evaluate(ckpt)
    assert not torch.equal(evaluate(twin), expected)
    twin.restore(path).assert_consumed()
    agree(torch.equal(evaluate(twin), expected))


def test_training_is_bit_exact_with_saves_and_evaluations_in_between(
    mpi_dir: Path, comm: object, agree: Callable[..., None]
) -> None:
    plain, saving = make(1, comm), make(1, comm)
    for _ in range(3):
        train(plain)
        saving.save(mpi_dir / "ckpt")  # before the first step, too
        train(saving)
        evaluate(saving)
    agree(all(torch.equal(a, b) for a, b in zip(state(plain), state(saving), strict=True)))


@pytest.mark.parametrize("overlap", [False, True])
def test_saves_in_the_background_hold_the_moment_of_the_call(
    mpi_dir: Path, comm: object, agree: Callable[..., None], overlap: bool
) -> None:
    ckpt = make(1, comm)
    train(ckpt)
    options = distckpt.SaveOptions(overlap=overlap, durable=False)
    for _ in range(10):
        expected = state(ckpt)
        handle = ckpt.save_async(mpi_dir / "ckpt", options=options)
        train(ckpt)
        twin = make(2, comm)
        twin.restore(handle.result()).assert_consumed()
        agree(all(torch.equal(a, b) for a, b in zip(expected, state(twin), strict=True)))
        agree(not all(torch.equal(a, b) for a, b in zip(expected, state(ckpt), strict=True)))


def test_a_sharded_parameter_that_changes_before_its_copy_fails_the_save(
    mpi_dir: Path, comm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = make(1, comm)
    train(ckpt)
    opened, begin = threading.Event(), BackgroundSave.begin
    monkeypatch.setattr(BackgroundSave, "begin", lambda *args: begin(*args) if opened.wait(30) else None)
    handle = ckpt.save_async(mpi_dir / "ckpt", options=distckpt.SaveOptions(overlap=True))
    with torch.no_grad():
        ckpt.model[1].weight.add_(1)
    opened.set()
    with pytest.raises(distckpt.CollectiveError, match="changed before the save had copied it: model/1/weight"):
        handle.result()
