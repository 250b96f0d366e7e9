"""Optimizers: state follows its parameter, groups follow their members, and nothing ever disturbs the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from distckpt import Checkpoint, CheckpointWarning, LayoutError, RestoreMismatchError, RestoreOptions

Keys = Callable[[str], set[str]]
Make = Callable[[Iterable[Any]], Optimizer]
PARTIAL = RestoreOptions(expect_partial=True)

_OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.01),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "SparseAdam": lambda p: torch.optim.SparseAdam(list(p), lr=0.1),
}
_TESTED = {
    torch.optim.LBFGS,
    Optimizer,
    *(type(make([nn.Parameter(torch.ones(2, 2))])) for make in _OPTIMIZERS.values()),
}


def test_all_optimizers_of_torch_are_tested() -> None:
    found = {cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, Optimizer)}
    assert found == _TESTED


class _Model(nn.Module):
    """Three matrices."""

    def __init__(self, seed: int, names: str = "abc") -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 3)))

    def loss(self, step: int, *, sparse: bool = False) -> torch.Tensor:
        losses = []
        for name, parameter in sorted(self.named_parameters()):
            generator = torch.Generator().manual_seed(step * 10 + ord(name))
            x = torch.randn(3, 2, generator=generator)
            rows = torch.tensor([step % 4, (step + 1) % 4])
            used = nn.functional.embedding(rows, parameter, sparse=True) if sparse else parameter
            losses.append((used @ x).square().sum())
        return torch.stack(losses).sum()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


def train(model: _Model, optimizer: Optimizer, steps: range) -> None:
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for step in steps:

        def closure(step: int = step) -> Any:
            optimizer.zero_grad()
            loss = model.loss(step, sparse=sparse)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def equal(a: Any, b: Any) -> bool:
    """Same bits and types, in any nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def slots(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The state by parameter name, copied."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        for parameter, state in optimizer.state.items()
    }


# ---- every optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", _OPTIMIZERS)
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
def test_training_goes_on_bit_for_bit(kind: str, stepped: bool, path: str) -> None:
    """Into a twin with other values, its parameters in another order, its groups in another order, other rates."""
    make = _OPTIMIZERS[kind]
    rate: Callable[[float], Any] = torch.tensor if "tensor" in kind else float
    model = _Model(1)
    optimizer = make([{"params": [model.a, model.b], "lr": rate(0.1)}, {"params": [model.c], "lr": rate(0.02)}])
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    saved_slots = slots(model, optimizer)
    train(model, optimizer, range(3, 6))

    twin = _Model(2, "cab")
    twin_optimizer = make([{"params": [twin.c], "lr": rate(0.5)}, {"params": [twin.b, twin.a], "lr": rate(0.25)}])
    if stepped:
        train(twin, twin_optimizer, range(20, 22))
    assert not equal(twin.values(), model.values())
    assert kind == "SGD" or not equal(slots(twin, twin_optimizer), saved_slots)
    Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    assert equal(slots(twin, twin_optimizer), saved_slots)
    assert [float(group["lr"]) for group in twin_optimizer.param_groups] == pytest.approx([0.02, 0.1])
    train(twin, twin_optimizer, range(3, 6))
    assert equal(twin.values(), model.values())
    assert equal(slots(twin, twin_optimizer), slots(model, optimizer))


@pytest.mark.parametrize("kind", _OPTIMIZERS)
def test_a_file_from_before_the_first_step_takes_the_state_away(kind: str, path: str) -> None:
    make = _OPTIMIZERS[kind]
    model = _Model(1)
    optimizer = make(model.parameters())
    before = slots(model, optimizer)  # Adagrad has a state from the start
    checkpoint = Checkpoint(m=model, o=optimizer)
    file = checkpoint.write(path)
    assert equal(slots(model, optimizer), before)
    train(model, optimizer, range(3))

    twin = _Model(2)
    twin_optimizer = make(twin.parameters())
    train(twin, twin_optimizer, range(20, 22))
    assert kind == "SGD" or not equal(slots(twin, twin_optimizer), before)
    Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    assert equal(slots(twin, twin_optimizer), before)
    train(twin, twin_optimizer, range(3))
    assert equal(twin.values(), model.values())


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_whose_state_is_a_structure(stepped: bool, search: str | None, path: str) -> None:
    def make(model: _Model) -> Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4, line_search_fn=search)

    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = make(model), make(twin)
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    saved = slots(model, optimizer)
    train(model, optimizer, range(3, 5))
    if stepped:
        train(twin, twin_optimizer, range(20, 22))
    assert not equal(slots(twin, twin_optimizer), saved)
    Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    train(twin, twin_optimizer, range(3, 5))
    assert equal(twin.values(), model.values())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_goes_back_to_its_first_step(search: str | None, path: str) -> None:
    """It has other slots then than later, and numbers in place of tensors."""
    model = _Model(1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1, line_search_fn=search)
    train(model, optimizer, range(1))
    live = Checkpoint(m=model, o=optimizer)
    file, saved = live.write(path), set(optimizer.state[model.a])
    train(model, optimizer, range(1, 4))
    expected = model.values()
    assert saved < set(optimizer.state[model.a])
    live.read(file).assert_consumed()
    assert saved == set(optimizer.state[model.a])
    train(model, optimizer, range(1, 4))
    assert equal(model.values(), expected)


# ---- nothing disturbs the training -------------------------------------------------------------------------------


