"""`CheckpointReader`: values by key and by slice, in one process."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointNotFoundError,
    CheckpointReader,
    CheckpointWarning,
    CorruptCheckpointError,
    PerRank,
    RestoreOptions,
    SaveOptions,
    list_variables,
    load_checkpoint,
    load_variable,
)
from distckpt.graph.python_value import TensorRef, encode
from distckpt.layout import slicing
from distckpt.layout.box import Shape
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.records import Attribute, Node, ObjectGraph, Shard, Variable
from distckpt.storage import creation, hdf5
from distckpt.storage import manifest as manifests
from distckpt.storage.writing import write_posix
from tests.checkpoint_files import make_manifest, placed, same_bits, save, specs_of, write_jobs
from tests.unit.test_plan import grid
from tests.unit.test_slicing import indices

ROOT = Path(__file__).resolve().parents[2]


def save_sharded(path: Path, tensor: torch.Tensor, mesh: tuple[int, ...], *, numpy: bool = False) -> None:
    """A file of one variable "x", divided over a mesh of ranks."""
    boxes = [box for box in grid(tuple(tensor.shape), mesh) if box.numel]
    shards = [Shard(rank, *box) for rank, box in enumerate(boxes)]
    (spec,) = specs_of({"x": tensor})
    variable = Variable("x", spec.dtype, spec.shape, -1, shards, numpy)
    manifest = make_manifest([variable], world_size=math.prod(mesh))
    n_checksums = index_checksums([variable]).total
    skeleton = creation.create_file(str(path), [spec], n_checksums, manifests.max_nbytes(manifest))
    fd = os.open(path, os.O_RDWR)
    write_posix(fd, write_jobs({"x": tensor}, [variable], skeleton), checksums=True).write(
        fd, skeleton.checksums_offset
    )
    creation.write_manifest(fd, skeleton, manifests.encode(placed(manifest, skeleton)))
    os.close(fd)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


class CountedReads:
    """What is asked of the file system, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self)
        self.__name__ = "preadv"

    def __call__(self, fd: int, buffers: Any, offset: int) -> int:
        self.nbytes += sum(len(buffer) for buffer in buffers)
        return self._preadv(fd, buffers, offset)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> CountedReads:
    return CountedReads(monkeypatch)


# ---- slices ----------------------------------------------------------------------------------------------------------


