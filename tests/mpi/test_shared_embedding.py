"""A pipeline whose first and last stage share an embedding: two objects on two ranks, one on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CheckpointWarning, SaveOptions

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Stage(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank == 0:
            self.embed = nn.Embedding(5, 3)
        else:
            self.head = nn.Linear(3, 5, bias=False)


def training(model: nn.Module, value: float) -> dict[str, Any]:
    (weight,) = model.parameters()
    optimizer = torch.optim.Adam([weight])
    with torch.no_grad():
        weight.copy_(torch.arange(15.0).view(5, 3) + value)
    slots = {name: weight.detach() * factor for name, factor in [("exp_avg", 2), ("exp_avg_sq", 3)]}
    optimizer.state[weight] = {"step": torch.tensor(value), **slots}
    return {"model": model, "optimizer": optimizer}


def tensors(objects: dict[str, Any]) -> list[torch.Tensor]:
    (weight,) = objects["model"].parameters()
    return [weight.detach(), *objects["optimizer"].state[weight].values()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("with_slots", [True, False])
def test_from_two_stages_to_one_rank_and_back(subcomm: Any, mpi_dir: Path, with_slots: bool) -> None:
    pair, alone = subcomm(2), subcomm(1)
    if pair is None:
        return
    stage = training(Stage(pair.rank), 7.0)
    Checkpoint(comm=pair, **stage).write(mpi_dir / "stages", options=FAST)
    if alone is not None:
        whole = training(Whole(), 0.0)
        assert not same(whole, stage)
        if not with_slots:
            whole["optimizer"].state.clear()
        Checkpoint(comm=alone, **whole).read(mpi_dir / "stages").assert_consumed()
        assert same(whole, stage)
        Checkpoint(comm=alone, **whole).write(mpi_dir / "whole", options=FAST)
    pair.Barrier()
    twin = training(Stage(pair.rank), 0.0)
    if not with_slots:
        twin["optimizer"].state.clear()
    Checkpoint(comm=pair, **twin).read(mpi_dir / "whole").assert_consumed()
    assert same(twin, stage)


def test_stages_that_differ_are_told_apart(subcomm: Any, mpi_dir: Path) -> None:
    pair, alone = subcomm(2), subcomm(1)
    if pair is None:
        return
    stage = training(Stage(pair.rank), 7.0)
    if pair.rank == 1:
        weight = stage["model"].head.weight
        stage["optimizer"].state[weight]["exp_avg"] += 1
    Checkpoint(comm=pair, **stage).write(mpi_dir / "stages", options=FAST)
    if alone is None:
        return
    with pytest.warns(CheckpointWarning, match="exp_avg of model/embed/weight in optimizer: two saved values"):
        status = Checkpoint(comm=alone, **training(Whole(), 0.0)).read(mpi_dir / "stages")
    with pytest.raises(AssertionError, match="exp_avg"):
        status.assert_consumed()
