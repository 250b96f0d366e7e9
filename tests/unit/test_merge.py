"""Merging the layouts of all ranks: the graph, what is compared, what is refused, and who writes what."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import LayoutError
from distckpt.layout.box import Box, Shape, pieces
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.merge import Merged, merge
from distckpt.layout.records import (
    OWN_VALUE,
    STATE,
    Attribute,
    Child,
    LocalAttribute,
    LocalLayout,
    LocalNode,
    SavePlan,
    SlotVariable,
)
from distckpt.layout.unify import group_ranks


@dataclass
class Rank:
    """One rank's live objects, as far as the layout room sees them. Paths name nodes: "model/w"."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    paths: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paths[""] = self._new()

    def _new(self) -> int:
        self.nodes.append({"children": [], "attributes": [], "slots": [], "parameters": None, "per_rank": False})
        return len(self.nodes) - 1

    def node(self, path: str, *, per_rank: bool = False) -> int:
        """The node at a path, created with its parents if need be."""
        if path not in self.paths:
            parent, _, name = path.rpartition("/")
            self.paths[path] = self._new()
            self.nodes[self.node(parent)]["children"].append((self.paths[path], name))
        self.nodes[self.paths[path]]["per_rank"] |= per_rank
        return self.paths[path]

    def tie(self, path: str, target: str) -> Rank:
        parent, _, name = path.rpartition("/")
        self.nodes[self.node(parent)]["children"].append((self.node(target), name))
        self.paths[path] = self.node(target)
        return self

    def tensor(
        self,
        path: str,
        shape: Shape,
        box: Box | None = None,
        *,
        dtype: str = "float32",
        name: str = OWN_VALUE,
        fingerprint: int = 0,
        buffer: bool = False,
        numpy: bool = False,
    ) -> Rank:
        self._add(
            self.node(path), LocalAttribute(name, dtype, shape, buffer, numpy), box or Box.whole(shape), fingerprint
        )
        return self

    def python(self, path: str, value: bytes, *, name: str = OWN_VALUE, fingerprint: int = 0) -> Rank:
        self._add(self.node(path), LocalAttribute(name, None, ()), value, fingerprint)
        return self

    def slot(self, optimizer: str, variable: str, name: str, shape: Shape, box: Box | None = None) -> Rank:
        node = self.paths[f"{optimizer}:{variable}:{name}"] = self._new()
        self.nodes[self.node(optimizer)]["slots"].append((self.node(variable), name, node))
        self._add(node, LocalAttribute(OWN_VALUE, "float32", shape), box or Box.whole(shape), 0)
        return self

    def group(self, path: str, members: Sequence[str]) -> Rank:
        self.nodes[self.node(path)]["parameters"] = [self.node(member) for member in members]
        return self

    def _add(self, node: int, attribute: LocalAttribute, content: Box | bytes, fingerprint: int) -> None:
        self.nodes[node]["attributes"].append((attribute, content, fingerprint))

    def layout(self) -> LocalLayout:
        held = [entry for node in self.nodes for entry in node["attributes"]]
        nodes = [LocalNode(**{**node, "attributes": [a for a, _, _ in node["attributes"]]}) for node in self.nodes]
        boxes = [number for _, content, _ in held if isinstance(content, Box) for part in content for number in part]
        return LocalLayout(
            msgspec.msgpack.encode(nodes),
            np.array(boxes, np.int64).tobytes(),
            np.array([fingerprint for _, _, fingerprint in held], np.uint64).tobytes(),
            [content for _, content, _ in held if isinstance(content, bytes)],
            self.problems,
        )


def merged(*ranks: Rank, trust_lowest: bool = False) -> Merged:
    return merge([rank.layout() for rank in ranks], trust_lowest=trust_lowest)


def refused(*ranks: Rank) -> str:
    with pytest.raises(LayoutError) as caught:
        merged(*ranks)
    return str(caught.value)


def keys(result: Merged) -> list[str]:
    return [variable.key for variable in result.variables]


def rows(rank: int, size: int, shape: Shape) -> Box:
    start, stop = shape[0] * rank // size, shape[0] * (rank + 1) // size
    return Box((start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:]))


def check_complete(result: Merged) -> None:
    """Every element is written exactly once, by a rank whose plan says so, with a checksum for each piece."""
    items = {(rank, item.checksum): item for rank, plan in enumerate(result.plans) for item in plan.items}
    assert len(items) == sum(len(plan.items) for plan in result.plans)
    checksums = index_checksums(result.variables)
    n_pieces = 0
    for index, variable in enumerate(result.variables):
        counts = np.zeros(variable.shape, int)
        assert [shard.offset for shard in variable.shards] == sorted(shard.offset for shard in variable.shards)
        for shard, first in zip(variable.shards, checksums.firsts(index), strict=True):
            item = items.pop((shard.rank, first))
            assert (item.offset, item.shape) == (shard.offset, shard.shape)
            assert result.plans[shard.rank].variables[item.tensor] == index
            box = Box(shard.offset, shard.shape)
            counts[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] += 1
            n_pieces += len(pieces(box, dtype_info(variable.dtype).itemsize))
        assert np.all(counts == 1)
    assert not items
    assert n_pieces == result.n_checksums


