"""Modules whose `state_dict()` has or changes something of its own: what would be lost is refused, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from distckpt import Checkpoint, CheckpointWarning, LayoutError, RestoreMismatchError, RestoreOptions


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


class Packed(nn.Module):
    """Has what quantized modules have, in what they override."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale: torch.Tensor | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.scale is not None:
            destination[f"{prefix}scale"] = self.scale


class Unsaved(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
        raise RuntimeError("ask for the state in another way")


class Averaging(nn.Linear):
    """Makes its state where it is asked for it, as the averages of weights of many libraries do."""

    def state_dict(self) -> Any:  # type: ignore[override]
        return {"decay": 0.9, "shadow": [parameter.clone() for parameter in self.parameters()]}


class Forwarding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.state_dict(*args, **kwargs)


def hooked(*hooks: Callable[[dict[str, Any], str], None], module: nn.Module | None = None) -> nn.Module:
    """A module with hooks; they take a state and the prefix of the module's names in it."""
    module = nn.Linear(2, 2) if module is None else module
    for hook in hooks:
        module.register_state_dict_post_hook(lambda _module, state, prefix, _metadata, hook=hook: hook(state, prefix))
    return module


def add_number(state: dict[str, Any], prefix: str) -> None:
    state[f"{prefix}version"] = 3


def add_tensor(state: dict[str, Any], prefix: str) -> None:
    state[f"{prefix}norm"] = torch.ones(1)


def rename(state: dict[str, Any], prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}renamed.{name.removeprefix(prefix)}"] = state.pop(name)


def convert(state: dict[str, Any], prefix: str) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[name] = state[name].half().clone()


def leave_out(state: dict[str, Any], prefix: str) -> None:
    del state[f"{prefix}bias"]


def fail(state: dict[str, Any], prefix: str) -> None:
    del state, prefix
    raise RuntimeError("ask for the state in another way")


def do_nothing(state: dict[str, Any], prefix: str) -> None:
    del state, prefix


# ---- what would be lost ------------------------------------------------------------------------------------------

LOSING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "number": (lambda: hooked(add_number), "Linear also has 'version',"),
    "tensor": (lambda: hooked(add_tensor), "Linear also has 'norm',"),
    "both": (lambda: hooked(add_number, add_tensor), "Linear also has 'version' and 1 more,"),
    "renamed": (lambda: hooked(rename, add_tensor), "Linear also has 'norm',"),
    "of a class that saves itself": (lambda: hooked(add_number, module=Packed()), "Packed also has 'version',"),
    "own": (lambda: Averaging(2, 2), "Averaging also has 'decay' and 1 more,"),
    "below": (
        lambda: hooked(do_nothing, module=nn.ModuleDict({"a": hooked(add_number)})),
        "ModuleDict also has 'a.ver",
    ),
}


@pytest.mark.parametrize("case", LOSING)
def test_what_hooks_and_own_state_dicts_add_is_refused(case: str, path: str) -> None:
    make, lost = LOSING[case]
    file = Checkpoint(m=nn.Sequential(nn.ModuleDict({"a": nn.Linear(2, 2)}))).write(path)
    checkpoint = Checkpoint(m=nn.Sequential(make()))
    with pytest.raises(LayoutError, match=rf"m/0: the state_dict\(\) of this {lost}"):
        checkpoint.write(path)
    with pytest.raises(RestoreMismatchError, match=rf"m/0: .*: the state_dict\(\) of this {lost}"):
        checkpoint.read(file)


def test_what_hooks_and_the_class_add_is_one_error(path: str) -> None:
    packed = Packed()
    packed.scale = torch.ones(2)
    for hooks, more in (((), ","), ((add_number,), " and 1 more,")):
        with pytest.raises(LayoutError, match=rf"m: the state_dict\(\) of this Packed also has 'scale'{more}"):
            Checkpoint(m=hooked(*hooks, module=packed)).write(path)


def test_what_only_the_modules_own_state_has_is_refused_on_restore_too(path: str) -> None:
    module = Packed()
    file = Checkpoint(m=nn.Sequential(module), step=1).write(path)
    module.scale = torch.ones(2)
    live = Checkpoint(m=nn.Sequential(module), step=0)
    with pytest.raises(RestoreMismatchError, match=r"Packed: the state_dict\(\) of this Packed also has 'scale'"):
        live.read(file)
    with pytest.warns(CheckpointWarning, match="m/0 skipped"):
        (skipped,) = live.read(file, options=RestoreOptions(on_mismatch="skip")).mismatched
    assert skipped.key == "m/0"


# ---- what is not -------------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return hooked(rename, module=nn.Sequential(first, second))


def parametrized() -> nn.Module:
    parametrizations = nn.utils.parametrizations
    return hooked(rename, module=parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(2, 2))))


HARMLESS: dict[str, Callable[[], Any]] = {
    "rename": lambda: hooked(rename),
    "convert": lambda: hooked(convert),
    "rename and convert": lambda: hooked(rename, convert),
    "leave out": lambda: hooked(leave_out),
    "fail": lambda: hooked(fail),
    "fail to save": lambda: Unsaved(2, 2),
    "forward": Forwarding,
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),  # its hook writes into the metadata
    "parametrized": parametrized,
    "tied": tied,
    "lazy": lambda: hooked(rename, module=nn.LazyLinear(2)),
    "activation checkpointing": lambda: checkpoint_wrapper(nn.Linear(2, 2)),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
    "averaged": lambda: AveragedModel(nn.Linear(2, 2)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile has it
@pytest.mark.parametrize("case", HARMLESS)
def test_hooks_that_rename_convert_or_leave_out_are_in_no_ones_way(case: str, path: str) -> None:
    model = hooked(do_nothing, module=nn.Sequential(HARMLESS[case](), nn.BatchNorm1d(2)))
    Checkpoint(m=model).read(Checkpoint(m=model).write(path)).assert_consumed()


def test_extra_state_of_a_child_is_no_loss(path: str) -> None:
    class Extra(nn.Module):
        state = 3

        def get_extra_state(self) -> int:
            return self.state

        def set_extra_state(self, state: int) -> None:
            self.state = state

    live, saved = (hooked(do_nothing, module=nn.Sequential(Extra())) for _ in range(2))
    live[0].state = 4  # type: ignore[index]
    Checkpoint(m=live).read(Checkpoint(m=saved).write(path)).assert_consumed()
    assert live[0].state == 3  # type: ignore[index]


def test_values_that_wait_for_memory_are_no_loss(path: str) -> None:
    file = Checkpoint(m=nn.Linear(2, 2), step=1).write(path)
    with torch.device("meta"):
        model = hooked(rename)
    checkpoint = Checkpoint(m=model, step=0)
    status = checkpoint.read(file)
    assert set(status.pending) == {"m/weight", "m/bias"}
    model.to_empty(device="cpu")
    status.assert_consumed()


def test_a_root_is_not_asked_for_its_state_at_each_step() -> None:
    asked = []
    checkpoint = Checkpoint(hooked(lambda state, _prefix: asked.append(len(state))), step=0)
    asked.clear()
    for _ in range(3):
        checkpoint.step += 1
    assert asked == []
