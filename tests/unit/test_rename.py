"""`RestoreOptions(rename=...)`: saved prefix to live prefix, whole components, the longest wins, slots follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, PerRank, RestoreOptions, RNGState
from distckpt.graph.rename import rename
from distckpt.layout.records import Attribute, Child, Node, ObjectGraph, SlotVariable

PARTIAL = RestoreOptions(expect_partial=True)


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def move(prefixes: dict[str, str], **more: Any) -> RestoreOptions:
    return RestoreOptions(rename=prefixes, **more)


def test_a_renamed_attribute(path: str) -> None:
    file = Checkpoint(old=full(3), number=5, text="x").write(path)
    live = Checkpoint(new=full(0), count=0, text="")
    live.read(file, options=move({"old": "new", "number": "count"})).assert_consumed()
    assert live.new.tolist() == [3, 3]
    assert (live.count, live.text) == (5, "x")


def test_a_renamed_subtree_with_its_optimizer(path: str) -> None:
    def make(seed: int, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.ModuleDict({name: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = make(1, "encoder")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    file = Checkpoint(m=model, o=optimizer).write(path)
    live, live_optimizer = make(2, "trunk")
    checkpoint = Checkpoint(net=live, opt=live_optimizer)
    assert not torch.equal(live["trunk"][0].weight, model["encoder"][0].weight)
    options = move({"m/encoder": "net/trunk", "m": "net", "o": "opt"})
    checkpoint.read(file, options=options).assert_consumed()
    for parameter, twin in zip(model.parameters(), live.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], live_optimizer.state[twin]["exp_avg"])


@pytest.mark.parametrize("prefixes", [{"a": "b", "b": "a"}, {"b": "a", "a": "b"}])
def test_two_places_can_be_swapped(prefixes: dict[str, str], path: str) -> None:
    file = Checkpoint(a={"x": full(1), "n": 1}, b={"x": full(2), "n": 2}).write(path)
    live = Checkpoint(a={"x": full(0), "n": 0}, b={"x": full(0), "n": 0})
    live.read(file, options=move(prefixes)).assert_consumed()
    assert (live.a["x"].tolist(), live.a["n"]) == ([2, 2], 2)
    assert (live.b["x"].tolist(), live.b["n"]) == ([1, 1], 1)


def test_swapped_values_inside_one_object(path: str) -> None:
    file = Checkpoint(d={"x": full(1), "y": full(2), "m": 1, "n": 2}).write(path)
    live = Checkpoint(d={"x": full(0), "y": full(0), "m": 0, "n": 0})
    live.read(file, options=move({"d/x": "d/y", "d/y": "d/x", "d/m": "d/n", "d/n": "d/m"})).assert_consumed()
    assert [live.d["x"].tolist(), live.d["y"].tolist(), live.d["m"], live.d["n"]] == [[2, 2], [1, 1], 2, 1]


def test_a_rotation_of_three(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(2), c=full(3)).write(path)
    live = Checkpoint(a=full(0), b=full(0), c=full(0))
    live.read(file, options=move({"a": "b", "b": "c", "c": "a"})).assert_consumed()
    assert [int(t[0]) for t in (live.a, live.b, live.c)] == [3, 1, 2]


@pytest.mark.parametrize(("old", "new"), [(full(1), 2), (1, full(2))], ids=["tensor", "number"])
def test_a_part_takes_the_place_of_another_kind(old: Any, new: Any, path: str) -> None:
    file = Checkpoint(old=old, new=new).write(path)
    live = Checkpoint(new=0 if isinstance(old, int) else full(0))
    status = live.read(file, options=move({"old": "new"}, expect_partial=True))
    assert int(torch.as_tensor(live.new).max()) == 1
    assert status.unexpected == ("new",)


@pytest.mark.parametrize("new", ["", "/", "a.b", "x/.foo", ".foo/x"])
def test_a_new_name_that_can_be_no_key(new: str, path: str) -> None:
    file = Checkpoint(old=full(1)).write(path)
    with pytest.raises(ValueError, match=rf"^rename: expected a live key for 'old'\. Got '{new}': .* no escaped name"):
        Checkpoint(new=full(0)).read(file, options=move({"old": new}))


def test_the_longest_prefix_wins(path: str) -> None:
    file = Checkpoint(m={"head": {"w": full(1), "b": full(2)}, "body": {"w": full(3)}}).write(path)
    live = Checkpoint(net={"body": {"w": full(0)}, "top": {"b": full(0)}}, w=full(0))
    options = move({"m": "net", "m/head": "net/top", "m/head/w": "w"})
    live.read(file, options=options).assert_consumed()
    assert [int(t[0]) for t in (live.w, live.net["top"]["b"], live.net["body"]["w"])] == [1, 2, 3]


def test_whole_components_only(path: str) -> None:
    file = Checkpoint(layer=full(1), layer1=full(2)).write(path)
    live = Checkpoint(block=full(0), layer1=full(0))
    live.read(file, options=move({"layer": "block"})).assert_consumed()
    assert [int(live.block[0]), int(live.layer1[0])] == [1, 2]


def test_into_a_place_that_the_file_does_not_have(path: str) -> None:
    file = Checkpoint(w=full(1), n=5).write(path)
    live = Checkpoint(deep={"er": {"w": full(0), "n": 0}})
    live.read(file, options=move({"w": "deep/er/w", "n": "deep/er/n"})).assert_consumed()
    assert live.deep["er"]["w"].tolist() == [1, 1]
    assert live.deep["er"]["n"] == 5


def test_keys_are_written_escaped(path: str) -> None:
    file = Checkpoint(d={"a/b": full(1), 5: full(2), "x.y": 3}).write(path)
    live = Checkpoint(d={"a": full(0), 6: full(0), "x/y": 0})
    live.read(file, options=move({"d/a.Sb": "d/a", "d/.i5": "d/.i6", "d/x..y": "d/x.Sy"})).assert_consumed()
    assert (live.d["a"].tolist(), live.d[6].tolist(), live.d["x/y"]) == ([1, 1], [2, 2], 3)


def test_slashes_at_the_ends_do_not_matter(path: str) -> None:
    file = Checkpoint(a={"x": full(1)}).write(path)
    live = Checkpoint(b={"x": full(0)})
    live.read(file, options=move({"/a/": "b/"})).assert_consumed()
    assert live.b["x"].tolist() == [1, 1]


@pytest.mark.parametrize("prefix", ["gone", "m/gone", "m/head/w/x", "he", "", "m//head", "save_counter/x"])
def test_a_rename_that_hits_nothing_is_refused(prefix: str, path: str) -> None:
    file = Checkpoint(m={"head": {"w": full(1)}}).save(path)
    live = Checkpoint(m={"head": {"w": full(0)}})
    with pytest.raises(ValueError, match=rf"rename: nothing in the checkpoint has the key or prefix '{prefix}'"):
        live.restore(file, options=move({prefix: "x"}))
    assert live.m["head"]["w"].tolist() == [0, 0]
    live.restore(file).assert_consumed()


def test_a_moved_place_waits_under_its_new_name(path: str) -> None:
    file = Checkpoint(a={"x": full(1)}, other=1).write(path)
    live = Checkpoint(other=0)
    status = live.read(file, options=move({"a": "b"}))
    assert status.pending == ("a/x",)
    live.a = {"x": full(0)}
    assert live.a["x"].tolist() == [0, 0]
    live.b = {"x": full(0)}
    assert live.b["x"].tolist() == [1, 1]


def test_extra_state_and_per_rank_values(path: str) -> None:
    class Extra(nn.Module):
        state: Any = None

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

    saved, live = Extra(), Extra()
    saved.state = {"t": full(1)}
    rng = torch.get_rng_state()
    file = Checkpoint(m=saved, p=PerRank(5), q=PerRank(full(2)), r=RNGState()).write(path)
    torch.rand(3)
    checkpoint = Checkpoint(n=live, a=PerRank(0), b=PerRank(full(0)), c=RNGState())
    checkpoint.read(file, options=move({"m": "n", "p": "a", "q": "b", "r": "c"})).assert_consumed()
    assert live.state["t"].tolist() == [1, 1]
    assert checkpoint.a.value == 5
    assert checkpoint.b.value.tolist() == [2, 2]
    assert torch.equal(torch.get_rng_state(), rng)


def test_what_a_renamed_value_meets_there_is_no_longer_wanted(path: str) -> None:
    """The place is taken by what the user asked for; what the file had there stays untaken and is reported."""
    file = Checkpoint(a=full(1), b=full(2)).write(path)
    live = Checkpoint(b=full(0))
    status = live.read(file, options=move({"a": "b"}, expect_partial=True))
    assert live.b.tolist() == [1, 1]
    assert status.unexpected == ("b",)


# ---- by records --------------------------------------------------------------------------------------------------


def _graph() -> ObjectGraph:
    return ObjectGraph(
        [
            Node(children=[Child(1, "m"), Child(2, "o")], attributes=[Attribute("n", "n")]),
            Node(children=[Child(3, "w"), Child(1, "loop")]),
            Node(slot_variables=[SlotVariable(3, "s", 4)]),
            Node(attributes=[Attribute(".value", "m/w")]),
            Node(attributes=[Attribute(".value", "o/.slots/m/w/s")]),
        ]
    )


def test_without_prefixes_nothing_is_copied() -> None:
    graph = _graph()
    assert rename(graph, {}) is graph


def test_node_ids_stay_so_slots_follow_their_variable() -> None:
    renamed = rename(_graph(), {"m/w": "elsewhere/v"})
    assert renamed.nodes[2:5] == _graph().nodes[2:5]
    assert renamed.nodes[0].children == [Child(1, "m"), Child(2, "o"), Child(5, "elsewhere")]
    assert renamed.nodes[5].children == [Child(3, "v")]
    assert renamed.nodes[1].children == [Child(1, "loop")]


def test_the_graph_itself_is_not_changed() -> None:
    graph = _graph()
    rename(graph, {"m": "x", "n": "m"})
    assert graph == _graph()