def test_lbfgs_cannot_be_resharded(path: str) -> None:
    """Its vectors go over all parameters of a rank, and say nothing of where in them a parameter is."""
    model, half = _Model(1), _Model(2, "a")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    file = Checkpoint(m=model, o=optimizer).write(path)
    fresh = torch.optim.LBFGS(half.parameters())
    before = half.values()
    live = Checkpoint(m=half, o=fresh)
    with pytest.raises(RestoreMismatchError, match=r"o/\.slots/m/a: .*cannot be resharded.*of 12 elements"):
        live.read(file, options=PARTIAL)
    assert equal(half.values(), before)
    with pytest.warns(CheckpointWarning, match="cannot be resharded"):
        live.read(file, options=RestoreOptions(on_mismatch="skip", expect_partial=True))
    assert not fresh.state
    live.read(file, options=RestoreOptions(skip_slots=True, expect_partial=True))
    assert torch.equal(half.a, model.a)
    twin = _Model(3)
    Checkpoint(m=twin, o=torch.optim.LBFGS(twin.parameters())).read(file).assert_consumed()


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
def test_lbfgs_over_its_parameters_in_another_order_is_a_mismatch(stepped: bool, path: str) -> None:
    """Its vectors have the elements of all parameters, in the order of these."""
    model, twin = _Model(1), _Model(2, "cab")
    optimizer, twin_optimizer = (torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3) for m in (model, twin))
    train(model, optimizer, range(2))
    file = Checkpoint(m=model, o=optimizer).write(path)
    if stepped:
        train(twin, twin_optimizer, range(20, 22))
    before = slots(twin, twin_optimizer)
    live = Checkpoint(m=twin, o=twin_optimizer)
    with pytest.raises(RestoreMismatchError, match=r"o/\.slots/m/a: .*over m/a, m/b, m/c.* order m/c, m/a, m/b"):
        live.read(file)
    with pytest.warns(CheckpointWarning, match="order m/c, m/a, m/b"):
        live.read(file, options=RestoreOptions(on_mismatch="skip", expect_partial=True))
    assert equal(slots(twin, twin_optimizer), before)
    assert torch.equal(twin.a, model.a)
    live.read(file, options=RestoreOptions(skip_slots=True)).expect_partial()


def test_saves_and_restores_leave_the_training_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = _Model(1), _Model(1)
    optimizer = torch.optim.AdamW([{"params": [model.a]}, {"params": [model.b, model.c], "lr": 0.2}], lr=0.1)
    twin_optimizer = torch.optim.AdamW([{"params": [twin.a]}, {"params": [twin.b, twin.c], "lr": 0.2}], lr=0.1)
    scheduler, twin_scheduler = (torch.optim.lr_scheduler.StepLR(o, 2) for o in (optimizer, twin_optimizer))
    checkpoint = Checkpoint(m=model, o=optimizer, s=scheduler)

    def forbidden(name: str) -> Callable[..., Any]:
        def called(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"{name} was called")

        return called

    for step in range(6):
        with monkeypatch.context() as patch:
            for name in ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"):
                patch.setattr(torch.optim.AdamW, name, forbidden(name))
                patch.setattr(Optimizer, name, forbidden(name))
            patch.setattr(torch.Tensor, "backward", forbidden("backward"))
            grads = [parameter.grad for parameter in model.parameters()]
            file = checkpoint.save(path)
            checkpoint.write(path)
            assert len(optimizer.state) == (3 if step else 0)
            checkpoint.restore(file).assert_consumed()
            checkpoint.restore(None)
            assert len(optimizer.state) == (3 if step else 0)
            assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
        for m, o, s in ((model, optimizer, scheduler), (twin, twin_optimizer, twin_scheduler)):
            train(m, o, range(step, step + 1))
            s.step()
    assert equal(model.values(), twin.values())
    assert equal(slots(model, optimizer), slots(twin, twin_optimizer))
    assert equal(optimizer.state_dict(), twin_optimizer.state_dict())
    assert equal(scheduler.state_dict(), twin_scheduler.state_dict())


def test_a_save_changes_no_bit_of_memory(path: str) -> None:
    model = _Model(1)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    checkpoint = Checkpoint(m=model, o=optimizer)
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    before = [(tensor.data_ptr(), tensor._version, tensor.detach().clone()) for tensor in tensors]
    checkpoint.save(path)
    after = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    for tensor, same, (address, version, value) in zip(tensors, after, before, strict=True):
        assert tensor is same
        assert (tensor.data_ptr(), tensor._version) == (address, version)
        assert torch.equal(tensor, value)


# ---- parameters without state, or without a counterpart ----------------------------------------------------------


def test_frozen_and_unused_parameters_have_no_state(path: str, keys_of: Keys) -> None:
    def make(seed: int, *, freeze: bool) -> tuple[_Model, Optimizer]:
        model = _Model(seed)
        optimizer = torch.optim.Adam(model.parameters())
        if freeze:
            model.b.requires_grad_(False)
        train(model, optimizer, range(2))
        return model, optimizer

    model, optimizer = make(1, freeze=True)
    file = Checkpoint(m=model, o=optimizer).write(path)
    assert not any(key.startswith("o/.slots/m/b/") for key in keys_of(file))
    train(model, optimizer, range(2, 4))

    twin, twin_optimizer = make(2, freeze=False)
    assert twin.b in twin_optimizer.state
    twin.b.requires_grad_(False)
    Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    assert twin.b not in twin_optimizer.state
    train(twin, twin_optimizer, range(2, 4))
    assert equal(twin.values(), model.values())


