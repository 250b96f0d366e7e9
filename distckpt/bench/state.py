"""The state that is saved and restored: float32 DTensors, shaped like a GPT and its Adam slots, or many small ones."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Shapes = dict[str, tuple[int, ...]]

#: Names of the optimizer slots of each weight, which are also the last part of the names of their variables.
SLOTS = ("exp_avg", "exp_avg_sq")

_ITEMSIZE = 4
_HIDDEN_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
_SALT = 0x1E3779B1


@dataclass(frozen=True, slots=True)
class State:
    """Variables of which each rank holds one shard, or everything.

    Attributes:
        tensors: The DTensors by name, with the same names on all ranks.
        shards: This rank's shards, in the order of the variables; contiguous, in the memory of the DTensors.
    """

    tensors: dict[str, DTensor]
    shards: tuple[torch.Tensor, ...]

    @property
    def device(self) -> torch.device:
        """Device of this rank's shards."""
        return self.shards[0].device

    @property
    def is_replicated(self) -> bool:
        """Whether each rank holds all of every variable."""
        return any(tensor.placements[0].is_replicate() for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all variables, each counted once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values()) * _ITEMSIZE

    @property
    def local_nbytes(self) -> int:
        """Bytes of this rank's shards."""
        return sum(shard.nbytes for shard in self.shards)

    def fill(self) -> None:
        """Set every element to a value that depends only on its variable and its position in the global shape."""
        for index, (tensor, shard) in enumerate(zip(self.tensors.values(), self.shards, strict=True)):
            shard.view(torch.int32).copy_(_expected(index, tensor))

    def advance(self) -> None:
        """Change every element, as an optimizer step does."""
        torch._foreach_add_(self.shards, 1.0)

    def scramble(self) -> None:
        """Set every element to a value that `fill` never uses."""
        for shard in self.shards:
            shard.fill_(-1.0)

    def wrong(self) -> list[str]:
        """Names of the variables whose shard on this rank differs in any bit from the values of `fill`."""
        return [
            name
            for index, ((name, tensor), shard) in enumerate(zip(self.tensors.items(), self.shards, strict=True))
            if not torch.equal(shard.view(torch.int32).cpu(), _expected(index, tensor))
        ]


def gpt_shapes(nbytes: int, hidden: int | None = None) -> Shapes:
    """Global shapes of the weights of a GPT with two optimizer slots each, of about `nbytes` in all.

    Args:
        nbytes: Bytes of all weights and slots as float32.
        hidden: Width of the model. None takes the width that gives about 12 layers.

    Returns:
        Global shapes by name; weights first, then one slot after the other.
    """
    weights = nbytes // _ITEMSIZE // (1 + len(SLOTS))
    width = hidden or min(_HIDDEN_SIZES, key=lambda size: abs(weights / _block_elements(size) - 12.5))
    layers = max(1, int(0.97 * weights / _block_elements(width)))
    rows = max(2, round((weights - layers * _block_elements(width)) / width) - 2)
    shapes = _gpt_weights(width, layers, rows)
    return shapes | {f"{name}.{slot}": shape for slot in SLOTS for name, shape in shapes.items()}


def small_shapes(count: int) -> Shapes:
    """Global shapes of `count` variables of 1 KiB, by name."""
    return {f"layers.{index}.bias": (256,) for index in range(count)}


def build_state(shapes: Shapes, mesh: DeviceMesh, *, dim: int | None) -> State:
    """Make a state with the values of `State.scramble`. Local.

    Args:
        shapes: Global shapes by name.
        mesh: One-dimensional mesh of all ranks, on the device of the state.
        dim: The dimension that is split over the ranks; variables with fewer dimensions are split along dimension 0.
            None replicates all variables on every rank.

    Returns:
        The state.
    """
    make = _replicated if dim is None else functools.partial(_sharded, dim=dim)
    tensors = {name: make(shape, mesh) for name, shape in shapes.items()}
    # Stored, because `to_local` takes longer than copying a small shard.
    state = State(tensors, tuple(tensor.to_local() for tensor in tensors.values()))
    state.scramble()
    return state


def _block_elements(hidden: int) -> int:
    return 12 * hidden * hidden + 13 * hidden


def _gpt_weights(hidden: int, layers: int, rows: int) -> Shapes:
    """Shapes of the weights of a GPT-2; `rows` counts those of the token and position embeddings together."""
    positions = min(1024, rows // 2)
    shapes: Shapes = {"wte.weight": (rows - positions, hidden), "wpe.weight": (positions, hidden)}
    for layer in range(layers):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in _block(hidden).items()}
    return shapes | {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}


def _block(hidden: int) -> Shapes:
    shapes: Shapes = {}
    for name, width in (("ln_1", None), ("attn.c_attn", 3), ("attn.c_proj", 1), ("ln_2", None), ("mlp.c_fc", 4)):
        shapes[f"{name}.weight"] = (width * hidden, hidden) if width else (hidden,)
        shapes[f"{name}.bias"] = ((width or 1) * hidden,)
    return shapes | {"mlp.c_proj.weight": (hidden, 4 * hidden), "mlp.c_proj.bias": (hidden,)}


def _replicated(shape: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
    local = torch.empty(shape, dtype=torch.float32, device=mesh.device_type)
    return DTensor.from_local(local, mesh, [Replicate()], run_check=False)


def _sharded(shape: tuple[int, ...], mesh: DeviceMesh, dim: int) -> DTensor:
    dim = dim if dim < len(shape) else 0
    rows = _rows(shape[dim], mesh)
    local_shape = (*shape[:dim], len(rows), *shape[dim + 1 :])
    local = torch.empty(local_shape, dtype=torch.float32, device=mesh.device_type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride)


def _rows(length: int, mesh: DeviceMesh) -> range:
    """Indices of the split dimension that this rank holds, by DTensor's rule; the last ranks may have fewer."""
    step = math.ceil(length / mesh.size())
    start = min(length, mesh.get_local_rank() * step)
    return range(start, min(length, start + step))


def _expected(index: int, tensor: DTensor) -> torch.Tensor:
    """The bits, as int32, of this rank's shard of variable `index` after `State.fill`: floats in [0, 2)."""
    places = torch.zeros((), dtype=torch.int32)
    for axis, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        held = _rows(length, tensor.device_mesh) if tensor.placements[0].is_shard(axis) else range(length)
        line = torch.arange(held.start, held.stop, dtype=torch.int32) * stride
        places = places.unsqueeze(-1) + line
    return ((places + index) * _SALT) & 0x3FFFFFFF
