"""What a run is asked to measure, and what its cases share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from distckpt.bench.state import State, build_state, gpt_shapes

#: Layout of a state to the dimension that is split over the ranks.
LAYOUTS = {"rows": 0, "columns": 1}
#: Where the state is.
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to measure, as the user asked.

    Attributes:
        nbytes: Bytes of the GPT-like state over all ranks.
        hidden: Width of the GPT; None takes one that suits the size.
        device: Where the state is: one of `DEVICES`. Ranks share the GPUs of their node.
        layout: How the state of the cases "save", "restore", "reshard" and "memory" is split: one of `LAYOUTS`.
        variables: Numbers of small variables for the case "overhead".
        small: Number of small variables for the case "small".
        competitors: Some of `builders.COMPETITORS`.
        cases: Some of `cases.CASES`.
        rounds: Measured rounds of each case.
    """

    nbytes: int
    hidden: int | None
    device: str
    layout: str
    variables: tuple[int, ...]
    small: int
    competitors: tuple[str, ...]
    cases: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases share.

    Attributes:
        setup: What to measure.
        mesh: One-dimensional mesh of all ranks, on the device of the state.
        directory: Where files are written.
    """

    setup: Setup
    mesh: DeviceMesh
    directory: Path

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return torch.device(self.mesh.device_type)

    @property
    def dim(self) -> int:
        """The dimension along which the layout that the user chose is split."""
        return LAYOUTS[self.setup.layout]

    def gpt(self, dim: int | None) -> State:
        """The GPT-like state, split along a dimension; None for all of it on every rank."""
        return build_state(gpt_shapes(self.setup.nbytes, self.setup.hidden), self.mesh, dim=dim)
