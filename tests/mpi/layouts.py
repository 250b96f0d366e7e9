"""One training state in every layout: a model, Adam with two parameter groups and a scheduler, spread in many ways.

Values are set, not trained, so that all layouts hold the same global state. They get into their places by torch's own
sharding: parameters are set before the model is spread, and slots are the parameters of twins of the model, spread
alike. `tests/mpi/test_layouts.py` saves each and restores it into each.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from distckpt import ShardedVariable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch about itself: the package uses torch.jit.script, which it deprecates
    from torch.distributed.optim import ZeroRedundancyOptimizer

VOCABULARY, WIDTH, HIDDEN, N_LAYERS, N_EXPERTS = 11, 6, 10, 2, 4
LEARNING_RATE = 0.0123


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A token model with experts; every stage of a pipeline and every rank of an expert group has a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(N_LAYERS)})
        self.experts = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH, bias=False) for i in range(N_EXPERTS)})
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers.values():
            x = layer(x)
        x = x + sum(expert(x) for expert in self.experts.values())
        return self.head(x).clone()  # fully_shard warns of views


def reference(kind: str, name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The global value of a parameter, slot or buffer: between 0 and 1/2, so that training goes on from them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} of {name}".encode()))
    return torch.rand(tuple(shape), generator=generator) / 2


def filled(kind: str) -> Net:
    """A whole model whose parameters and buffers are the reference values; zero where `kind` is ""."""
    with torch.random.fork_rng():
        net = Net()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            tensor.copy_(reference(kind, name, tensor.shape) if kind else torch.zeros_like(tensor))
    return net


@dataclass
class State:
    """What one rank holds.

    Attributes:
        objects: What its `Checkpoint` gets.
        optimizer: The optimizer that steps on this rank.
        parameters: Those of this rank by their name in the whole model.
        slots: Values for their slots, by name and slot name.
    """

    objects: dict[str, Any]
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.Tensor]
    slots: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def set_slots(self) -> None:
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            if id(parameter) in own:
                self.optimizer.state[parameter] = {k: v.detach().clone() for k, v in self.slots[name].items()}

    def clear(self, *, with_slots: bool) -> None:
        """Back to zero; slots to zero, too, or away, as before the first step."""
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.zero_()
        if not with_slots:
            self.optimizer.state.clear()
        self.objects["scheduler"].last_epoch = 0
        for group in self.objects["optimizer"].param_groups:
            group["lr"] = 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of every tensor."""
        found = {name: local(parameter) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            found |= {f"{name}/{k}": local(v) for k, v in self.optimizer.state.get(parameter, {}).items()}
        model = self.objects["model"]
        if isinstance(model, nn.Module):
            return found | {name.removeprefix("module."): buffer for name, buffer in model.named_buffers()}
        return found | {"scale": model["scale"].tensor}

    def options(self) -> object:
        """What is no tensor."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.objects["optimizer"].param_groups]
        return groups, self.objects["scheduler"].state_dict(), self.objects["step"]


def local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Spread = Callable[[Net, int], Any]
"""Spreads a whole model over the ranks, given this rank; returns what takes the model's place in the checkpoint."""


@dataclass(frozen=True)
class Layout:
    """A way to spread the state over the first `size` ranks.

    Attributes:
        name: Unique.
        size: Number of ranks.
        spread: What becomes of the model.
        zero: Process group of a `ZeroRedundancyOptimizer`; None for the plain one.
    """

    name: str
    size: int
    spread: Spread
    zero: Any = None

    def build(self, rank: int, kind: str) -> State:
        """This rank's part of the state; with the reference values, or with zeros where `kind` is ""."""
        model = self.spread(filled(kind and "weight"), rank)
        parameters = named_tensors(model)
        optimizer = self._optimizer(parameters)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 17 if kind else 0}
        state = State(objects, inner, parameters, self._slots(rank, kind))
        state.set_slots()
        if kind:
            scheduler.last_epoch = 17
            scheduler._last_lr = [LEARNING_RATE, LEARNING_RATE]
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE
        return state

    def _optimizer(self, parameters: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
        vectors = [p for name, p in parameters.items() if name.endswith("bias") or "norm" in name]
        matrices = [p for p in parameters.values() if not any(p is vector for vector in vectors)]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        if self.zero is not None:
            return ZeroRedundancyOptimizer(
                groups, torch.optim.AdamW, process_group=self.zero, lr=1.0, foreach=False, weight_decay=0.0
            )
        return torch.optim.AdamW(groups, lr=1.0, foreach=False)

    def _slots(self, rank: int, kind: str) -> dict[str, dict[str, torch.Tensor]]:
        slots: dict[str, dict[str, torch.Tensor]] = {}
        for slot in ("exp_avg", "exp_avg_sq"):
            for name, tensor in named_tensors(self.spread(filled(kind and slot), rank)).items():
                slots.setdefault(name, {"step": torch.tensor(17.0 if kind else 0.0)})[slot] = tensor
        return slots


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of a spread model by their name in the whole one."""
    if isinstance(model, nn.Module):
        return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    return dict(_named(model, ""))


def _named(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{name}.")
        elif isinstance(value.tensor, nn.Parameter):
            yield f"{prefix}{name}", value.tensor


# ---- ways to spread ----------------------------------------------------------------------------------------------


def whole(net: Net, _rank: int) -> Net:
    return net


def data_parallel(group: Any) -> Spread:
    def spread(net: Net, _rank: int) -> Any:
        return DistributedDataParallel(net, process_group=group)

    return spread


def fsdp(mesh: DeviceMesh, **options: Any) -> Spread:
    def spread(net: Net, _rank: int) -> Net:
        for layer in net.layers.values():
            fully_shard(layer, mesh=mesh, **options)
        return fully_shard(net, mesh=mesh, **options)

    return spread


def along_columns(parameter: nn.Parameter) -> Shard | None:
    """`shard_placement_fn`: along the last dimension where two ranks get equal parts, as FSDP demands there."""
    return Shard(1) if parameter.dim() == 2 and parameter.size(1) % 2 == 0 else None


def meshes_by_parameter(mesh: DeviceMesh, expert_mesh: DeviceMesh) -> Spread:
    """FSDP with a mesh of their own for the experts."""

    def spread(net: Net, _rank: int) -> Net:
        experts = {id(parameter) for parameter in net.experts.parameters()}
        infos = FSDPMeshInfo(mesh, shard_mesh_dim=0), FSDPMeshInfo(expert_mesh, shard_mesh_dim=0)

        def place(parameter: nn.Parameter) -> ShardPlacementResult:
            return ShardPlacementResult(Shard(0), infos[id(parameter) in experts])

        return fully_shard(net, mesh=mesh, shard_placement_fn=place)

    return spread


def tensor_plan(*, sequence: bool) -> dict[str, Any]:
    """What is cut: the embedding by rows, pairs of linear layers by columns and rows; norms replicated as DTensors."""
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(N_LAYERS):
        if sequence:
            plan[f"layers.{i}.norm"] = SequenceParallel()
        plan[f"layers.{i}.up"] = ColwiseParallel()
        plan[f"layers.{i}.down"] = RowwiseParallel()
    return plan


def tensor_parallel(mesh: DeviceMesh, *, sequence: bool = True) -> Spread:
    def spread(net: Net, _rank: int) -> Net:
        return parallelize_module(net, mesh, tensor_plan(sequence=sequence), src_data_rank=None)

    return spread


def then(*spreads: Spread) -> Spread:
    def spread(net: Net, rank: int) -> Any:
        for one in spreads:
            net = one(net, rank)
        return net

    return spread


def stages(*layers_of: list[int]) -> Spread:
    """A pipeline: these layers on each rank, the embedding on the first and the head on the last."""

    def spread(net: Net, rank: int) -> Net:
        keep(net.layers, layers_of[rank])
        keep(net.experts, range(N_EXPERTS) if rank == len(layers_of) - 1 else [])
        if rank > 0:
            del net.embed
        if rank < len(layers_of) - 1:
            del net.head
        return net

    return spread


def experts(*experts_of: list[int]) -> Spread:
    """Expert parallelism: these experts on each rank, all else on all."""

    def spread(net: Net, rank: int) -> Net:
        keep(net.experts, experts_of[rank])
        return net

    return spread


def keep(modules: nn.ModuleDict, kept: Any) -> None:
    for name in set(modules) - {str(i) for i in kept}:
        del modules[name]


def zero_ranges(size: int) -> Spread:
    """ZeRO by hand: all parameters one after the other, cut into equal ranges of elements; a rank has one of them."""

    def spread(net: Net, rank: int) -> dict[str, Any]:
        total = sum(parameter.numel() for parameter in net.parameters())
        low, high = total * rank // size, total * (rank + 1) // size
        tree: dict[str, Any] = {}
        position = 0
        for name, parameter in net.named_parameters():
            start, stop = max(low - position, 0), min(high - position, parameter.numel())
            part = nn.Parameter(parameter.detach().view(-1)[start : max(start, stop)].clone())
            *path, last = name.split(".")
            place = tree
            for component in path:
                place = place.setdefault(component, {})
            place[last] = ShardedVariable.flat(part, tuple(parameter.shape), start)
            position += parameter.numel()
        tree["scale"] = ShardedVariable(net.scale, (3,), (0,))
        return tree

    return spread


# ---- all of them -------------------------------------------------------------------------------------------------


def all_layouts() -> list[Layout]:
    """Collective over torch's process group of 4 ranks."""
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    rows = {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("data",)) for size in (2, 3, 4)}
    square = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "model"))
    flat = DeviceMesh("cpu", [[[0, 1], [2, 3]]], mesh_dim_names=("replicate", "shard", "tensor"))
    deep = DeviceMesh("cpu", [[[0, 2]], [[1, 3]]], mesh_dim_names=("replicate", "shard", "tensor"))
    rank = dist.get_rank()
    return [
        Layout("one rank", 1, whole),
        Layout("DDP on 2", 2, data_parallel(groups[2])),
        Layout("DDP with ZeroRedundancyOptimizer on 3", 3, data_parallel(groups[3]), groups[3]),
        Layout("DDP with ZeroRedundancyOptimizer on 4", 4, data_parallel(groups[4]), groups[4]),
        Layout("FSDP on 2", 2, fsdp(rows[2])),
        Layout("FSDP on 3, not resharded", 3, fsdp(rows[3], reshard_after_forward=False)),
        Layout("FSDP by columns on 2", 2, fsdp(rows[2], shard_placement_fn=along_columns)),
        Layout("FSDP, experts on another mesh", 4, meshes_by_parameter(rows[4], square["model"])),
        Layout("HSDP", 4, fsdp(square)),
        Layout("tensor parallel on 2", 2, tensor_parallel(rows[2])),
        Layout("tensor parallel on 3", 3, tensor_parallel(rows[3])),
        Layout("FSDP over tensor parallel", 4, then(tensor_parallel(square["model"]), fsdp(square["data"]))),
        Layout("3-d mesh 1 x 2 x 2", 4, then(tensor_parallel(flat["tensor"]), fsdp(flat["replicate", "shard"]))),
        Layout("3-d mesh 2 x 1 x 2", 4, then(tensor_parallel(deep["tensor"]), fsdp(deep["replicate", "shard"]))),
        Layout("pipeline of 2", 2, stages([1], [0])),
        Layout("pipeline of 4", 4, stages([], [0], [1], [])),
        Layout("pipeline of FSDP", 4, on_rank(rank // 2, stages([1, 0], []), fsdp(square["model"]))),
        Layout("experts on 2", 2, experts([0, 1], [2, 3])),
        Layout("experts on 3", 3, experts([3], [0, 2], [1])),
        Layout("experts on 4, twice", 4, experts([0, 3], [1, 2], [1, 2], [0, 3])),
        Layout("ZeRO ranges on 2", 2, zero_ranges(2)),
        Layout("ZeRO ranges on 3", 3, zero_ranges(3)),
    ]


def trained_layouts() -> list[Layout]:
    """Some of them such that the model computes what a whole one does. Collective as `all_layouts`."""
    group = dist.new_group([0, 1, 2])
    rows = {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("data",)) for size in (2, 3, 4)}
    square = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "model"))
    tensor = {2: tensor_parallel(rows[2], sequence=False), 4: tensor_parallel(square["model"], sequence=False)}
    return [
        Layout("DDP", 2, data_parallel(dist.new_group([0, 1]))),
        Layout("DDP with ZeroRedundancyOptimizer", 3, data_parallel(group), group),
        Layout("FSDP, not resharded", 3, fsdp(rows[3], reshard_after_forward=False)),
        Layout("FSDP by columns", 2, fsdp(rows[2], shard_placement_fn=along_columns)),
        Layout("FSDP, experts on another mesh", 4, meshes_by_parameter(rows[4], square["model"])),
        Layout("HSDP", 4, fsdp(square)),
        Layout("tensor parallel", 2, tensor[2]),
        Layout("FSDP over tensor parallel", 4, then(tensor[4], fsdp(square["data"]))),
    ]


def on_rank(stage: int, pipeline: Spread, inner: Spread) -> Spread:
    """A pipeline each of whose stages is spread over several ranks."""

    def spread(net: Net, rank: int) -> Any:
        return inner(pipeline(net, stage), rank)

    return spread
