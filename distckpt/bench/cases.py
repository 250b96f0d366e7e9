"""The cases of the benchmark: one function per case, each with a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from distckpt.bench.background import measure_background, measure_background_memory
from distckpt.bench.builders import OF_ONE_LAYOUT, builders, builders_without_checksums, names_without
from distckpt.bench.raw import Raw
from distckpt.bench.runner import Meter, Trial, agreed, extra_mib, failures_of, seconds
from distckpt.bench.samples import Samples, measure
from distckpt.bench.setting import LAYOUTS, Bench
from distckpt.bench.state import State, build_state, small_shapes
from distckpt.bench.trials import ColdRestoreTrial, FirstSaveTrial, RestoreTrial, SaveTrial, check_restore, delete

OVERHEAD = "overhead"

#: `Trial.kind` of row shards in a case of column shards, measured for comparison.
_ROWS = "rows"


def run_case(bench: Bench, case: str) -> list[Samples]:
    """Measure one case. Collective over the process group.

    Args:
        bench: The setup that all cases share.
        case: One of `CASES`.

    Returns:
        The measured values, the same on all ranks.
    """
    return CASES[case](bench)


def _save(bench: Bench) -> list[Samples]:
    """Durable saves; those of distckpt also without checksums, to show their cost."""
    state = bench.gpt(bench.dim)
    trials = _save_trials(bench, state, bench.setup.competitors)
    trials += [SaveTrial(build(state), bench.directory) for build in builders_without_checksums(bench)]
    return measure(bench, "save", state, trials, seconds)


def _restore(bench: Bench) -> list[Samples]:
    return _restore_case(bench, "restore", bench.gpt(bench.dim), bench.setup.competitors, seconds)


def _cold(bench: Bench) -> list[Samples]:
    """Restores from the disk, not from the page cache."""
    state = bench.gpt(bench.dim)
    paths = _saved(bench, state, bench.setup.competitors, bench.directory)
    return _measure_restores(
        bench, "cold", state, _restore_trials(bench, state, paths, trial=ColdRestoreTrial), seconds
    )


def _reshard(bench: Bench) -> list[Samples]:
    """Restores from the layout that the user chose into the other one."""
    return _reshard_case(bench, "reshard", seconds)


def _memory(bench: Bench) -> list[Samples]:
    names = names_without(bench, "raw")
    saved = _save_case(bench, "memory of save", bench.gpt(bench.dim), names, extra_mib)
    restored = _restore_case(bench, "memory of restore", bench.gpt(bench.dim), names, extra_mib)
    resharded = _reshard_case(bench, "memory of reshard", extra_mib)
    return saved + restored + resharded + measure_background_memory(bench)


def _overhead(bench: Bench) -> list[Samples]:
    """First saves, and saves of an unchanged layout, against plain writes of the same bytes."""
    return [samples for count in bench.setup.variables for samples in _overhead_case(bench, count)]


def _repeat(bench: Bench) -> list[Samples]:
    """First saves of the whole state, and saves of an unchanged layout."""
    state = bench.gpt(bench.dim)
    return measure(bench, "repeat", state, _first_and_later(bench, state), seconds)


def _replicated(bench: Bench) -> list[Samples]:
    """Saves and restores of a state that every rank holds completely."""
    saved = _save_case(bench, "replicated: save", bench.gpt(None), bench.setup.competitors, seconds)
    return saved + _restore_case(bench, "replicated: restore", bench.gpt(None), bench.setup.competitors, seconds)


def _columns(bench: Bench) -> list[Samples]:
    """Saves and restores of column shards, and, by distckpt, of row shards in the same rounds for comparison."""
    return _save_columns(bench) + _restore_columns(bench)


def _small(bench: Bench) -> list[Samples]:
    """Saves and restores of many variables of 1 KiB."""
    state = build_state(small_shapes(bench.setup.small), bench.mesh, dim=0)
    title = f"small, {bench.setup.small} variables"
    saved = _save_case(bench, f"{title}: save", state, bench.setup.competitors, seconds)
    return saved + _restore_case(bench, f"{title}: restore", state, bench.setup.competitors, seconds)


CASES: Mapping[str, Callable[[Bench], list[Samples]]] = {
    "save": _save,
    "restore": _restore,
    "cold": _cold,
    "reshard": _reshard,
    "memory": _memory,
    OVERHEAD: _overhead,
    "async": partial(measure_background, overlap=False),
    "overlap": partial(measure_background, overlap=True),
    "replicated": _replicated,
    "columns": _columns,
    "small": _small,
    "repeat": _repeat,
}


def _save_case(bench: Bench, case: str, state: State, names: Iterable[str], meter: Meter[Trial]) -> list[Samples]:
    return measure(bench, case, state, _save_trials(bench, state, names), meter, _unit(meter))


def _save_trials(bench: Bench, state: State, names: Iterable[str]) -> list[SaveTrial]:
    return [SaveTrial(build(state), bench.directory) for build in builders(bench, names, saving=True)]


def _restore_case(bench: Bench, case: str, state: State, names: Iterable[str], meter: Meter[Trial]) -> list[Samples]:
    """Restore into the layout that was saved."""
    paths = _saved(bench, state, names, bench.directory)
    return _measure_restores(bench, case, state, _restore_trials(bench, state, paths), meter)


def _reshard_case(bench: Bench, case: str, meter: Meter[Trial]) -> list[Samples]:
    """Restore into another layout than the one that was saved."""
    state = bench.gpt(1 - bench.dim)
    # The raw limit is a plain read of as many bytes, already in the layout that each rank wants.
    raw = [name for name in bench.setup.competitors if name == "raw" and meter is not extra_mib]
    paths = _saved(bench, state, raw, bench.directory)
    paths |= _saved(bench, bench.gpt(bench.dim), names_without(bench, *OF_ONE_LAYOUT), bench.directory)
    return _measure_restores(bench, case, state, _restore_trials(bench, state, paths), meter)


def _saved(bench: Bench, state: State, names: Iterable[str], directory: Path) -> dict[str, Path]:
    """Save with each competitor; returns the path of each one's checkpoint. Collective over the process group."""
    state.fill()
    paths = {}
    for name in names:
        competitor = builders(bench, [name], saving=True)[0](state)
        with failures_of(competitor.name, bench.failed, is_rival=competitor.is_rival):
            paths[name] = agreed(f"save with {name}", competitor.save, directory / name)
    return paths


