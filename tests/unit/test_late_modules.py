"""Modules that get their memory or their final form late: meta device, wrappers on one side only, parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from distckpt import Checkpoint, LayoutError, RestoreOptions

PARTIAL = RestoreOptions(expect_partial=True)


def make(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def trained(seed: int) -> Checkpoint:
    model = make(seed)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return Checkpoint(model=model, optimizer=optimizer, step=seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- the meta device ---------------------------------------------------------------------------------------------


def test_memory_before_the_restore(path: str) -> None:
    saved = trained(1)
    with torch.device("meta"):
        model = make(2)
    live = Checkpoint(model=model, step=0)
    model.to_empty(device="cpu")  # new parameter objects
    live.optimizer = torch.optim.Adam(model.parameters())
    live.restore(saved.save(path)).assert_consumed()
    assert same(model, saved.model)


def test_memory_after_the_restore(path: str) -> None:
    """The values wait for it, and so do the slots."""
    saved = trained(1)
    with torch.device("meta"):
        model = make(2)
    live = Checkpoint(model=model, step=0)
    status = live.restore(saved.save(path), options=PARTIAL)
    assert live.step == 1
    assert "model/0/weight" in status.pending
    with pytest.raises(AssertionError, match=r"model/0/bias \(pending: waits for the memory \(to_empty\(\)\) of model"):
        status.assert_consumed()
    model.to_empty(device="cpu")
    live.optimizer = torch.optim.Adam(model.parameters())
    status.assert_consumed()
    assert same(model, saved.model)
    slots = saved.optimizer.state[saved.model[0].weight], live.optimizer.state[model[0].weight]
    assert torch.equal(slots[0]["exp_avg"], slots[1]["exp_avg"])


def test_an_optimizer_of_parameters_without_memory(path: str) -> None:
    """Its state waits; that of parameters which were replaced for good is of no use to anybody."""
    saved = trained(1)
    with torch.device("meta"):
        model = make(2)
    optimizer = torch.optim.Adam(model.parameters())
    live = Checkpoint(model=model, optimizer=optimizer, step=0)
    status = live.restore(saved.save(path), options=PARTIAL)
    assert "optimizer/.slots/model/0/weight/exp_avg" in status.pending
    assert not optimizer.state
    model.to_empty(device="cpu")
    optimizer.param_groups[0]["params"] = list(model.parameters())
    status.assert_consumed()
    assert torch.equal(optimizer.state[model[0].weight]["step"], torch.tensor(1.0))


def test_a_save_needs_memory(path: str) -> None:
    with torch.device("meta"):
        live = Checkpoint(model=nn.Linear(1, 1))
    with pytest.raises(LayoutError, match=r"model/weight: a tensor on the meta device has no data"):
        live.save(path)


def test_only_a_part_has_no_memory(path: str) -> None:
    file = Checkpoint(a=torch.ones(2), b=torch.ones(2)).write(path)
    live = Checkpoint(a=torch.zeros(2), b=torch.zeros(2, device="meta"))
    status = live.read(file, options=PARTIAL)
    assert live.a.tolist() == [1, 1]
    assert status.pending == ("b",)
    live.b = torch.zeros(2)
    assert live.b.tolist() == [1, 1]


# ---- wrappers on one side ----------------------------------------------------------------------------------------


def test_compiled_after_the_restore(path: str) -> None:
    saved = trained(1)
    live = Checkpoint(model=make(2), step=0)
    status = live.restore(saved.save(path), options=PARTIAL)
    inner = live.model
    live.model = torch.compile(inner, backend="eager")
    live.optimizer = torch.optim.Adam(inner.parameters())
    status.assert_consumed()
    batch = torch.ones(3, 2)
    assert torch.equal(live.model.eval()(batch), saved.model.eval()(batch))


def test_a_wrapper_that_comes_with_the_object(path: str) -> None:
    """The value waits, and meets a wrapped module."""
    saved = trained(1)
    live = Checkpoint(step=0)
    live.restore(saved.save(path), options=PARTIAL)
    inner = make(2)
    live.model = nn.DataParallel(torch.compile(inner, backend="eager"))
    assert same(inner, saved.model)


# ---- parametrizations --------------------------------------------------------------------------------------------

_PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", _PARAMETRIZATIONS)
def test_parametrized_on_both_sides(kind: str, path: str) -> None:
    wrap = _PARAMETRIZATIONS[kind]
    torch.manual_seed(1)
    saved, live = wrap(nn.Linear(3, 3)), wrap(nn.Linear(3, 3))
    with torch.no_grad():
        assert not torch.equal(saved.eval().weight, live.eval().weight)
        Checkpoint(m=live).read(Checkpoint(m=saved).write(path)).assert_consumed()
        assert torch.equal(saved.weight, live.weight)


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("direction", ["into a parametrized module", "out of one"])
def test_a_parametrization_on_one_side_through_rename(direction: str, path: str) -> None:
    """The original takes the place of the weight, and its slots follow."""
    torch.manual_seed(1)
    plain: Any = nn.Linear(3, 2)
    wrapped: Any = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", _Doubled())
    inside, outside = "m/parametrizations/weight/original", "m/weight"
    originals = {plain: lambda: plain.weight, wrapped: lambda: wrapped.parametrizations.weight.original}
    saved, live = (plain, wrapped) if direction.startswith("into") else (wrapped, plain)
    rename = {outside: inside} if saved is plain else {inside: outside}
    optimizer, twin = _stepped(saved), _stepped(live)
    file = Checkpoint(m=saved, o=optimizer).write(path)
    twin.state[originals[live]()]["momentum_buffer"].zero_()
    Checkpoint(m=live, o=twin).read(file, options=RestoreOptions(rename=rename)).assert_consumed()
    assert torch.equal(originals[live](), originals[saved]())
    buffers = [o.state[originals[m]()]["momentum_buffer"] for m, o in ((saved, optimizer), (live, twin))]
    assert torch.equal(*buffers)
    assert buffers[0].any()