def test_an_optimizer_that_is_not_in_the_file_is_left_alone(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    file = Checkpoint(m=model).write(path)
    optimizer = torch.optim.Adam(twin.parameters())
    train(twin, optimizer, range(2))
    before = slots(twin, optimizer)
    status = Checkpoint(m=twin, o=optimizer).read(file, options=PARTIAL)
    assert equal(twin.values(), model.values())
    assert equal(slots(twin, optimizer), before)
    assert "o/.slots/m/a/exp_avg" in status.missing
    assert not any("param_groups" in key for key in status.missing)


def test_a_parameter_that_is_not_in_the_file_keeps_its_state(path: str) -> None:
    model, twin = _Model(1, "ab"), _Model(2, "abc")
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    train(model, optimizer, range(3))
    train(twin, twin_optimizer, range(1))
    file = Checkpoint(m=model, o=optimizer).write(path)
    before = slots(twin, twin_optimizer)
    with pytest.warns(CheckpointWarning, match="o/param_groups: parameter groups have other members"):
        status = Checkpoint(m=twin, o=twin_optimizer).read(file, options=PARTIAL)
    after = slots(twin, twin_optimizer)
    assert equal(after["c"], before["c"])
    assert equal(after["a"], slots(model, optimizer)["a"])
    assert status.missing == ("m/c", *(f"o/.slots/m/c/{name}" for name in ("exp_avg", "exp_avg_sq", "step")))


def test_a_parameter_that_joins_the_optimizer_later(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.Adam([{"params": [model.a, model.b]}, {"params": [model.c], "lr": 0.5}])
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    train(model, optimizer, range(3, 5))

    twin_optimizer = torch.optim.Adam([twin.a, twin.b])
    checkpoint = Checkpoint(m=twin, o=twin_optimizer)
    with pytest.warns(CheckpointWarning, match=r"o/param_groups: 1 saved parameter group\(s\) have no live group"):
        status = checkpoint.read(file)
    assert status.pending == tuple(f"o/.slots/m/c/{name}" for name in ("exp_avg", "exp_avg_sq", "step"))
    with pytest.raises(AssertionError, match=r"o/\.slots/m/c/exp_avg \(pending: waits for .*m/c"):
        status.assert_consumed()
    twin_optimizer.add_param_group({"params": [twin.c]})
    status.assert_consumed()
    assert twin_optimizer.param_groups[1]["lr"] == 0.5
    train(twin, twin_optimizer, range(3, 5))
    assert equal(twin.values(), model.values())


def test_an_optimizer_that_comes_later_has_its_state_before_its_first_step(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    train(model, optimizer, range(3, 5))
    checkpoint = Checkpoint(m=twin)
    status = checkpoint.read(file)
    assert len([key for key in status.pending if ".slots" in key]) == 9
    checkpoint.o = torch.optim.Adam(twin.parameters())
    assert checkpoint.o.param_groups[0]["lr"] == 0.3
    assert equal(slots(twin, checkpoint.o)["a"]["step"], torch.tensor(3.0))
    status.assert_consumed()
    train(twin, checkpoint.o, range(3, 5))
    assert equal(twin.values(), model.values())


def test_state_is_restored_once(path: str) -> None:
    """What training does to it afterwards is no reason to restore it again, whatever is still pending."""
    model = _Model(1)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(3))
    checkpoint = Checkpoint(m=model, o=optimizer, later=torch.ones(2))
    trained = checkpoint.write(path)
    fresh_model = _Model(1)
    fresh = Checkpoint(m=fresh_model, o=torch.optim.Adam(fresh_model.parameters()), later=torch.ones(2)).write(
        f"{path}-2"
    )
    for file, n in ((trained, 3), (fresh, 0)):
        twin = _Model(2)
        twin_optimizer = torch.optim.Adam(twin.parameters())
        live = Checkpoint(m=twin, o=twin_optimizer)
        status = live.read(file)
        train(twin, twin_optimizer, range(1))
        before = slots(twin, twin_optimizer), twin.values()
        status.assert_existing_objects_matched()
        live.later = torch.zeros(2)
        status.assert_consumed()
        assert live.later.tolist() == [1, 1]
        assert equal((slots(twin, twin_optimizer), twin.values()), before)
        assert slots(twin, twin_optimizer)["a"]["step"] == n + 1


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
def test_slots_that_training_adds_later_are_no_mismatch(stepped: bool, path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    train(model, optimizer, range(2))
    if stepped:
        train(twin, twin_optimizer, range(1))
    checkpoint = Checkpoint(m=twin, o=twin_optimizer)
    status = checkpoint.read(Checkpoint(m=model, o=optimizer, n=1).write(path), options=PARTIAL)
    twin_optimizer.state[twin.a]["more"] = torch.ones(2)
    twin_optimizer.state[twin.b].pop("exp_avg")
    twin_optimizer.state.pop(twin.c)
    checkpoint.n = 0
    assert checkpoint.n == 1
    assert "more" in twin_optimizer.state[twin.a]
    assert "exp_avg" not in twin_optimizer.state[twin.b]
    assert twin.c not in twin_optimizer.state
    status.initialize_or_restore()
    assert status.mismatched == status.unexpected == ()


# ---- slots that differ -------------------------------------------------------------------------------------------


def test_other_slot_names_are_a_mismatch(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters(), amsgrad=True)
    train(model, optimizer, range(1))
    train(twin, twin_optimizer, range(1))
    file = Checkpoint(m=model, o=optimizer).write(path)
    before = twin.values(), slots(twin, twin_optimizer)
    checkpoint = Checkpoint(m=twin, o=twin_optimizer)
    with pytest.raises(RestoreMismatchError, match=r"o/\.slots/m/a: saved slots .*live slots .*max_exp_avg_sq"):
        checkpoint.read(file)
    assert equal((twin.values(), slots(twin, twin_optimizer)), before)
    with pytest.warns(CheckpointWarning, match="skipped"):
        checkpoint.read(file, options=RestoreOptions(on_mismatch="skip"))
    assert equal(slots(twin, twin_optimizer), before[1])
    assert equal(twin.values(), model.values())


def test_the_key_of_a_mismatch_is_that_of_the_file_where_the_optimizer_is_the_root(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters(), amsgrad=True)
    train(model, optimizer, range(1))
    train(twin, twin_optimizer, range(1))
    file = Checkpoint(optimizer, m=model).write(path)
    with pytest.raises(RestoreMismatchError, match=r"\n  \.slots/m/a: saved slots .*live slots .*max_exp_avg_sq"):
        Checkpoint(twin_optimizer, m=twin).read(file)


def test_a_fresh_optimizer_gets_exactly_the_saved_slots(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters(), amsgrad=True)
    train(model, optimizer, range(1))
    Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert equal(slots(twin, twin_optimizer), slots(model, optimizer))
    assert twin_optimizer.param_groups[0]["amsgrad"] is False
    for state in twin_optimizer.state.values():
        assert not state["exp_avg"].requires_grad
        assert state["step"].dtype is torch.float32


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
def test_slots_of_a_skipped_parameter_are_skipped(stepped: bool, path: str) -> None:
    model, twin = _Model(1), _Model(2)
    twin.b = nn.Parameter(torch.randn(5, 3))
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    train(model, optimizer, range(3))
    if stepped:
        train(twin, twin_optimizer, range(1))
    before = slots(twin, twin_optimizer).get("b")
    checkpoint = Checkpoint(m=twin, o=twin_optimizer)
    with pytest.warns(CheckpointWarning, match="m/b skipped"):
        status = checkpoint.read(
            Checkpoint(m=model, o=optimizer).write(path), options=RestoreOptions(on_mismatch="skip")
        )
    assert [key for key, _, _ in status.mismatched] == ["m/b"]
    assert equal(slots(twin, twin_optimizer).get("b"), before)
    assert equal(slots(twin, twin_optimizer)["a"], slots(model, optimizer)["a"])
    assert status.unexpected == ("m/b", *(f"o/.slots/m/b/{name}" for name in ("exp_avg", "exp_avg_sq", "step")))
    train(twin, twin_optimizer, range(1))


def test_slots_of_a_parameter_skipped_earlier_are_skipped_too(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    twin.b = nn.Parameter(torch.randn(5, 3))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(3))
    checkpoint = Checkpoint(m=twin)
    with pytest.warns(CheckpointWarning, match="m/b skipped"):
        checkpoint.read(Checkpoint(m=model, o=optimizer).write(path), options=RestoreOptions(on_mismatch="skip"))
    checkpoint.o = torch.optim.Adam(twin.parameters())
    assert set(slots(twin, checkpoint.o)) == {"a", "c"}
    train(twin, checkpoint.o, range(1))


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh twin", "trained twin"])
def test_cast_slots_follow_the_parameter_and_step_never(stepped: bool, path: str) -> None:
    model, twin = _Model(1), _Model(2).bfloat16()
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    if stepped:
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter)
        twin_optimizer.step()
    with pytest.raises(RestoreMismatchError, match=r"m/a: saved .*float32, live .*bfloat16"):
        Checkpoint(m=twin, o=twin_optimizer).read(file)
    Checkpoint(m=twin, o=twin_optimizer).read(file, options=RestoreOptions(cast=True)).assert_consumed()
    expected, got = slots(model, optimizer), slots(twin, twin_optimizer)
    for name in "abc":
        assert equal(got[name]["exp_avg"], expected[name]["exp_avg"].bfloat16())
        assert equal(got[name]["step"], torch.tensor(3.0))
        assert torch.equal(getattr(twin, name), getattr(model, name).bfloat16())


def test_a_step_of_another_dtype_is_never_cast(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    train(model, optimizer, range(1))
    train(twin, twin_optimizer, range(1))
    twin_optimizer.state[twin.a]["step"] = torch.tensor(1.0, dtype=torch.float64)
    file = Checkpoint(m=model, o=optimizer).write(path)
    with pytest.raises(RestoreMismatchError, match=r"o/\.slots/m/a/step: saved .*float32, live .*float64"):
        Checkpoint(m=twin, o=twin_optimizer).read(file, options=RestoreOptions(cast=True))


# ---- groups ------------------------------------------------------------------------------------------------------


def _groups(optimizer: Optimizer, name: str = "lr") -> list[Any]:
    return [group[name] for group in optimizer.param_groups]


def test_options_of_a_group_follow_its_members(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.a], "lr": 1.0, "betas": (0.5, 0.6)},
            {"params": [model.b], "lr": 2.0, "name": "decay"},
            {"params": [model.c], "lr": 3.0, "extra": [1, {"x": None}]},
        ]
    )
    twin_optimizer = torch.optim.AdamW([{"params": [twin.c]}, {"params": [twin.a]}, {"params": [twin.b], "own": 7}])
    params = [group["params"] for group in twin_optimizer.param_groups]
    Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert _groups(twin_optimizer) == [3.0, 1.0, 2.0]
    assert twin_optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert type(twin_optimizer.param_groups[1]["betas"]) is tuple
    assert twin_optimizer.param_groups[2]["name"] == "decay"
    assert twin_optimizer.param_groups[2]["own"] == 7  # the file says nothing about it
    assert twin_optimizer.param_groups[0]["extra"] == [1, {"x": None}]
    assert all(group["params"] is old for group, old in zip(twin_optimizer.param_groups, params, strict=True))