def _restore_trials(
    bench: Bench, state: State, paths: Mapping[str, Path], kind: str = "", trial: type[RestoreTrial] = RestoreTrial
) -> list[RestoreTrial]:
    """Trials that restore. The state is scrambled first, as competitors with buffers fill them from it now."""
    state.scramble()
    return [
        trial(build(state), path, kind)
        for name, path in paths.items()
        for build in builders(bench, [name], saving=False)
    ]


def _measure_restores(
    bench: Bench, case: str, state: State, trials: Sequence[RestoreTrial], meter: Meter[Trial]
) -> list[Samples]:
    """Measure restores, check the restored values, and delete the files."""
    samples = measure(bench, case, state, trials, meter, _unit(meter))
    for trial in trials:
        if trial.name not in bench.failed:
            with failures_of(trial.name, bench.failed, is_rival=trial.is_rival):
                agreed(f"{case}: {trial.name}", check_restore, trial)
    for path in dict.fromkeys(trial.path for trial in trials):
        delete(path)
    return [of_trial for of_trial in samples if of_trial.name not in bench.failed]


def _overhead_case(bench: Bench, count: int) -> list[Samples]:
    state = build_state(small_shapes(count), bench.mesh, dim=0)
    return measure(bench, f"{OVERHEAD} of {count} variables", state, _first_and_later(bench, state), seconds)


def _first_and_later(bench: Bench, state: State) -> list[SaveTrial]:
    """First and later saves by all competitors but "raw", and a raw save through the page cache for comparison."""
    trials = [SaveTrial(Raw(state), bench.directory)]
    for build in builders(bench, names_without(bench, "raw"), saving=True):
        trials += [FirstSaveTrial(build, state, bench.directory), SaveTrial(build(state), bench.directory)]
    return trials


def _save_columns(bench: Bench) -> list[Samples]:
    columns, rows = (bench.gpt(LAYOUTS[layout]) for layout in ("columns", "rows"))
    own = [name for name in bench.setup.competitors if name == "distckpt"]
    trials = _save_trials(bench, columns, bench.setup.competitors)
    trials += [SaveTrial(build(rows), bench.directory, _ROWS) for build in builders(bench, own, saving=True)]
    return measure(bench, "columns: save", columns, trials, seconds)


def _restore_columns(bench: Bench) -> list[Samples]:
    columns, rows = (bench.gpt(LAYOUTS[layout]) for layout in ("columns", "rows"))
    own = [name for name in bench.setup.competitors if name == "distckpt"]
    trials = _restore_trials(bench, columns, _saved(bench, columns, bench.setup.competitors, bench.directory))
    # In another directory, as distckpt numbers the files of each directory itself, and would begin again.
    trials += _restore_trials(bench, rows, _saved(bench, rows, own, bench.directory / "rows"), _ROWS)
    return _measure_restores(bench, "columns: restore", columns, trials, seconds)


def _unit(meter: Meter[Trial]) -> str:
    return "MiB" if meter is extra_mib else "s"
