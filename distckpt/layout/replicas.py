"""Compare what several ranks hold, and find out how they cover each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Shape
from distckpt.layout.cover import Cover, cover, describe
from distckpt.layout.merged_values import Holding, MergedValue, sharding_note
from distckpt.layout.records import LocalLayout
from distckpt.layout.unify import RankGroup, UnifiedGraph
from distckpt.words import listing, rank_list

_WAY_OUT = (
    "Make it the same on every rank, or wrap it in PerRank to save each rank's own "
    '(SaveOptions(replicas="first") takes the lowest rank\'s).'
)

_GROUPS_WAY_OUT = (
    "Make it the same on every rank; ranks that have other parameters, such as pipeline stages, need the same groups "
    "in the same order, empty ones too."
)

#: Most characters of a python value that an error shows, and how many of these come before the first that differs.
_MAX_CHARS = 60
_LEAD_CHARS = 25


@dataclass(slots=True)
class Comparison:
    """What comparing replicas found.

    Attributes:
        enabled: Replicas are compared at all.
        problems: Replicas that differ.
        differing_buffers: Keys of module buffers whose replicas differ, which is allowed.
    """

    enabled: bool
    problems: list[str] = field(default_factory=list)
    differing_buffers: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One warning about all buffers."""
        keys = self.differing_buffers
        if not keys:
            return []
        warning = (
            f"{len(keys)} module buffer(s) differ between ranks ({listing(keys, 3)}); the values of the lowest rank "
            "that holds each are saved. That is usual for running statistics under data parallelism; if it is not "
            "meant, broadcast the buffers before saving, or wrap them in PerRank."
        )
        return [warning]


def compare_containers(groups: Sequence[RankGroup], graph: UnifiedGraph, comparison: Comparison) -> None:
    """Find containers of python values, such as deques, that have other elements on other ranks.

    Args:
        groups: The graphs, unified.
        graph: The merged graph.
        comparison: Receives the containers that differ.
    """
    found: dict[int, dict[frozenset[str], list[int]]] = {}
    for group in groups if comparison.enabled else ():
        for node_id, node in zip(group.node_ids, group.nodes, strict=True):
            if node.whole:
                names = frozenset(attribute.name for attribute in node.attributes)
                found.setdefault(node_id, {}).setdefault(names, []).extend(group.ranks)
    comparison.problems += [
        _container_difference(graph.keys[node_id], ranks)
        for node_id, ranks in found.items()
        if len(ranks) > 1 and not graph.children[node_id]
    ]


def _container_difference(key: str, ranks: dict[frozenset[str], list[int]]) -> str:
    (expected, first), *others = ranks.items()
    got = listing([f"{len(names)} on {rank_list(where)}" for names, where in others], 3)
    lacked = sorted(frozenset.union(*ranks) - frozenset.intersection(*ranks))
    return (
        f"{key}: elements differ. Expected {len(expected)}, as on {rank_list(first)}. Got {got}. Not on all of these "
        f"ranks: {listing(lacked, 3)}. {_WAY_OUT}"
    )


def compare_python_values(
    values: Sequence[MergedValue],
    holdings: Sequence[Holding],
    layouts: Sequence[LocalLayout],
    graph: UnifiedGraph,
    comparison: Comparison,
) -> dict[str, bytes]:
    """Checkpoint key to the encoded value of the lowest holder; sets the weights of compared values.

    Args:
        values: All values; tensors are skipped.
        holdings: What each group of ranks holds.
        layouts: The layout of each rank, by rank.
        graph: The merged graph.
        comparison: Receives the values that differ.
    """
    state: dict[str, bytes] = {}
    for value in values:
        if value.attribute.dtype is None and value.agreed:
            ranks = _ranks_by_content(value, holdings, layouts)
            state[value.key] = next(iter(ranks))
            if comparison.enabled:
                _set_weights(value, holdings)
                if len(ranks) > 1:
                    way_out = _GROUPS_WAY_OUT if value.node in graph.parameters else _WAY_OUT
                    comparison.problems.append(f"{_python_difference(value.key, ranks)} {way_out}")
    return state


def _ranks_by_content(
    value: MergedValue, holdings: Sequence[Holding], layouts: Sequence[LocalLayout]
) -> dict[bytes, list[int]]:
    """The holders by what they hold; the lowest holder's value comes first."""
    ranks: dict[bytes, list[int]] = {}
    for index, position in zip(value.groups, value.positions, strict=True):
        ordinal = holdings[index].ordinals[position]
        for rank in holdings[index].ranks:
            ranks.setdefault(layouts[rank].python_values[ordinal], []).append(rank)
    return ranks