@pytest.mark.parametrize("name", ["schedule.warmup", "a/b", ""])
@pytest.mark.parametrize("value", [3, torch.tensor(3)])
def test_an_entry_that_the_live_group_lacks_gets_its_own_name(path: str, name: str, value: object) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), name: value}], lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert name not in twin_optimizer.param_groups[0]
    Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert twin_optimizer.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert twin_optimizer.param_groups[0][name] == 3


@pytest.mark.parametrize("names", ["ba", "cab"])
@pytest.mark.filterwarnings("ignore:.*matched by index")
def test_names_of_members_stay_with_them(names: str, path: str, keys_of: Keys) -> None:
    """Torch keeps in `param_names` how the program called the parameters, in their order."""
    model, twin = _Model(1, "ab"), _Model(2, names)
    optimizer, other = (torch.optim.SGD(m.named_parameters(), lr=1.0) for m in (model, twin))
    file = Checkpoint(m=model, o=optimizer).write(path)
    Checkpoint(m=twin, o=other).read(file)
    assert other.param_groups[0]["param_names"] == [*names]
    assert "o/param_groups/0/param_names" not in keys_of(file)


def test_a_tensor_rate_is_restored_in_place(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.125), foreach=False)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=rate, foreach=False)
    status = Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path))
    status.assert_consumed()
    assert twin_optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.125


