"""The setup of a run, and the values that its cases share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from distckpt.bench.state import State, build_state, gpt_shapes

#: For each layout of a state: the dimension that is split over the ranks.
LAYOUTS = {"rows": 0, "columns": 1}
#: Devices on which the state may be.
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The options that the user chose.

    Attributes:
        nbytes: Bytes of the GPT-like state over all ranks.
        hidden: Width of the GPT; None takes one that suits the size.
        device: Device of the state, one of `DEVICES`. Ranks share the GPUs of their node.
        layout: One of `LAYOUTS`, by which the state is split in "save", "restore", "reshard", "memory" and others.
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
    """The values that all cases share.

    Attributes:
        setup: The options of the run.
        mesh: One-dimensional mesh of all ranks, on the device of the state.
        directory: Directory for all files.
        failed: For each rival that has failed, by its name in the report: the reason.
    """

    setup: Setup
    mesh: DeviceMesh
    directory: Path
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return torch.device(self.mesh.device_type)

    @property
    def dim(self) -> int:
        """The dimension along which the user's layout splits tensors."""
        return LAYOUTS[self.setup.layout]

    def gpt(self, dim: int | None) -> State:
        """The GPT-like state, split along a dimension; None for all of it on every rank."""
        return build_state(gpt_shapes(self.setup.nbytes, self.setup.hidden), self.mesh, dim=dim)
