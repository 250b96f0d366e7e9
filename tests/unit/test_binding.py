"""Matching a saved graph with a live one: by edges from the root and by identity, never by position or key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CheckpointWarning, PerRank, RestoreMismatchError, RestoreOptions, Trackable
from distckpt.graph.adapters.registry import adapter_for
from distckpt.graph.binding import bind
from distckpt.graph.selection import select
from distckpt.graph.view import LiveGraph, walk
from distckpt.layout.records import Attribute, Child, Node, ObjectGraph

PARTIAL = RestoreOptions(expect_partial=True)
STRICT = RestoreOptions(strict=True)
SKIP = RestoreOptions(on_mismatch="skip")


def node(**attributes: Any) -> Trackable:
    """A trackable object with these attributes, in this order."""
    made = Trackable()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def live_graph(root: object) -> LiveGraph:
    adapter = adapter_for(root)
    assert adapter is not None
    return walk(root, adapter, 0)


# ---- the order of things -----------------------------------------------------------------------------------------


def test_the_order_of_edges_does_not_matter(path: str) -> None:
    file = Checkpoint(n=node(a=full(1), b=full(2), c=node(x=full(3)), k=4)).write(path)
    live = node(k=0, c=node(x=full(0)), b=full(0), a=full(0))
    Checkpoint(n=live).read(file).assert_consumed()
    assert [live.a.tolist(), live.b.tolist(), live.c.x.tolist(), live.k] == [[1, 1], [2, 2], [3, 3], 4]


def test_a_parameter_registered_in_another_order(path: str) -> None:
    saved, live = nn.Module(), nn.Module()
    for name in "abc":
        saved.register_parameter(name, nn.Parameter(torch.randn(2)))
    for name in "cab":
        live.register_parameter(name, nn.Parameter(torch.randn(2)))
    Checkpoint(m=live).read(Checkpoint(m=saved).write(path)).assert_consumed()
    for name in "abc":
        assert torch.equal(getattr(live, name), getattr(saved, name))


def test_layers_added_and_removed(path: str) -> None:
    saved = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    live = nn.ModuleDict({"0": nn.Linear(2, 2), "1": nn.BatchNorm1d(2), "3": nn.Linear(2, 2)})
    status = Checkpoint(m=live).read(Checkpoint(m=saved).write(path), options=PARTIAL)
    assert torch.equal(live["0"].weight, saved[0].weight)
    assert status.unexpected == ("m/2/bias", "m/2/weight")
    assert status.pending == ("m/2/bias", "m/2/weight")
    assert status.missing == (
        "m/1/bias",
        *(f"m/1/{name}" for name in ("num_batches_tracked", "running_mean", "running_var", "weight")),
        "m/3/bias",
        "m/3/weight",
    )


def test_cycles(path: str) -> None:
    def ring(value: float) -> Checkpoint:
        checkpoint = Checkpoint(a=node(x=full(value)), b=node(y=full(value + 1)))
        checkpoint.a.next, checkpoint.b.next = checkpoint.b, checkpoint.a
        checkpoint.a.root = checkpoint
        return checkpoint

    live = ring(-5)
    live.restore(ring(3).save(path)).assert_consumed()
    assert live.a.x.tolist() == [3, 3]
    assert live.b.y.tolist() == [4, 4]


def test_a_graph_by_its_records() -> None:
    """Edges decide; the keys say nothing."""
    saved = ObjectGraph(
        [
            Node(children=[Child(1, "x"), Child(2, "gone")], attributes=[Attribute("n", "misleading/y")]),
            Node(attributes=[Attribute(".value", "y")]),
            Node(attributes=[Attribute(".value", "x")]),
        ]
    )
    live = node(x=full(0), y=full(0), n=1)
    binding = bind(select(saved, saved, only=None, skip_slots=False, rename={}), live_graph(live))
    assert [(match.key, match.name, match.node.key) for match in binding.matches] == [
        ("misleading/y", "n", ""),
        ("y", ".value", "x"),
    ]
    assert binding.pending == {"x": ("", "attribute 'gone'")}
    assert binding.mismatches == binding.duplicates == binding.combined == []


# ---- one saved object, two live ones -----------------------------------------------------------------------------


class _Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        if tied:
            self.out.weight = self.embedding.weight


def test_weights_that_are_no_longer_tied(path: str) -> None:
    saved, live = _Tied(tied=True), _Tied(tied=False)
    file = Checkpoint(m=saved).write(path)
    out = live.out.weight.detach().clone()
    checkpoint = Checkpoint(m=live)
    with pytest.raises(RestoreMismatchError, match=r"(?s)ambiguous.*m/embedding/weight and m/out/weight"):
        checkpoint.read(file, options=STRICT)
    assert not torch.equal(live.embedding.weight, saved.embedding.weight)
    with pytest.warns(CheckpointWarning, match="m/embedding/weight: one saved object meets two live ones") as caught:
        status = checkpoint.read(file)
    assert len(caught) <= 1  # on ranks above 0 none
    assert torch.equal(live.embedding.weight, saved.embedding.weight)
    assert torch.equal(live.out.weight, out)
    assert status.missing == ("m/out/weight",)
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match="only the first is restored"):
            assertion()
    status.assert_nontrivial_match()


def test_the_first_in_breadth_first_order_wins(path: str) -> None:
    shared = full(7)
    file = Checkpoint(deep=node(er=node(x=shared)), z=shared).write(path)
    live = Checkpoint(deep=node(er=node(x=full(0))), z=full(0))
    with pytest.warns(CheckpointWarning, match="z: one saved object meets two live ones, z and deep/er/x"):
        live.read(file)
    assert live.z.tolist() == [7, 7]
    assert live.deep.er.x.tolist() == [0, 0]


def test_one_saved_container_two_live_ones(path: str) -> None:
    shared = [full(1)]
    live = Checkpoint(a=[full(0)], b=[full(0)])
    with pytest.warns(CheckpointWarning, match="one saved object meets two live ones, a and b"):
        status = live.read(Checkpoint(a=shared, b=shared).write(path))
    assert (live.a[0].tolist(), live.b[0].tolist()) == ([1, 1], [0, 0])
    with pytest.raises(AssertionError, match="ambiguous"):
        status.assert_existing_objects_matched()


def test_the_same_tie_is_no_conflict(path: str) -> None:
    saved, live = _Tied(tied=True), _Tied(tied=True)
    Checkpoint(m=live, again=live.out).read(Checkpoint(m=saved, again=saved.out).write(path), options=STRICT)
    assert torch.equal(live.out.weight, saved.out.weight)


# ---- two saved objects, one live one -----------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [True, False])
def test_weights_that_became_tied(equal: bool, path: str) -> None:
    """Equal values, which the checksums tell, lose nothing."""
    saved, live = _Tied(tied=False), _Tied(tied=True)
    if equal:
        saved.out.weight.data.copy_(saved.embedding.weight)
    file = Checkpoint(m=saved).write(path)
    checkpoint = Checkpoint(m=live)
    if equal:
        checkpoint.read(file, options=STRICT).assert_consumed()
        assert torch.equal(live.out.weight, saved.out.weight)
        return
    before = live.out.weight.detach().clone()
    with pytest.raises(
        RestoreMismatchError, match=r"two saved values, m/embedding/weight and m/out/weight, meet one live"
    ):
        checkpoint.read(file, options=STRICT)
    assert torch.equal(live.out.weight, before)
    with pytest.warns(CheckpointWarning, match="two saved values, m/embedding/weight and m/out/weight"):
        status = checkpoint.read(file)
    assert torch.equal(live.out.weight, saved.embedding.weight)
    assert status.unexpected == ("m/out/weight",)
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match="the first is restored"):
            assertion()


def test_two_saved_objects_whose_children_one_live_object_has(path: str) -> None:
    file = Checkpoint(a=node(x=full(1), n=1), b=node(y=full(2), m=2)).write(path)
    both = node(x=full(0), y=full(0), n=0, m=0)
    Checkpoint(a=both, b=both).read(file, options=STRICT).assert_consumed()
    assert (both.x.tolist(), both.y.tolist(), both.n, both.m) == ([1, 1], [2, 2], 1, 2)


def test_two_saved_objects_that_contradict_each_other_in_one_number(path: str) -> None:
    file = Checkpoint(a=node(n=1, same=5), b=node(n=2, same=5)).write(path)
    both = node(n=0, same=0)
    with pytest.warns(CheckpointWarning, match="a/n: two saved values, a/n and b/n") as caught:
        status = Checkpoint(a=both, b=both).read(file)
    assert len(caught) == 1
    assert (both.n, both.same) == (1, 5)
    with pytest.raises(AssertionError, match="a/n and b/n"):
        status.assert_consumed()


def test_values_without_checksums_are_taken_to_differ(path: str) -> None:
    from distckpt import SaveOptions

    file = Checkpoint(a=full(1), b=full(1)).write(path, options=SaveOptions(checksums=False))
    shared = full(0)
    with pytest.warns(CheckpointWarning, match="two saved values, a and b"):
        Checkpoint(a=shared, b=shared).read(file)
    assert shared.tolist() == [1, 1]


# ---- kinds -------------------------------------------------------------------------------------------------------


class _Stateful:
    def state_dict(self) -> dict[str, Any]:
        return {"x": 1, "t": full(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


_KINDS: dict[str, Any] = {
    "number": lambda: 5,
    "tensor": lambda: full(3),
    "module": lambda: nn.Linear(2, 2),
    "stateful": _Stateful,
    "list of tensors": lambda: [full(1)],
}


_CHANGES = [
    (saved, live)
    for saved in _KINDS
    for live in _KINDS
    if saved != live and {saved, live} != {"module", "list of tensors"}
]


@pytest.mark.parametrize(("saved", "live"), _CHANGES)
def test_a_value_whose_kind_changed_is_a_mismatch(saved: str, live: str, path: str) -> None:
    file = Checkpoint(x=_KINDS[saved](), other=full(1)).write(path)
    checkpoint = Checkpoint(x=_KINDS[live](), other=full(0))
    before = repr(checkpoint.x)
    with pytest.raises(RestoreMismatchError, match=r"(?m)^  x(/\.state|/t)?: saved .*, live "):
        checkpoint.read(file)
    assert checkpoint.other.tolist() == [0, 0]
    assert repr(checkpoint.x) == before
    with pytest.warns(CheckpointWarning, match="x.* skipped: saved"):
        status = checkpoint.read(file, options=SKIP)
    assert checkpoint.other.tolist() == [1, 1]
    assert repr(checkpoint.x) == before
    assert status.mismatched
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match=r"x.*: saved .*, live "):
            assertion()


@pytest.mark.parametrize(("saved", "live"), [("number", "tensor"), ("tensor", "number"), ("stateful", "number")])
def test_a_per_rank_value_whose_kind_changed_is_a_mismatch(saved: str, live: str, path: str) -> None:
    file = Checkpoint(x=PerRank(_KINDS[saved]()), other=full(1)).write(path)
    checkpoint = Checkpoint(x=PerRank(_KINDS[live]()), other=full(0))
    with pytest.raises(RestoreMismatchError, match=r"(?m)^  x/\.rank/0: saved .*, live "):
        checkpoint.read(file)
    assert checkpoint.other.tolist() == [0, 0]
    with pytest.warns(CheckpointWarning, match=r"x/\.rank/0 skipped: saved"):
        checkpoint.read(file, options=SKIP)
    assert checkpoint.other.tolist() == [1, 1]
    assert repr(checkpoint.x.value) == repr(_KINDS[live]())


def test_the_type_of_a_number_is_not_its_kind(path: str) -> None:
    values: list[Any] = [5, 2.5, "text", None, b"bytes", [1], (1,), {"a": 1}, True]
    for saved in values:
        for live in values:
            checkpoint = Checkpoint(x=live)
            checkpoint.read(Checkpoint(x=saved).write(path)).assert_consumed()
            assert checkpoint.x == saved
            assert type(checkpoint.x) is type(saved)


def test_an_object_where_nothing_was_yet_is_a_mismatch(path: str) -> None:
    """None is a value; a placeholder that may become anything is the missing attribute."""
    file = Checkpoint(m=None, n=nn.Linear(1, 1)).write(path)
    with pytest.raises(
        RestoreMismatchError, match=r"(?s)m: saved a python value, live a Linear.*n: saved an object or tensor, live"
    ):
        Checkpoint(m=nn.Linear(1, 1), n=None).read(file)