def _set_weights(value: MergedValue, holdings: Sequence[Holding]) -> None:
    count = sum(len(holdings[index].ranks) for index in value.groups)
    if count > 1:
        for index, position in zip(value.groups, value.positions, strict=True):
            holdings[index].weights[:, position] = 1
        holdings[value.groups[0]].weights[0, value.positions[0]] = 1 - count


def _python_difference(key: str, ranks: dict[bytes, list[int]]) -> str:
    pairs = zip(*(encoded.decode(errors="replace") for encoded in (min(ranks), max(ranks))), strict=False)
    differs_at = next((place for place, (one, other) in enumerate(pairs) if one != other), 0)
    (expected, first), *others = ((_excerpt(encoded, differs_at), rank_list(on)) for encoded, on in ranks.items())
    got = listing([f"{text} on {on}" for text, on in others], 3)
    return f"{key}: value differs. Expected {expected}, as on {first}. Got {got}."


def _excerpt(encoded: bytes, differs_at: int) -> str:
    """An encoded python value as text of bounded length, with the part that differs."""
    text = encoded.decode(errors="replace")
    start = max(0, min(differs_at - _LEAD_CHARS, len(text) - _MAX_CHARS))
    stop = start + _MAX_CHARS
    return f"{'...' if start else ''}{text[start:stop]}{'...' if stop < len(text) else ''}"


def cover_tensors(
    tensors: Sequence[MergedValue], holdings: Sequence[Holding], comparison: Comparison, problems: list[str]
) -> list[Cover]:
    """The cover of each tensor that the holders agree on, in order; sets the weights of compared ones.

    Args:
        tensors: The tensors.
        holdings: What each group of ranks holds.
        comparison: Receives replicas that differ.
        problems: Receives shards that do not tile.
    """
    covers: dict[int, Cover] = {}
    for alike in _by_holders(tensors):
        bucket = _gather([tensors[i] for i in alike], holdings)
        for shared in _share_covers(bucket):
            for member in shared.members:
                covers[alike[member]] = shared.cover
                problems += [_problem(bucket.values[member], holdings, problem) for problem in shared.cover.problems]
            if comparison.enabled and shared.cover.replicated:
                bucket.weights[:, shared.members] = shared.cover.weights[:, None]
                _compare(bucket, shared, holdings, comparison)
        _scatter_weights(bucket, holdings)
    if comparison.differing_buffers:
        _clear_buffer_weights(tensors, holdings)
    return [covers[i] for i in sorted(covers)]


def _by_holders(tensors: Sequence[MergedValue]) -> list[list[int]]:
    """Indices of tensors that the same ranks hold, in as many boxes, and that have equally many dimensions."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, value in enumerate(tensors):
        if value.agreed:
            alike.setdefault((len(value.attribute.global_shape), *value.groups, *value.n_boxes), []).append(i)
    return list(alike.values())


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Tensors of equally many dimensions that the same ranks hold; rows are those ranks, ascending.

    Ranks that have the object but no box have no row: they are outside of the mesh of a tensor without dimensions.

    Attributes:
        values: The tensors.
        ranks: The ranks.
        order: For each row: its index when the ranks are listed group by group, those without a box, too.
        positions: For each group: which of its attributes the tensors are.
        boxes: Offset and extent in elements of each box: tensors x ranks x (boxes * 2 * ndim).
        fingerprints: Ranks x tensors.
        weights: Ranks x tensors.
    """

    values: list[MergedValue]
    ranks: list[int]
    order: npt.NDArray[np.intp]
    positions: list[npt.NDArray[np.intp]]
    boxes: npt.NDArray[np.int64]
    fingerprints: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.int64]


def _gather(values: list[MergedValue], holdings: Sequence[Holding]) -> _Bucket:
    groups = values[0].groups
    box_columns = [np.arange(2 * len(values[0].attribute.global_shape) * count) for count in values[0].n_boxes]
    positions: list[npt.NDArray[np.intp]] = []
    boxes: list[npt.NDArray[np.int64]] = []
    fingerprints: list[npt.NDArray[np.uint64]] = []
    for i, index in enumerate(groups):
        at = np.array([value.positions[i] for value in values], np.intp)
        positions.append(at)
        boxes.append(holdings[index].boxes[:, holdings[index].columns[at][:, None] + box_columns[i]])
        fingerprints.append(holdings[index].fingerprints[:, at])
    ranks = np.concatenate([holdings[index].ranks for index in groups])
    has_box = np.repeat(np.array(values[0].n_boxes) > 0, [len(holdings[index].ranks) for index in groups])
    order = np.argsort(ranks)
    order = order[has_box[order]]
    return _Bucket(
        values,
        ranks[order].tolist(),
        order,
        positions,
        np.concatenate(_padded(boxes))[order].transpose(1, 0, 2),
        np.concatenate(fingerprints)[order],
        np.zeros((len(order), len(values)), np.int64),
    )