def test_groups_with_other_members_match_by_index_with_a_warning(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.SGD([{"params": [model.a], "lr": 1.0}, {"params": [model.b, model.c], "lr": 2.0}])
    twin_optimizer = torch.optim.SGD([{"params": [twin.a, twin.b]}, {"params": [twin.c]}], lr=9.0)
    file = Checkpoint(m=model, o=optimizer).write(path)
    with pytest.warns(CheckpointWarning, match="o/param_groups: parameter groups have other members.*by index"):
        status = Checkpoint(m=twin, o=twin_optimizer).read(file)
    assert _groups(twin_optimizer) == [1.0, 2.0]
    status.assert_consumed()


def test_a_group_with_other_members_gets_the_options_that_no_other_group_has(path: str) -> None:
    """As after freezing a parameter where the groups are in another order, too."""
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.SGD([{"params": [model.a, model.b], "lr": 1.0}, {"params": [model.c], "lr": 2.0}])
    twin_optimizer = torch.optim.SGD([{"params": [twin.c]}, {"params": [twin.a]}], lr=9.0)
    file = Checkpoint(m=model, o=optimizer).write(path)
    with pytest.warns(CheckpointWarning, match="parameter groups have other members"):
        Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    assert _groups(twin_optimizer) == [2.0, 1.0]


def test_members_that_the_program_no_longer_has_do_not_count(path: str) -> None:
    """As on a pipeline stage, which has some members of a group, or none."""
    model, twin = _Model(1), _Model(2, "b")
    optimizer = torch.optim.SGD([{"params": [model.a], "lr": 1.0}, {"params": [model.b, model.c], "lr": 2.0}])
    twin_optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [twin.b]}], lr=9.0)
    status = Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path), options=PARTIAL)
    assert _groups(twin_optimizer) == [1.0, 2.0]
    assert torch.equal(twin.b, model.b)
    assert status.unexpected == ("m/a", "m/c")


def test_another_number_of_groups_keeps_the_live_options_with_a_warning(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.Adam([{"params": [model.a, model.b]}, {"params": [model.c]}], lr=0.1)
    train(model, optimizer, range(3))
    file = Checkpoint(m=model, o=optimizer).write(path)
    train(model, optimizer, range(3, 6))
    twin_optimizer = torch.optim.Adam([twin.c, twin.a, twin.b], lr=0.1, eps=1e-8)
    with pytest.warns(CheckpointWarning, match=r"2 saved parameter group\(s\) have no live group with the same param"):
        status = Checkpoint(m=twin, o=twin_optimizer).read(file, options=PARTIAL)
    status.assert_existing_objects_matched()
    assert {key.rsplit("/", 1)[0] for key in status.unexpected} == {"o/param_groups/0", "o/param_groups/1"}
    train(twin, twin_optimizer, range(3, 6))  # regrouped, and still bit for bit: state follows the parameters
    assert equal(twin.values(), model.values())


def test_a_group_that_matches_is_restored_whatever_the_others_do(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer = torch.optim.SGD([{"params": [model.a], "lr": 1.0}, {"params": [model.b, model.c], "lr": 2.0}])
    twin_optimizer = torch.optim.SGD([{"params": [twin.b]}, {"params": [twin.c]}, {"params": [twin.a]}], lr=9.0)
    file = Checkpoint(m=model, o=optimizer).write(path)
    with pytest.warns(CheckpointWarning, match=r"1 saved parameter group\(s\) have no live group"):
        Checkpoint(m=twin, o=twin_optimizer).read(file, options=PARTIAL)
    assert _groups(twin_optimizer) == [9.0, 9.0, 1.0]


def test_another_kind_of_optimizer_is_warned_of(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    groups = [{"params": [model.a]}, {"params": [model.b, model.c]}]
    saved = torch.optim.Adam(groups)
    train(model, saved, range(1))
    file = Checkpoint(m=model, o=saved).write(path)
    live = Checkpoint(m=twin, o=torch.optim.SGD([{"params": [twin.a]}, {"params": [twin.b, twin.c]}], lr=0.1))
    text = r"o/param_groups: saved with the options amsgrad, .*, and without dampening, momentum, nesterov, as by an"
    with pytest.warns(CheckpointWarning, match=text) as caught:
        live.read(file)
    assert len(caught) == 1


def test_options_that_a_scheduler_adds_are_no_other_kind_of_optimizer(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    saved, live = torch.optim.Adam(model.parameters()), torch.optim.AdamW(twin.parameters())
    torch.optim.lr_scheduler.OneCycleLR(saved, max_lr=0.1, total_steps=10)
    Checkpoint(m=twin, o=live).read(Checkpoint(m=model, o=saved).write(path)).assert_consumed()


@pytest.mark.parametrize("fresh", [False, True])
def test_group_entries_that_are_tuples_of_tensors(fresh: bool, path: str, keys_of: Keys) -> None:
    def make(seed: int) -> tuple[_Model, torch.optim.Adam, Checkpoint]:
        model = _Model(seed)
        betas = (0.5, 0.6) if fresh and seed == 2 else (torch.tensor(0.1 * seed), torch.tensor(0.2 * seed))
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1 * seed), betas=betas, foreach=False)
        train(model, optimizer, range(2))
        return model, optimizer, Checkpoint(m=model, o=optimizer)

    model, optimizer, checkpoint = make(1)
    twin, other, live = make(2)
    file = checkpoint.write(path)
    assert keys_of(file) >= {"o/param_groups/0/betas", "o/param_groups/0/betas/0", "o/param_groups/0/betas/1"}
    live.read(file).assert_consumed()
    (group,), (restored,) = optimizer.param_groups, other.param_groups
    assert type(restored["betas"]) is tuple
    assert equal(restored["betas"], group["betas"])
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert equal(twin.values(), model.values())


def test_a_group_entry_that_cannot_be_stored_is_refused(path: str) -> None:
    model = _Model(1)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "hook": print}], lr=0.1)
    with pytest.raises(LayoutError, match=r"o/param_groups/0/hook: a param-group entry of type builtin"):
        Checkpoint(m=model, o=optimizer).write(path)


