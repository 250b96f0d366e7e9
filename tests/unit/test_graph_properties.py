"""Random object graphs come back: any nesting, sharing and cycles, in any order of edges, at once or bit by bit."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt import Checkpoint, RestoreOptions, SaveOptions, Trackable, load_checkpoint

#: Names that need escaping, look like ours, or differ in little.
_NAMES = ["a", "b", "a.b", "a/b", ".slots", ".value", "", "x y", "é", "0"]
_names = st.sampled_from(_NAMES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
#: Node number to edges (name, node number) and values (name, number); the last node is a tensor-bearing one.
_Graph = list[tuple[list[tuple[str, int]], list[tuple[str, int]]]]


@st.composite
def graphs(draw: st.DrawFn) -> _Graph:
    """Nodes that refer to any others, themselves included."""
    n = draw(st.integers(1, 6))
    nodes = []
    for _ in range(n):
        names = draw(st.lists(_names, max_size=5, unique=True))
        n_edges = draw(st.integers(0, len(names)))
        edges = [(name, draw(st.integers(0, n - 1))) for name in names[:n_edges]]
        nodes.append((edges, [(name, draw(st.integers(-(2**70), 2**70))) for name in names[n_edges:]]))
    return nodes


def build(graph: _Graph, *, zero: bool, shuffle: random.Random | None = None) -> Trackable:
    """The objects: even numbers are python values, odd ones tensors."""
    made = [Trackable() for _ in graph]
    for number, (edges, values) in enumerate(graph):
        attributes: list[tuple[str, Any]] = [(name, made[target]) for name, target in edges]
        for name, value in values:
            shown = 0 if zero else value
            attributes.append((name, torch.tensor(shown % 2**60, dtype=torch.int64) if value % 2 else shown))
        if shuffle is not None:
            shuffle.shuffle(attributes)
        for name, attribute in attributes:
            setattr(made[number], name, attribute)
    return made[0]


def contents(root: Trackable) -> list[list[tuple[str, Any]]]:
    """What is reachable, breadth-first by sorted names, shared objects once."""
    order, found = [root], []
    for node in order:
        attributes = {name: value for name, value in vars(node).items() if name != "_self_tracking"}
        listed: list[tuple[str, Any]] = []
        for name, value in sorted(attributes.items()):
            if isinstance(value, Trackable):
                if not any(value is other for other in order):
                    order.append(value)
                listed.append((name, [value is other for other in order].index(True)))
            else:
                listed.append((name, repr(value)))
        found.append(listed)
    return found


_SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_FAST = SaveOptions(durable=False)


@_SETTINGS
@given(graphs(), st.randoms(use_true_random=False))
def test_any_graph_comes_back(graph: _Graph, shuffle: random.Random) -> None:
    """Into a twin whose edges come in another order: matching goes by names."""
    saved, live = build(graph, zero=False), build(graph, zero=True, shuffle=shuffle)
    with tempfile.TemporaryDirectory() as directory:
        file = Checkpoint(top=saved, here=1).write(Path(directory, "state"), options=_FAST)
        Checkpoint(top=live, here=0).read(file, options=RestoreOptions(strict=True)).assert_consumed()
        assert contents(live) == contents(saved)
        with load_checkpoint(file) as reader:
            assert len(set(reader)) == len(list(reader))


@_SETTINGS
@given(graphs(), st.randoms(use_true_random=False))
def test_any_graph_comes_back_bit_by_bit(graph: _Graph, shuffle: random.Random) -> None:
    """Into objects that get their attributes one at a time, after the restore, in any order."""
    saved = build(graph, zero=False)
    with tempfile.TemporaryDirectory() as directory:
        file = Checkpoint(top=saved, here=1).write(Path(directory, "state"), options=_FAST)
        live = Checkpoint(here=0)
        status = live.read(file, options=RestoreOptions(expect_partial=True))
        made = [Trackable() for _ in graph]
        steps: list[tuple[Any, str, Any]] = [(live, "top", made[0])]
        for number, (edges, values) in enumerate(graph):
            steps += [(made[number], name, made[target]) for name, target in edges]
            steps += [
                (made[number], name, torch.tensor(0, dtype=torch.int64) if value % 2 else 0) for name, value in values
            ]
        shuffle.shuffle(steps)
        for holder, name, value in steps:
            setattr(holder, name, value)
        status.assert_consumed()
        assert contents(live.top) == contents(saved)
