"""`distckpt bench` without MPI: sizes, shapes, values, rounds, ratios, and round trips of all rivals on one rank."""

from __future__ import annotations

import ctypes
import importlib
import io
import itertools
import json
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from typer.testing import CliRunner

from distckpt.bench import builders
from distckpt.bench.background import (
    DurableTrial,
    FirstStallTrial,
    MemcpyTrial,
    SlowdownTrial,
    StallTrial,
    seconds_lost,
)
from distckpt.bench.cases import CASES, run_case
from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.dcp import Dcp, DcpAsync, modes
from distckpt.bench.raw import Raw, supports_direct
from distckpt.bench.report import describe_missing, make_document, make_rows, make_tables
from distckpt.bench.rivals import find_missing
from distckpt.bench.runner import agreed, extra_mib, interleave, seconds
from distckpt.bench.samples import Samples
from distckpt.bench.session import make_directory
from distckpt.bench.setting import Bench, Setup
from distckpt.bench.state import State, build_state, gpt_shapes, small_shapes
from distckpt.bench.trials import ColdRestoreTrial, FirstSaveTrial, RestoreTrial, SaveTrial, check_restore
from distckpt.cli.bench import parse_choices, parse_number, parse_size
from distckpt.cli.main import build
from distckpt.errors import CollectiveError

