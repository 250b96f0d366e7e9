"""The walk: which objects are nodes, in which order, under which keys. Keys are compared as whole tables."""

from __future__ import annotations

import collections
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import (
    Checkpoint,
    CheckpointWarning,
    CollectiveError,
    LayoutError,
    NoDependency,
    PerRank,
    PythonState,
    RNGState,
    SaveOptions,
    ShardedVariable,
    Trackable,
)
from distckpt.layout.records import Manifest

Keys = Callable[[str], set[str]]


def edges(manifest: Manifest, node_id: int = 0) -> list[tuple[str, int]]:
    """Names and targets of a node's edges."""
    return [(child.local_name, child.node_id) for child in manifest.object_graph.nodes[node_id].children]


def variables(manifest: Manifest) -> list[str]:
    """Keys of the tensors in the order of the file."""
    return [variable.key for variable in manifest.variables]


def one() -> torch.Tensor:
    return torch.ones(1)


# ---- keys --------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_whole_training_state(path: str, keys_of: Keys, manifest_of: Callable[[str], Manifest]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(model=model, optimizer=optimizer, scheduler=scheduler, step=0)
    checkpoint.history = [1.5, 2.5]
    file = checkpoint.save(path)
    parameters = ["0/weight", "0/bias", "1/weight", "1/bias"]
    options = [
        *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable"),
        *("fused", "decoupled_weight_decay", "initial_lr"),
    ]
    assert keys_of(file) == {
        "save_counter",
        "step",
        "history",
        "scheduler/.state",
        *(f"model/{name}" for name in parameters),
        *(f"model/1/{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
        *(f"optimizer/param_groups/0/{name}" for name in options),
        *(f"optimizer/.slots/model/{name}/{slot}" for name in parameters for slot in ("step", "exp_avg", "exp_avg_sq")),
    }
    manifest = manifest_of(file)
    assert variables(manifest)[:5] == [
        "save_counter",
        "model/0/weight",
        "model/0/bias",
        "model/1/weight",
        "model/1/bias",
    ]
    assert [v.key for v in manifest.variables if v.dtype == "int64"] == ["save_counter", "model/1/num_batches_tracked"]


def test_breadth_first_with_keywords_sorted_and_later_attributes_in_their_order(
    path: str, manifest_of: Callable[[str], Manifest]
) -> None:
    class Branch(Trackable):
        def __init__(self) -> None:
            self.deep = Trackable()
            self.deep.leaf = one()
            self.leaf = one()

    checkpoint = Checkpoint(z=one(), a=Branch(), m=one())
    checkpoint.k = one()
    checkpoint.b = one()
    manifest = manifest_of(checkpoint.write(path))
    assert edges(manifest) == [("a", 1), ("m", 2), ("z", 3), ("k", 4), ("b", 5)]
    assert edges(manifest, 1) == [("deep", 6), ("leaf", 7)]
    assert variables(manifest) == ["m", "z", "k", "b", "a/leaf", "a/deep/leaf"]


class _Everything(nn.Module):
    """Registers its parts in an order that is not the stored one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_parameter("absent", None)
        self.register_buffer("nothing", None)
        self.scale = nn.Parameter(torch.ones(2))
        self.child = nn.Linear(1, 1, bias=False)
        self.gone: nn.Module | None = nn.Linear(1, 1)
        self.gone = None
        self.unregistered = torch.ones(2)
        self.number = 5
        self.modules_in_a_list = [nn.Linear(1, 1)]


def test_a_module_has_children_then_parameters_then_persistent_buffers(
    path: str, manifest_of: Callable[[str], Manifest]
) -> None:
    model = _Everything()
    manifest = manifest_of(Checkpoint(m=model).write(path))
    assert [name for name, _ in edges(manifest, 1)] == ["child", "scale", "mean"]
    names = {f"m/{name.replace('.', '/')}" for name in model.state_dict()}
    assert set(variables(manifest)) == names
    assert manifest.python_state == {}


_ESCAPES = {
    "plain": "plain",
    "a.b": "a..b",
    "a/b/c": "a.Sb.Sc",
    "c/": "c.S",
    ".": "..",
    "": ".E",
    "\0": ".0",
    ".slots": "..slots",
    ".ATTRIBUTES/f": "..ATTRIBUTES.Sf",
    "größe": "größe",
    "日本 語": "日本 語",
    "0": "0",
    0: ".i0",
    -12: ".i-12",
    "\0i0": ".0i0",
}


def test_escaping(path: str, keys_of: Keys) -> None:
    """Names that mean something to HDF5, to this package or to nobody, as keys of dicts and as attributes."""
    attributes = [name for name in _ESCAPES if isinstance(name, str) and name != "\0i0"]

    def make(numbers: list[int]) -> Checkpoint:
        checkpoint = Checkpoint(
            t={name: torch.tensor(i) for name, i in zip(_ESCAPES, numbers, strict=True)}, v=Trackable()
        )
        for name, i in zip(attributes, numbers, strict=False):
            setattr(checkpoint.v, name, i)
        return checkpoint

    file = make(list(range(len(_ESCAPES)))).write(path)
    assert keys_of(file) == {f"t/{component}" for component in _ESCAPES.values()} | {
        f"v/{_ESCAPES[name]}" for name in attributes
    }
    live = make([-1] * len(_ESCAPES))
    live.t = dict(reversed(live.t.items()))
    live.read(file).assert_consumed()
    assert {name: int(tensor) for name, tensor in live.t.items()} == {name: i for i, name in enumerate(_ESCAPES)}
    assert [getattr(live.v, name) for name in attributes] == list(range(len(attributes)))


@pytest.mark.parametrize("key", [(1, 2), 1.5, True, None, b"a"], ids=repr)
def test_other_dict_keys_are_refused_naming_the_container(key: Any, path: str) -> None:
    with pytest.raises(LayoutError, match=r"outer/inner: a dict key of type .*Use str"):
        Checkpoint(outer={"inner": {key: one()}}).write(path)
    plain = Checkpoint(outer={key: 1})  # without tensors it is one python value, and may have such keys
    live = Checkpoint(outer={})
    live.read(plain.write(path)).assert_consumed()
    assert live.outer == {key: 1}
    assert type(next(iter(live.outer))) is type(key)


def test_keys_that_utf8_cannot_express_are_refused(path: str) -> None:
    with pytest.raises(LayoutError, match="d: a dict key"):
        Checkpoint(d={"\ud800": one()}).write(path)


class _Point(NamedTuple):
    x: Any
    y: Any


def test_containers(path: str, keys_of: Keys) -> None:
    """With something trackable inside they have edges, and their plain elements are values; else they are values."""
    checkpoint = Checkpoint(
        plain=[1, (2, {"a": None})],
        mixed=[one(), 5, "text", [one(), {"deep": [one()], "flat": [1, 2]}]],
        pair=(one(), 7),
        point=_Point(one(), 8),
        numbers=_Point(1, 2),
        queue=collections.deque([one(), 9]),
        ordered=collections.OrderedDict(b=one(), a=1),
        default=collections.defaultdict(list, k=[one()]),
        empty={"list": [], "tuple": (), "t": one()},
    )
    assert keys_of(checkpoint.write(path)) == {
        "plain",
        "mixed/0",
        "mixed/1",
        "mixed/2",
        "mixed/3/0",
        "mixed/3/1/deep/0",
        "mixed/3/1/flat",
        "pair/0",
        "pair/1",
        "point/x",
        "point/y",
        "numbers/x",
        "numbers/y",
        "queue/0",
        "queue/1",
        "ordered/b",
        "ordered/a",
        "default/k/0",
        "empty/list",
        "empty/tuple",
        "empty/t",
    }


class _Secret(PythonState):
    def serialize(self) -> str:
        return "s"


class _Stateful:
    def state_dict(self) -> dict[str, Any]:
        return {"t": one(), "nested": {"x/y": [one(), np.ones(1)]}, 5: one(), "plain": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


class _Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"n": 1, "t": one()}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError(state)


def test_components_of_our_own_begin_with_one_dot(path: str, keys_of: Keys) -> None:
    checkpoint = Checkpoint(
        secret=_Secret(),
        stateful=_Stateful(),
        extra=_Extra(),
        per=PerRank(one()),
        per_int=PerRank(3),
        per_dict=PerRank({"a": one(), "b": 2}),
        rng=RNGState(),
        generator=torch.Generator(),
        sharded=ShardedVariable(torch.ones(2), (2,), (0,)),
    )
    assert keys_of(checkpoint.write(path)) == {
        "secret/.state",
        "stateful/.state",
        "stateful/t",
        "stateful/nested/x.Sy/0",
        "stateful/nested/x.Sy/1",
        "stateful/.i5",
        "extra/.extra_state",
        "extra/.extra_state/t",
        "per/.rank/0",
        "per_int/.rank/0",
        "per_dict/.rank/0/a",
        "per_dict/.rank/0/b",
        *(
            f"rng/.rank/0/{name}"
            for name in ("torch", "python", "python_gauss", "numpy", "numpy_position", "numpy_gauss")
        ),
        "generator",
        "sharded",
    }


# ---- identity ----------------------------------------------------------------------------------------------------


def test_shared_objects_are_stored_once_under_the_first_path(path: str, manifest_of: Callable[[str], Manifest]) -> None:
    shared = nn.Linear(1, 1, bias=False)
    checkpoint = Checkpoint(b=Trackable(), a=Trackable(), c=[shared, shared, shared.weight])
    checkpoint.b.layer = shared
    checkpoint.a.deep = Trackable()
    checkpoint.a.deep.layer = shared
    manifest = manifest_of(checkpoint.write(path))
    assert variables(manifest) == ["c/2"]  # the shortest path, and not the first in the alphabet
    layer = dict(edges(manifest, 2))["layer"]
    assert edges(manifest, 3) == [("0", layer), ("1", layer), ("2", edges(manifest, layer)[0][1])]
    assert dict(edges(manifest, dict(edges(manifest, 1))["deep"]))["layer"] == layer


class _Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        if tied:
            self.out.weight = self.embedding.weight


def test_tied_weights_are_one_variable_with_one_state(path: str, keys_of: Keys) -> None:
    model = _Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model.out(model.embedding(torch.tensor([1]))).sum().backward()
    optimizer.step()
    file = Checkpoint(m=model, o=optimizer).write(path)
    assert {key for key in keys_of(file) if "param_groups" not in key} == {
        "m/embedding/weight",
        "o/.slots/m/embedding/weight/momentum_buffer",
    }
    twin = _Tied()
    assert not torch.equal(twin.embedding.weight, model.embedding.weight)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, momentum=0.9)
    Checkpoint(m=twin, o=twin_optimizer).read(file).assert_consumed()
    assert twin.out.weight is twin.embedding.weight
    assert torch.equal(twin.out.weight, model.out.weight)
    assert len(twin_optimizer.state) == 1


def test_cycles(path: str, keys_of: Keys) -> None:
    checkpoint = Checkpoint()
    checkpoint.first, checkpoint.second = Trackable(), Trackable()
    checkpoint.first.other, checkpoint.second.other = checkpoint.second, checkpoint.first
    checkpoint.first.me = (checkpoint.first,)
    checkpoint.second.root = checkpoint
    checkpoint.second.x = one()
    assert keys_of(checkpoint.save(path)) == {"save_counter", "second/x"}


def test_a_chain_deeper_than_the_recursion_limit(path: str) -> None:
    def chain(value: float) -> Trackable:
        first = last = Trackable()
        for _ in range(3000):
            last.next = Trackable()
            last = last.next
        last.x = value
        return first

    live = chain(0.0)
    Checkpoint(c=live).read(Checkpoint(c=chain(5.0)).write(path)).assert_consumed()
    for _ in range(3000):
        live = live.next
    assert live.x == 5


def test_a_container_that_contains_itself_is_no_value(path: str, keys_of: Keys) -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    with pytest.raises(ValueError, match=r"endless: a builtins\.list cannot be checkpointed: it contains itself"):
        Checkpoint(endless=endless)
    loop: list[Any] = [one()]
    loop.append(loop)
    assert keys_of(Checkpoint(loop=loop).write(path)) == {"loop/0"}


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_container_nested_too_deeply_is_refused(path: str) -> None:
    words = r"more levels than Python's recursion limit \(\d+\) leaves room for, which is about \d+\. Store it flat"
    with pytest.raises(ValueError, match=rf"^x: a builtins\.list cannot be checkpointed: .*{words}, or .*NoDependency"):
        Checkpoint(x=nested(800))
    with pytest.raises(TypeError, match=words):
        Trackable().track(nested(800), "x")
    optimizer = torch.optim.SGD([{"params": [one()], "own": nested(800)}])
    for value in ([one(), nested(800)], optimizer):
        with pytest.raises(CollectiveError, match=rf"RecursionError.*while x.* was asked for its state: .*{words}"):
            Checkpoint(x=value).write(path)
    with pytest.raises(LayoutError, match=rf"metadata: .*{words}"):
        Checkpoint().write(path, options=SaveOptions(metadata={"m": nested(800)}))
    assert not Path(path + ".h5").exists()
    Checkpoint(x=nested(0)).read(Checkpoint(x=nested(100)).write(path)).assert_consumed()


@pytest.mark.parametrize("root", [None, Trackable()], ids=["own root", "other root"])
def test_an_attribute_nested_too_deeply_is_left_out_with_a_warning(path: str, keys_of: Keys, root: Any) -> None:
    checkpoint = Checkpoint(root, x=1)
    checkpoint.part = Trackable()
    checkpoint.deep = checkpoint.part.deep = nested(800)
    checkpoint.other, checkpoint.later = object(), [object()]  # nothing in them could be saved
    with pytest.warns(CheckpointWarning) as warned:
        assert keys_of(checkpoint.write(path)) == {"x"}
    texts = sorted(str(warning.message) for warning in warned)
    for key, text in zip(["deep", "part/deep"], texts, strict=True):
        assert text.startswith(f"{key}: left out: a builtins.list cannot be checkpointed: it contains itself, or has")
        assert text.endswith("Store it flat, or keep it out with NoDependency.")
    checkpoint.write(path)  # once: a warning would be an error here
    checkpoint.part.deep = NoDependency(nested(800))
    checkpoint.deep = nested(5)
    assert keys_of(checkpoint.write(path)) == {"x", "deep"}


# ---- what is tracked ---------------------------------------------------------------------------------------------


class _NoInit(Trackable):
    def __init__(self) -> None:  # does not call super().__init__()
        self.a = one()
        self._private = 1
        self.__mangled = 2


def test_private_names_are_tracked_without_any_init(path: str, keys_of: Keys) -> None:
    assert keys_of(Checkpoint(t=_NoInit()).write(path)) == {"t/a", "t/_private", "t/_NoInit__mangled"}


def test_deleting_untracks_and_assigning_again_tracks(path: str, keys_of: Keys) -> None:
    checkpoint = Checkpoint(a=one(), b=1, d={"x": one(), "y": 2})
    assert keys_of(checkpoint.write(path)) == {"a", "b", "d/x", "d/y"}
    del checkpoint.a, checkpoint.b, checkpoint.d["x"]
    assert keys_of(checkpoint.write(path)) == {"d"}
    checkpoint.b = one()
    checkpoint.d["z"] = one()
    assert keys_of(checkpoint.write(path)) == {"b", "d/y", "d/z"}
    with pytest.raises(AttributeError):
        del checkpoint.missing


def test_reassigning_replaces(path: str) -> None:
    checkpoint = Checkpoint(a=one())
    checkpoint.a = torch.full((2,), 7.0)
    live = Checkpoint(a=torch.zeros(2))
    live.read(checkpoint.write(path)).assert_consumed()
    assert live.a.tolist() == [7, 7]


def test_no_dependency_keeps_an_attribute_out(path: str, keys_of: Keys) -> None:
    checkpoint = Checkpoint(a=one())
    value = [one()]
    checkpoint.hidden = NoDependency(value)
    assert checkpoint.hidden is value
    checkpoint.a = NoDependency(checkpoint.a)
    assert keys_of(checkpoint.write(path)) == set()
    checkpoint.hidden = value
    assert keys_of(checkpoint.write(path)) == {"hidden/0"}


def test_track(path: str, keys_of: Keys) -> None:
    node, tensor = Trackable(), one()
    assert node.track(tensor, "x") is tensor
    assert node.track(tensor, "x") is tensor  # again is fine
    assert not hasattr(node, "x")
    assert keys_of(Checkpoint(n=node).write(path)) == {"n/x"}
    with pytest.raises(ValueError, match=r"track\('x'\): the name belongs to another object.*overwrite=True"):
        node.track(one(), "x")
    other = node.track(torch.zeros(1), "x", overwrite=True)
    live = Trackable()
    live.x = torch.full((1,), 5.0)
    Checkpoint(n=live).read(Checkpoint(n=node).write(path)).assert_consumed()
    assert live.x == other
    with pytest.raises(TypeError, match=r"track\('y'\): a builtins.set cannot be checkpointed. Pass"):
        node.track({1}, "y")
    del node.x
    assert keys_of(Checkpoint(n=node).write(path)) == set()


def test_track_meets_attributes(path: str, keys_of: Keys) -> None:
    node = Trackable()
    node.a = one()
    with pytest.raises(ValueError, match="belongs to another object"):
        node.track(one(), "a")
    assert node.track(node.a, "a") is node.a
    node.b = NoDependency(one())
    node.track(node.b, "b")  # asked for by name, so the opt-out no longer holds
    node.c = node.track(one(), "c")
    assert keys_of(Checkpoint(n=node).write(path)) == {"n/a", "n/b", "n/c"}


def test_a_later_attribute_that_cannot_be_saved_is_left_out_with_a_debug_message(
    path: str, keys_of: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(a=one())
    checkpoint.callback = print
    checkpoint.things = {1, 2}
    with caplog.at_level(logging.DEBUG, "distckpt"):
        assert keys_of(checkpoint.write(path)) == {"a"}
    assert "attribute 'callback' of Checkpoint is a builtin_function_or_method and is not saved" in caplog.text
    assert "'things'" in caplog.text


@pytest.mark.parametrize(
    ("value", "kind"),
    [({1}, "builtins.set"), (print, "builtins.builtin_function_or_method"), ([object()], "builtins.list")],
    ids=["set", "function", "list"],
)
def test_a_keyword_that_cannot_be_saved_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^x: a {kind} cannot be checkpointed.*state_dict"):
        Checkpoint(x=value)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"lr": 0.1, "seen": {1}}, r"\['seen'\] in it is a builtins\.set"),
        ([1, ("a", {2: print})], r"\[1\]\[1\]\[2\] in it is a builtins\.builtin_function_or_method"),
        (collections.deque([NoDependency(1), object()]), r"\[1\] in it is a builtins\.object"),
    ],
    ids=["dict", "nested", "deque"],
)
def test_what_is_in_the_way_inside_a_container_is_named(value: Any, part: str) -> None:
    kind = type(value).__name__
    with pytest.raises(ValueError, match=rf"^x: a \w+\.{kind} cannot be checkpointed, for {part}\. Pass.*NoDependency"):
        Checkpoint(x=value)


@pytest.mark.parametrize("root", [None, Trackable()], ids=["own root", "other root"])
def test_a_container_that_gets_what_cannot_be_saved_is_left_out_with_a_warning(
    path: str, keys_of: Keys, root: Any
) -> None:
    checkpoint = Checkpoint(root, history={"loss": 0.5}, a=1)
    checkpoint.part = Trackable()
    checkpoint.part.config = {"sizes": (1, 2), "name": "a"}
    assert keys_of(checkpoint.write(path)) == {"history", "a", "part/config"}
    checkpoint.history["best"] = checkpoint.part.config["sizes"] = {1, 2}
    with pytest.warns(CheckpointWarning) as warned:
        assert keys_of(checkpoint.write(path)) == {"a"}
    texts = sorted(str(warning.message) for warning in warned)
    for start, text in zip(["history: left out", "part/config: left out"], texts, strict=True):
        assert text.startswith(f"{start}: a builtins.dict cannot be checkpointed, for [")
        assert "in it is a builtins.set. Pass" in text
        assert text.endswith("or keep it out with NoDependency.")
    checkpoint.write(path)  # once: a warning would be an error here
    checkpoint.history["best"] = NoDependency(checkpoint.history["best"])
    checkpoint.part.config["sizes"] = 3
    assert keys_of(checkpoint.write(path)) == {"history/loss", "a", "part/config"}


def _two_children(module: Any, value: float) -> None:
    nn.Module.__init__(module)
    module.linear = nn.Linear(2, 2)
    module.scale = nn.Parameter(torch.full((2,), value))


class _TrackableFirst(Trackable, nn.Module):
    __init__ = _two_children


class _ModuleFirst(nn.Module, Trackable):
    __init__ = _two_children


@pytest.mark.parametrize("cls", [_TrackableFirst, _ModuleFirst])
def test_a_trackable_that_is_a_module_is_saved_as_one(cls: Any, path: str, keys_of: Keys) -> None:
    saved, live = cls(1.0), cls(2.0)
    assert len([*live.parameters()]) == 3
    file = Checkpoint(m=saved).write(path)
    assert keys_of(file) == {"m/linear/weight", "m/linear/bias", "m/scale"}
    Checkpoint(m=live).read(file).assert_consumed()
    assert all(map(torch.equal, live.parameters(), saved.parameters()))
    del live.scale
    assert len([*live.parameters()]) == 2


def test_what_sits_beside_something_trackable_must_be_saveable(path: str) -> None:
    with pytest.raises(LayoutError, match=r"x/1: a builtins\.object cannot be checkpointed.*NoDependency") as caught:
        Checkpoint(x=[one(), object()]).write(path)
    assert isinstance(caught.value, ValueError)


def test_the_walk_runs_no_code_of_the_objects(path: str, keys_of: Keys) -> None:
    class Touchy(Trackable):
        @property
        def trap(self) -> None:
            raise AssertionError("read a property")

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

        def __len__(self) -> int:
            raise AssertionError("asked for its length")

    node = Touchy()
    node.x = one()
    assert keys_of(Checkpoint(n=node, again=node).write(path)) == {"again/x"}


def test_containers_are_read_when_saved(path: str, keys_of: Keys) -> None:
    layers = [nn.Linear(1, 1, bias=False)]
    checkpoint = Checkpoint(layers=layers)
    assert keys_of(checkpoint.write(path)) == {"layers/0/weight"}
    layers.insert(0, nn.Linear(1, 1, bias=False))
    layers.append(3)  # type: ignore[arg-type]
    assert keys_of(checkpoint.write(path)) == {"layers/0/weight", "layers/1/weight", "layers/2"}
    layers.clear()
    assert keys_of(checkpoint.write(path)) == {"layers"}
    assert checkpoint.layers is layers
    assert type(checkpoint.layers) is list


# ---- optimizers whose parameters are not all known ---------------------------------------------------------------


def test_slots_of_parameters_without_an_owner_are_not_saved_with_one_warning(path: str, keys_of: Keys) -> None:
    known, unknown = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.Adam([*known.parameters(), *unknown.parameters()])
    (known(one()) + unknown(one())).sum().backward()
    checkpoint = Checkpoint(known=known, optimizer=optimizer)
    checkpoint.write(path)  # nothing is lost yet
    optimizer.step()
    with pytest.warns(CheckpointWarning, match="2 optimizer parameter.*no tracked object.*Track the module"):
        file = checkpoint.write(path)
    checkpoint.write(path)
    assert {key for key in keys_of(file) if ".slots" in key} == {
        f"optimizer/.slots/known/{name}/{slot}"
        for name in ("weight", "bias")
        for slot in ("step", "exp_avg", "exp_avg_sq")
    }


def test_parameters_in_a_plain_list_are_nodes_too(path: str, keys_of: Keys) -> None:
    parameters = [nn.Parameter(one()), nn.Parameter(one())]
    optimizer = torch.optim.SGD(parameters, momentum=0.9, lr=0.1)
    sum(parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert {key for key in keys_of(Checkpoint(p=parameters, o=optimizer).write(path)) if "groups" not in key} == {
        "p/0",
        "p/1",
        "o/.slots/p/0/momentum_buffer",
        "o/.slots/p/1/momentum_buffer",
    }


# ---- the root ----------------------------------------------------------------------------------------------------


def test_a_positional_root_gives_its_own_children_to_node_zero(path: str, keys_of: Keys) -> None:
    model = nn.Linear(1, 1)
    checkpoint = Checkpoint(model, step=3)
    checkpoint.later = {"t": one()}
    file = checkpoint.save(path)
    assert keys_of(file) == {"save_counter", "weight", "bias", "step", "later/t"}
    twin = nn.Linear(1, 1)
    assert not torch.equal(twin.weight, model.weight)
    live = Checkpoint(weight=twin.weight, bias=twin.bias, step=0, later={"t": torch.zeros(1)})  # the same top level
    live.restore(file).assert_consumed()
    assert torch.equal(twin.weight, model.weight)
    assert live.step == 3
    assert live.later["t"] == 1


@pytest.mark.parametrize("root", ["module", "trackable", "dict", "list", "optimizer", "tensor", "scheduler"])
def test_anything_that_is_a_node_can_be_the_root(root: str, path: str) -> None:
    def make(value: float) -> Any:
        torch.manual_seed(int(value))
        if root == "module":
            return nn.Linear(2, 2)
        if root == "trackable":
            node = Trackable()
            node.x, node.n = torch.full((2,), value), value
            return node
        parameter = nn.Parameter(torch.full((2,), value))
        optimizer = torch.optim.SGD([parameter], lr=value)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=value)
        objects = {"dict": {"x": parameter, "n": value}, "list": [parameter, value], "optimizer": optimizer}
        return {**objects, "tensor": parameter, "scheduler": scheduler}[root]

    def state(obj: Any) -> Any:
        if isinstance(obj, Trackable):
            obj = vars(obj)
        if hasattr(obj, "state_dict"):
            return repr(obj.state_dict())
        return repr({k: v for k, v in obj.items() if k[0] != "_"} if isinstance(obj, dict) else obj)

    saved, live = make(3.0), make(0.5)
    assert state(saved) != state(live)
    checkpoint = Checkpoint(live, extra=0)
    checkpoint.restore(Checkpoint(saved, extra=5).save(path)).assert_consumed()
    assert state(saved) == state(live)
    assert checkpoint.extra == 5


def test_a_root_that_is_no_node_is_refused() -> None:
    with pytest.raises(ValueError, match="root: a int cannot be checkpointed"):
        Checkpoint(5)
    with pytest.raises(ValueError, match="root: a set cannot be checkpointed"):
        Checkpoint({1})


def test_names_of_the_root_and_of_the_checkpoint_must_differ(path: str) -> None:
    root = Trackable()
    root.a, root.n, root.none = one(), 1, None
    for name in ("a", "n", "none"):
        with pytest.raises(ValueError, match=f"{name}: the root already has a child of that name"):
            Checkpoint(root, **{name: one()})
    checkpoint = Checkpoint(root)
    for name in ("a", "n", "none"):
        with pytest.raises(ValueError, match=f"{name}: the root already has"):
            setattr(checkpoint, name, None)
        with pytest.raises(ValueError, match=f"{name}: the root already has"):
            checkpoint.track(one(), name)
    checkpoint.a = root.a  # the same object is no clash
    checkpoint.b = one()
    checkpoint.write(path)
    root.b = one()
    with pytest.raises(LayoutError, match="b: the root and the Checkpoint both have something of this name"):
        checkpoint.write(path)


@pytest.mark.parametrize("value", [5, torch.ones(2)], ids=["number", "tensor"])
def test_the_name_of_the_counter_is_taken(value: Any, path: str, keys_of: Keys) -> None:
    root = Trackable()
    root.save_counter = value
    with pytest.raises(LayoutError, match="save_counter: the root and the Checkpoint both"):
        Checkpoint(root).save(path)
    assert keys_of(Checkpoint(root).write(path)) == {"save_counter"}  # which has no counter of its own


def test_a_weakly_held_root(path: str, keys_of: Keys) -> None:
    model = nn.Linear(1, 1)
    checkpoint = Checkpoint(weakref.ref(model), step=1)
    file = checkpoint.save(path)
    assert keys_of(file) == {"save_counter", "weight", "bias", "step"}
    expected = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    checkpoint.restore(file)
    assert torch.equal(model.weight, expected)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    with pytest.raises(Exception, match="given as a weak reference and no longer exists"):
        checkpoint.save(path)


def test_nothing_keeps_a_checkpoint_alive(path: str) -> None:
    gc.collect()
    gc.disable()
    try:
        checkpoint = Checkpoint(m=nn.Linear(1, 1), step=0)
        file = checkpoint.save(path)
        checkpoint.restore(file)
        del checkpoint.step
        status = checkpoint.restore(file).expect_partial()  # something waits now
        assert status.pending == ("step",)
        model, gone = weakref.ref(checkpoint.m), weakref.ref(checkpoint)
        del checkpoint, status
        assert gone() is None
        assert model() is None
    finally:
        gc.enable()


# ---- saves of a graph that changes -------------------------------------------------------------------------------


def test_every_save_stores_what_is_there_then(path: str, tmp_path: Path, keys_of: Keys) -> None:
    """Saves of an unchanged layout take a short cut, which must not hide a change."""
    checkpoint = Checkpoint(a=torch.zeros(3), n=0)
    for i in range(1, 8):
        checkpoint.a.fill_(i)
        checkpoint.n = "text" * i if i % 2 else {"number": i}
        if i == 4:
            checkpoint.b = torch.zeros(2)
        if i == 6:
            del checkpoint.b
            checkpoint.a = torch.zeros(5)
            checkpoint.a.fill_(i)
        checkpoint.save(path)
    for i in range(1, 8):
        file = str(tmp_path / f"state-{i}.h5")
        assert keys_of(file) == {"save_counter", "a", "n"} | ({"b"} if i in (4, 5) else set())
        live = Checkpoint(a=torch.zeros(5 if i >= 6 else 3), n=None)
        if i in (4, 5):
            live.b = torch.ones(2)
        live.restore(file).assert_consumed()
        assert live.a.unique().tolist() == [i]
        assert live.n == ("text" * i if i % 2 else {"number": i})
        assert live.save_counter == i
