"""The values of the merged graph: which ranks hold each, under which key, and whether they agree what it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import MAX_NDIM
from distckpt.layout.dtypes import is_known
from distckpt.layout.keys import escape, join
from distckpt.layout.records import OWN_VALUE, WHOLE, LocalAttribute, LocalLayout
from distckpt.layout.unify import RankGroup, UnifiedGraph
from distckpt.words import listing, rank_list

_PLAIN_REMEDY = (
    "If these are shards of one tensor, wrap them in ShardedVariable(tensor, global_shape, offset); if each rank has a "
    "value of its own, wrap it in PerRank."
)


@dataclass(slots=True, eq=False)
class MergedValue:
    """An attribute of the merged graph.

    Attributes:
        attribute: As the lowest rank that holds it describes it.
        node: Node of the merged graph.
        groups: Indices of the groups of ranks that hold it, ascending; so the first has the lowest rank.
        positions: For each of these groups: its index among the group's attributes.
        n_boxes: For each of these groups: number of boxes of a rank's shard.
        buffer: A rank says that it is a module buffer.
        agreed: All holders describe it alike, and it can be stored.
        key: Its checkpoint key; "" for one that is not stored.
        variable: Index in the manifest's variables, for a tensor.
    """

    attribute: LocalAttribute
    node: int
    groups: list[int]
    positions: list[int]
    n_boxes: list[int]
    buffer: bool
    agreed: bool = True
    key: str = ""
    variable: int = -1


@dataclass(slots=True, eq=False)
class Holding:
    """What the ranks of a group hold. "In order" is that of `LocalLayout`.

    Attributes:
        ranks: The ranks, ascending.
        layouts: The layout of each.
        attributes: The group's attributes in order.
        ordinals: For each attribute: its index among the group's tensors, or among its python values.
        values: The merged value of each attribute.
        columns: Where the boxes of each attribute begin in a row of `boxes`.
        boxes: Offsets and extents, a row per rank.
        fingerprints: A row per rank, a column per attribute.
        weights: As `SavePlan.weights`, a row per rank.
    """

    ranks: list[int]
    layouts: list[LocalLayout]
    attributes: list[LocalAttribute]
    ordinals: list[int]
    values: list[MergedValue]
    columns: npt.NDArray[np.intp]
    boxes: npt.NDArray[np.int64]
    fingerprints: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.int64]


def hold(group: RankGroup, layouts: Sequence[LocalLayout]) -> Holding:
    """The arrays of a group's ranks, one row per rank; values are not yet filled in."""
    attributes = [attribute for node in group.nodes for attribute in node.attributes]
    rows, width = len(group.ranks), len(attributes)
    sizes = [2 * len(attribute.global_shape) * attribute.n_boxes for attribute in attributes]
    ends = np.cumsum(sizes, dtype=np.intp)
    boxes = np.frombuffer(b"".join(layouts[rank].boxes for rank in group.ranks), np.int64)
    fingerprints = np.frombuffer(b"".join(layouts[rank].fingerprints for rank in group.ranks), np.uint64)
    return Holding(
        ranks=group.ranks,
        layouts=[layouts[rank] for rank in group.ranks],
        attributes=attributes,
        ordinals=_ordinals(attributes),
        values=[],
        columns=ends - sizes,
        boxes=boxes.reshape(rows, sum(sizes)),
        fingerprints=fingerprints.reshape(rows, width),
        weights=np.zeros((rows, width), np.int64),
    )


def _ordinals(attributes: Sequence[LocalAttribute]) -> list[int]:
    tensors, python_values = itertools.count(), itertools.count()
    return [next(python_values if attribute.dtype is None else tensors) for attribute in attributes]


def collect_values(
    groups: Sequence[RankGroup],
    holdings: Sequence[Holding],
    graph: UnifiedGraph,
    problems: list[str],
    *,
    trust_lowest: bool,
) -> list[MergedValue]:
    """The values in order of the merged nodes, with keys; fills `Holding.values`.

    Args:
        groups: The ranks' graphs, unified.
        holdings: What their ranks hold, parallel to `groups`.
        graph: The merged graph.
        problems: Receives what holders disagree on, what cannot be stored, and keys that clash.
        trust_lowest: Of containers of python values the lowest holder's elements are the values.
    """
    tables: list[dict[str, MergedValue]] = [{} for _ in graph.keys]
    complete: set[int] = set()
    for index, group in enumerate(groups):
        holdings[index].values = _add_group(index, group, tables, complete)
        if trust_lowest:
            complete.update(node_id for node_id, node in zip(group.node_ids, group.nodes, strict=True) if node.whole)
    _drop_hollow(graph, tables, holdings)
    _assign_keys(graph, tables)
    values = [value for table in tables for value in table.values()]
    _separate_datasets(values)
    _check_unique(values, holdings, problems)
    _check_edges(graph, tables, groups, holdings, problems)
    for value in values:
        if not value.agreed:
            problems += _disagreements(value, holdings)
        elif not _is_storable(value.attribute):
            value.agreed = False
            problems.append(_unstorable(value))
    return values


