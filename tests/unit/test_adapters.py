"""How each kind of object is saved and restored: modules, containers, objects with a state, schedulers, wrappers."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    CollectiveError,
    LayoutError,
    NoDependency,
    PerRank,
    PythonState,
    RestoreMismatchError,
    RestoreOptions,
    RNGState,
    ShardedVariable,
    Trackable,
)

Keys = Callable[[str], set[str]]
PARTIAL = RestoreOptions(expect_partial=True)


# ---- modules -----------------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.named = nn.ModuleDict({"a/b": nn.Linear(4, 4), "two words": nn.Linear(4, 4)})
            self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))])
            self.table = nn.ParameterDict({"x": nn.Parameter(torch.randn(4))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (*self.layers, *self.named.values()):
                x = layer(x)
            return self.norm(x) * self.scales[0] * self.table["x"]

    return nn.Sequential(nn.Embedding(10, 4), Block(), nn.LSTM(4, 3, batch_first=False))


def test_every_entry_of_a_state_dict_comes_back(path: str) -> None:
    saved = _network()
    saved[1](torch.randn(5, 4))
    torch.manual_seed(99)
    live = _network()
    before = copy.deepcopy(live.state_dict())
    assert not torch.equal(before["0.weight"], saved.state_dict()["0.weight"])
    assert not torch.equal(before["1.norm.running_mean"], saved.state_dict()["1.norm.running_mean"])
    Checkpoint(m=live).read(Checkpoint(m=saved).write(path)).assert_consumed()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(live.state_dict()[name], tensor), name


def test_parametrizations(path: str, keys_of: Keys) -> None:
    def make() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    saved, live = make(), make()
    assert not torch.equal(live.weight, saved.weight)
    file = Checkpoint(m=saved).write(path)
    assert "m/parametrizations/weight/original0" in keys_of(file)
    Checkpoint(m=live).read(file).assert_consumed()
    assert torch.equal(live.weight, saved.weight)


class _Buffers(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("kept", torch.full((2,), value))
        self.register_buffer("scratch", torch.full((2,), value), persistent=False)


class _Packed(nn.Module):
    """Keeps a part of its state where only its own state_dict() finds it, as quantized modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.inner = nn.Linear(2, 2)
        self.scale: torch.Tensor | None = torch.ones(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: Any) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}inner.bias"] = self.inner.bias
        if self.scale is not None:
            destination[f"{prefix}weight.scale"] = destination[f"{prefix}weight.format"] = self.scale


def test_what_only_the_modules_own_state_dict_has_is_refused(path: str, keys_of: Keys) -> None:
    module = _Packed()
    with pytest.raises(
        LayoutError, match=r"m/0: the state_dict\(\) of this _Packed also has 'weight\.scale' and 1 more"
    ):
        Checkpoint(m=nn.Sequential(module)).write(path)
    module.scale = None
    file = Checkpoint(m=nn.Sequential(module)).write(path)
    assert keys_of(file) == {"m/0/weight", "m/0/inner/weight", "m/0/inner/bias"}
    fake = torch.ao.quantization.FakeQuantize()  # has a state_dict() of its own, too, and no more in it
    Checkpoint(m=fake).read(Checkpoint(m=fake).write(path)).assert_consumed()


def test_only_persistent_buffers(path: str, keys_of: Keys) -> None:
    file = Checkpoint(m=_Buffers(5)).write(path)
    assert keys_of(file) == {"m/kept"}
    live = _Buffers(0)
    Checkpoint(m=live).read(file).assert_consumed()
    assert live.kept.tolist() == [5, 5]
    assert live.scratch.tolist() == [0, 0]