MIB = 2**20
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of states on a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs have written is not ours to wait for."""
    monkeypatch.setattr(os, "sync", lambda: None)


def a_setup(**changes: object) -> Setup:
    values = {
        "nbytes": MIB,
        "hidden": None,
        "device": "cpu",
        "layout": "rows",
        "variables": (20,),
        "small": 25,
        "competitors": ("raw", "dcp"),
        "cases": (),
        "rounds": 2,
    }
    return Setup(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1GiB", 2**30), ("64mib", 64 * MIB), ("1.5 KiB", 1536), ("2MB", 2_000_000), ("4096", 4096), (" 1TiB ", 2**40)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "0", "0.1", "-1MiB", "1 QiB", "1GiB2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected a size"):
        parse_size(text)


def test_choices_keep_their_order_and_come_once() -> None:
    assert parse_choices("--against", "dcp, raw,dcp,", ("raw", "dcp")) == ("dcp", "raw")
    assert parse_choices("--against", "", ("raw", "dcp")) == ()


def test_what_is_no_choice_or_number() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected some of raw, dcp\. Got 'zarr'"):
        parse_choices("--against", "raw,zarr", ("raw", "dcp"))
    for text in ("", "0", "-5", "many"):
        with pytest.raises(typer.BadParameter, match="expected numbers"):
            parse_number(text)


@pytest.mark.parametrize("nbytes", [MIB, 3 * MIB, 256 * MIB, 2**30, 4 * 2**30, 100 * 2**30])
@pytest.mark.parametrize("slots", ["exp_avg", "exp_avg_sq"])
def test_the_gpt_has_the_size_and_a_slot_of_each_kind_per_weight(nbytes: int, slots: str) -> None:
    shapes = gpt_shapes(nbytes)
    assert sum(map(math.prod, shapes.values())) * 4 == pytest.approx(nbytes, rel=0.01)
    weights = [name for name in shapes if not name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert all(shapes[f"{name}.{slots}"] == shapes[name] for name in weights)
    assert len(shapes) == 3 * len(weights)


def test_the_gpt_of_a_gibibyte_has_444_variables_and_the_width_can_be_chosen() -> None:
    assert len(gpt_shapes(2**30)) == 444
    assert gpt_shapes(2**30, hidden=1024)["h.0.mlp.c_fc.weight"] == (4096, 1024)


def test_values_depend_on_variable_and_place_and_are_ordinary_floats(mesh: DeviceMesh) -> None:
    state = build_state({"a": (4, 6), "b": (4, 6)}, mesh, dim=1)
    assert state.wrong() == ["a", "b"]
    state.fill()
    assert state.wrong() == []
    values = torch.stack(list(state.shards))
    assert len(values.unique()) >= 25
    assert bool(((values >= 0) & (values < 2)).all())
    state.tensors["b"].to_local()[2, 3] += 0.5
    assert state.wrong() == ["b"]
    state.scramble()
    assert state.wrong() == ["a", "b"]


#: Competitor to its module and class.
CLASSES = {
    "dcp": ("dcp", "Dcp"),
    "torchsnapshot": ("torchsnapshot", "Torchsnapshot"),
    "torch.save": ("torch_save", "TorchSave"),
    "safetensors": ("safetensors", "Safetensors"),
}


def competitor_class(name: str) -> type[Competitor]:
    module, of_module = CLASSES[name]
    return getattr(importlib.import_module(f"distckpt.bench.{module}"), of_module)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("name", ["raw", "raw O_DIRECT", "raw, 3 threads", *CLASSES])
def test_competitors_restore_what_they_saved(name: str, dim: int | None, mesh: DeviceMesh, tmp_path: Path) -> None:
    if name in ("safetensors", "torchsnapshot"):
        pytest.importorskip(name)
    if name == "raw O_DIRECT" and not supports_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    saved, live = (build_state(gpt_shapes(MIB), mesh, dim=dim) for _ in range(2))
    assert saved.is_replicated == (dim is None)
    saved.fill()
    if name.startswith("raw"):
        path = Raw(saved, direct=name == "raw O_DIRECT").save(tmp_path / "saved")
        trial = RestoreTrial(Raw(live, threads=3 if "threads" in name else 1), path)
    else:
        path = competitor_class(name)(saved).save(tmp_path / "saved")
        trial = RestoreTrial(competitor_class(name)(live), path)
    assert live.wrong() == list(live.tensors)
    check_restore(trial)
    assert live.wrong() == []


def test_a_wrong_byte_is_found(mesh: DeviceMesh, tmp_path: Path) -> None:
    saved, live = (build_state(gpt_shapes(MIB), mesh, dim=0) for _ in range(2))
    saved.fill()
    path = Raw(saved).save(tmp_path / "saved")
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 variables .* restored wrongly"):
        check_restore(RestoreTrial(Raw(live), path))


class Recorder:
    """A trial that writes down what is done with it."""

    kind = ""
    is_rival = False

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def prepare(self) -> None:
        self.log.append(f"prepare {self.name}")

    def run(self) -> None:
        self.log.append(f"run {self.name}")

    def clean(self) -> None:
        self.log.append(f"clean {self.name}")


@pytest.mark.usefixtures("mesh")
def test_rounds_alternate() -> None:
    log: list[str] = []
    samples = interleave([Recorder("a", log), Recorder("b", log)], 3, seconds, {})
    assert [line for line in log if line.startswith("run")] == [f"run {name}" for name in "abbaab"]
    assert log[:4] == ["prepare a", "run a", "clean a", "prepare b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in samples.values() for value in values)


class Failing(Recorder):
    """A trial that fails in its second run."""

    is_rival = True

    def run(self) -> None:
        super().run()
        if self.log.count(f"run {self.name}") == 2:
            raise KeyError("step")


@pytest.mark.usefixtures("mesh")
def test_a_rival_that_fails_is_left_out_with_the_reason() -> None:
    log: list[str] = []
    failed: dict[str, str] = {}
    trials = [Recorder("a", log), Failing("b", log)]
    samples = interleave(trials, 3, seconds, failed)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3}
    assert failed == {"b": "failed on rank 0: KeyError: 'step'"}
    assert list(interleave(trials, 1, seconds, failed)) == ["a"]
    assert log.count("run b") == 2


@pytest.mark.usefixtures("mesh")
def test_a_run_ends_where_distckpt_fails() -> None:
    trial = Failing("b", [])
    trial.is_rival = False
    with pytest.raises(CollectiveError, match="KeyError: 'step'"):
        interleave([trial], 3, seconds, {})


class Hungry(Recorder):
    """A trial that needs 64 MiB for a moment."""

    def run(self) -> None:
        torch.ones(16 * MIB)


@pytest.mark.usefixtures("mesh")
def test_the_peak_of_a_run_is_seen_again_and_again() -> None:
    samples = interleave([Hungry("hungry", []), Recorder("modest", [])], 2, extra_mib, {})
    assert all(60 < value < 80 for value in samples["hungry"])
    assert all(value < 8 for value in samples["modest"])


@pytest.mark.usefixtures("mesh")
def test_what_fails_on_a_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError, match=r"step 'look' failed[\s\S]*rank 0: FileNotFoundError") as error:
        agreed("look", (tmp_path / "nothing").read_bytes)
    assert isinstance(error.value.__cause__, FileNotFoundError)
    assert agreed("add", int.__add__, 1, 2) == 3


def test_saves_change_the_values_use_fresh_names_and_delete(mesh: DeviceMesh, tmp_path: Path) -> None:
    state = build_state(small_shapes(3), mesh, dim=0)
    trials = [SaveTrial(Raw(state), tmp_path), FirstSaveTrial(Dcp, state, tmp_path)]
    assert [(trial.name, trial.kind) for trial in trials] == [("raw", ""), ("DCP, first save", "first save")]
    names = set()
    for _ in range(2):
        for trial in trials:
            before = state.tensors["layers.0.bias"].to_local().clone()
            trial.prepare()
            assert not torch.equal(before, state.tensors["layers.0.bias"].to_local())
            trial.run()
            names.update(path.name for path in tmp_path.iterdir())
            assert len(list(tmp_path.iterdir())) == 1
            trial.clean()
            assert not list(tmp_path.iterdir())
    assert names == {"raw-1.raw", "raw-2.raw", "DCP,-first-save-1", "DCP,-first-save-2"}


UNITS = {"memory": {"MiB"}, "async": {"s", "s lost"}, "overlap": {"s", "s lost"}}
DCP = {"DCP, 1 thread", "DCP, 2 threads"}
DCP_ASYNC = {f"DCP in a {mode}" for mode in modes(CPU)}
SAVED = {"raw", "torch.save", *DCP}
RAW_READS = {"raw", "raw, 3 threads"}
RESTORED = {*RAW_READS, "torch.save", "DCP"}
PARTS = {
    "save": {"save": SAVED},
    "restore": {"restore": RESTORED},
    "cold": {"cold": RESTORED},
    "reshard": {"reshard": {*RAW_READS, "DCP"}},
    "memory": {
        "memory of save": SAVED - {"raw"},
        "memory of restore": RESTORED - RAW_READS,
        "memory of reshard": {"DCP"},
        "memory of async": DCP_ASYNC,
    },
    "overhead": {"overhead of 20 variables": {*SAVED, *(f"{name}, first save" for name in SAVED - {"raw"})}},
    **{
        case: {
            f"{case}: stall": {"raw memcpy", *DCP_ASYNC, *(f"{name}, first save" for name in DCP_ASYNC)},
            f"{case}: until durable": {"raw", *DCP_ASYNC, *(f"{name}, save" for name in DCP)},
            f"{case}: training lost": DCP_ASYNC,
        }
        for case in ("async", "overlap")
    },
    "replicated": {"replicated: save": SAVED, "replicated: restore": RESTORED},
    "columns": {"columns: save": SAVED, "columns: restore": RESTORED},
    "small": {"small, 25 variables: save": SAVED, "small, 25 variables: restore": RESTORED},
    "repeat": {"repeat": {*SAVED, *(f"{name}, first save" for name in SAVED - {"raw"})}},
}
PARTS["overlap"]["overlap: until tensors may change"] = DCP_ASYNC


@pytest.mark.parametrize("case", list(CASES))
def test_each_case_measures_each_competitor(
    case: str, mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "threads_of_rank", lambda _: 3)
    setup = a_setup(nbytes=2**16, rounds=1, competitors=("raw", "dcp", "torch.save"))
    results = run_case(Bench(setup, mesh, tmp_path), case)
    found: dict[str, set[str]] = {samples.case: set() for samples in results}
    for samples in results:
        assert len(samples.values) == 1
        found[samples.case].add(samples.name)
    assert {part: names - {"raw O_DIRECT"} for part, names in found.items()} == PARTS[case]
    assert {samples.unit for samples in results} == UNITS.get(case, {"s"})
    assert not list(tmp_path.iterdir())


@needs_gpu
@pytest.mark.parametrize("case", ["save", "restore", "reshard", "async", "overlap", "replicated", "columns"])
@pytest.mark.usefixtures("mesh")
def test_states_on_gpus(case: str, tmp_path: Path) -> None:
    competitors = ("distckpt", "raw", "torch.save")
    setup = a_setup(nbytes=2**16, rounds=1, competitors=competitors, device="cuda")
    bench = Bench(setup, init_device_mesh("cuda", (1,)), tmp_path)
    assert bench.gpt(0).device.type == "cuda"
    assert {name for samples in run_case(bench, case) for name in samples.name.split(",")[:1]} >= {"distckpt"}


@pytest.mark.parametrize(("layout", "saved", "restored"), [("rows", 0, 1), ("columns", 1, 0)])
def test_the_layout_is_that_of_saves_and_a_reshard_goes_to_the_other(
    layout: str, saved: int, restored: int, mesh: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dims: list[tuple[str, int]] = []
    for name in ("save", "restore"):
        monkeypatch.setattr(Dcp, name, recording(getattr(Dcp, name), name, dims))
    run_case(Bench(a_setup(nbytes=2**16, layout=layout, competitors=("dcp",), rounds=1), mesh, tmp_path), "reshard")
    assert set(dims) == {("save", saved), ("restore", restored)}


def recording(method: Callable[[Dcp, Path], object], name: str, dims: list[tuple[str, int]]) -> object:
    def record(self: Dcp, path: Path) -> object:
        weight = self.state.tensors["wte.weight"]
        dims.extend((name, placement.dim) for placement in weight.placements if isinstance(placement, Shard))
        return method(self, path)

    return record


def background(name: str, state: State, *, overlap: bool) -> BackgroundCompetitor:
    if name == "torchsnapshot":
        pytest.importorskip(name)
        return importlib.import_module("distckpt.bench.torchsnapshot").TorchsnapshotAsync(state)  # type: ignore[no-any-return]
    return DcpAsync(state, name, overlap=overlap)


@pytest.mark.parametrize(("name", "overlap"), [*itertools.product(modes(CPU), [False, True]), ("torchsnapshot", False)])
def test_saves_in_the_background_have_the_values_of_the_moment(
    name: str, overlap: bool, mesh: DeviceMesh, tmp_path: Path
) -> None:
    require_values_of_the_moment(name, overlap, mesh, tmp_path)


@needs_gpu
@pytest.mark.parametrize(("name", "overlap"), [*itertools.product(modes(GPU), [False, True])])
@pytest.mark.usefixtures("mesh")
def test_saves_of_gpus_in_the_background_have_the_values_of_the_moment(
    name: str, overlap: bool, tmp_path: Path
) -> None:
    require_values_of_the_moment(name, overlap, init_device_mesh("cuda", (1,)), tmp_path)


def require_values_of_the_moment(name: str, overlap: bool, mesh: DeviceMesh, tmp_path: Path) -> None:
    saved, live = (build_state(gpt_shapes(MIB), mesh, dim=0) for _ in range(2))
    competitor = background(name, saved, overlap=overlap)
    reader = competitor_class("torchsnapshot" if name == "torchsnapshot" else "dcp")(live)
    for number in range(2):
        saved.fill()
        pending = competitor.start(tmp_path / str(number))
        pending.wait_staged()
        saved.scramble()
        path = pending.result()
        assert pending.is_done()
        check_restore(RestoreTrial(reader, path))


@pytest.mark.usefixtures("mesh")
def test_what_cannot_be_measured_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsnapshot", None)
    setup = a_setup(competitors=("distckpt", "raw", "dcp", "torchsnapshot"), cases=("save",))
    missing = find_missing(setup)
    assert list(missing) == ["torchsnapshot"]
    assert describe_missing(missing).startswith("not measured here: torchsnapshot (")
    assert describe_missing({}) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = find_missing(replace(setup, cases=("async",)))
    assert missing["DCP in a thread, pinned"] == "for tensors of GPUs only"


def test_plans_that_dcp_caches_are_those_of_one_competitor(mesh: DeviceMesh, tmp_path: Path) -> None:
    for number, count in enumerate((3, 5)):
        saved, live = (build_state(small_shapes(count), mesh, dim=0) for _ in range(2))
        competitor = Dcp(saved, threads=2)
        for again in range(2):
            saved.fill()
            path = competitor.save(tmp_path / f"{number}-{again}")
        check_restore(RestoreTrial(Dcp(live), path))


def test_a_cold_restore_begins_with_an_empty_page_cache(mesh: DeviceMesh, tmp_path: Path) -> None:
    state = build_state(gpt_shapes(MIB), mesh, dim=0)
    state.fill()
    raw = Raw(state)
    path = raw.save(tmp_path / "saved")
    trial = ColdRestoreTrial(raw, path)
    path.read_bytes()
    assert cached_pages(path) > 0
    trial.prepare()
    assert cached_pages(path) == 0
    check_restore(trial)


def cached_pages(path: Path) -> int:
    """Pages of a file that are in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        count = -(-len(mapped) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * count)()
        first = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages)