def _add_group(
    index: int, group: RankGroup, tables: Sequence[dict[str, MergedValue]], complete: Container[int]
) -> list[MergedValue]:
    """The values of a group's attributes; nodes that are complete get no further ones, so that these are not stored."""
    values: list[MergedValue] = []
    for node_id, node in zip(group.node_ids, group.nodes, strict=True):
        for attribute in node.attributes:
            value = tables[node_id].get(attribute.name)
            if value is None:
                value = MergedValue(attribute, node_id, [index], [len(values)], [attribute.n_boxes], attribute.buffer)
                if node_id not in complete:
                    tables[node_id][attribute.name] = value
            # A torn tie brings the same value twice: it is a problem already, and the first one stands for it.
            elif value.groups[-1] != index:
                _add_holder(value, attribute, index, len(values))
            values.append(value)
    return values


def _add_holder(value: MergedValue, attribute: LocalAttribute, index: int, position: int) -> None:
    value.groups.append(index)
    value.positions.append(position)
    value.n_boxes.append(attribute.n_boxes)
    if attribute != value.attribute:
        value.buffer |= attribute.buffer
        value.agreed &= _same_but_buffer(value.attribute, attribute)


def _same_but_buffer(a: LocalAttribute, b: LocalAttribute) -> bool:
    return (a.dtype, a.global_shape, a.numpy) == (b.dtype, b.global_shape, b.numpy)


def _drop_hollow(graph: UnifiedGraph, tables: Sequence[dict[str, MergedValue]], holdings: Sequence[Holding]) -> None:
    """Containers that have nothing inside on some ranks, and objects on others, are those of the others."""
    for children, table in zip(graph.children, tables, strict=True):
        if table and children:
            edges = {escape(child.local_name) for child in children}
            for name in [name for name in table if name in edges and _is_hollow(table[name], holdings)]:
                del table[name]


def _is_hollow(value: MergedValue, holdings: Sequence[Holding]) -> bool:
    places = zip(value.groups, value.positions, strict=True)
    return all(holdings[index].attributes[position].hollow for index, position in places)


def _assign_keys(graph: UnifiedGraph, tables: Sequence[dict[str, MergedValue]]) -> None:
    for key, children, table in zip(graph.keys, graph.children, tables, strict=True):
        alone = len(table) == 1 and not children and key
        for name, value in table.items():
            value.key = key if alone and name == OWN_VALUE else join(key, name)


def _separate_datasets(values: Sequence[MergedValue]) -> None:
    """Move a tensor whose key is also a prefix of another tensor's key: HDF5 has no dataset that is also a group."""
    # With the slash appended, keys below a key follow it directly in sorted order.
    tensors = {f"{value.key}/": value for value in values if value.attribute.dtype is not None}
    for key, following in itertools.pairwise(sorted(tensors)):
        if following.startswith(key):
            tensors[key].key = key + OWN_VALUE


def _check_unique(values: Sequence[MergedValue], holdings: Sequence[Holding], problems: list[str]) -> None:
    by_key: dict[str, MergedValue] = {}
    for value in values:
        other = by_key.setdefault(value.key, value)
        if other is not value:
            problems.append(
                f"{value.key}: two values have this key, a {_kind(other.attribute)} on "
                f"{rank_list(_ranks(other, holdings))} and a {_kind(value.attribute)} on "
                f"{rank_list(_ranks(value, holdings))}. Rename one, or save the same kind of value everywhere."
            )


def _check_edges(
    graph: UnifiedGraph,
    tables: Sequence[dict[str, MergedValue]],
    groups: Sequence[RankGroup],
    holdings: Sequence[Holding],
    problems: list[str],
) -> None:
    """A name of one node is a value or an edge, and an object is one value or has parts, on all ranks."""
    mixed = [  # most nodes are leaves
        node_id
        for node_id, (children, table) in enumerate(zip(graph.children, tables, strict=True))
        if table and (children or len(table) > 1)
    ]
    torn = _torn({node_id: [name for name in WHOLE if name in tables[node_id]] for node_id in mixed}, groups)
    for node_id in mixed:
        edges = {escape(child.local_name) for child in graph.children[node_id]}
        problems += [
            f"{value.key}: a {_kind(value.attribute)} on {rank_list(_ranks(value, holdings))} and another kind of "
            "object elsewhere. Save the same kind everywhere; to hold different values, wrap them in PerRank on all "
            "ranks."
            for name, value in tables[node_id].items()
            if name in edges or (node_id, name) in torn
        ]