def written(result: Merged) -> list[int]:
    """Bytes that each rank writes."""
    nbytes = [0] * len(result.plans)
    for variable in result.variables:
        for shard in variable.shards:
            nbytes[shard.rank] += math.prod(shard.shape) * dtype_info(variable.dtype).itemsize
    return nbytes


# ---- keys and the graph ------------------------------------------------------------------------------------------


def test_keys_follow_the_rules() -> None:
    rank = (
        Rank()
        .tensor("model/w", (2,))
        .tensor("model", (3,))
        .tensor("model/a.b", (2,))
        .tensor("model", (4,), name=".extra_state")
        .tensor("lr", ())
        .python("", b"7", name="step")
        .python("only", b"1")
    )
    result = merged(rank)
    assert set(keys(result)) == {"model/w", "model/.value", "model/a..b", "model/.extra_state", "lr"}
    assert result.python_state == {"step": b"7", "only": b"1"}


def test_the_root_can_have_a_value_of_its_own() -> None:
    assert keys(merged(Rank().tensor("", (2,)))) == [".value"]


def test_an_own_value_beside_another_attribute_is_told_apart() -> None:
    result = merged(Rank().tensor("m", (2,)).tensor("m", (1,), name=".state"))
    assert sorted(keys(result)) == ["m/.state", "m/.value"]


def test_per_rank_values_and_children_carry_the_rank() -> None:
    def one(r: int) -> Rank:
        rank = Rank()
        rank.node("rng", per_rank=True)
        rank.node("data", per_rank=True)
        return rank.tensor("rng", (5,), name=f".rank/{r}").tensor(f"data/{r}", (r + 1,))

    result = merged(one(0), one(1))
    assert sorted(keys(result)) == ["data/.rank/0", "data/.rank/1", "rng/.rank/0", "rng/.rank/1"]
    assert {variable.key: variable.shards[0].rank for variable in result.variables}["data/.rank/1"] == 1
    assert [node.per_rank for node in result.object_graph.nodes].count(True) == 2
    check_complete(result)


def test_per_rank_must_be_so_on_every_rank() -> None:
    wrapped = Rank()
    wrapped.node("rng", per_rank=True)
    text = refused(wrapped.tensor("rng", (5,), name=".rank/0"), Rank().tensor("rng", (5,)))
    assert "rng: PerRank on some ranks, but not on rank 1" in text


def test_nodes_are_numbered_breadth_first_and_slots_come_last() -> None:
    rank = Rank()
    rank.node("model")
    rank.node("optimizer")
    rank.tensor("model/a", (2,)).tensor("model/b", (2,)).slot("optimizer", "model/b", "m", (2,)).tensor("late", ())
    rank.group("optimizer/param_groups", ["model/b", "model/a"])
    graph = merged(rank).object_graph
    root, model, optimizer = graph.nodes[0], graph.nodes[1], graph.nodes[2]
    assert root.children == [Child(1, "model"), Child(2, "optimizer"), Child(3, "late")]
    assert model.children == [Child(4, "a"), Child(5, "b")]
    assert optimizer.children == [Child(6, "param_groups")]
    assert graph.nodes[6].parameters == [5, 4]
    assert optimizer.slot_variables == [SlotVariable(5, "m", 7)]
    assert graph.nodes[7].attributes == [Attribute(OWN_VALUE, "optimizer/.slots/model/b/m")]
    assert len(graph.nodes) == 8


def test_pipeline_stages_hold_different_parts() -> None:
    def stage(r: int) -> Rank:
        layers = [f"model/{i}" for i in (2 * r, 2 * r + 1)]
        rank = Rank().group("optimizer/group", layers)
        for layer in layers:
            rank.tensor(layer, (4,)).slot("optimizer", layer, "m", (4,))
        return rank

    result = merged(stage(0), stage(1))
    graph = result.object_graph
    assert keys(result) == [
        *(f"model/{i}" for i in range(4)),
        *(f"optimizer/.slots/model/{i}/m" for i in range(4)),
    ]
    group = next(node for node in graph.nodes if node.parameters is not None)
    stored = {attribute.checkpoint_key: i for i, node in enumerate(graph.nodes) for attribute in node.attributes}
    assert group.parameters == [stored[f"model/{i}"] for i in range(4)]
    assert {variable.shards[0].rank for variable in result.variables[:2]} == {0}
    assert {variable.shards[0].rank for variable in result.variables[2:4]} == {1}
    check_complete(result)


def test_a_parameter_is_in_the_same_group_on_all_ranks() -> None:
    def rank(*groups: list[str]) -> Rank:
        made = Rank()
        for index, members in enumerate(groups):
            made.group(f"optimizer/param_groups/{index}", members)
        return made.tensor("m/a", ()).tensor("m/b", ())

    text = refused(rank(["m/a", "m/b"]), rank(["m/a"], ["m/b"]), rank(["m/a", "m/b"]))
    assert "optimizer/param_groups: m/b is in group 0 on ranks 0, 2 and in group 1 on rank 1. Give every rank" in text
    assert "1 problem" in text
    text = refused(rank(["m/a"], ["m/b"]), rank(["m/b"], ["m/a"]))
    assert "m/b is in group 0 on rank 1 and in group 1 on rank 0" in text
    check_complete(merged(rank(["m/a"], ["m/b"]), rank([], ["m/b"]), rank(["m/a"]), rank()))
    check_complete(merged(rank(["m/a"], ["m/a", "m/b"])))  # a rank's own affair


