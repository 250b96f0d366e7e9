"""Virtual jobs: the layouts that many ranks would hold of a GPT-like model and its optimizer, without tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from distckpt.layout.box import Box, Shape
from distckpt.layout.keys import child_key, slot_key
from distckpt.layout.placement import Cut, boxes_of, inner_first, left_over
from distckpt.layout.records import OWN_VALUE, LocalAttribute, LocalLayout, LocalNode

LAYOUTS = ("fsdp", "hsdp", "tp", "pp")

#: Number of ranks that share one copy of the model under hsdp, of ranks in a tensor-parallel group, and of stages.
_HSDP_SHARDS, _TP_RANKS, _STAGES = 64, 8, 8
_DTYPE = "bfloat16"
_SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a layer.

    Attributes:
        name: Its path below the layer.
        shape: Its global shape, in multiples of the width.
        tensor_parallel: The dimension that tensor parallelism cuts; None if it leaves the parameter whole.
    """

    name: str
    shape: Shape
    tensor_parallel: int | None


#: Column-parallel weights are cut along dimension 0, row-parallel ones along dimension 1.
_LAYER = (
    Parameter("norm", (1,), None),
    Parameter("qkv", (3, 1), 0),
    Parameter("proj", (1, 1), 1),
    Parameter("up", (4, 1), 0),
    Parameter("down", (1, 4), 1),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A training job that saves.

    Attributes:
        ranks: Number of ranks.
        variables: Number of tensors over all ranks: for each parameter its value, AdamW's two moments and its step.
        layout: One of `LAYOUTS`: fsdp shards everything over all ranks; hsdp over groups of 64 that replicate each
            other; tp over groups of 8 ranks and fsdp over those; pp has 8 stages, and fsdp within each.
        width: Width of the model, in elements.
    """

    ranks: int
    variables: int
    layout: str
    width: int = 16384

    @property
    def stages(self) -> int:
        """Number of pipeline stages; 1 without pipeline parallelism."""
        return min(_STAGES, self.ranks, self.n_parameters) if self.layout == "pp" else 1

    @property
    def n_parameters(self) -> int:
        """Number of parameters with optimizer state; remaining variables are frozen parameters."""
        return self.variables // 4

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage."""
        first, stop = (self.ranks * i // self.stages for i in (stage, stage + 1))
        return range(first, stop)

    def parameters_of(self, stage: int) -> range:
        """Indices of the parameters of a stage."""
        first, stop = (self.n_parameters * i // self.stages for i in (stage, stage + 1))
        return range(first, stop)


def layouts_of(job: Job) -> Iterator[LocalLayout]:
    """The local layout of each rank, in rank order."""
    for stage in range(job.stages):
        holder = Stage(job, stage)
        for rank in holder.ranks:
            yield holder.layout(rank)


class Stage:
    """The ranks of one pipeline stage, which have the same object graph.

    Attributes:
        ranks: The ranks, consecutive.
        keys: Key of each tensor that they hold, in order.
    """

    def __init__(self, job: Job, stage: int) -> None:
        self._job = job
        self.ranks = job.ranks_of(stage)
        indices = job.parameters_of(stage)
        frozen = job.variables - 4 * job.n_parameters if stage == 0 else 0
        graph = _graph(job, indices, frozen)
        self.keys = [key for key, node in zip(graph.keys, graph.nodes, strict=True) if key and node.attributes]
        self._graph = msgspec.msgpack.encode(graph.nodes)
        # In order of the nodes: parameters, frozen ones, then the slots of each parameter.
        kinds = [index % len(_LAYER) for index in indices]
        step = len(_LAYER)
        slots = [kind for own in kinds for kind in (own, own, step)]
        self._kinds = np.array([*kinds, *[0] * frozen, *slots], np.intp)
        self._seeds = np.random.default_rng(stage).integers(1, 1 << 63, len(self._kinds), np.uint64)

    def layout(self, rank: int) -> LocalLayout:
        """The local layout of one of the ranks; replicas have equal fingerprints."""
        boxes = [_encode(_boxes(self._job, parameter, rank, self.ranks)) for parameter in _LAYER]
        boxes.append(b"")  # of the step, a number
        held = np.array([xxhash.xxh3_64_intdigest(own) | 1 for own in boxes], np.uint64)
        fingerprints = np.append(np.uint64(1), self._seeds ^ held[self._kinds] << np.uint64(1))
        return LocalLayout(
            graph=self._graph,
            boxes=b"".join([boxes[kind] for kind in self._kinds.tolist()]),
            fingerprints=fingerprints.tobytes(),
            python_values=[b"100"],
            problems=[],
            shardings=[f"placements of {self._job.layout} on a mesh of {self._job.ranks} ranks"],
            sharding_of=bytes(4 * len(self._kinds)),
        )

    def boxes(self, rank: int) -> list[tuple[Box, ...]]:
        """The boxes that one of the ranks holds of each tensor, in order."""
        of_kind = [_boxes(self._job, parameter, rank, self.ranks) for parameter in _LAYER]
        of_kind.append((Box((), ()),))
        return [of_kind[kind] for kind in self._kinds.tolist()]


def _encode(boxes: Sequence[Box]) -> bytes:
    return np.array([n for box in boxes for n in (*box.offset, *box.shape)], np.int64).tobytes()


def shape_of(job: Job, parameter: Parameter) -> Shape:
    """Global shape of a parameter, in elements."""
    return tuple(job.width * factor for factor in parameter.shape)


def _boxes(job: Job, parameter: Parameter, rank: int, ranks: range) -> tuple[Box, ...]:
    """The boxes that a rank holds of a parameter, by torch's placements."""
    shape = shape_of(job, parameter)
    cuts = _cuts(job, parameter, rank - ranks[0], len(ranks))
    intervals = []
    for axis, size in enumerate(shape):
        along = [cut for where, cut in cuts if where == axis]
        intervals.append(left_over(size, inner_first(along) or along))
    return boxes_of(intervals)


def _cuts(job: Job, parameter: Parameter, place: int, count: int) -> list[tuple[int, Cut]]:
    """(dimension, cut) for each mesh dimension, for the rank at index `place` among `count` ranks."""
    if job.layout == "hsdp":
        shards = min(_HSDP_SHARDS, count)
        return [(0, Cut(shards, place % shards))]
    if job.layout == "tp":
        inner = min(_TP_RANKS, count)
        split = inner if parameter.tensor_parallel == 0 else 1
        outer = Cut(count // inner, place // inner, split)
        if parameter.tensor_parallel is None:
            return [(0, outer)]
        return [(0, outer), (parameter.tensor_parallel, Cut(inner, place % inner))]
    return [(0, Cut(count, place))]


class _Graph:
    """The object graph of a rank, under construction.

    Attributes:
        nodes: The nodes as the rank sends them.
        keys: Key of each node.
    """

    def __init__(self) -> None:
        self.nodes: list[LocalNode] = []
        self.keys: list[str] = []

    def add(self, key: str, *attributes: LocalAttribute) -> int:
        """Append a node; returns its id."""
        self.nodes.append(LocalNode([], list(attributes), []))
        self.keys.append(key)
        return len(self.nodes) - 1

    def attach(self, parent: int, name: str, *attributes: LocalAttribute) -> int:
        """Append a node below another; returns its id."""
        child = self.add(child_key(self.keys[parent], name, per_rank=False), *attributes)
        self.nodes[parent].children.append((child, name))
        return child

    def add_slot(self, optimizer: int, variable: int, name: str, attribute: LocalAttribute) -> None:
        """Append a slot of a variable."""
        slot = self.add(slot_key(self.keys[optimizer], self.keys[variable], name), attribute)
        self.nodes[optimizer].slots.append((variable, name, slot))


def _graph(job: Job, indices: Sequence[int], frozen: int) -> _Graph:
    """Root -> model -> layers -> <i> -> <parameter>, and an optimizer with slots, as `graph.view` records them."""
    graph = _Graph()
    root = graph.add("", LocalAttribute("step", None, ()))
    layers = graph.attach(graph.attach(root, "model"), "layers")
    optimizer = graph.attach(root, "optimizer")
    known: dict[int, int] = {}
    parameters = []
    for index in indices:
        layer, kind = divmod(index, len(_LAYER))
        if layer not in known:
            known[layer] = graph.attach(layers, str(layer))
        attribute = LocalAttribute(OWN_VALUE, _DTYPE, shape_of(job, _LAYER[kind]))
        parameters.append((graph.attach(known[layer], _LAYER[kind].name, attribute), attribute))
    for number in range(frozen):
        graph.attach(layers, f"frozen{number}", LocalAttribute(OWN_VALUE, _DTYPE, shape_of(job, _LAYER[0])))
    for variable, attribute in parameters:
        for name in _SLOTS:
            graph.add_slot(optimizer, variable, name, attribute)
        graph.add_slot(optimizer, variable, "step", LocalAttribute(OWN_VALUE, "float32", ()))
    return graph