def test_a_group_entry_that_is_named_by_no_str_is_refused(path: str) -> None:
    model = _Model(1)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), 3: 0.5}], lr=0.1)
    with pytest.raises(LayoutError, match=r"o/param_groups/0: a param-group entry named 3 cannot be stored"):
        Checkpoint(m=model, o=optimizer).write(path)


def test_slots_that_are_named_by_no_str_are_refused(path: str) -> None:
    model = _Model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.a] = {0: torch.ones(2)}
    with pytest.raises(LayoutError, match=r"o: m/a has a slot named 0\. Name slots by a str"):
        Checkpoint(m=model, o=optimizer).write(path)


def test_state_under_other_keys_than_parameters_is_refused(path: str) -> None:
    model = _Model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["global"] = 5  # type: ignore[index]
    words = r"o/\.state: optimizer state under 'global' belongs to no parameter .*entry of a param group.*or track it"
    with pytest.raises(LayoutError, match=words):
        Checkpoint(m=model, o=optimizer).write(path)


def test_state_of_no_parameter_is_kept_in_a_param_group_instead(path: str) -> None:
    """What the error of the test above says to do."""
    first, second = (torch.optim.SGD(_Model(1).parameters(), lr=0.1) for _ in range(2))
    first.param_groups[0]["global"] = torch.tensor(5.0)
    second.param_groups[0]["global"] = torch.tensor(0.0)
    Checkpoint(o=second).read(Checkpoint(o=first).write(path)).assert_consumed()
    assert second.param_groups[0]["global"] == 5


def test_python_slots(path: str) -> None:
    def make(value: Any) -> tuple[_Model, Optimizer]:
        model = _Model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.a] = {"count": value, "window": [torch.full((2,), float(value)), None, {"n": value}]}
        return model, optimizer

    (model, optimizer), (twin, twin_optimizer) = make(5), make(6)
    file = Checkpoint(m=model, o=optimizer).write(path)
    for fresh in (False, True):
        if fresh:
            twin_optimizer.state.clear()
        assert not equal(slots(twin, twin_optimizer), slots(model, optimizer))
        Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
        assert equal(slots(twin, twin_optimizer), slots(model, optimizer))
        twin_optimizer.state[twin.a]["count"] = -1


@pytest.mark.parametrize("fresh", [False, True])
def test_slots_of_numpy_arrays(fresh: bool, path: str) -> None:
    def make(value: float) -> tuple[_Model, Optimizer]:
        model = _Model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.a] = {"bare": np.full(3, value), "inside": [np.full((4, 2), value), 1]}
        return model, optimizer

    (model, optimizer), (twin, twin_optimizer) = make(5.0), make(6.0)
    assert repr(twin_optimizer.state[twin.a]) != repr(optimizer.state[model.a])
    if fresh:
        twin_optimizer.state.clear()
    Checkpoint(m=twin, o=twin_optimizer).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert repr(twin_optimizer.state[twin.a]) == repr(optimizer.state[model.a])


@pytest.mark.parametrize("late", [False, True])
def test_training_goes_on_after_a_restore_in_inference_mode(late: bool, path: str) -> None:
    model, twin = _Model(1), _Model(2)
    optimizer, twin_optimizer = (torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, twin))
    train(model, optimizer, range(2))
    file = Checkpoint(m=model, o=optimizer).write(path)
    checkpoint = Checkpoint(m=twin) if late else Checkpoint(m=twin, o=twin_optimizer)
    with torch.inference_mode():
        checkpoint.read(file, options=PARTIAL)
        if late:
            checkpoint.o = twin_optimizer
    for each in ((model, optimizer), (twin, twin_optimizer)):
        train(*each, range(2, 4))
    assert equal(twin.values(), model.values())


def test_a_slot_whose_kind_changed(path: str) -> None:
    def make(slot: Any) -> Checkpoint:
        model = _Model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.a] = {"slot": slot}
        return Checkpoint(m=model, o=optimizer)

    kinds = {"number": 5, "tensor": torch.ones(2), "structure": [torch.ones(2), 1]}
    for name, slot in kinds.items():
        file = make(slot).write(path)
        for other, live in kinds.items():
            if name != other:
                with pytest.raises(RestoreMismatchError, match=r"o/\.slots/m/a/slot"):
                    make(live).read(file)


def test_two_optimizers_of_one_parameter(path: str) -> None:
    model, twin = _Model(1), _Model(2)
    first, second = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for optimizer in (first, second):
        train(model, optimizer, range(2))
    file = Checkpoint(m=model, one=first, two=second).write(path)
    twins = torch.optim.Adam(twin.parameters()), torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
    Checkpoint(m=twin, one=twins[0], two=twins[1]).read(file).assert_consumed()
    assert equal(slots(twin, twins[0]), slots(model, first))
    assert equal(slots(twin, twins[1]), slots(model, second))


class _Ahead(Optimizer):
    """As SAM and Lookahead do: steps another optimizer, and has a state of its own."""

    def __init__(self, base: Optimizer, *, shares_state: bool) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups
        if shares_state:
            self.state = base.state

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", torch.zeros_like(parameter))
            slow.lerp_(parameter.detach(), 0.5)