def test_options_of_parameter_groups_that_differ_are_explained() -> None:
    stages = [
        Rank()
        .tensor(f"m/{r}", ())
        .group("o/param_groups/0", [f"m/{r}"])
        .python("o/param_groups/0", b"%d" % r, name="lr")
        for r in range(2)
    ]
    text = refused(*stages)
    assert "o/param_groups/0/lr: value differs. Expected 0, as on rank 0. Got 1 on rank 1. Make it the same" in text
    assert "the same groups in the same order, empty ones too" in text
    assert "PerRank" not in text


def test_edges_come_in_rank_order_then_in_each_ranks_order() -> None:
    first = Rank().tensor("b", ()).tensor("a", ())
    second = Rank().tensor("c", ()).tensor("a", ()).tensor("d", ())
    root = merged(first, second).object_graph.nodes[0]
    assert [child.local_name for child in root.children] == ["b", "a", "c", "d"]


def test_cycles_and_shared_objects_are_one_node() -> None:
    rank = Rank().tensor("model/embed", (4, 2))
    rank.tie("model/head", "model/embed").tie("model/self", "model")
    result = merged(rank, rank)
    assert keys(result) == ["model/embed"]
    assert result.object_graph.nodes[1].children == [Child(2, "embed"), Child(2, "head"), Child(1, "self")]


def test_a_tie_needs_only_the_ranks_that_hold_both() -> None:
    tied = Rank().tensor("embed", (4,)).tie("head", "embed")
    result = merged(Rank().tensor("head", (4,)), Rank().tensor("embed", (4,)), tied)
    assert keys(result) == ["head"]
    assert result.object_graph.nodes[0].children == [Child(1, "head"), Child(1, "embed")]
    assert [plan.keys for plan in result.plans] == [["head"]] * 3


def test_a_tie_of_modules_ties_what_is_below_them() -> None:
    tied = Rank().tensor("a/w", (4,)).tie("b", "a")
    result = merged(Rank().tensor("a/w", (4,)), Rank().tensor("b/w", (4,)), tied)
    assert keys(result) == ["a/w"]
    assert len(result.object_graph.nodes) == 3


def test_ranks_that_disagree_on_a_tie_are_told_so() -> None:
    tied = Rank().tensor("model/embed", (4,)).tie("model/head", "model/embed")
    apart = Rank().tensor("model/embed", (4,)).tensor("model/head", (4,))
    text = refused(tied, apart, tied)
    assert "model/embed and model/head: one object on ranks 0, 2, but two objects on rank 1." in text
    assert "1 problem(s)" in text


def test_a_tie_through_a_third_path_is_refused_too() -> None:
    first = Rank().tensor("a", (4,)).tie("c", "a")
    second = Rank().tensor("b", (4,)).tie("c", "b")
    third = Rank().tensor("a", (4,)).tensor("b", (4,))
    assert "a and b: two objects on rank 2, but tied to the same on others" in refused(first, second, third)


def test_slots_that_ranks_share_differently_are_refused() -> None:
    def one(shared: bool) -> Rank:
        rank = Rank().tensor("w", (2,)).tensor("v", (2,)).slot("o", "w", "step", ()).slot("o", "v", "step", ())
        if shared:
            node = rank.nodes[rank.node("o")]
            node["slots"][1] = (*node["slots"][1][:2], node["slots"][0][2])
            rank.nodes.pop()
        return rank

    assert keys(merged(one(shared=True), one(shared=True)))[-1] == "o/.slots/w/step"
    text = refused(one(shared=True), one(shared=False))
    assert "o/.slots/w/step and o/.slots/v/step: one object on rank 0, but two objects on rank 1" in text


def test_equal_graphs_are_decoded_once() -> None:
    rank, other = Rank().tensor("w", (2,)), Rank().tensor("v", (2,))
    groups = group_ranks([rank.layout(), other.layout(), rank.layout()])
    assert [group.ranks for group in groups] == [[0, 2], [1]]


@st.composite
def graphs(draw: st.DrawFn) -> list[Rank]:
    """Parts of one rooted graph with shared nodes and cycles, one part per rank, ids in any order."""
    size = draw(st.integers(1, 7))
    names = st.sampled_from("abcd")
    edges = {(draw(st.integers(0, size - 1)), draw(names)): draw(st.integers(0, size - 1)) for _ in range(10)}
    ranks = []
    for _ in range(draw(st.integers(1, 4))):
        kept = draw(st.lists(st.sampled_from(sorted(edges)), unique=True)) if edges else []
        ids = {0: 0}
        nodes: list[list[tuple[int, str]]] = [[]]
        queue = [0]
        for source in queue:
            for parent, name in kept:
                if parent == source:
                    target = edges[parent, name]
                    if target not in ids:
                        ids[target] = len(nodes)
                        nodes.append([])
                        queue.append(target)
                    nodes[ids[source]].append((ids[target], name))
        rank = Rank()
        rank.nodes = [
            {"children": children, "attributes": [], "slots": [], "parameters": None, "per_rank": False}
            for children in nodes
        ]
        ranks.append(rank)
    return ranks