def _padded(boxes: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """The arrays with as many boxes as the widest has; zeros are empty boxes."""
    width = max(array.shape[2] for array in boxes)
    return [np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2]))) for array in boxes]


def _scatter_weights(bucket: _Bucket, holdings: Sequence[Holding]) -> None:
    n_ranks = sum(len(holdings[index].ranks) for index in bucket.values[0].groups)
    weights = np.zeros((n_ranks, len(bucket.values)), np.int64)
    weights[bucket.order] = bucket.weights
    start = 0
    for index, positions in zip(bucket.values[0].groups, bucket.positions, strict=True):
        stop = start + len(holdings[index].ranks)
        holdings[index].weights[:, positions] = weights[start:stop]
        start = stop


def _clear_buffer_weights(tensors: Sequence[MergedValue], holdings: Sequence[Holding]) -> None:
    """Buffers that differ once go on to differ: comparing them again would only repeat the merge on each save."""
    for value in tensors:
        if value.buffer:
            for index, position in zip(value.groups, value.positions, strict=True):
                holdings[index].weights[:, position] = 0


@dataclass(frozen=True, slots=True)
class _SharedCover:
    """A cover, and the places of the tensors in the bucket that have it."""

    cover: Cover
    members: list[int]


def _share_covers(bucket: _Bucket) -> list[_SharedCover]:
    """Tensors with the same shape and the same box on each rank are sorted out once: a model has few such patterns."""
    members: dict[tuple[Shape, bytes], list[int]] = {}
    encoded = bucket.boxes.tobytes()
    width = len(encoded) // len(bucket.values)
    for i, value in enumerate(bucket.values):
        pattern = (value.attribute.global_shape, encoded[i * width : (i + 1) * width])
        members.setdefault(pattern, []).append(i)
    return [
        _SharedCover(cover(bucket.ranks, bucket.boxes[alike[0]].tolist(), shape), alike)
        for (shape, _), alike in members.items()
    ]


def _problem(value: MergedValue, holdings: Sequence[Holding], problem: str) -> str:
    return f"{value.key}: {problem}{sharding_note(value, holdings)}"


def _compare(bucket: _Bucket, shared: _SharedCover, holdings: Sequence[Holding], comparison: Comparison) -> None:
    """Fingerprints of the holders of the same boxes must agree; 0 stands for one that was not computed."""
    starts = shared.cover.starts
    fingerprints = bucket.fingerprints[shared.cover.order][:, shared.members]
    highest = np.maximum.reduceat(fingerprints, starts, axis=0)
    fingerprints[fingerprints == 0] = np.iinfo(np.uint64).max
    lowest = np.minimum.reduceat(fingerprints, starts, axis=0)
    differs = (highest != 0) & (highest != lowest)
    for member, shard in np.argwhere(differs.T).tolist():
        value = bucket.values[shared.members[member]]
        if not value.buffer:
            comparison.problems.append(_problem(value, holdings, _difference(bucket, shared, member, shard)))
        elif value.key not in comparison.differing_buffers:
            comparison.differing_buffers.append(value.key)


def _difference(bucket: _Bucket, shared: _SharedCover, member: int, shard: int) -> str:
    rows = shared.cover.rows(shard)
    ranks: dict[int, list[int]] = {}
    for row, fingerprint in zip(rows, bucket.fingerprints[rows, shared.members[member]].tolist(), strict=True):
        if fingerprint:
            ranks.setdefault(fingerprint, []).append(bucket.ranks[row])
    first, *others = ranks.values()
    what = "replicas" if len(shared.cover.shards) == 1 else f"replicas of {describe(shared.cover.shards[shard][0])}"
    got = listing([f"others on {rank_list(where)}" for where in others], 3)
    return f"{what} differ. Expected the bytes of {rank_list(first)}. Got {got}. {_WAY_OUT}"