class _Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("as_root", [False, True])
def test_extra_state(as_root: bool, path: str) -> None:
    """The file decides what is in it, also which tensors."""

    def checkpoint(model: nn.Module) -> Checkpoint:
        return Checkpoint(model) if as_root else Checkpoint(m=model)

    state = {"step": 7, "window": [torch.arange(3.0), None], "a.b": (1, torch.ones(2, dtype=torch.bool))}
    live = _Extra({})
    checkpoint(live).restore(checkpoint(_Extra(state)).save(path)).assert_consumed()
    assert live.state["step"] == 7
    assert live.state["window"][0].tolist() == [0, 1, 2]
    assert live.state["window"][1] is None
    assert live.state["a.b"][1].tolist() == [True, True]
    assert type(live.state["a.b"]) is tuple


def test_extra_state_without_tensors_and_none(path: str) -> None:
    live = nn.ModuleList([_Extra(1), _Extra(2), _Extra({"t": torch.ones(1)})])
    file = Checkpoint(m=nn.ModuleList([_Extra({"x": 1}), _Extra(None), _Extra([])])).write(path)
    Checkpoint(m=live).read(file).assert_consumed()
    assert [module.state for module in live] == [{"x": 1}, None, []]


def test_extra_state_that_only_pickle_could_store_is_refused(path: str) -> None:
    with pytest.raises(LayoutError, match=r"m/\.extra_state/x: its state holds a builtins\.set"):
        Checkpoint(m=_Extra({"x": {1}})).write(path)


def test_a_module_that_lost_its_extra_state(path: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    status = Checkpoint(m=Plain()).read(Checkpoint(m=_Extra(1)).write(path), options=PARTIAL)
    assert status.unexpected == ("m/.extra_state",)


# ---- wrappers ----------------------------------------------------------------------------------------------------


def _compiled(module: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(module, backend="eager"))


def _checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


_WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": _compiled,
    "activation checkpointing": _checkpointed,
    "DataParallel": nn.DataParallel,
    "both": lambda module: _checkpointed(_compiled(module)),
}