@st.composite
def slices_of_shards(draw: st.DrawFn) -> tuple[Shape, tuple[int, ...], Any]:
    """A shape, the mesh that it is divided over, and an index: sharded along rows, columns, both, or three axes."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    mesh = tuple(draw(st.integers(1, 4)) for _ in shape)
    return shape, mesh, draw(indices(shape))


@pytest.mark.parametrize("gap_nbytes", [1, 4096], ids=["row by row", "with gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_slices_are_those_of_numpy(
    gap_nbytes: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "_GAP_NBYTES", gap_nbytes)
    monkeypatch.setattr(slicing, "_AT_ONCE_NBYTES", 100)

    @given(slices_of_shards())
    @settings(max_examples=60, deadline=None)
    def check(case: tuple[Shape, tuple[int, ...], Any]) -> None:
        shape, mesh, index = case
        saved = numbers(*shape).to(dtype)
        path = tmp_path / "x.h5"
        path.unlink(missing_ok=True)
        save_sharded(path, saved, mesh)
        with load_checkpoint(path) as reader:
            got = reader["x"][index]
        expected = saved.float().numpy()[index]
        assert got.dtype == dtype
        assert got.is_contiguous()
        np.testing.assert_array_equal(got.float().numpy(), expected)
        assert tuple(got.shape) == expected.shape

    check()


@pytest.mark.parametrize("mesh", [(3, 1), (1, 3), (2, 2)], ids=["rows", "columns", "both"])
@pytest.mark.parametrize(
    "index",
    [
        slice(10, 20),
        7,
        -1,
        (slice(2, 5), slice(100, 228)),
        (..., 3),
        (slice(None, None, 9), slice(0, 1024)),
        slice(5, 5),
    ],
)
def test_only_the_bytes_of_a_slice_are_read(
    mesh: tuple[int, ...], index: Any, tmp_path: Path, reads: CountedReads
) -> None:
    saved = numbers(40, 1100)
    save_sharded(tmp_path / "x.h5", saved, mesh)
    with load_checkpoint(tmp_path / "x") as reader:
        reads.nbytes = 0
        got = reader["x"][index]
    assert reads.nbytes == got.nbytes
    assert torch.equal(got, saved[index])


def test_close_elements_are_read_with_what_is_between(tmp_path: Path, reads: CountedReads) -> None:
    save_sharded(tmp_path / "x.h5", numbers(1000), (2,))
    with load_checkpoint(tmp_path / "x") as reader:
        reads.nbytes = 0
        assert torch.equal(reader["x"][100:200:3], torch.arange(100.0, 200, 3))
    assert reads.nbytes == 100 * 4


def test_indices_that_no_slice_is_made_of_are_refused(tmp_path: Path) -> None:
    save_sharded(tmp_path / "x.h5", numbers(4, 5), (2, 1))
    with load_checkpoint(tmp_path / "x") as reader:
        with pytest.raises(TypeError, match="Got None"):
            reader["x"][None]
        with pytest.raises(TypeError, match="Got Tensor"):
            reader["x"][torch.tensor([1, 2])]
        with pytest.raises(IndexError, match="out of bounds"):
            reader["x"][4]
        with pytest.raises(ValueError, match="step > 0"):
            reader["x"][::-1]


def all_dtypes() -> dict[str, torch.Tensor]:
    names = (
        "float64 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu int64 int8 "
        "uint64 uint32 uint16 bool complex128 complex64 complex32 float4_e2m1fn_x2"
    )
    data = torch.arange(512, dtype=torch.int16).view(torch.uint8).remainder(2)
    return {name: data.view(getattr(torch, name)).view(8, -1) for name in names.split()}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("gap_nbytes", [1, 4096])
def test_slices_of_every_dtype(gap_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "_GAP_NBYTES", gap_nbytes)
    tensors = all_dtypes()
    save(tmp_path / "file.h5", tensors, n_ranks=3)
    with load_checkpoint(tmp_path / "file") as reader:
        for name, tensor in tensors.items():
            assert reader[name].dtype == tensor.dtype
            assert same_bits(reader[name].read(), tensor)
            assert same_bits(reader[name][1::3, 2:], torch.stack([tensor[1, 2:], tensor[4, 2:], tensor[7, 2:]]))


def test_a_handle_describes_the_variable(tmp_path: Path) -> None:
    save_sharded(tmp_path / "x.h5", numbers(4, 6), (2, 2))
    with load_checkpoint(tmp_path / "x") as reader:
        handle = reader["x"]
    assert (handle.key, handle.shape, handle.dtype, handle.nbytes) == ("x", (4, 6), torch.float32, 96)
    assert handle.shards == tuple(
        Shard(rank, offset, (2, 3)) for rank, offset in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)])
    )
    assert reader.world_size == 4
    assert repr(handle) == "<x: shape (4, 6), torch.float32, 4 shard(s)>"


def test_arrays_come_back_as_arrays(tmp_path: Path) -> None:
    save_sharded(tmp_path / "x.h5", numbers(4, 6), (2, 1), numpy=True)
    with load_checkpoint(tmp_path / "x") as reader:
        assert reader["x"].dtype == torch.float32
        assert isinstance(reader["x"].read(), np.ndarray)
        assert isinstance(reader["x"][0, 0], np.ndarray)
        np.testing.assert_array_equal(reader["x"][1:3, ::2], numbers(4, 6).numpy()[1:3, ::2])


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_whole_pieces_are_verified(tmp_path: Path) -> None:
    save_sharded(tmp_path / "x.h5", numbers(4, 6), (2, 1))
    offset = hdf5.open_checkpoint(str(tmp_path / "x.h5")).offsets[0]
    with (tmp_path / "x.h5").open("r+b") as file:
        file.seek(offset + 30)  # in the second row, so in the first shard
        file.write(b"\xff")
    with load_checkpoint(tmp_path / "x") as reader:
        for index in (..., slice(0, 2), slice(0, 3)):
            with pytest.raises(CorruptCheckpointError, match=r"x\.h5: x: the 48 bytes .* are damaged"):
                reader["x"][index]
        assert torch.equal(reader["x"][2:], numbers(4, 6)[2:])
        assert torch.equal(reader["x"][0], numbers(4, 6)[0])


# ---- a real checkpoint -----------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = torch.nn.Embedding(5, 3)
        self.output = torch.nn.Linear(3, 5)
        self.output.weight = self.inputs.weight


class Metric:
    """A stateful object with tensors, arrays and numbers, nested."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"sum": torch.ones(2), "seen": [np.arange(3), (1, {"a/b": torch.zeros(())})]}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


