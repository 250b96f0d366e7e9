"""What a run is asked to measure, and what its cases share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from distckpt.bench.state import State, build_state, gpt_shapes

#: Layout of a state to the dimension that is split over the ranks.
LAYOUTS = {"rows": 0, "columns": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to measure, as the user asked.

    Attributes:
        nbytes: Bytes of the GPT-like state over all ranks.
        hidden: Width of the GPT; None takes one that suits the size.
        layout: How the state of the cases "save", "restore", "reshard" and "memory" is split: one of `LAYOUTS`.
        variables: Numbers of small variables for the case "overhead".
        small: Number of small variables for the case "small".
        competitors: Some of `builders.COMPETITORS`.
        cases: Some of `cases.CASES`.
        rounds: Measured rounds of each case.
    """

    nbytes: int
    hidden: int | None
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
        mesh: One-dimensional mesh of all ranks.
        directory: Where files are written.
    """

    setup: Setup
    mesh: DeviceMesh
    directory: Path

    @property
    def dim(self) -> int:
        """The dimension along which the layout that the user chose is split."""
        return LAYOUTS[self.setup.layout]

    def gpt(self, dim: int | None) -> State:
        """The GPT-like state, split along a dimension; None for all of it on every rank."""
        return build_state(gpt_shapes(self.setup.nbytes, self.setup.hidden), self.mesh, dim=dim)