@pytest.mark.parametrize(("shares_state", "also_tracked"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_inside_another(
    shares_state: bool, also_tracked: bool, stepped: bool, path: str, keys_of: Keys
) -> None:
    def make(seed: int) -> tuple[_Model, _Ahead, Checkpoint]:
        model = _Model(seed)
        optimizer = _Ahead(torch.optim.Adam(model.parameters(), lr=0.1 * seed), shares_state=shares_state)
        others = {"base": optimizer.base} if also_tracked else {}
        return model, optimizer, Checkpoint(m=model, o=optimizer, **others)

    model, optimizer, checkpoint = make(1)
    train(model, optimizer, range(2))
    twin, other, live = make(2)
    if stepped:
        train(twin, other, range(1))
    file = checkpoint.write(path)
    live.read(file).assert_consumed()
    for saved, restored in ((optimizer, other), (optimizer.base, other.base)):
        assert equal(slots(twin, restored), slots(model, saved))
    assert other.base.param_groups[0]["lr"] == 0.1
    assert sum(key.endswith("/exp_avg") for key in keys_of(file)) == len([*model.parameters()])


class _Counting(Optimizer):
    """Has a state of its own beside that of the optimizer that it steps, as PostLocalSGDOptimizer."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.state, self.param_groups = base, base.state, base.param_groups

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "step": 3, "scale": torch.ones(1)}


class _Nested(_Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "groups": []}


class _Silent(_Counting):
    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("ask otherwise")


def _with_hook(optimizer: Optimizer) -> Optimizer:
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "step": 3})
    return optimizer


@pytest.mark.parametrize("wrap", [_Counting, _with_hook])
def test_what_only_the_state_dict_of_an_optimizer_has_is_refused(wrap: Any, path: str) -> None:
    model = _Model(1)
    file = Checkpoint(m=model, o=torch.optim.SGD(model.parameters(), lr=0.1)).write(path)
    live = Checkpoint(m=model, o=wrap(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(LayoutError, match=r"o: the state_dict\(\) of this \w+ also has 'step'"):
        live.write(path)
    with pytest.raises(RestoreMismatchError, match=r"the state_dict\(\) of this \w+ also has 'step'"):
        live.read(file)


@pytest.mark.parametrize("wrap", [_Nested, _Silent])
def test_a_state_dict_of_an_optimizers_own_that_has_no_more_is_in_no_ones_way(wrap: Any, path: str) -> None:
    model = _Model(1)
    live = Checkpoint(m=model, o=wrap(torch.optim.SGD(model.parameters(), lr=0.1)))
    live.read(live.write(path)).assert_consumed()


# ---- how new state lies in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_new_state_lies_in_memory_as_its_parameter(options: dict[str, bool], layout: str, path: str) -> None:
    """A fused step takes the elements of parameter and state in the order in which they lie."""

    def make(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        model: nn.Module = nn.Conv2d(3, 4, 2)
        if layout == "channels last":
            model = model.to(memory_format=torch.channels_last)
        else:
            model.weight = nn.Parameter(model.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, **options)

    def steps(model: nn.Module, optimizer: Optimizer) -> None:
        for step in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()

    (model, optimizer), (twin, other) = make(1), make(2)
    steps(model, optimizer)
    Checkpoint(m=twin, o=other).read(Checkpoint(m=model, o=optimizer).write(path)).assert_consumed()
    assert not model.weight.is_contiguous()
    assert other.state[twin.weight]["exp_avg"].stride() == twin.weight.stride()
    steps(model, optimizer)
    steps(twin, other)
    assert torch.equal(twin.weight, model.weight)


# ---- schedulers --------------------------------------------------------------------------------------------------


class _Decay:
    """A function with state, which LambdaLR saves."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, epoch: int) -> float:
        return float(self.factor**epoch)


_SCHEDULERS: dict[str, Callable[[Optimizer, Callable[[list[Any]], list[Any]]], Any]] = {
    "LambdaLR": lambda o, by: lr_scheduler.LambdaLR(o, by([lambda n: 0.5**n, lambda n: 0.9**n, lambda n: 0.8**n])),
    "LambdaLR of objects": lambda o, by: lr_scheduler.LambdaLR(o, by([_Decay(0.5), _Decay(0.9), _Decay(0.8)])),
    "LinearLR": lambda o, _: lr_scheduler.LinearLR(o),
    "ReduceLROnPlateau": lambda o, by: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=by([0.09, 0.001, 0.01])),
    "CyclicLR": lambda o, by: lr_scheduler.CyclicLR(
        o, by([0.1, 0.01, 0.02]), by([0.2, 0.03, 0.5]), step_size_up=3, base_momentum=by([0.1, 0.2, 0.3])
    ),
    "OneCycleLR": lambda o, by: lr_scheduler.OneCycleLR(o, by([0.1, 0.01, 0.02]), total_steps=20),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], [2]
    ),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.CosineAnnealingLR(o, 9), lr_scheduler.PolynomialLR(o, 9)]
    ),
}


_Scheduled = tuple[nn.Module, Optimizer, Any]


def _with_scheduler(kind: str, names: str) -> _Scheduled:
    """A model with all three parameters, those of `names` trained, in that order."""
    model = _Model(ord(names[0]))
    rates = {"a": 0.1, "b": 0.01, "c": 0.02}
    groups = [{"params": [getattr(model, name)], "lr": rates[name]} for name in names]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    return model, optimizer, _SCHEDULERS[kind](optimizer, lambda of: [of["abc".index(name)] for name in names])


def _checkpoint(scheduled: _Scheduled) -> Checkpoint:
    return Checkpoint(**dict(zip("mos", scheduled, strict=True)))


def _next_rates(scheduled: _Scheduled) -> list[list[float]]:
    """The rates of each group after each of some steps."""
    _, optimizer, scheduler = scheduled
    found = []
    for _ in range(4):
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("kind", _SCHEDULERS)
def test_the_rates_of_a_scheduler_follow_their_groups(kind: str, path: str) -> None:
    """A scheduler has one rate per group, by position; the twin has its groups in another order."""
    saved, twin = _with_scheduler(kind, "abc"), _with_scheduler(kind, "bca")
    _next_rates(saved)
    _checkpoint(twin).read(_checkpoint(saved).write(path)).assert_consumed()
    assert _next_rates(twin) == [[b, c, a] for a, b, c in _next_rates(saved)]
    before = twin[2].state_dict()
    _checkpoint(twin).read(_checkpoint(twin).write(path)).assert_consumed()
    assert equal(twin[2].state_dict(), before)