PYTHON_VALUES: dict[str, Any] = {
    "step": 100,
    "big": 1 << 200,
    "name": "run a",
    "rate": 0.1,
    "flag": True,
    "nothing": None,
    "raw": b"\x00\xff",
    "pair": (1, 2.5),
    "scalar": np.float32(2),
}


def training() -> dict[str, Any]:
    """A model with tied weights, its optimizer after a step, and other things."""
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.output(model.inputs(torch.tensor([1]))).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "metric": Metric(),
        "array": np.arange(6.0).reshape(2, 3),
        "mine": PerRank(torch.tensor([3.0])),
        **PYTHON_VALUES,
    }


@pytest.fixture
def live() -> dict[str, Any]:
    return training()


@pytest.fixture
def saved(live: dict[str, Any], tmp_path: Path) -> str:
    return Checkpoint(**live).save(tmp_path / "ckpt", options=SaveOptions(metadata={"note": "first", "n": (1, 2)}))


@pytest.fixture
def reader(saved: str) -> Iterator[CheckpointReader]:
    with load_checkpoint(saved) as opened:
        yield opened


def test_python_values_come_back_as_they_were(reader: CheckpointReader) -> None:
    for name, value in PYTHON_VALUES.items():
        assert reader[name] == value
        assert type(reader[name]) is type(value)


def test_tensors_and_arrays_come_back(reader: CheckpointReader, live: dict[str, Any]) -> None:
    assert torch.equal(reader["model/inputs/weight"].read(), live["model"].inputs.weight)
    assert torch.equal(reader["model/output/bias"][1:3], live["model"].output.bias[1:3])
    moment = reader["optimizer/.slots/model/inputs/weight/exp_avg"].read()
    assert torch.equal(moment, live["optimizer"].state[live["model"].inputs.weight]["exp_avg"])
    np.testing.assert_array_equal(reader["array"][...], live["array"])
    assert torch.equal(reader["mine/.rank/0"].read(), torch.tensor([3.0]))
    assert reader["optimizer/param_groups/0/lr"] == 0.001


def test_a_state_has_its_tensors_inside(reader: CheckpointReader) -> None:
    state = reader["metric/.state"]
    assert torch.equal(state["sum"], torch.ones(2))
    array, (number, nested) = state["seen"]
    np.testing.assert_array_equal(array, np.arange(3))
    assert isinstance(array, np.ndarray)
    assert number == 1
    assert torch.equal(nested["a/b"], torch.zeros(()))
    assert torch.equal(reader["metric/sum"].read(), torch.ones(2))


def test_a_python_value_reads_no_tensor_that_it_does_not_hold(reader: CheckpointReader, reads: CountedReads) -> None:
    assert reader["step"] == 100
    assert reads.nbytes == 0


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model/output/weight", "model/inputs/weight"),
        ("/model/output/weight", "model/inputs/weight"),
        ("/model/inputs/weight", "model/inputs/weight"),
        ("optimizer/.slots/model/output/weight/exp_avg", "optimizer/.slots/model/inputs/weight/exp_avg"),
        ("mine/.rank/0", "mine/.rank/0"),
    ],
)
def test_every_path_of_a_shared_object_leads_to_its_value(path: str, key: str, reader: CheckpointReader) -> None:
    assert key in list(reader)
    assert path in reader
    assert reader[path].key == key


def test_keys(reader: CheckpointReader, keys_of: Callable[[str], set[str]]) -> None:
    keys = reader.keys()
    assert list(reader) == keys
    assert len(reader) == len(keys) == len(set(keys))
    assert set(keys) == keys_of(reader.path)
    assert "model/output/weight" not in keys
    assert dict(reader).keys() == set(keys)  # type: ignore[call-overload]
    assert "model" not in reader
    assert 3 not in reader


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model/inputs/wieght", "model/inputs/weight"),
        ("inputs/weight", "model/inputs/weight"),
        ("model", "model/inputs/weight"),
        ("mine/.rank/1", "mine/.rank/0"),
        ("/stepp", "step"),
    ],
)
def test_an_unknown_key_names_similar_ones(key: str, near: str, reader: CheckpointReader) -> None:
    with pytest.raises(KeyError, match=f"has no value '{key}'. Similar: .*{near}"):
        reader[key]