class Sleeper(BackgroundCompetitor):
    """Saves nothing; what it starts is done when it was asked a few times, each of which takes 50 ms."""

    def __init__(self, state: State, asked: int) -> None:
        super().__init__("sleeper", state)
        self.asked = asked

    def start(self, stem: Path) -> Sleeper:
        stem.touch()
        self.stem, self.left, self.waited = stem, self.asked, 0
        return self

    def wait_staged(self) -> None:
        self.waited += 1

    def is_done(self) -> bool:
        time.sleep(0.05)
        self.left -= 1
        return self.left <= 0

    def result(self) -> Path:
        return self.stem


def test_training_goes_on_until_the_save_has_ended_and_what_it_lost_is_measured(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    sleeper = Sleeper(build_state(small_shapes(3), mesh, dim=0), asked=6)
    samples = interleave([SlowdownTrial(sleeper, tmp_path)], 1, seconds_lost, {})
    assert sleeper.left == 0
    assert sleeper.waited == 6
    assert 0.25 < samples["sleeper"][0] < 2
    assert not list(tmp_path.iterdir())


def test_stalls_change_the_values_use_fresh_names_and_delete(mesh: DeviceMesh, tmp_path: Path) -> None:
    state = build_state(small_shapes(3), mesh, dim=0)
    build = partial(DcpAsync, mode="thread", overlap=False)
    trials = [StallTrial(build(state), tmp_path), FirstStallTrial(build, state, tmp_path)]
    trials.append(DurableTrial(build(state), tmp_path))
    names = set()
    for _ in range(2):
        for trial in trials:
            before = state.tensors["layers.0.bias"].to_local().clone()
            trial.prepare()
            assert not torch.equal(before, state.tensors["layers.0.bias"].to_local())
            trial.run()
            names.update(path.name for path in tmp_path.iterdir())
            trial.clean()
            assert not list(tmp_path.iterdir())
    assert {"DCP-in-a-thread-1", "DCP-in-a-thread-2"} <= names


def test_the_limit_of_a_copy_copies_everything(mesh: DeviceMesh) -> None:
    state = build_state(small_shapes(3), mesh, dim=0)
    trial = MemcpyTrial(state)
    for _ in range(2):
        trial.prepare()
    assert not any(map(torch.equal, trial.copies, state.shards))
    trial.run()
    assert all(map(torch.equal, trial.copies, state.shards))


@pytest.mark.usefixtures("mesh")
def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"expected 5242880064 MiB free.*Choose a smaller size"):
        make_directory(a_setup(nbytes=1000 * 2**40, competitors=("raw",) * 4), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert Path(make_directory(a_setup(), tmp_path / "new")).is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "tar"], "expected some of raw, dcp, torchsnapshot, torch.save, safetensors. Got 'tar'"),
        (["--cases", "sleep"], f"expected some of {', '.join(CASES)}. Got 'sleep'"),
        (["--layout", "diagonal"], "expected rows or columns. Got 'diagonal'"),
        (["--device", "tpu"], "expected cpu or cuda. Got 'tpu'"),
        (["--plot", "no/such/directory/file.png"], "no/such/directory/file.png: its directory does not exist"),
        (["--plot", "file.xls"], "expected a name that ends in .png, .svg, .pdf. Got file.xls"),
        (["--size", "big"], "expected a size such as 64MiB or 1GiB. Got 'big'"),
        (["--json", "no/such/directory/file.json"], "no/such/directory/file.json: its directory does not exist"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(build(("bench",)), ["bench", "--dir", str(tmp_path), *options])
    assert done.exit_code == 2
    words = " ".join(done.output.replace("│", " ").split())
    assert message in words


RESULTS = [
    Samples("save", "distckpt", "", "s", 10**9, (0.5, 0.6, 0.4)),
    Samples("save", "raw", "", "s", 10**9, (0.8, 0.9, 0.7)),
    Samples("save", "raw O_DIRECT", "", "s", 10**9, (0.4, 0.4, 0.4)),
    Samples("save", "DCP", "", "s", 10**9, (1.0, 9.0, 1.0)),
    Samples("overhead of 5 variables", "distckpt", "", "s", 5120, (0.004,)),
    Samples("overhead of 5 variables", "raw", "", "s", 5120, (0.001,)),
    Samples("memory of save", "distckpt", "", "MiB", 10**9, (8.0, 0.0, 0.0)),
    Samples("memory of save", "DCP", "", "MiB", 10**9, (2.0, 3.0, 4.0)),
    Samples("async: training lost", "distckpt", "", "s lost", 10**9, (-0.01,)),
    Samples("async: training lost", "DCP", "", "s lost", 10**9, (0.3,)),
]


def test_ratios_are_between_medians_and_to_the_best_raw() -> None:
    own, raw, direct, dcp, small, _, memory, _, lost, lost_by_dcp = make_rows(RESULTS)
    assert (own.median, own.minimum, own.maximum) == (0.5, 0.4, 0.6)
    assert (own.of_raw, raw.of_raw, direct.of_raw) == (pytest.approx(0.8), pytest.approx(0.5), 1.0)
    assert (own.against_distckpt, dcp.against_distckpt) == (1.0, 2.0)
    assert own.gigabytes_per_second == pytest.approx(2.0)
    assert own.beyond_raw is None
    assert small.beyond_raw == pytest.approx(0.003)
    assert (memory.of_raw, memory.gigabytes_per_second, memory.against_distckpt) == (None, None, None)
    assert (lost.median, lost.gigabytes_per_second, lost_by_dcp.against_distckpt) == (-0.01, None, None)


def test_the_best_dcp_is_its_fastest_setting_in_trials_of_the_same_kind() -> None:
    values = {
        ("distckpt", ""): 0.2,
        ("distckpt, first save", "first save"): 0.5,
        ("DCP in a thread", ""): 0.6,
        ("DCP in a process", ""): 0.4,
        ("DCP in a thread, first save", "first save"): 1.5,
        ("DCP in a process, first save", "first save"): 2.0,
        ("torchsnapshot", ""): 0.1,
    }
    rows = make_rows([Samples("stall", name, kind, "s", 1, (value,)) for (name, kind), value in values.items()])
    assert [row.best_dcp_against for row in rows] == pytest.approx([2.0, 3.0, 0.4 / 0.6, 1.0, 1.0, 0.75, 4.0])
    assert make_rows(RESULTS[:3])[0].best_dcp_against is None
    assert make_rows(RESULTS)[-2].best_dcp_against is None  # nothing was lost


def test_the_tables_show_what_means_something() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in make_tables(make_rows(RESULTS)):
        console.print(table)
    save, overhead, memory, lost = console.export_text().split(" rounds")[1:]
    assert "of raw limit" in save
    assert "best DCP / this" in save
    assert "beyond raw" not in save
    assert "beyond raw" in overhead
    assert "GB/s" not in memory
    assert "median MiB" in memory
    assert "median s lost" in lost
    assert "-0.0100" in lost
    assert "GB/s" not in lost


def test_the_plot_has_a_bar_for_each_row_and_a_panel_for_each_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("distckpt.bench.plot")
    plot.plot_rows(make_rows(RESULTS), tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    for samples in RESULTS:
        assert f"<!-- {samples.name} -->" in text
        assert f"<!-- {samples.case} -->" in text
    plot.plot_rows(make_rows(RESULTS[:1]), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_is_plain_json(tmp_path: Path) -> None:
    document = json.loads(json.dumps(make_document(make_rows(RESULTS), a_setup(), 2, tmp_path, {"tar": "too old"})))
    assert document["setup"]["ranks"] == 2
    assert document["missing"] == {"tar": "too old"}
    assert document["environment"]["file_system"]
    assert document["environment"]["packages"]["torch"]
    assert document["results"][0]["values"] == [0.5, 0.6, 0.4]