@pytest.mark.filterwarnings("ignore:.*have no live group")
@pytest.mark.parametrize("kind", _SCHEDULERS)
def test_a_scheduler_goes_on_without_a_group_that_only_the_file_has(kind: str, path: str) -> None:
    """As after freezing a layer for good."""
    saved, twin = _with_scheduler(kind, "abc"), _with_scheduler(kind, "ca")
    _next_rates(saved)
    _checkpoint(twin).read(_checkpoint(saved).write(path))
    assert _next_rates(twin) == [[c, a] for a, b, c in _next_rates(saved)]


_RATES = {"a": 0.1, "b": 0.01, "c": 0.02}


def _scheduled(kind: Any, names: str, factor: float = 1.0) -> tuple[nn.Module, Optimizer, Any]:
    """A model with all three parameters, some of which are trained, each in a group of its own."""
    model = _Model(len(names))
    groups = [{"params": [getattr(model, name)], "lr": _RATES[name] * factor} for name in names]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    by = {lr_scheduler.LambdaLR: [[lambda n: 0.5**n] * len(names)], lr_scheduler.CosineAnnealingLR: [8]}
    return model, optimizer, kind(optimizer, *by.get(kind, []))


def _step(optimizer: Optimizer, scheduler: Any) -> list[float]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(("saved", "live"), [("ab", "cab"), ("ab", "bca"), ("ab", "ab")])
@pytest.mark.parametrize("kind", [lr_scheduler.LinearLR, lr_scheduler.LambdaLR, lr_scheduler.CosineAnnealingLR])
def test_a_group_that_the_file_lacks_keeps_its_rate(kind: Any, saved: str, live: str, path: str) -> None:
    """As after unfreezing a layer."""
    model, optimizer, scheduler = _scheduled(kind, saved)
    twin, other, its_scheduler = _scheduled(kind, live, 3.0)
    _step(optimizer, scheduler)
    file = Checkpoint(m=model, o=optimizer, s=scheduler).write(path)
    Checkpoint(m=twin, o=other, s=its_scheduler).read(file).assert_consumed()
    assert its_scheduler.base_lrs == [_RATES[name] * (1.0 if name in saved else 3.0) for name in live]
    expected, found = _step(optimizer, scheduler), _step(other, its_scheduler)
    assert [found[live.index(name)] for name in saved] == expected


@pytest.mark.filterwarnings("ignore:.*have no live group")
def test_a_group_that_comes_after_the_restore_gets_its_rate(path: str) -> None:
    model, optimizer, scheduler = _scheduled(lr_scheduler.CosineAnnealingLR, "abc")
    twin, other, its_scheduler = _scheduled(lr_scheduler.CosineAnnealingLR, "cb", 3.0)
    _step(optimizer, scheduler)
    file = Checkpoint(m=model, o=optimizer, s=scheduler).write(path)
    live = Checkpoint(m=twin, o=other, s=its_scheduler)
    status = live.read(file)
    other.add_param_group({"params": [twin.a]})
    live.retry_pending()
    status.assert_consumed()
    expected = _step(optimizer, scheduler)
    assert _step(other, its_scheduler) == [expected[2], expected[1], expected[0]]


class _Own(lr_scheduler.LRScheduler):
    """Has values per group under a name of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.factors = [0.5, 0.25]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [base * factor for base, factor in zip(self.base_lrs, self.factors, strict=True)]


def test_what_a_scheduler_of_ones_own_has_per_group_is_warned_of(path: str) -> None:
    model, optimizer, scheduler = _scheduled(_Own, "ab")
    file = Checkpoint(m=model, o=optimizer, s=scheduler).write(path)
    Checkpoint(m=model, o=optimizer, s=scheduler).read(file).assert_consumed()  # in the order saved
    twin, other, its_scheduler = _scheduled(_Own, "ba")
    with pytest.warns(CheckpointWarning, match=r"s: the groups of its optimizer are not those saved.* in factors are"):
        Checkpoint(m=twin, o=other, s=its_scheduler).read(file)
    assert its_scheduler.base_lrs == [_RATES["b"], _RATES["a"]]


class _Foreign:
    """A scheduler that is none of torch's, as libraries have them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "epoch": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base_lrs = state["base_lrs"]


def test_what_a_scheduler_of_another_library_has_per_group_is_warned_of(path: str) -> None:
    model, optimizer, scheduler = _scheduled(_Foreign, "ab")
    file = Checkpoint(m=model, o=optimizer, s=scheduler).write(path)
    Checkpoint(m=model, o=optimizer, s=scheduler).read(file).assert_consumed()  # in the order saved
    twin, other, its_scheduler = _scheduled(_Foreign, "ba")
    with pytest.warns(CheckpointWarning, match=r"s: the groups of its optimizer are not those saved.* in base_lrs are"):
        Checkpoint(m=twin, o=other, s=its_scheduler).read(file)


def test_a_scheduler_of_another_library_made_after_its_optimizer_was_restored(path: str) -> None:
    class Warmup(_Foreign):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = 1e-6

    model, optimizer, scheduler = _scheduled(_Foreign, "ab")
    file = Checkpoint(m=model, o=optimizer, s=scheduler).write(path)
    twin, other, _ = _scheduled(_Foreign, "ab", 3.0)
    live = Checkpoint(m=twin, o=other)
    status = live.read(file)
    live.s = Warmup(other)
    status.assert_consumed()
    assert [group["lr"] for group in other.param_groups] == [_RATES["a"], _RATES["b"]]