@pytest.mark.parametrize("key", [5, None, b"step", ("step",)])
def test_what_is_no_text_is_no_key(key: Any, reader: CheckpointReader) -> None:
    assert key not in reader
    with pytest.raises(KeyError, match="has no value"):
        reader[key]


@pytest.mark.parametrize("key", ["", "/", "zzzzzz", "mine/.rank", "optimizer/.slots", "model/inputs/weight/0"])
def test_an_unlike_key_has_no_similar_ones_but_an_error(key: str, reader: CheckpointReader) -> None:
    assert key not in reader
    with pytest.raises(KeyError, match="has no value"):
        reader[key]


def test_what_else_the_manifest_says(reader: CheckpointReader, saved: str) -> None:
    assert reader.path == saved
    assert reader.metadata == {"note": "first", "n": (1, 2)}
    assert reader.save_counter == 1
    assert reader["save_counter"].read() == 1
    assert reader.world_size == 1
    names = {child.local_name for child in reader.object_graph.nodes[0].children}
    assert names == {"array", "metric", "mine", "model", "optimizer"}
    assert repr(reader) == f"<CheckpointReader of {saved}: 14 tensors, 21 python values>"


def test_a_written_file_has_neither_counter_nor_metadata(tmp_path: Path) -> None:
    with load_checkpoint(Checkpoint(step=1).write(tmp_path / "m")) as reader:
        assert reader.save_counter is None
        assert reader.metadata is None
        assert reader.keys() == ["step"]


# ---- opening and closing ---------------------------------------------------------------------------------------------


def test_a_directory_means_its_latest_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(step=1)
    checkpoint.save(tmp_path / "ckpt")
    checkpoint.step = 2
    newest = checkpoint.save(tmp_path / "ckpt")
    with load_checkpoint(tmp_path) as reader:
        assert reader.path == newest
        assert reader["step"] == 2
    Path(newest).write_bytes(b"damaged")
    with pytest.warns(CheckpointWarning, match="passed over"), load_checkpoint(str(tmp_path)) as reader:
        assert reader["step"] == 1


def test_there_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "ckpt-1")
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(CorruptCheckpointError, match=r"a\.h5"):
        load_checkpoint(tmp_path / "a")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_releases_the_descriptor(saved: str) -> None:
    load_variable(saved, "array")  # HDF5 opens files of its own the first time
    before = open_descriptors()
    with load_checkpoint(saved) as reader:
        handle = reader["array"]
        assert open_descriptors() == before + 1
    assert open_descriptors() == before
    reader.close()
    assert reader["step"] == 100
    assert reader.metadata["note"] == "first"
    for read in (handle.read, lambda: handle[0], lambda: reader["metric/.state"]):
        with pytest.raises(ValueError, match="closed"):
            read()


def test_a_reader_that_is_dropped_closes_its_file(saved: str) -> None:
    load_variable(saved, "array")
    before = open_descriptors()
    load_checkpoint(saved)
    assert open_descriptors() == before


def test_a_damaged_file_leaves_no_descriptor_open(saved: str) -> None:
    load_variable(saved, "array")
    before = open_descriptors()
    os.truncate(saved, 1000)
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(saved)
    assert open_descriptors() == before


def test_a_file_that_was_deleted_stays_readable(reader: CheckpointReader, live: dict[str, Any]) -> None:
    Path(reader.path).unlink()
    assert torch.equal(reader["model/inputs/weight"][...], live["model"].inputs.weight)
    assert torch.equal(reader["metric/.state"]["sum"], torch.ones(2))