@given(graphs())
def test_every_path_of_every_rank_leads_to_the_same_merged_node(ranks: list[Rank]) -> None:
    """Parts of one graph always merge, and walking a path locally and in the merged graph ends at one place."""
    result = merged(*ranks).object_graph
    for rank in ranks:
        places = {0: 0}
        queue = [0]
        for local in queue:
            edges = {child.local_name: child.node_id for child in result.nodes[places[local]].children}
            for child, name in rank.nodes[local]["children"]:
                assert places.setdefault(child, edges[name]) == edges[name]
                if child not in queue:
                    queue.append(child)
        assert len(set(places.values())) == len(places)


def test_a_dataset_is_never_a_group() -> None:
    """Slot "b" of variable a and slot "c" of variable a/b meet on one path."""
    rank = Rank().tensor("a/b", (2,)).tensor("a", (2,)).slot("o", "a", "b", (2,)).slot("o", "a/b", "c", (2,))
    result = merged(rank)
    assert keys(result) == ["a/.value", "a/b", "o/.slots/a/b/.value", "o/.slots/a/b/c"]
    stored = {attribute.checkpoint_key for node in result.object_graph.nodes for attribute in node.attributes}
    assert stored == set(keys(result)) == set(result.plans[0].keys)


def test_keys_that_clash_are_refused() -> None:
    """On rank 0 `step` is a python value of the root, on rank 1 a tensor."""
    text = refused(Rank().python("", b"1", name="step"), Rank().tensor("step", ()))
    assert "step: two values have this key, a python value on rank 0 and a tensor on rank 1" in text


# ---- what must agree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "bfloat16"}, "w: dtype differs. Expected float32, as on ranks 0-1. Got bfloat16 on rank 2."),
        ({"shape": (4, 3)}, "w: global shape differs. Expected (4, 2), as on ranks 0-1. Got (4, 3) on rank 2."),
        ({"shape": (4,)}, "w: global shape differs. Expected (4, 2), as on ranks 0-1. Got (4,) on rank 2."),
        ({"numpy": True}, "w: container differs. Expected torch tensor, as on ranks 0-1. Got NumPy array on rank 2."),
    ],
)
def test_what_holders_disagree_on(change: dict[str, Any], text: str) -> None:
    usual: dict[str, Any] = {"shape": (4, 2)}
    assert text in refused(*(Rank().tensor("w", **usual) for _ in range(2)), Rank().tensor("w", **(usual | change)))


def test_plain_tensors_of_different_shape_are_explained() -> None:
    text = refused(Rank().tensor("w", (4,)), Rank().tensor("w", (3,)))
    assert "ShardedVariable" in text
    assert "PerRank" in text
    text = refused(Rank().tensor("w", (4,), Box((0,), (2,))), Rank().tensor("w", (5,), Box((2,), (3,))))
    assert "ShardedVariable" not in text


def test_a_tensor_here_and_a_python_value_there() -> None:
    text = refused(Rank().tensor("a", ()), Rank().python("a", b"1"))
    assert "a: kind differs. Expected tensor, as on rank 0. Got python value on rank 1." in text


def test_a_tensor_here_and_an_object_with_parts_there() -> None:
    """The file would have both, and neither rank could restore what it saved."""
    elsewhere = "another kind of object elsewhere. Save the same kind everywhere"
    for other in (Rank().tensor("a/w", ()), Rank().python("a", b"1", name="n")):
        text = refused(other, Rank().tensor("a", ()), Rank().tensor("a", ()))
        assert "a tensor on ranks 1-2 and " + elsewhere in text
        text = refused(other, Rank().python("a", b"1", name=STATE).tensor("a", (), name="t"))
        assert "a/.state: a python value on rank 1 and " + elsewhere in text


def test_an_object_that_has_a_value_and_parts_on_all_ranks() -> None:
    """As a root that is a tensor, with what is attached to it; the value may be missing where nothing else is."""
    whole = Rank().tensor("a", ()).tensor("a/w", ())
    lazy = Rank()
    lazy.node("a")
    assert keys(merged(whole, whole, lazy)) == ["a/.value", "a/w"]


def test_what_no_file_can_hold() -> None:
    text = refused(Rank().tensor("a", (2,), dtype="qint8").tensor("b", (1,) * 33))
    assert "a: tensors of dtype qint8 cannot be stored" in text
    assert "b: it has 33 dimensions" in text


def test_local_problems_name_their_ranks_and_come_alone() -> None:
    bad = Rank().tensor("w", (3,))
    bad.problems.append("model/x: a sparse tensor cannot be saved.")
    text = refused(Rank().tensor("w", (2,)), bad, bad)
    assert "ranks 1-2: model/x: a sparse tensor cannot be saved." in text
    assert "1 problem(s)" in text