def _torn(whole: Mapping[int, Sequence[str]], groups: Sequence[RankGroup]) -> set[tuple[int, str]]:
    """Values that are the whole of their object on some ranks, while it has parts on others.

    Args:
        whole: Node id to the names of such values.
        groups: The graphs.
    """
    found: set[tuple[int, str]] = set()
    for group in groups if any(whole.values()) else ():
        for node_id, node in zip(group.node_ids, group.nodes, strict=True):
            names = whole.get(node_id)
            if names:
                own = {attribute.name for attribute in node.attributes}
                found.update((node_id, name) for name in names if name not in own and (own or node.children))
    return found


def _ranks(value: MergedValue, holdings: Sequence[Holding]) -> list[int]:
    return [rank for index in value.groups for rank in holdings[index].ranks]


def _is_storable(attribute: LocalAttribute) -> bool:
    return attribute.dtype is None or (is_known(attribute.dtype) and len(attribute.global_shape) <= MAX_NDIM)


def _unstorable(value: MergedValue) -> str:
    if not is_known(str(value.attribute.dtype)):
        return f"{value.key}: tensors of dtype {value.attribute.dtype} cannot be stored. Convert it before saving."
    ndim = len(value.attribute.global_shape)
    return f"{value.key}: it has {ndim} dimensions. HDF5 stores up to {MAX_NDIM}; reshape it before saving."


def _kind(attribute: LocalAttribute) -> str:
    return "python value" if attribute.dtype is None else "tensor"


def _container(attribute: LocalAttribute) -> str:
    return "NumPy array" if attribute.numpy else "torch tensor"


def _shape(attribute: LocalAttribute) -> str:
    return str(attribute.global_shape)


def _dtype(attribute: LocalAttribute) -> str:
    return str(attribute.dtype)


def _disagreements(value: MergedValue, holdings: Sequence[Holding]) -> Iterator[str]:
    """What the holders of a value disagree on, one sentence per aspect."""
    if len(_by_aspect(value, holdings, _kind)) > 1:
        yield _disagreement(value, holdings, "kind", _kind, "Save the same kind of value on every rank.")
        return
    if len(_by_aspect(value, holdings, _dtype)) > 1:
        yield _disagreement(value, holdings, "dtype", _dtype, "Use the same dtype on every rank.")
    if len(_by_aspect(value, holdings, _container)) > 1:
        yield _disagreement(value, holdings, "container", _container, "Use the same container on every rank.")
    if len(_by_aspect(value, holdings, _shape)) > 1:
        remedy = _PLAIN_REMEDY if _is_plain(value, holdings) else "Use the same global shape on every rank."
        yield _disagreement(value, holdings, "global shape", _shape, remedy)


def _by_aspect(
    value: MergedValue, holdings: Sequence[Holding], aspect: Callable[[LocalAttribute], str]
) -> dict[str, list[int]]:
    """Ranks by what they say."""
    ranks: dict[str, list[int]] = {}
    for index, position in zip(value.groups, value.positions, strict=True):
        ranks.setdefault(aspect(holdings[index].attributes[position]), []).extend(holdings[index].ranks)
    return ranks


def _disagreement(
    value: MergedValue, holdings: Sequence[Holding], name: str, aspect: Callable[[LocalAttribute], str], remedy: str
) -> str:
    (expected, first), *others = _by_aspect(value, holdings, aspect).items()
    got = listing([f"{text} on {rank_list(ranks)}" for text, ranks in others], 3)
    note = sharding_note(value, holdings)
    return f"{value.key}: {name} differs. Expected {expected}, as on {rank_list(first)}. Got {got}.{note} {remedy}"


def _is_plain(value: MergedValue, holdings: Sequence[Holding]) -> bool:
    """Whether every rank holds all of its global shape: no rank said that its tensor is a shard."""
    for index, position in zip(value.groups, value.positions, strict=True):
        holding = holdings[index]
        shape = holding.attributes[position].global_shape
        start = holding.columns[position]
        boxes = holding.boxes[:, start : start + 2 * len(shape)]
        if holding.attributes[position].n_boxes > 1 or np.any(boxes != np.array((*[0] * len(shape), *shape), np.int64)):
            return False
    return True


def sharding_note(value: MergedValue, holdings: Sequence[Holding]) -> str:
    """A sentence about how each rank shards a tensor, after a blank; "" where no rank has placements."""
    ranks: dict[str, list[int]] = {}
    for index, position in zip(value.groups, value.positions, strict=True):
        holding = holdings[index]
        for rank, layout in zip(holding.ranks, holding.layouts, strict=True):
            ranks.setdefault(_sharding(layout, holding.ordinals[position]), []).append(rank)
    if not any(ranks):
        return ""
    on_ranks = [f"{words or 'no placements'} on {rank_list(on)}" for words, on in ranks.items()]
    return f" It has {listing(on_ranks, 4)}."


def _sharding(layout: LocalLayout, tensor: int) -> str:
    """Placements of one of a rank's tensors in words."""
    return layout.shardings[np.frombuffer(layout.sharding_of, np.uint32)[tensor]] if layout.shardings else ""