def test_a_file_that_was_replaced_stays_what_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(x=torch.zeros(100))
    with load_checkpoint(checkpoint.write(tmp_path / "m")) as reader:
        checkpoint.x.fill_(1)
        checkpoint.write(tmp_path / "m")
        assert torch.equal(reader["x"].read(), torch.zeros(100))
    assert torch.equal(load_variable(tmp_path / "m", "x"), torch.ones(100))


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifest and data must be of one file."""
    Checkpoint(y=torch.zeros(3), x=torch.ones(100)).write(tmp_path / "new")
    path = Checkpoint(x=torch.zeros(100)).write(tmp_path / "m")
    open_checkpoint = hdf5.open_checkpoint

    def replace_first(path: str) -> hdf5.OpenedCheckpoint:
        if (tmp_path / "new.h5").exists():
            (tmp_path / "new.h5").replace(path)
        return open_checkpoint(path)

    monkeypatch.setattr(distckpt.source, "open_checkpoint", replace_first)
    with load_checkpoint(path) as reader:
        assert torch.equal(reader["x"].read(), torch.ones(100))
        assert "y" in reader


def test_a_compressed_file_is_read_as_long_as_it_is_there(tmp_path: Path) -> None:
    saved = numbers(100, 100)
    save_sharded(tmp_path / "x.h5", saved, (2, 1))
    if shutil.which("h5repack") is None:
        pytest.skip("no h5repack")
    subprocess.run(["h5repack", "-f", "GZIP=1", tmp_path / "x.h5", tmp_path / "y.h5"], check=True, timeout=60)
    with load_checkpoint(tmp_path / "y") as reader:
        assert torch.equal(reader["x"][7:90:2], saved[7:90:2])
        assert torch.equal(reader["x"].read(), saved)
        (tmp_path / "x.h5").replace(tmp_path / "y.h5")
        with pytest.raises(CheckpointNotFoundError, match=r"y\.h5: the file was deleted or replaced"):
            reader["x"].read()


def test_a_file_that_hdf5_cannot_open_again_is_named_once(tmp_path: Path) -> None:
    """Chunks are read through HDF5, which opens the file anew."""
    file = Checkpoint(x=numbers(8)).write(tmp_path / "x")
    with h5py.File(file, "a") as opened:
        data = opened["x"][...]
        del opened["x"]
        opened.create_dataset("x", data=data, chunks=(4,))
    with load_checkpoint(file) as reader:
        with Path(file).open("r+b") as damaged:
            damaged.write(bytes(8))  # the signature
        with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(file)}: HDF5 cannot open the file") as caught:
            reader["x"].read()
    assert str(caught.value).count(f"{file}: ") == 1


# ---- functions -------------------------------------------------------------------------------------------------------


def test_list_variables_is_sorted(saved: str, tmp_path: Path) -> None:
    listed = list_variables(saved)
    assert listed == sorted(listed)
    assert ("model/inputs/weight", (5, 3)) in listed
    assert ("save_counter", ()) in listed
    assert "step" not in dict(listed)
    assert list_variables(tmp_path) == listed


def test_load_variable(saved: str, live: dict[str, Any], tmp_path: Path) -> None:
    assert torch.equal(load_variable(tmp_path, "/model/output/weight"), live["model"].inputs.weight)
    np.testing.assert_array_equal(load_variable(Path(saved), "array"), live["array"])
    assert load_variable(saved, "step") == 100
    with pytest.raises(KeyError, match="Similar: step"):
        load_variable(saved, "stp")


# ---- live objects ----------------------------------------------------------------------------------------------------


def all_but_counter(reader: CheckpointReader) -> set[str]:
    return set(reader.keys()) - {"save_counter"}


def test_a_twin_matches_in_full(reader: CheckpointReader) -> None:
    twin = training()
    twin["model"].output.bias.data.fill_(7)
    for live in (twin, Checkpoint(**twin)):
        match, diff = reader.match(live), reader.diff(live)
        assert match == {key: key for key in all_but_counter(reader)}
        assert diff == distckpt.dry_run.CheckpointDiff((), (), (), ())
    assert (twin["model"].output.bias == 7).all(), "it was restored"


def test_a_fresh_optimizer_matches_by_its_slots(reader: CheckpointReader) -> None:
    twin = training() | {"optimizer": None}
    twin["optimizer"] = torch.optim.Adam(twin["model"].parameters())
    assert reader.match(twin) == {key: key for key in all_but_counter(reader)}
    assert not twin["optimizer"].state


def test_a_match_says_where_a_value_goes(reader: CheckpointReader) -> None:
    """The live object has the tied weight under the path that is an alias in the file."""
    match = reader.match({"model": {"output": torch.nn.Linear(3, 5)}})
    assert match == {
        "model/inputs/weight": "model/output/weight",
        "model/output/bias": "model/output/bias",
    }


def test_differences_are_those_of_a_restore(reader: CheckpointReader, saved: str) -> None:
    twin = {
        "model": torch.nn.ModuleDict({"inputs": torch.nn.Embedding(6, 3), "extra": torch.nn.Linear(1, 1)}),
        "step": 0,
    }
    diff = reader.diff(twin)
    with pytest.warns(CheckpointWarning, match="skipped"):
        status = Checkpoint(**twin).restore(saved, options=RestoreOptions(on_mismatch="skip", expect_partial=True))
    assert diff.missing == status.missing == ("model/extra/bias", "model/extra/weight")
    assert diff.unexpected == status.unexpected
    assert diff.pending == status.pending
    assert diff.mismatched == status.mismatched
    assert {"model/output/bias", "metric/.state", "model/inputs/weight"} <= set(diff.unexpected)
    assert "model/output/bias" in diff.pending
    assert [mismatch.key for mismatch in diff.mismatched] == ["model/inputs/weight"]
    assert reader.match(twin) == {"step": "step"}


def test_options_of_the_restore_count(reader: CheckpointReader) -> None:
    renamed = {"net": torch.nn.Linear(3, 5)}
    assert not reader.match(renamed)
    assert reader.match(renamed, options=RestoreOptions(rename={"model/output": "net"})) == {
        "model/inputs/weight": "net/weight",
        "model/output/bias": "net/bias",
    }


def test_what_cannot_be_saved_matches_nothing(reader: CheckpointReader) -> None:
    with pytest.raises(TypeError, match="a object cannot be checkpointed"):
        reader.match(object())


# ---- other processes, other files ------------------------------------------------------------------------------------

WITHOUT_MPI = """
import sys, torch, distckpt
path = sys.argv[1]
with distckpt.load_checkpoint(path) as reader:
    assert reader["model/inputs/weight"][1:3].shape == (2, 3)
    assert reader["metric/.state"]["sum"].sum() == 2
    assert reader.match({"model": torch.nn.Module(), "step": 1}) == {"step": "step"}
    assert "metric/.state" in reader.diff({"step": 1}).unexpected