def test_all_problems_are_counted_and_the_first_are_listed() -> None:
    def one(dtype: str) -> Rank:
        rank = Rank()
        for i in range(50):
            rank.tensor(f"w{i}", (2,), dtype=dtype)
        return rank

    text = refused(one("float32"), one("float64"))
    assert "50 problem(s)" in text
    assert "and 30 more problems" in text
    assert len(text.splitlines()) == 22


def test_problems_of_different_kinds_are_raised_together() -> None:
    def one(r: int) -> Rank:
        return (
            Rank()
            .tensor("dtype", (2,), dtype=("float32", "int32")[r])
            .tensor("gap", (9,), Box((3 * r,), (3,)))
            .tensor("replica", (2,), fingerprint=1 + r)
            .python("value", (b"1", b"2")[r])
        )

    text = refused(one(0), one(1))
    assert all(f"{key}: " in text for key in ("dtype", "gap", "replica", "value"))
    assert "4 problem(s)" in text


# ---- boxes -------------------------------------------------------------------------------------------------------


def test_a_gap_is_located() -> None:
    shape = (6, 4)
    text = refused(*(Rank().tensor("w", shape, Box((2 * r, 0), (2, 4))) for r in (0, 2)))
    assert "w: 8 of the elements of the global shape (6, 4) are on no rank" in text
    assert "the box at offset (2, 0) of shape (2, 4)" in text
    assert "ranks 0-1" in text


def test_boxes_that_overlap_in_part_are_named() -> None:
    boxes = [Box((0, 0), (4, 4)), Box((3, 0), (3, 4))]
    text = refused(*(Rank().tensor("w", (6, 4), box) for box in (boxes[0], *boxes)))
    assert "w: the box at offset (0, 0) of shape (4, 4) on ranks 0-1" in text
    assert "the box at offset (3, 0) of shape (3, 4) on rank 2 overlap" in text


@pytest.mark.parametrize("box", [Box((4,), (3,)), Box((-1,), (2,)), Box((0,), (-2,)), Box((1 << 62,), (1 << 62,))])
def test_boxes_outside_are_named(box: Box) -> None:
    text = refused(Rank().tensor("w", (6,)), Rank().tensor("w", (6,), box))
    assert "w: the box at offset" in text
    assert "on rank 1 is outside of the global shape (6,)" in text


def test_a_rank_without_elements_passes_any_offset() -> None:
    shape = (4, 2)
    result = merged(
        Rank().tensor("w", shape, Box((0, 0), (2, 2))),
        Rank().tensor("w", shape, Box((99, 7), (0, 2))),
        Rank().tensor("w", shape, Box((2, 0), (2, 2))),
    )
    assert [shard.rank for shard in result.variables[0].shards] == [0, 2]
    check_complete(result)


def test_scalars_and_tensors_without_elements() -> None:
    rank = Rank().tensor("scalar", (), fingerprint=5).tensor("none", (0, 3)).tensor("wide", (3, 0))
    result = merged(rank, rank)
    assert keys(result) == ["scalar", "none", "wide"]
    assert [len(variable.shards) for variable in result.variables] == [1, 0, 0]
    assert result.n_checksums == 1
    check_complete(result)


def test_only_some_ranks_hold_a_tensor() -> None:
    result = merged(
        Rank(), Rank().tensor("expert", (4,), rows(0, 2, (4,))), Rank().tensor("expert", (4,), rows(1, 2, (4,)))
    )
    assert [shard.rank for shard in result.variables[0].shards] == [1, 2]
    assert result.plans[0].keys == result.plans[0].variables == result.plans[0].items == []


@st.composite
def sharded(draw: st.DrawFn) -> list[Rank]:
    """Tensors over a mesh: each dimension of a tensor is split over some mesh dimension, unevenly, or not at all."""
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    places = list(np.ndindex(*mesh))
    ranks = [Rank() for _ in places]
    for t in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        dtype = draw(st.sampled_from(["float32", "uint8", "complex128"]))
        axes = draw(st.permutations(range(len(mesh))))
        split = {d: axis for d, axis in zip(range(len(shape)), axes, strict=False) if draw(st.booleans())}
        cuts = {
            d: sorted([0, shape[d], *(draw(st.integers(0, shape[d])) for _ in range(mesh[axis] - 1))])
            for d, axis in split.items()
        }
        for rank, place in zip(ranks, places, strict=True):
            bounds = [
                (cuts[d][place[split[d]]], cuts[d][place[split[d]] + 1]) if d in split else (0, size)
                for d, size in enumerate(shape)
            ]
            box = Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))
            rank.tensor(f"t{t}", shape, box, dtype=dtype, fingerprint=7)
    return ranks


@given(sharded(), st.booleans())
def test_every_element_is_written_once(ranks: list[Rank], trust_lowest: bool) -> None:
    check_complete(merged(*ranks, trust_lowest=trust_lowest))


