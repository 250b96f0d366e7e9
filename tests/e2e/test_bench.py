"""`distckpt bench` as started by mpirun, at sizes where times mean nothing: none is asserted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

RIVALS = ["raw", "dcp", "torchsnapshot", "torch.save", "safetensors"]
BENCH = ["-m", "distckpt", "bench", "--rounds", "1"]


def test_all_cases_are_measured_and_written(mpirun: Any, tmp_path: Path) -> None:
    cases = ["save", "restore", "reshard", "memory", "overhead"]
    files, report = tmp_path / "not" / "yet" / "there", tmp_path / "report.json"
    options = ["--size", "1MiB", "--dir", files, "--variables", "30", "--json", report]
    done = mpirun(2, [*BENCH, *options, "--against", ",".join(RIVALS), "--cases", ",".join(cases)], timeout=300)
    assert done.returncode == 0, done.stdout
    document = json.loads(report.read_text())
    assert document["setup"] | {"ranks": 2, "nbytes": 2**20, "cases": cases} == document["setup"]
    assert {"cpu", "cores", "file_system", "packages"} <= document["environment"].keys()
    measured = {(row["case"], row["name"]) for row in document["results"]}
    expected = {("save", "raw"), ("save", "DCP, 1 thread"), ("save", "DCP, 2 threads"), ("save", "torch.save")}
    expected |= {("save", "distckpt without checksums"), ("restore", "distckpt"), ("restore", "distckpt unverified")}
    expected |= {("restore", "DCP"), ("reshard", "distckpt"), ("reshard", "DCP"), ("memory of save", "distckpt")}
    expected |= {("memory of async", "distckpt"), ("memory of async", "DCP in a process")}
    expected |= {("save", rival) for rival in RIVALS[2:] if rival not in document["missing"]}
    expected |= {("overhead of 30 variables", "distckpt"), ("overhead of 30 variables", "distckpt, first save")}
    assert expected <= measured
    own = next(row for row in document["results"] if (row["case"], row["name"]) == ("save", "distckpt"))
    assert own["values"] == [own["median"]]
    assert own["of_raw"] > 0
    assert own["against_distckpt"] == 1
    assert own["best_dcp_against"] > 0
    missing = [line for line in done.stdout.splitlines() if line.startswith("not measured here: ")]
    assert len(missing) == bool(document["missing"])
    installed = {rival for rival in ("torchsnapshot", "safetensors") if importlib.util.find_spec(rival)}
    assert not installed & document["missing"].keys()
    assert len([line for line in done.stdout.splitlines() if line.startswith("restore: 1.00 MiB")]) == 1
    assert not list(files.iterdir())


def test_saves_in_the_background_and_other_layouts_are_measured_and_drawn(mpirun: Any, tmp_path: Path) -> None:
    cases = ["overlap", "replicated", "columns"]
    report, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ["--size", "64KiB", "--dir", tmp_path / "files", "--json", report]
    options += ["--plot", picture] if importlib.util.find_spec("matplotlib") else []
    done = mpirun(2, [*BENCH, *options, "--against", "raw,dcp", "--cases", ",".join(cases)], timeout=300)
    assert done.returncode == 0, done.stdout
    rows = json.loads(report.read_text())["results"]
    measured = {(row["case"], row["name"]) for row in rows}
    parts = [f"overlap: {part}" for part in ("stall", "until tensors may change", "until durable", "training lost")]
    parts += [f"{case}: {part}" for case in ("replicated", "columns") for part in ("save", "restore")]
    assert {(part, "distckpt") for part in parts} <= measured
    names = {"overlap": ("DCP in a thread", "DCP in a process"), "save": ("DCP, 1 thread",), "restore": ("DCP",)}
    for words, dcp in names.items():
        assert {(part, name) for part in parts if words in part for name in dcp} <= measured
    assert {("columns: save", "distckpt, rows"), ("columns: restore", "distckpt, rows")} <= measured
    assert {("overlap: stall", "raw memcpy"), ("overlap: stall", "distckpt, first save")} <= measured
    sizes = {row["case"]: row["nbytes"] for row in rows}
    assert sizes["replicated: save"] == sizes["columns: save"]
    assert picture.exists() == ("--plot" in options)
    assert not list((tmp_path / "files").iterdir())


def test_a_directory_that_cannot_be_made_is_one_error_on_all_ranks(mpirun: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = mpirun(2, [*BENCH, "--size", "1MiB", "--dir", tmp_path / "file"])
    assert done.returncode == 1
    assert "step 'make the directory' failed on 1 rank(s)" in done.stdout
    assert "FileExistsError" in done.stdout
