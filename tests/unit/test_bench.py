"""`distckpt bench` without MPI: sizes, shapes, values, rounds, ratios, and round trips of all rivals on one rank."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typer.testing import CliRunner

from distckpt.bench.cases import Bench, Samples, Setup, run_case
from distckpt.bench.competitor import Competitor
from distckpt.bench.dcp import Dcp
from distckpt.bench.raw import Raw, supports_direct
from distckpt.bench.report import make_document, make_rows, make_tables
from distckpt.bench.runner import agreed, extra_mib, interleave, seconds
from distckpt.bench.session import make_directory
from distckpt.bench.state import build_state, gpt_shapes, small_shapes
from distckpt.bench.trials import FirstSaveTrial, RestoreTrial, SaveTrial, check_restore
from distckpt.cli.bench import parse_choices, parse_number, parse_size
from distckpt.cli.main import build
from distckpt.errors import CollectiveError

MIB = 2**20


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def a_setup(**changes: object) -> Setup:
    values = {
        "nbytes": MIB,
        "hidden": None,
        "variables": (20,),
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
    values = torch.stack(list(state.shards()))
    assert len(values.unique()) >= 25
    assert bool(((values >= 0) & (values < 2)).all())
    state.tensors["b"].to_local()[2, 3] += 0.5
    assert state.wrong() == ["b"]
    state.scramble()
    assert state.wrong() == ["a", "b"]


def competitor_class(name: str) -> type[Competitor]:
    if name == "dcp":
        return Dcp
    return importlib.import_module("distckpt.bench.safetensors").Safetensors  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["raw", "raw O_DIRECT", "dcp", "safetensors"])
def test_competitors_restore_what_they_saved(name: str, mesh: DeviceMesh, tmp_path: Path) -> None:
    if name == "safetensors":
        pytest.importorskip("safetensors")
    if name == "raw O_DIRECT" and not supports_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    saved, live = (build_state(gpt_shapes(MIB), mesh, dim=0) for _ in range(2))
    saved.fill()
    if name.startswith("raw"):
        path = Raw(saved, direct=name != "raw").save(tmp_path / "saved")
        trial = RestoreTrial(Raw(live, direct=False), path)
    else:
        path = competitor_class(name)(saved).save(tmp_path / "saved")
        trial = RestoreTrial(competitor_class(name)(live), path)
    assert live.wrong() == list(live.tensors)
    check_restore(trial)
    assert live.wrong() == []


def test_a_wrong_byte_is_found(mesh: DeviceMesh, tmp_path: Path) -> None:
    saved, live = (build_state(gpt_shapes(MIB), mesh, dim=0) for _ in range(2))
    saved.fill()
    path = Raw(saved, direct=False).save(tmp_path / "saved")
    content = bytearray(path.read_bytes())
    content[100_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 variables .* restored wrongly"):
        check_restore(RestoreTrial(Raw(live, direct=False), path))


class Recorder:
    """A trial that writes down what is done with it."""

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
    samples = interleave([Recorder("a", log), Recorder("b", log)], 3, seconds)
    assert [line for line in log if line.startswith("run")] == [f"run {name}" for name in "abbaab"]
    assert log[:4] == ["prepare a", "run a", "clean a", "prepare b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in samples.values() for value in values)


class Hungry(Recorder):
    """A trial that needs 64 MiB for a moment."""

    def run(self) -> None:
        torch.ones(16 * MIB)


@pytest.mark.usefixtures("mesh")
def test_the_peak_of_a_run_is_seen_again_and_again() -> None:
    samples = interleave([Hungry("hungry", []), Recorder("modest", [])], 2, extra_mib)
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
    trials = [SaveTrial(Raw(state, direct=False), tmp_path), FirstSaveTrial(Dcp, state, tmp_path)]
    assert trials[1].name == "DCP, first save"
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


@pytest.mark.parametrize("case", ["save", "restore", "reshard", "memory", "overhead"])
def test_each_case_measures_each_competitor(case: str, mesh: DeviceMesh, tmp_path: Path) -> None:
    results = run_case(Bench(a_setup(), mesh, tmp_path), case)
    assert results
    assert all(len(samples.values) == 2 for samples in results)
    assert any(samples.name == "DCP" for samples in results)
    assert any(samples.name == "raw" for samples in results) == (case in {"save", "restore", "overhead"})
    assert {samples.unit for samples in results} == {"MiB" if case == "memory" else "s"}
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("mesh")
def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"expected 5242880064 MiB free.*Choose a smaller size"):
        make_directory(a_setup(nbytes=1000 * 2**40, competitors=("raw",) * 4), tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert Path(make_directory(a_setup(), tmp_path / "new")).is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "tar"], "expected some of raw, dcp, safetensors. Got 'tar'"),
        (["--cases", "sleep"], "expected some of save, restore, reshard, memory, overhead. Got 'sleep'"),
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
    Samples("save", "distckpt", "s", 10**9, (0.5, 0.6, 0.4)),
    Samples("save", "raw", "s", 10**9, (0.8, 0.9, 0.7)),
    Samples("save", "raw O_DIRECT", "s", 10**9, (0.4, 0.4, 0.4)),
    Samples("save", "DCP", "s", 10**9, (1.0, 9.0, 1.0)),
    Samples("overhead of 5 variables", "distckpt", "s", 5120, (0.004,)),
    Samples("overhead of 5 variables", "raw", "s", 5120, (0.001,)),
    Samples("memory of save", "distckpt", "MiB", 10**9, (8.0, 0.0, 0.0)),
    Samples("memory of save", "DCP", "MiB", 10**9, (2.0, 3.0, 4.0)),
]


def test_ratios_are_between_medians_and_to_the_best_raw() -> None:
    own, raw, direct, dcp, small, _, memory, _ = make_rows(RESULTS)
    assert (own.median, own.minimum, own.maximum) == (0.5, 0.4, 0.6)
    assert (own.of_raw, raw.of_raw, direct.of_raw) == (pytest.approx(0.8), pytest.approx(0.5), 1.0)
    assert (own.against_distckpt, dcp.against_distckpt) == (1.0, 2.0)
    assert own.gigabytes_per_second == pytest.approx(2.0)
    assert own.beyond_raw is None
    assert small.beyond_raw == pytest.approx(0.003)
    assert (memory.of_raw, memory.gigabytes_per_second, memory.against_distckpt) == (None, None, None)


def test_the_tables_show_what_means_something() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in make_tables(make_rows(RESULTS)):
        console.print(table)
    save, overhead, memory = console.export_text().split(" rounds")[1:]
    assert "of raw limit" in save
    assert "beyond raw" not in save
    assert "beyond raw" in overhead
    assert "GB/s" not in memory
    assert "median MiB" in memory


def test_the_document_is_plain_json(tmp_path: Path) -> None:
    document = json.loads(json.dumps(make_document(make_rows(RESULTS), a_setup(), 2, tmp_path)))
    assert document["setup"]["ranks"] == 2
    assert document["environment"]["file_system"]
    assert document["environment"]["packages"]["torch"]
    assert document["results"][0]["values"] == [0.5, 0.6, 0.4]