assert distckpt.load_variable(path, "step") == 100 and distckpt.list_variables(path)
assert not [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]
"""


def test_reading_needs_no_mpi(saved: str) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_MPI, saved], check=True, cwd=ROOT, timeout=100)


def file_with_state(path: Path, state: Mapping[str, msgspec.Raw], names: Mapping[str, str]) -> None:
    """A file of an object "o" with one tensor, whose python values may be anything."""
    attributes = [Attribute(name, key) for name, key in names.items()]
    graph = ObjectGraph([Node(children=[], attributes=attributes)])
    save(path, {"o/x": torch.ones(2)}, object_graph=graph, python_state=dict(state))


def test_a_state_that_refers_to_nothing_is_damage(tmp_path: Path) -> None:
    state = msgspec.Raw(encode(OrderedDict(a=TensorRef("y"))))
    file_with_state(tmp_path / "f.h5", {"o/.state": state}, {"o/.state": "o/.state", "x": "o/x"})
    with load_checkpoint(tmp_path / "f") as reader, pytest.raises(CorruptCheckpointError, match="refers to 'y'"):
        reader["o/.state"]


def test_a_value_that_nobody_encoded_is_damage(tmp_path: Path) -> None:
    state = msgspec.Raw(b'{"type":"pickle","value":"gASVJAA"}')
    file_with_state(tmp_path / "f.h5", {"o/.state": state}, {"o/.state": "o/.state"})
    with load_checkpoint(tmp_path / "f") as reader, pytest.raises(CorruptCheckpointError, match=r"f\.h5: o/\.state"):
        reader["o/.state"]


def test_a_value_of_no_node_is_read(tmp_path: Path) -> None:
    file_with_state(tmp_path / "f.h5", {"o/number": msgspec.Raw(b"7")}, {})
    with load_checkpoint(tmp_path / "f") as reader:
        assert reader["o/number"] == 7


@pytest.mark.parametrize("name", ["number", ".state"])
def test_a_state_that_refers_to_what_is_no_tensor_is_damage(tmp_path: Path, name: str) -> None:
    state = msgspec.Raw(encode({"a": TensorRef(name)}))
    values = {"o/.state": state, "o/number": msgspec.Raw(b"1")}
    file_with_state(tmp_path / "f.h5", values, {".state": "o/.state", "number": "o/number"})
    with load_checkpoint(tmp_path / "f") as reader, pytest.raises(CorruptCheckpointError, match=r"f\.h5: o/\.state: "):
        reader["o/.state"]


def test_other_programs_see_the_same_values(reader: CheckpointReader) -> None:
    with h5py.File(reader.path) as file:
        np.testing.assert_array_equal(file["model/output/bias"][1:4], reader["model/output/bias"][1:4].numpy())
