"""Join what all ranks hold into one global layout, and plan who writes what. Rank 0 only; pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from distckpt.errors import LayoutError
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.collector import collector_off
from distckpt.layout.merged_values import Holding, MergedValue, collect_values, hold
from distckpt.layout.records import (
    Attribute,
    LocalLayout,
    Node,
    ObjectGraph,
    PlanItem,
    SavePlan,
    Shard,
    Variable,
)
from distckpt.layout.replicas import Comparison, compare_containers, compare_python_values, cover_tensors
from distckpt.layout.ties import check_ties
from distckpt.layout.tiling import tilings_of
from distckpt.layout.unify import UnifiedGraph, group_ranks, unify
from distckpt.layout.writers import assign_shards
from distckpt.words import rank_list, texts_of_ranks

#: Most problems that an error lists.
_MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Merged:
    """The global layout.

    Attributes:
        object_graph: The merged object graph.
        variables: All tensors in file order, with offset -1.
        python_state: Checkpoint key to encoded python value.
        plans: What each rank does, by rank.
        warnings: What the user should be told, once.
        dropped: Waiting values that the save replaces, of which the user should be told each time.
        n_checksums: Number of pieces of all shards.
    """

    object_graph: ObjectGraph
    variables: list[Variable]
    python_state: dict[str, bytes]
    plans: list[SavePlan]
    warnings: list[str]
    dropped: list[str]
    n_checksums: int


def merge(layouts: Sequence[LocalLayout], *, trust_lowest: bool = False) -> Merged:
    """Merge the layouts of all ranks. Rank 0 only.

    Args:
        layouts: The layout of each rank, by rank.
        trust_lowest: Compare no replicas; the lowest rank that holds a value writes it.

    Raises:
        LayoutError: The ranks do not agree, shards do not tile, replicas differ, or a rank cannot save a value; with
            all problems found.
    """
    with collector_off():
        _raise_local_problems(layouts)
        return _merge(layouts, trust_lowest)


def _raise_local_problems(layouts: Sequence[LocalLayout]) -> None:
    """What a rank cannot save comes first: the rest of its layout is incomplete, so other findings would mislead."""
    ranks: dict[str, list[int]] = {}
    for rank, layout in enumerate(layouts):
        for problem in layout.problems:
            ranks.setdefault(problem, []).append(rank)
    if ranks:
        raise _layout_error([f"{rank_list(where)}: {problem}" for problem, where in ranks.items()])


def _merge(layouts: Sequence[LocalLayout], trust_lowest: bool) -> Merged:
    problems: list[str] = []
    groups = group_ranks(layouts)
    graph = unify(groups, problems)
    check_ties(groups, problems)
    holdings = [hold(group, layouts) for group in groups]
    values = collect_values(groups, holdings, graph, problems, trust_lowest=trust_lowest)
    tensors = [value for value in values if value.attribute.dtype is not None]
    comparison = Comparison(enabled=not trust_lowest)
    compare_containers(groups, graph, comparison)
    python_state = compare_python_values(values, holdings, layouts, graph, comparison)
    covers = cover_tensors(tensors, holdings, comparison, problems)
    if problems or comparison.problems:
        raise _layout_error(problems + comparison.problems)
    variables = _variables(tensors, assign_shards(tensors, covers, len(layouts), trust_lowest))
    items = _items(holdings, variables, len(layouts))
    return Merged(
        object_graph=_object_graph(graph, values),
        variables=variables,
        python_state=python_state,
        plans=_plans(holdings, items, _watched(values, holdings), _plan_id(layouts, trust_lowest)),
        warnings=[*texts_of_ranks([layout.warnings for layout in layouts]), *comparison.warnings()],
        dropped=texts_of_ranks([layout.dropped for layout in layouts]),
        n_checksums=items.n_checksums,
    )


def _layout_error(problems: Collection[str]) -> LayoutError:
    """One error for all problems; the first 20 of them are listed."""
    lines = list(problems)[:_MAX_PROBLEMS]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more problems")
    text = "\n  ".join(lines)
    return LayoutError(f"This state cannot be saved as one checkpoint, {len(problems)} problem(s):\n  {text}")


def _variables(tensors: Sequence[MergedValue], shards: Sequence[list[Shard]]) -> list[Variable]:
    variables: list[Variable] = []
    for value, written in zip(tensors, shards, strict=True):
        attribute = value.attribute
        value.variable = len(variables)
        variables.append(
            Variable(value.key, str(attribute.dtype), attribute.global_shape, -1, written, attribute.numpy)
        )
    return variables


def _object_graph(graph: UnifiedGraph, values: Sequence[MergedValue]) -> ObjectGraph:
    attributes: list[list[Attribute]] = [[] for _ in graph.keys]
    for value in values:
        attributes[value.node].append(Attribute(value.attribute.name, value.key))
    return ObjectGraph(
        [
            Node(children, attributes[i], graph.slots.get(i, []), graph.parameters.get(i), i in graph.per_rank)
            for i, children in enumerate(graph.children)
        ]
    )


def _plan_id(layouts: Sequence[LocalLayout], trust_lowest: bool) -> int:
    """A digest, 63 bits, of all that determines the layout and the plans; values have no part in it."""
    digest = hashlib.blake2b(bytes([trust_lowest]), digest_size=8)
    for layout in layouts:
        for part in (layout.graph, layout.boxes):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class _Items:
    """What each rank writes, and how many checksums that makes."""

    by_rank: list[list[PlanItem]]
    n_checksums: int


def _items(holdings: Sequence[Holding], variables: Sequence[Variable], size: int) -> _Items:
    """Rank by rank: going by variables would touch the items of all ranks again and again."""
    tilings = tilings_of(variables)
    tensor_of = _tensor_ordinals(holdings, len(variables), size)
    checksums = index_checksums(variables)
    members: list[list[tuple[int, int]]] = [[] for _ in tilings.distinct]
    for index, tiling in enumerate(tilings.which):
        members[tiling].append((index, tiling))
    by_rank: list[list[PlanItem]] = []
    previous: list[int] = []
    in_file_order: list[tuple[int, int]] = []
    for rank, own in enumerate(_shards_by_rank(tilings.distinct, size)):
        if list(own) != previous:  # else those of the rank before
            previous = list(own)
            in_file_order = sorted(member for tiling in own for member in members[tiling])
        items = [
            PlanItem(tensor_of[rank][index], shard.offset, shard.shape, checksums.first(index, number))
            for index, tiling in in_file_order
            for number, shard in own[tiling]
        ]
        by_rank.append(items)
    return _Items(by_rank, checksums.total)


def _shards_by_rank(tilings: Sequence[Sequence[Shard]], size: int) -> list[dict[int, list[tuple[int, Shard]]]]:
    """For each rank: index of each tiling in which it writes, to its shards there with their numbers."""
    by_rank: list[dict[int, list[tuple[int, Shard]]]] = [{} for _ in range(size)]
    for tiling, shards in enumerate(tilings):
        for number, shard in enumerate(shards):
            by_rank[shard.rank].setdefault(tiling, []).append((number, shard))
    return by_rank


def _tensor_ordinals(holdings: Sequence[Holding], n_variables: int, size: int) -> list[list[int]]:
    """For each rank: which of its tensors each variable is. Ranks of one group share the list."""
    by_rank: list[list[int]] = [[]] * size
    for holding in holdings:
        ordinals = [-1] * n_variables
        for value, ordinal in zip(holding.values, holding.ordinals, strict=True):
            if value.variable >= 0:
                ordinals[value.variable] = ordinal
        for rank in holding.ranks:
            by_rank[rank] = ordinals
    return by_rank


def _watched(values: Sequence[MergedValue], holdings: Sequence[Holding]) -> dict[int, list[int]]:
    """Rank to positions of the python values that it watches: no lower rank holds them."""
    watched: dict[int, list[int]] = {}
    for value in values:
        rank = holdings[value.groups[0]].ranks[0]
        if value.attribute.dtype is None and rank > 0:
            watched.setdefault(rank, []).append(value.positions[0])
    return watched


def _plans(holdings: Sequence[Holding], items: _Items, watched: dict[int, list[int]], plan_id: int) -> list[SavePlan]:
    plans: dict[int, SavePlan] = {}
    for holding in holdings:
        keys = [value.key for value in holding.values]
        variables = [value.variable for value in holding.values if value.variable >= 0]
        for rank, weights in zip(holding.ranks, holding.weights.tolist(), strict=True):
            speaks_for = sorted(watched.get(rank, ()))
            plans[rank] = SavePlan(plan_id, keys, variables, items.by_rank[rank], weights, speaks_for)
    return [plans[rank] for rank in range(len(plans))]