@pytest.mark.parametrize("wrapper", _WRAPPERS)
@pytest.mark.parametrize("where", ["keyword", "child", "list", "root"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_wrapped_and_unwrapped_programs_interchange(wrapper: str, where: str, path: str, keys_of: Keys) -> None:
    wrap = _WRAPPERS[wrapper]

    def checkpoint(inner: nn.Module, model: nn.Module) -> Checkpoint:
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)
        inner(torch.ones(2)).sum().backward()
        optimizer.step()
        if where == "child":
            return Checkpoint(m=nn.Sequential(model), o=optimizer)
        if where == "list":
            return Checkpoint(m=[model], o=optimizer)
        return Checkpoint(model, o=optimizer) if where == "root" else Checkpoint(m=model, o=optimizer)

    plain, inner = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not torch.equal(plain.weight, inner.weight)
    from_plain = checkpoint(plain, plain).write(path)
    wrapped = checkpoint(inner, wrap(inner))
    expected = plain.weight.detach().clone()
    assert keys_of(wrapped.write(f"{path}-wrapped")) == keys_of(from_plain)
    wrapped.read(from_plain).assert_consumed()
    assert torch.equal(inner.weight, expected)
    assert torch.equal(wrapped.o.state[inner.weight]["momentum_buffer"], torch.ones(2, 2))
    with torch.no_grad():
        inner.weight.fill_(3)
    checkpoint(plain, plain).read(wrapped.write(path)).assert_consumed()
    assert torch.equal(plain.weight, torch.full((2, 2), 3.0))


def test_a_child_that_is_only_called_like_a_wrapper_is_a_child(path: str, keys_of: Keys) -> None:
    """By type, not by the name of an attribute."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1, bias=False)
            self._orig_mod = nn.Linear(1, 1, bias=False)

    assert keys_of(Checkpoint(m=Mine()).write(path)) == {"m/module/weight", "m/_orig_mod/weight"}


# ---- containers --------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    x: Any
    y: Any


def test_a_container_without_trackables_is_restored_in_place(path: str) -> None:
    saved = {"l": [1, 2, [3]], "d": {"b": 1, "a": {2: None}}, "t": (1, (2,)), "o": collections.OrderedDict(z=1)}
    live = Checkpoint(l=[9], d={"c": 0}, t=(), o=collections.OrderedDict())
    aliases = live.l, live.d, live.o
    live.read(Checkpoint(**saved).write(path)).assert_consumed()
    assert {"l": live.l, "d": live.d, "t": live.t, "o": live.o} == saved
    assert list(live.d) == ["b", "a"]
    assert (live.l, live.d, live.o) == aliases
    assert live.l is aliases[0]
    assert live.d is aliases[1]
    assert live.o is aliases[2]


def test_a_container_with_trackables_is_restored_element_by_element(path: str) -> None:
    def make(value: int) -> dict[str, Any]:
        tensor = torch.full((2,), float(value))
        return {
            "mixed": [tensor.clone(), value, [value, value], {"t": tensor.clone(), "n": value, 5: [value]}],
            "queue": collections.deque([tensor.clone(), value]),
            "default": collections.defaultdict(list, t=tensor.clone(), n=value),
            "point": _Point(tensor.clone(), 1),
        }

    state = make(0)
    assert repr(state) != repr(make(7))
    live = Checkpoint(**state)
    inner, log = live.mixed[2], live.mixed[3][5]
    live.read(Checkpoint(**make(7)).write(path)).assert_consumed()
    assert repr(state) == repr(make(7))
    assert live.mixed is state["mixed"]
    assert live.mixed[2] is inner
    assert live.mixed[3][5] is log


def test_elements_of_tuples_cannot_change(path: str) -> None:
    file = Checkpoint(a=torch.ones(2), t=(torch.ones(2), 5, [1, 2]), p=_Point(1, 2)).write(path)
    live = Checkpoint(a=torch.zeros(2), t=(torch.zeros(2), 6, [0]), p=_Point(1, 3))
    with pytest.raises(
        RestoreMismatchError, match=r"(?s)p/y: saved the python value 2, live 3 in a tuple.*t/1: saved .* 5"
    ):
        live.read(file)
    assert live.a.tolist() == [0, 0]
    assert live.t[2] == [0]
    live.t, live.p = (live.t[0], 5, live.t[2]), _Point(1, 2)
    live.read(file).assert_consumed()
    assert live.t[0].tolist() == [1, 1]
    assert live.t[2] == [1, 2]


def test_an_element_of_a_tuple_must_have_the_saved_type(path: str) -> None:
    file = Checkpoint(t=(torch.ones(1), 5, [1])).write(path)
    with pytest.raises(RestoreMismatchError, match=r"t/1: saved the python value 5, live 5\.0 in a tuple"):
        Checkpoint(t=(torch.ones(1), 5.0, [1])).read(file)
    with pytest.raises(RestoreMismatchError, match=r"t/2: saved the python value \[1\], live \{\} in a tuple"):
        Checkpoint(t=(torch.ones(1), 5, {})).read(file)


def test_what_a_container_holds_beside_the_saved(path: str) -> None:
    file = Checkpoint(d={"a": torch.ones(1), "b": torch.ones(1), "n": 1}, l=[torch.ones(1), 2, 3]).write(path)
    live = Checkpoint(d={"a": torch.zeros(1), "c": torch.zeros(1), "m": 5}, l=[torch.zeros(1), 0])
    with pytest.warns(UserWarning, match=r"l: a list of 2 element\(s\), saved with 3"):
        status = live.read(file, options=PARTIAL)
    assert live.d == {"a": torch.ones(1), "c": torch.zeros(1), "m": 5}
    assert live.l == [torch.ones(1), 2]
    assert status.pending == ("d/b", "d/n", "l/2")
    assert status.missing == ("d/c", "d/m")
    live.d["b"] = torch.zeros(1)
    live.d["n"] = 0
    live.l.append(0)
    assert live.retry_pending() == 3
    assert live.d["b"] == 1
    assert live.d["n"] == 1
    assert live.l[2] == 3


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(
    ("saved", "live", "expected"),
    [
        (collections.deque([1, 2, 3]), collections.deque([9]), collections.deque([1, 2, 3])),
        (collections.deque([1, 2, 3]), collections.deque([9], maxlen=2), collections.deque([2, 3], maxlen=2)),
        (
            collections.defaultdict(list, {"a": [1.5], 3: [2], ".x/": []}),
            collections.defaultdict(list, a=[7]),
            collections.defaultdict(list, {"a": [1.5], 3: [2], ".x/": []}),
        ),
        (collections.deque([1]), collections.deque([7, 8, 9]), collections.deque([1])),
        (collections.deque([1, 2]), collections.deque([7, 8, 9], maxlen=3), collections.deque([1, 2], maxlen=3)),
        (
            collections.defaultdict(int, {"a": 1}),
            collections.defaultdict(int, {"a": 5, "b": 6, 3: 7, ".x/": 8}),
            collections.defaultdict(int, {"a": 1}),
        ),
        (
            collections.defaultdict(int, {"a": 1, "b": 2}),
            collections.defaultdict(int, {"c": 3, "d": 4}),
            collections.defaultdict(int, {"a": 1, "b": 2}),
        ),
    ],
    ids=["deque", "maxlen", "defaultdict", "shorter", "shorter, maxlen", "fewer keys", "other keys"],
)
def test_a_container_of_a_class_of_its_own_gets_the_saved_elements_and_no_others(
    saved: Any, live: Any, expected: Any, late: bool, path: str
) -> None:
    live = copy.copy(live)
    file = Checkpoint(x=1, h=saved).write(path)
    checkpoint = Checkpoint(x=0) if late else Checkpoint(x=0, h=live)
    status = checkpoint.read(file)
    if late:
        checkpoint.h = live
    assert checkpoint.h is live
    assert repr(live) == repr(expected)
    status.assert_consumed()
    live.clear()  # training goes on: what was restored does not come back
    checkpoint.retry_pending()
    assert len(live) == 0


def test_a_part_of_a_container_of_a_class_of_its_own_leaves_the_rest(path: str) -> None:
    live = Checkpoint(h=collections.defaultdict(int, a=5, b=6))
    file = Checkpoint(h=collections.defaultdict(int, a=1, c=2)).write(path)
    live.read(file, options=RestoreOptions(only=["h/a"]))
    assert live.h == {"a": 1, "b": 6}


def test_elements_that_training_adds_after_a_restore_stay(path: str) -> None:
    live = Checkpoint(h=collections.deque([1, 2, 3]), x=0)
    status = live.read(Checkpoint(h=collections.deque([7]), x=0, late=1).write(path))
    live.h.append(8)
    live.late = 0
    assert live.late == 1
    assert list(live.h) == [7, 8]
    status.assert_consumed()
    assert list(live.h) == [7, 8]


def test_what_a_container_of_a_class_of_its_own_does_not_get(path: str) -> None:
    opted_out = collections.defaultdict(int, n=NoDependency(5))
    with pytest.warns(CheckpointWarning, match="d: a defaultdict of 0 element"):
        Checkpoint(d=opted_out, x=0).read(Checkpoint(d=collections.defaultdict(int, n=1, m=2), x=1).write(path))
    assert list(opted_out) == ["n"]
    assert isinstance(opted_out["n"], NoDependency)
    empty = collections.defaultdict(int)
    with pytest.raises(RestoreMismatchError, match=r"d/\.state: saved the state of an object"):
        Checkpoint(d=empty, x=0).read(Checkpoint(d=_Stateful({"n": 1}), x=1).write(path))
    assert empty == {}


def test_empty_containers_count_as_nothing(path: str) -> None:
    live = Checkpoint(b=[], deep=[[], {}], same={"x": 1})
    status = live.read(Checkpoint(a=[], nested=([],), same={}).write(path))
    status.assert_consumed()
    assert status.missing == ()
    assert status.unexpected == ()
    assert live.same == {}


def test_a_list_that_was_saved_empty_and_has_grown(path: str) -> None:
    live = Checkpoint(l=[nn.Linear(1, 1, bias=False)], x=0)
    status = live.read(Checkpoint(l=[], x=1).write(path), options=PARTIAL)
    assert status.missing == ("l/0/weight",)


def test_a_list_that_is_still_empty(path: str) -> None:
    layer = nn.Linear(1, 1)
    live = Checkpoint(l=[])
    with pytest.warns(UserWarning, match="nothing but the save counter matched"):
        status = live.read(Checkpoint(l=[layer]).write(path), options=PARTIAL)
    assert status.pending == ("l/0/bias", "l/0/weight")
    live.l.append(nn.Linear(1, 1))
    assert not torch.equal(live.l[0].weight, layer.weight)
    status.assert_consumed()
    assert torch.equal(live.l[0].weight, layer.weight)


# ---- objects with a state of their own ---------------------------------------------------------------------------


class _Stateful:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


_STATES: list[Any] = [
    {"a": 1, "b": {"c": [1.5, None, "x", b"y"]}},
    {"t": torch.arange(5), "n": np.arange(3.0), "s": np.float32(2.5)},
    {
        "deep": [({"t": torch.ones(2)},), collections.OrderedDict(z=torch.zeros(0), a=1)],
        3: "int key",
        (1, 2): "tuple key",
    },
    {"same": [torch.ones(1)] * 2, "empty": {}, "half": torch.ones(2, dtype=torch.bfloat16)},
    [torch.ones(1), 2],
    torch.arange(3.0),
    np.arange(4),
    {key: torch.full((2,), float(n)) for n, key in enumerate([(1,), "(1,)", None, "None", 2.5, "2.5", 3, "3", ".k3"])},
]


@pytest.mark.parametrize("state", _STATES, ids=range(len(_STATES)))
@pytest.mark.parametrize("live_state", [{"other": torch.zeros(9)}, {}], ids=["other", "empty"])
@pytest.mark.filterwarnings("ignore:different tensors share memory")
def test_whatever_state_dict_returns_comes_back(state: Any, live_state: Any, path: str) -> None:
    live = _Stateful(live_state)
    assert repr(live.state) != repr(state)
    Checkpoint(s=live).read(Checkpoint(s=_Stateful(state)).write(path)).assert_consumed()
    assert repr(live.state) == repr(state)
    assert type(live.state) is type(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x/y": {"z": {1, 2}}}, r"s/x\.Sy/z: its state holds a builtins\.set, which only pickle could store"),
        ({"f": print}, r"s/f: its state holds a builtins\.builtin_function_or_method"),
        ({"m": torch.zeros(1, device="meta")}, "s/m: a tensor on the meta device"),
        ({"o": np.array([None])}, "s/o: a NumPy array of dtype object"),
        ({"a": np.ma.masked_array([1, 2], [False, True])}, "s/a: a masked array"),
    ],
)
def test_a_state_that_only_pickle_could_store_is_refused(state: Any, message: str, path: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Checkpoint(s=_Stateful(state)).write(path)


def test_an_object_that_fails_to_give_its_state(path: str) -> None:
    class Broken(_Stateful):
        def state_dict(self) -> Any:
            raise RuntimeError("no state today")

    checkpoint = Checkpoint(s=Broken(1))
    with pytest.raises(CollectiveError, match=r"no state today \(while s was asked for its state\)") as caught:
        checkpoint.save(path)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert checkpoint.save_counter == 0


def test_an_object_that_refuses_its_state(path: str) -> None:
    class Broken(_Stateful):
        def load_state_dict(self, state: Any) -> None:
            raise RuntimeError(f"not {state}")

    file = Checkpoint(s={"part": _Stateful([1])}).write(path)
    with pytest.raises(CollectiveError, match=r"not \[1\] \(while s/part was given its saved state\)") as caught:
        Checkpoint(s={"part": Broken([2])}).read(file)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_disabled_scaler_has_no_values(path: str, keys_of: Keys) -> None:
    off = torch.amp.GradScaler("cpu", enabled=False)
    file = Checkpoint(s=off, n=1).write(path)
    assert keys_of(file) == {"n"}
    Checkpoint(s=torch.amp.GradScaler("cpu", enabled=False), n=0).read(file).assert_consumed()
    status = Checkpoint(s=torch.amp.GradScaler("cpu"), n=0).read(file, options=PARTIAL)
    assert status.missing == ("s/.state",)


def test_a_scaler_that_was_turned_off(path: str) -> None:
    """Its state is consumed, as by `load_state_dict`, and a later save has none."""
    live = torch.amp.GradScaler("cpu", enabled=False)
    Checkpoint(s=live, n=0).read(Checkpoint(s=torch.amp.GradScaler("cpu"), n=1).write(path)).assert_consumed()
    assert live.state_dict() == {}


def test_a_scaler(path: str) -> None:
    saved, live = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu")
    assert live.get_scale() != 8
    Checkpoint(s=live).read(Checkpoint(s=saved).write(path)).assert_consumed()
    assert live.get_scale() == 8


class _Custom(PythonState):
    def __init__(self, value: Any) -> None:
        self.value = value

    def serialize(self) -> Any:
        return self.value

    def deserialize(self, value: str | bytes) -> None:
        self.value = value


@pytest.mark.parametrize("value", ["text \0 é", b"\0\xff", "", b""], ids=repr)
def test_python_state(value: Any, path: str) -> None:
    live = _Custom("other")
    Checkpoint(p=live).read(Checkpoint(p=_Custom(value)).write(path)).assert_consumed()
    assert live.value == value
    assert type(live.value) is type(value)


def test_python_state_must_be_text_or_bytes(path: str) -> None:
    with pytest.raises(LayoutError, match=r"p: serialize\(\) must return str or bytes. Got dict"):
        Checkpoint(p=_Custom({})).write(path)
    with pytest.raises(CollectiveError, match=r"NotImplementedError: PythonState.serialize\(\)"):
        Checkpoint(p=PythonState()).write(path)


def test_python_state_that_the_program_lost_is_named(path: str) -> None:
    status = Checkpoint(n=0).read(Checkpoint(p=_Custom("x"), n=1).write(path))
    with pytest.raises(AssertionError, match=r"p/\.state"):
        status.assert_consumed()


class _Split:
    """One fused value that is stored as two."""

    def __init__(self, fused: torch.Tensor) -> None:
        self.fused = fused

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"left": self.fused[:2].clone(), "right": self.fused[2:].clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.fused = torch.cat([state["left"], state["right"]])


def test_a_custom_value_of_several_tensors(path: str) -> None:
    file = Checkpoint(s=_Split(torch.arange(4.0))).write(path)
    live = _Split(torch.zeros(4))
    Checkpoint(s=live).read(file).assert_consumed()
    assert live.fused.tolist() == [0, 1, 2, 3]
    live.fused.zero_()
    Checkpoint(s=live).read(file).assert_consumed()
    assert live.fused.tolist() == [0, 1, 2, 3]


# ---- schedulers --------------------------------------------------------------------------------------------------

_Optimizer = torch.optim.Optimizer
_SCHEDULERS: dict[str, Callable[[_Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 7, 2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9 + 0.01 * epoch),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


def test_all_schedulers_of_torch_are_tested() -> None:
    base, here = lr_scheduler.LRScheduler, lr_scheduler.__name__
    kinds = [kind for kind in vars(lr_scheduler).values() if isinstance(kind, type) and issubclass(kind, base)]
    found = {kind.__name__ for kind in kinds if kind.__module__ == here}
    assert found - {"LRScheduler", "_LRScheduler"} == set(_SCHEDULERS) - {"SWALR"}


def _lrs(scheduler: Any, optimizer: _Optimizer, n: int) -> list[tuple[float, float]]:
    rates = []
    for _ in range(n):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum", 0.0)))
    return rates


@pytest.mark.parametrize("kind", _SCHEDULERS)
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
def test_schedulers_go_on_as_if_nothing_had_happened(kind: str, order: str, path: str) -> None:
    names = ("a_optimizer", "b_scheduler") if order == "optimizer first" else ("b_optimizer", "a_scheduler")

    def make(lr: float) -> tuple[_Optimizer, Any, Checkpoint]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
        scheduler = _SCHEDULERS[kind](optimizer)
        return optimizer, scheduler, Checkpoint(**dict(zip(names, (optimizer, scheduler), strict=True)))

    optimizer, scheduler, checkpoint = make(0.1)
    _lrs(scheduler, optimizer, 3)
    file = checkpoint.write(path)
    expected = _lrs(scheduler, optimizer, 6)
    optimizer, scheduler, checkpoint = make(7.0)
    checkpoint.read(file).assert_consumed()
    assert _lrs(scheduler, optimizer, 6) == expected
    optimizer, scheduler, _ = make(7.0)
    assert _lrs(scheduler, optimizer, 6) != expected


@pytest.mark.parametrize("kind", _SCHEDULERS)
def test_a_scheduler_made_after_its_optimizer_was_restored(kind: str, path: str) -> None:
    """Its constructor sets rates and momenta of the optimizer."""

    def make(lr: float) -> _Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)

    optimizer = make(0.1)
    scheduler = _SCHEDULERS[kind](optimizer)
    _lrs(scheduler, optimizer, 3)
    file = Checkpoint(optimizer=optimizer, scheduler=scheduler, step=3).write(path)
    live = Checkpoint(step=0)
    status = live.read(file)
    live.optimizer = late = make(7.0)
    live.scheduler = _SCHEDULERS[kind](late)
    status.assert_consumed()
    assert late.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert _lrs(live.scheduler, late, 6) == _lrs(scheduler, optimizer, 6)


@pytest.mark.filterwarnings("ignore:.*a dict of 1 element")
def test_options_of_an_optimizer_that_are_restored_again_count_once(path: str) -> None:
    def make(lr: float) -> tuple[_Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        return optimizer, lr_scheduler.LinearLR(optimizer)

    (optimizer, scheduler), (other, late) = make(0.1), make(7.0)
    file = Checkpoint(o=optimizer, more={"s": scheduler, "t": torch.ones(1)}).write(path)
    more: dict[str, Any] = {"t": torch.zeros(1)}
    live = Checkpoint(o=other, more=more)
    live.read(file)
    more["s"] = late
    assert live.retry_pending() == 1
    other.param_groups[0]["lr"] = 0.5  # the user's own, from now on
    assert live.retry_pending() == 0
    assert other.param_groups[0]["lr"] == 0.5


def test_a_scheduler_of_an_optimizer_that_replaced_the_restored_one(path: str) -> None:
    """An object that is reassigned after it was restored keeps what the program gave it."""

    def make(lr: float) -> _Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)

    optimizer = make(0.1)
    file = Checkpoint(o=optimizer, s=lr_scheduler.ExponentialLR(optimizer, 0.9)).write(path)
    live = Checkpoint(o=make(7.0))
    live.read(file).expect_partial()
    live.o = other = make(0.5)
    live.s = lr_scheduler.ExponentialLR(other, 0.8)
    assert live.s.gamma == 0.9
    assert other.param_groups[0]["lr"] == 0.5


def test_scheduler_internals_the_file_lacks_keep_their_value(path: str) -> None:
    def make() -> Any:
        return lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 2)

    saved, live = make(), make()
    saved.last_epoch = 5
    live.from_a_newer_torch = 3
    Checkpoint(s=live).read(Checkpoint(s=saved).write(path)).assert_consumed()
    assert live.last_epoch == 5
    assert live.from_a_newer_torch == 3


# ---- per-rank values on one rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["tensor", "number", "list", "generator", "module"])
def test_per_rank(value: str, path: str) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return {
            "tensor": torch.full((2,), float(seed)),
            "number": seed,
            "list": [seed],
            "generator": torch.Generator().manual_seed(seed),
            "module": nn.Linear(2, 2),
        }[value]

    def state(held: Any) -> Any:
        if isinstance(held, torch.Generator):
            return held.get_state().tolist()
        return held.weight.tolist() if isinstance(held, nn.Module) else repr(held)

    saved, live = PerRank(make(3)), PerRank(make(4))
    assert state(saved.value) != state(live.value)
    before = live.value
    Checkpoint(p=live).read(Checkpoint(p=saved).write(path)).assert_consumed()
    assert state(saved.value) == state(live.value)
    assert live.value is before or value == "number"


def test_rng_state_replays_all_generators(path: str) -> None:
    def draw() -> list[Any]:
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]
        return [*numbers, random.getrandbits(70)]

    outer = random.getstate(), np.random.get_state()
    try:
        draw()  # an odd number of Gaussian numbers: one is kept in hand
        file = Checkpoint(r=RNGState()).write(path)
        expected = draw()
        assert draw() != expected
        Checkpoint(r=RNGState()).read(file).assert_consumed()
        assert draw() == expected
    finally:
        random.setstate(outer[0])
        np.random.set_state(outer[1])


# ---- sharded variables on one rank -------------------------------------------------------------------------------


def test_a_sharded_variable_and_its_slots(path: str, keys_of: Keys) -> None:
    def make(value: float) -> Checkpoint:
        tensor = torch.full((3, 4), value)[:, ::2].requires_grad_()  # may be non-contiguous
        variable = ShardedVariable(tensor, (3, 2), (0, 0))
        assert variable.tensor is tensor
        optimizer = torch.optim.Adam([tensor])
        (tensor * value).sum().backward()
        optimizer.step()
        return Checkpoint(v=variable, o=optimizer)

    saved, live = make(3.0), make(5.0)
    file = saved.write(path)
    assert "o/.slots/v/exp_avg" in keys_of(file)
    tensor = live.v.tensor
    assert not torch.equal(tensor, saved.v.tensor)
    live.read(file).assert_consumed()
    assert torch.equal(live.v.tensor, saved.v.tensor)
    assert torch.equal(live.o.state[tensor]["exp_avg"], saved.o.state[saved.v.tensor]["exp_avg"])


def test_half_a_sharded_variable_is_a_gap(path: str) -> None:
    with pytest.raises(LayoutError, match="v: "):
        Checkpoint(v=ShardedVariable(torch.ones(2), (4,), (0,))).write(path)


@pytest.mark.parametrize(("shape", "offset"), [((3,), (2,)), ((1,), (0,)), ((2, 2), (0,)), ((4,), (-1,))])
def test_a_sharded_variable_lies_inside_its_global_shape(shape: Any, offset: Any) -> None:
    with pytest.raises(ValueError, match="expected a block inside global_shape"):
        ShardedVariable(torch.ones(2), shape, offset)


def test_a_trackable_with_a_state_dict_is_walked(path: str, keys_of: Keys) -> None:
    class Both(Trackable):
        def __init__(self) -> None:
            self.x = torch.ones(1)

        def state_dict(self) -> Any:
            raise AssertionError("not asked")

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError("not asked")

    assert keys_of(Checkpoint(b=Both()).write(path)) == {"b/x"}