@given(sharded(), st.data())
def test_a_lost_shard_is_a_gap(ranks: list[Rank], data: st.DataObject) -> None:
    """Without the holders of one box the merge fails, and says how much is missing."""
    name = data.draw(st.sampled_from(sorted(ranks[0].paths)[1:]))
    lost = data.draw(st.sampled_from([_box(rank, name) for rank in ranks]))
    for rank in ranks:
        for node in rank.nodes:
            node["attributes"] = [
                (a, Box(b.offset, (0,) * len(b.shape)) if b == lost and rank.nodes[rank.paths[name]] is node else b, f)
                for a, b, f in node["attributes"]
            ]
    if lost.numel and lost.shape:
        assert f"{name}: {lost.numel} of the elements" in refused(*ranks)


def _box(rank: Rank, path: str) -> Box:
    box = rank.nodes[rank.paths[path]]["attributes"][0][1]
    assert isinstance(box, Box)
    return box


# ---- replicas ----------------------------------------------------------------------------------------------------


def test_replicas_that_differ_are_named() -> None:
    ranks = [Rank().tensor("w", (2,), fingerprint=f) for f in (5, 6, 5, 6)]
    text = refused(*ranks)
    assert "w: replicas differ. Expected the bytes of ranks 0, 2. Got others on ranks 1, 3." in text
    assert "PerRank" in text
    assert keys(merged(*ranks, trust_lowest=True)) == ["w"]


def test_replicas_are_compared_box_by_box() -> None:
    shape = (4, 2)
    ranks = [Rank().tensor("w", shape, rows(r % 2, 2, shape), fingerprint=10 + r % 2) for r in range(4)]
    check_complete(merged(*ranks))
    ranks[3] = Rank().tensor("w", shape, rows(1, 2, shape), fingerprint=99)
    assert "w: replicas of the box at offset (2, 0) of shape (2, 2) differ. Expected the bytes of rank 1." in refused(
        *ranks
    )


