"""What is measured: one function per case, each with a state of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distckpt.bench.raw import Raw, supports_direct
from distckpt.bench.runner import Meter, Trial, agreed, extra_mib, interleave, over_ranks, seconds
from distckpt.bench.state import State, build_state, gpt_shapes, small_shapes
from distckpt.bench.trials import Builder, FirstSaveTrial, RestoreTrial, SaveTrial, check_restore, delete

COMPETITORS = ("distckpt", "raw", "dcp", "safetensors")
OVERHEAD = "overhead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to measure, as the user asked.

    Attributes:
        nbytes: Bytes of the GPT-like state over all ranks.
        hidden: Width of the GPT; None takes one that suits the size.
        variables: Numbers of small variables for the case "overhead".
        competitors: Some of `COMPETITORS`.
        cases: Some of `CASES`.
        rounds: Measured rounds of each case.
    """

    nbytes: int
    hidden: int | None
    variables: tuple[int, ...]
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

    def gpt(self, dim: int) -> State:
        """The GPT-like state, split along a dimension."""
        return build_state(gpt_shapes(self.setup.nbytes, self.setup.hidden), self.mesh, dim=dim)


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured values of one competitor in one case.

    Attributes:
        case: Name of the case.
        name: Name of the competitor.
        unit: "s" or "MiB".
        nbytes: Bytes of the state over all ranks.
        values: One per round, of the rank with the largest.
    """

    case: str
    name: str
    unit: str
    nbytes: int
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values)


def run_case(bench: Bench, case: str) -> list[Samples]:
    """Measure one case. Collective over the process group.

    Args:
        bench: What all cases share.
        case: One of `CASES`.

    Returns:
        What was measured, the same on all ranks.
    """
    return CASES[case](bench)


def _save(bench: Bench) -> list[Samples]:
    return _save_case(bench, "save", bench.setup.competitors, seconds)


def _restore(bench: Bench) -> list[Samples]:
    return _restore_case(bench, "restore", 0, bench.setup.competitors, seconds)


def _reshard(bench: Bench) -> list[Samples]:
    return _restore_case(bench, "reshard", 1, _without(bench, "raw", "safetensors"), seconds)


def _memory(bench: Bench) -> list[Samples]:
    saved = _save_case(bench, "memory of save", _without(bench, "raw"), extra_mib)
    restored = _restore_case(bench, "memory of restore", 0, _without(bench, "raw"), extra_mib)
    resharded = _restore_case(bench, "memory of reshard", 1, _without(bench, "raw", "safetensors"), extra_mib)
    return saved + restored + resharded


def _overhead(bench: Bench) -> list[Samples]:
    return [samples for count in bench.setup.variables for samples in _overhead_case(bench, count)]


CASES: Mapping[str, Callable[[Bench], list[Samples]]] = {
    "save": _save,
    "restore": _restore,
    "reshard": _reshard,
    "memory": _memory,
    OVERHEAD: _overhead,
}


def _save_case(bench: Bench, case: str, names: Iterable[str], meter: Meter) -> list[Samples]:
    state = bench.gpt(dim=0)
    trials = [SaveTrial(build(state), bench.directory) for build in _builders(bench, names, saving=True)]
    return _measure(bench, case, state, trials, meter)


def _restore_case(bench: Bench, case: str, dim: int, names: Iterable[str], meter: Meter) -> list[Samples]:
    """Save row shards once with each competitor; restore into shards along dimension `dim`, and check at the end."""
    paths = _saved(bench, names)
    state = bench.gpt(dim)
    trials = [
        RestoreTrial(build(state), path)
        for name, path in paths.items()
        for build in _builders(bench, [name], saving=False)
    ]
    samples = _measure(bench, case, state, trials, meter)
    for trial in trials:
        agreed(f"{case}: {trial.name}", check_restore, trial)
    for path in paths.values():
        delete(path)
    return samples


def _overhead_case(bench: Bench, count: int) -> list[Samples]:
    """First saves, and saves of an unchanged layout, against the mere writing of the same bytes."""
    state = build_state(small_shapes(count), bench.mesh, dim=0)
    trials: list[Trial] = [SaveTrial(Raw(state, direct=False), bench.directory)]
    for build in _builders(bench, _without(bench, "raw"), saving=True):
        trials += [FirstSaveTrial(build, state, bench.directory), SaveTrial(build(state), bench.directory)]
    return _measure(bench, f"{OVERHEAD} of {count} variables", state, trials, seconds)


def _measure(bench: Bench, case: str, state: State, trials: Sequence[Trial], meter: Meter) -> list[Samples]:
    """Times are taken after one round that does not count; memory from the first, which loads the libraries too."""
    if meter is seconds:
        interleave(trials, 1, meter)
    unit = "s" if meter is seconds else "MiB"
    values = interleave(trials, bench.setup.rounds, meter)
    return [Samples(case, name, unit, state.nbytes, tuple(measured)) for name, measured in values.items()]


def _saved(bench: Bench, names: Iterable[str]) -> dict[str, Path]:
    """Name of a competitor to the checkpoint it wrote. Collective over the process group."""
    state = bench.gpt(dim=0)
    state.fill()
    paths = {}
    for name in names:
        competitor = _builders(bench, [name], saving=True)[0](state)
        paths[name] = agreed(f"save with {name}", competitor.save, bench.directory / name)
    return paths


def _without(bench: Bench, *names: str) -> tuple[str, ...]:
    return tuple(name for name in bench.setup.competitors if name not in names)


def _builders(bench: Bench, names: Iterable[str], *, saving: bool) -> list[Builder]:
    """How to make the competitors of these names. Collective over the process group."""
    return [build for name in names for build in _builders_of(bench, name, saving=saving)]


def _builders_of(bench: Bench, name: str, *, saving: bool) -> list[Builder]:
    """Competitors whose packages may be missing are imported only when asked for."""
    if name == "raw":
        direct = saving and over_ranks(supports_direct(bench.directory), dist.ReduceOp.MIN)
        return [partial(Raw, direct=mode) for mode in ((False, True) if direct else (False,))]
    if name == "dcp":
        from distckpt.bench.dcp import Dcp

        return [Dcp]
    if name == "safetensors":
        from distckpt.bench.safetensors import Safetensors

        return [Safetensors]
    from distckpt.bench.product import Distckpt

    return [Distckpt] if saving else [partial(Distckpt, verify=False), Distckpt]