def test_ranks_of_different_graphs_may_alternate() -> None:
    """Even and odd ranks have different graphs; rows and replicas still belong to the ranks that hold them."""
    shape = (6, 2)

    def one(r: int) -> Rank:
        rank = Rank().tensor("odd", ()) if r % 2 else Rank()
        rank.tensor("rows", shape, rows(r, 6, shape))
        return rank.tensor("pairs", shape, rows(r // 2, 3, shape), fingerprint=20 + r // 2)

    ranks = [one(r) for r in range(6)]
    result = merged(*ranks)
    check_complete(result)
    stored = {variable.key: [shard.rank for shard in variable.shards] for variable in result.variables}
    assert stored["rows"] == [0, 1, 2, 3, 4, 5]
    assert [plan.weights[plan.keys.index("pairs")] for plan in result.plans] == [-1, 1] * 3
    ranks[4].tensor("late", (), fingerprint=1)
    ranks[5].tensor("late", (), fingerprint=2)
    assert "late: replicas differ. Expected the bytes of rank 4. Got others on rank 5." in refused(*ranks)


def test_a_buffer_on_one_rank_may_differ_on_all() -> None:
    assert merged(*(Rank().tensor("b", (2,), fingerprint=r + 1, buffer=r == 1) for r in range(3))).warnings


def test_a_fingerprint_that_was_not_computed_is_no_difference() -> None:
    largest = 2**64 - 1
    merged(*(Rank().tensor("w", (2,), fingerprint=f) for f in (0, largest, 0, largest)))
    assert "replicas differ" in refused(*(Rank().tensor("w", (2,), fingerprint=f) for f in (0, largest, 0, 3)))


def test_buffers_may_differ_with_one_warning() -> None:
    def one(r: int) -> Rank:
        rank = Rank().tensor("w", (2,), fingerprint=3)
        for name in ("mean", "var"):
            rank.tensor(f"bn/{name}", (300_000,), fingerprint=10 + r, buffer=True)
        return rank.tensor("bn/same", (2,), fingerprint=8, buffer=True)

    result = merged(one(0), one(1), one(2))
    (warning,) = result.warnings
    assert "2 module buffer(s)" in warning
    assert "bn/mean" in warning
    for variable in result.variables[1:]:
        assert [(shard.rank, shard.shape) for shard in variable.shards] == [(0, variable.shape)]
    assert [plan.weights for plan in result.plans] == [[-2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_buffers_that_agree_are_compared_and_written_by_the_lowest_holder() -> None:
    result = merged(*(Rank().tensor("b", (300_000,), fingerprint=3, buffer=True) for _ in range(2)))
    assert result.warnings == []
    assert [shard.rank for shard in result.variables[0].shards] == [0]
    assert [plan.weights for plan in result.plans] == [[-1], [1]]


def test_python_values_must_be_equal() -> None:
    long = b"[" + b"1," * 100 + b"1]"
    text = refused(Rank().python("step", b"1"), Rank().python("step", b"2"), Rank().python("step", long))
    assert "step: value differs. Expected 1, as on rank 0. Got 2 on rank 1, [1,1" in text
    assert "PerRank" in text
    assert str(long) not in text


@pytest.mark.parametrize("place", [0, 20, 120, 198])
def test_an_error_shows_where_long_python_values_differ(place: int) -> None:
    """Of the states of two schedulers the first characters are the same."""
    states = [b"[" + b"".join(b"%d," % (r + 1 if i == place else 0) for i in range(199)) + b"0]" for r in range(3)]
    text = refused(*(Rank().python("state", state) for state in states))
    for r in range(3):
        assert f",{r + 1},0" in text.replace("[", ",")
    assert len(text) < 600


def test_trusting_the_lowest_rank_takes_its_python_value() -> None:
    result = merged(Rank(), Rank().python("a", b"1"), Rank().python("a", b"2"), trust_lowest=True)
    assert result.python_state == {"a": b"1"}
    assert [plan.weights for plan in result.plans] == [[], [0], [0]]
    assert [plan.watched for plan in result.plans] == [[], [0], []]


def test_python_values_of_other_ranks_are_watched_by_their_lowest_holder() -> None:
    own = Rank().python("zero", b"0").tensor("t", ()).python("both", b"1")
    other = Rank().python("both", b"1").tensor("t", ()).python("theirs", b"2")
    result = merged(own, other, other)
    assert result.python_state == {"zero": b"0", "both": b"1", "theirs": b"2"}
    assert [plan.watched for plan in result.plans] == [[], [2], []]


@given(sharded(), st.data())
def test_weighted_fingerprints_cancel_exactly_when_replicas_agree(ranks: list[Rank], data: st.DataObject) -> None:
    """What the steady state relies on: one sum over all ranks instead of a merge."""
    for rank in ranks:
        rank.python("p", b"1", fingerprint=data.draw(st.just(11)))
    result = merged(*ranks)
    prints = [np.frombuffer(rank.layout().fingerprints, np.uint64).tolist() for rank in ranks]
    assert _weighted(result, prints) == 0
    rank = data.draw(st.integers(0, len(ranks) - 1))
    position = data.draw(st.integers(0, len(prints[rank]) - 1))
    prints[rank][position] += 1
    assert (_weighted(result, prints) != 0) == (result.plans[rank].weights[position] != 0)
    compared = _holders(ranks, rank, position) > 1
    assert (result.plans[rank].weights[position] != 0) == compared


def _weighted(result: Merged, prints: Sequence[Sequence[int]]) -> int:
    return sum(sum(map(int.__mul__, plan.weights, own)) for plan, own in zip(result.plans, prints, strict=True)) % 2**64


def _holders(ranks: Sequence[Rank], rank: int, position: int) -> int:
    """How many ranks hold the same box of the same value."""
    entries = [[entry for node in other.nodes for entry in node["attributes"]][position][1] for other in ranks]
    own = entries[rank]
    return entries.count(own) if not isinstance(own, Box) or own.numel else 0


# ---- writers -----------------------------------------------------------------------------------------------------


def _transformer() -> Rank:
    """A replicated GPT with AdamW: many small values, some large ones."""
    rank = Rank()
    width = 512
    shapes: dict[str, Shape] = {"embed": (32000, width)}
    for i in range(8):
        shapes |= {
            f"{i}/qkv": (3 * width, width),
            f"{i}/proj": (width, width),
            f"{i}/up": (4 * width, width),
            f"{i}/down": (width, 4 * width),
            f"{i}/norm": (width,),
            f"{i}/bias": (4 * width,),
        }
    for name, shape in shapes.items():
        rank.tensor(f"model/{name}", shape)
        for slot, slot_shape in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
            rank.slot("optimizer", f"model/{name}", slot, slot_shape)
    return rank


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16])
def test_replicas_of_a_model_are_written_evenly(size: int) -> None:
    result = merged(*[_transformer()] * size)
    nbytes = written(result)
    assert max(nbytes) <= 1.1 * sum(nbytes) / size
    assert max(len(variable.shards) for variable in result.variables) <= 3 * size
    check_complete(result)


@pytest.mark.parametrize("shape", [(3, 1_000_003), (1_000_003, 3), (4_000_037,), (5, 7, 99_991), (1, 1, 2_000_003)])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_one_large_replica_is_written_evenly(shape: Shape, size: int) -> None:
    result = merged(*[Rank().tensor("w", shape)] * size)
    nbytes = written(result)
    assert max(nbytes) <= 1.1 * sum(nbytes) / size
    check_complete(result)


def test_parts_are_whole_rows_where_that_is_even() -> None:
    result = merged(*[Rank().tensor("w", (4096, 1024))] * 4)
    assert [(shard.rank, shard.shape) for shard in result.variables[0].shards] == [(r, (1024, 1024)) for r in range(4)]


def test_small_replicas_are_not_split_but_spread() -> None:
    rank = Rank()
    for i in range(8):
        rank.tensor(f"w{i}", (1000,))
    result = merged(*[rank] * 4)
    assert [len(variable.shards) for variable in result.variables] == [1] * 8
    assert written(result) == [8000] * 4


@pytest.mark.parametrize("size", [2, 3, 7])
def test_small_replicas_are_written_in_stretches_of_neighbours(size: int) -> None:
    rank = Rank()
    for i in range(100):
        rank.tensor(f"w{i:02}", (256 + i,))
    result = merged(*[rank] * size)
    writers = [variable.shards[0].rank for variable in result.variables]
    assert writers == sorted(writers)
    assert set(writers) == set(range(size))
    assert max(written(result)) - min(written(result)) < 2 * 4 * 356


@st.composite
def of_ranks(draw: st.DrawFn) -> list[Rank]:
    """Tensors of up to 60 KB, each held by some of the ranks; on the first ranks larger ones of their own."""
    ranks = [Rank() for _ in range(draw(st.integers(2, 5)))]
    for r, numel in enumerate(draw(st.lists(st.integers(0, 50_000), max_size=len(ranks)))):
        ranks[r].tensor(f"own{r}", (numel,))
    teams = draw(st.lists(st.sets(st.sampled_from(range(len(ranks))), min_size=1), min_size=1, max_size=3))
    for i, (team, numel) in enumerate(
        draw(st.lists(st.tuples(st.sampled_from(teams), st.integers(1, 15_000)), max_size=30))
    ):
        for r in team:
            ranks[r].tensor(f"w{i:02}", (numel,), fingerprint=1)
    return ranks


@given(of_ranks())
def test_small_replicas_even_the_loads_out(ranks: list[Rank]) -> None:
    """Who writes a box that all ranks hold has at most two such boxes more than the emptiest rank."""
    result = merged(*ranks)
    check_complete(result)
    holders = {
        variable.key: [r for r, rank in enumerate(ranks) if variable.key in rank.paths] for variable in result.variables
    }
    assert all(shard.rank in holders[variable.key] for variable in result.variables for shard in variable.shards)
    nbytes = written(result)
    everywhere = [key for key, ranks_of_it in holders.items() if len(ranks_of_it) == len(ranks)]
    largest = max((4 * math.prod(v.shape) for v in result.variables if v.key in everywhere), default=0)
    for variable in result.variables:
        if variable.key in everywhere:
            assert nbytes[variable.shards[0].rank] - min(nbytes) <= 2 * largest


def test_ranks_with_shards_of_their_own_get_fewer_replicas() -> None:
    """Rank 0 alone holds one tensor and half of another, so that the others write what all hold."""

    def one(r: int) -> Rank:
        rank = Rank().tensor("sharded", (20_000,), Box((0,), (20_000 if r == 0 else 0,)))
        for i in range(20):
            rank.tensor(f"w{i}", (1000,))
        return rank.tensor("mixed", (2, 10_000), Box((int(r > 0), 0), (1, 10_000)))

    result = merged(one(0), one(1), one(2))
    # Bytes of "sharded", "mixed" and all "w" over three ranks: rank 0 cannot have fewer than its own 120,000.
    assert written(result) == [120_000, 60_000, 60_000]
    check_complete(result)


def test_hybrid_shards_are_written_evenly() -> None:
    """Two replicas of row shards over three ranks."""
    shape = (9000, 512)
    result = merged(*(Rank().tensor("w", shape, rows(r % 3, 3, shape)).tensor("b", (100,)) for r in range(6)))
    nbytes = written(result)
    assert max(nbytes) <= 1.1 * sum(nbytes) / 6
    check_complete(result)


def test_the_lowest_rank_writes_all_when_it_is_trusted() -> None:
    result = merged(*[Rank().tensor("w", (4096, 1024))] * 4, trust_lowest=True)
    assert [(shard.rank, shard.shape) for shard in result.variables[0].shards] == [(0, (4096, 1024))]
    assert [plan.weights for plan in result.plans] == [[0]] * 4


# ---- plans -------------------------------------------------------------------------------------------------------


def test_the_plan_id_follows_the_layout_and_not_the_values() -> None:
    def plans(value: bytes = b"1", shape: Shape = (4,), split: int = 2) -> list[SavePlan]:
        boxes = [Box((0,), (split,)), Box((split,), (shape[0] - split,))]
        return merged(
            *(Rank().tensor("w", shape, box, fingerprint=len(value)).python("p", value) for box in boxes)
        ).plans

    first = plans()
    assert plans() == first
    assert first[0].plan_id == first[1].plan_id == plans(b"22")[0].plan_id
    assert 0 <= first[0].plan_id < 2**63
    assert len({first[0].plan_id, plans(shape=(5,))[0].plan_id, plans(split=1)[0].plan_id}) == 3


def test_records_survive_the_wire() -> None:
    result = merged(*[_transformer()] * 2)
    for plan in result.plans:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=type(plan)) == plan
    assert all(variable.offset == -1 for variable in result.variables)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ranks", [[Rank().tensor("w", (2,))], [Rank().tensor("w", (2,)), Rank().tensor("w", (3,))]])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool, ranks: list[Rank]) -> None:
    switch: Callable[[], None] = gc.enable if enabled else gc.disable
    before = gc.isenabled()
    try:
        switch()
        if len(ranks) == 1:
            merged(*ranks)
        else:
            refused(*ranks)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_merging_leaves_no_cyclic_garbage() -> None:
    layouts = [Rank().tensor("w", (2,)).python("p", b"1").layout()] * 2
    merge(layouts)
    gc.collect()
    gc.disable()
    try:
        merge(layouts)
        assert gc.collect() == 0
    finally:
        gc.enable()
