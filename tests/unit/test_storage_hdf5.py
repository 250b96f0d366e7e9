from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
import torch

from distckpt import Checkpoint, RestoreOptions, load_checkpoint
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, RestoreMismatchError
from distckpt.layout.dtypes import dtype_info, is_known
from distckpt.layout.records import Shard
from distckpt.storage import creation, hdf5, rawio
from distckpt.storage import manifest as manifests
from distckpt.storage import skeleton as skeletons
from distckpt.storage.checksum import StoredChecksums
from distckpt.storage.hdf5_types import hdf5_type
from distckpt.storage.skeleton import DatasetSpec, Skeleton
from distckpt.storage.verify import verify_file
from tests.bare import bare
from tests.checkpoint_files import (
    Tensors,
    load,
    make_manifest,
    placed,
    same_bits,
    save,
    specs_of,
    twins,
    variables_of,
    with_bytes_of,
)

DTYPES = sorted({str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)})
STORABLE = [name for name in DTYPES if is_known(name)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model/layers/0/weight": torch.randn(33, 7, generator=generator),
        "model/layers/0/bias": torch.randn(33, generator=generator).bfloat16(),
        "model/embedding": torch.randn(700, 100, generator=generator, dtype=torch.float64),
        "optimizer/.slots/model/embedding/step": torch.tensor(7.0),
        "empty": torch.empty(0, 4),
        "save_counter": torch.tensor(1),
        "größe/層..0": torch.arange(5),
    }


def raw_bytes(dtype: str, n_elements: int) -> torch.Tensor:
    """All bit patterns of one byte, NaN payloads among them, as elements of a dtype."""
    torch_dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(0, 256, (n_elements * torch_dtype.itemsize,), generator=generator, dtype=torch.uint8)
    data[:256] = torch.arange(256)[: len(data)]
    return data.view(torch_dtype)


def metadata_times(path: Path) -> set[int]:
    with h5py.File(path) as file:
        found = {int(h5py.h5g.get_objinfo(file["/"].id).mtime)}
        file.visititems(lambda _, item: found.add(int(h5py.h5g.get_objinfo(item.id).mtime)))
    return found


# ---- create


def test_layout_of_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors(), n_ranks=2)
    assert skeleton.file_nbytes == path.stat().st_size
    with h5py.File(path) as file:
        for (key, tensor), offset in zip(tensors().items(), skeleton.offsets.tolist(), strict=True):
            dataset = file[key]
            assert dataset.shape == tuple(tensor.shape)
            assert dataset.chunks is None
            assert dataset.id.get_offset() == (offset if tensor.numel() else None)
            assert (offset == -1) == (tensor.numel() == 0)
            assert np.array_equal(dataset[()], tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor)
        large = skeleton.offsets[2]
        assert large % 4096 == 0
        assert file[".manifest"].id.get_offset() == skeleton.manifest_offset
        assert file[".checksums"].id.get_offset() == skeleton.checksums_offset
        assert skeleton.manifest_capacity == file[".manifest"].shape[0]
        assert skeleton.manifest_capacity % 4096 == 0
    assert metadata_times(path) == {0}


def test_the_manifest_is_json_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors())
    with h5py.File(path) as file:
        document = json.loads(bytes(file[".manifest"][()]))
    assert document["format"] == "distckpt"
    assert [variable["key"] for variable in document["variables"]] == list(tensors())


def test_h5dump_shows_bfloat16_and_float8_numbers(tmp_path: Path) -> None:
    if shutil.which("h5dump") is None:
        pytest.skip("no h5dump")
    path = tmp_path / "file.h5"
    numbers = torch.tensor([1.0, -0.375, 224.0, 2.0**-6])
    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    save(path, {name: numbers.to(getattr(torch, name)) for name in names})
    for name in names:
        command = ["h5dump", "-y", "-d", f"/{name}", str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert f"floating-point {8 * getattr(torch, name).itemsize}-bit precision" in shown
        assert "1, -0.375, 224, 0.015625" in shown


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_h5py_shows_true_numbers(tmp_path: Path, dtype: str) -> None:
    shown = [1.0, -0.375, 112.0, 2.0**-9]
    save(tmp_path / "file.h5", {"x": torch.tensor(shown).to(getattr(torch, dtype))})
    with h5py.File(tmp_path / "file.h5") as file:
        assert file["x"][()].tolist() == shown


def test_h5py_shows_bool_and_complex(tmp_path: Path) -> None:
    values = {"b": torch.tensor([True, False]), "c": torch.tensor([1 + 2j]), "h": raw_bytes("complex32", 3)}
    save(tmp_path / "file.h5", values)
    with h5py.File(tmp_path / "file.h5") as file:
        assert file["b"].dtype == np.dtype(bool)
        assert file["b"][()].tolist() == [True, False]
        assert file["c"][()].tolist() == [1 + 2j]
        assert file["h"].dtype == np.dtype([("r", "<f2"), ("i", "<f2")])


def test_the_parts_of_complex_elements_are_those_of_their_type() -> None:
    for name in ("complex128", "complex64", "complex32", "bcomplex32"):
        made, part = hdf5_type(name), hdf5_type(dtype_info(name).part)
        assert [made.get_member_name(index) for index in range(2)] == [b"r", b"i"]
        assert [made.get_member_offset(index) for index in range(2)] == [0, part.get_size()]
        assert all(made.get_member_type(index).equal(part) for index in range(2))
        assert made.get_size() == dtype_info(name).itemsize == 2 * part.get_size()


def test_a_dtype_that_this_torch_does_not_have_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by a newer torch: what has another dtype is restored, and errors name the dtype and the way out."""
    new = torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    path = Checkpoint(new=new, old=torch.ones(3)).write(tmp_path / "c")
    live = torch.zeros(3)
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    checkpoint = Checkpoint(old=live, new=torch.zeros(4))
    with pytest.raises(RestoreMismatchError, match="float8_e8m0fnu"):
        checkpoint.read(path)
    assert not live.any()
    checkpoint.read(path, options=RestoreOptions(only=["old"])).assert_consumed()
    assert bool((live == 1).all())
    with load_checkpoint(path) as reader:
        assert bool((reader["old"][...] == 1).all())
        with pytest.raises(CheckpointError, match=r"dtype float8_e8m0fnu: torch .* newer torch"):
            reader["new"]


@pytest.mark.parametrize("dtype", STORABLE)
def test_every_dtype_keeps_every_bit(tmp_path: Path, dtype: str) -> None:
    saved = {"x": raw_bytes(dtype, 300), "s": raw_bytes(dtype, 1)[0], "e": raw_bytes(dtype, 1)[:0]}
    save(tmp_path / "file.h5", saved)
    restored = twins(saved)
    assert not same_bits(restored["x"], saved["x"])
    load(tmp_path / "file.h5", restored)
    assert all(same_bits(restored[key], saved[key]) for key in saved)
    with h5py.File(tmp_path / "file.h5") as file:
        assert file["x"].id.get_type().equal(hdf5_type(dtype))


@pytest.mark.parametrize("dtype", STORABLE)
def test_every_dtype_keeps_every_bit_between_strides(tmp_path: Path, dtype: str) -> None:
    saved = {"x": raw_bytes(dtype, 600)[::2]}
    save(tmp_path / "file.h5", saved)
    restored = {"x": with_bytes_of(raw_bytes(dtype, 900), 0x55)[::3]}
    load(tmp_path / "file.h5", restored)
    assert same_bits(restored["x"], saved["x"])


def test_two_files_of_a_layout_are_equal_in_every_byte(tmp_path: Path) -> None:
    save(tmp_path / "a.h5", tensors(), n_ranks=3)
    time.sleep(1.1)
    save(tmp_path / "b.h5", tensors(), n_ranks=3)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_the_length_of_the_manifest_moves_no_dataset(tmp_path: Path) -> None:
    short = save(tmp_path / "a.h5", tensors())
    long = save(tmp_path / "b.h5", tensors(), metadata={"text": "x" * 9000})
    assert long.manifest_capacity > short.manifest_capacity
    assert np.array_equal(long.offsets, short.offsets)
    assert long.checksums_offset == short.checksums_offset


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [DatasetSpec("w", "float32", (3,))],
        [DatasetSpec("e", "float32", (0, 3)), DatasetSpec("s", "bool", ())],
        [DatasetSpec(f"flat{i}", "float32", (i % 5,)) for i in range(3000)],
        [DatasetSpec(f"g/{i}/weight", "bfloat16", (700, i % 3 * 100)) for i in range(1200)],
        [DatasetSpec(f"g/{i % 9}/{'n' * (i % 40)}{i}", "complex64", (5,)) for i in range(500)],
        [DatasetSpec("/".join("abcdefgh") + f"/{i}/w{i}", "int8", (1,)) for i in range(200)],
        [DatasetSpec("ü" * 300 + f"/{i}", "int8", (70000,)) for i in range(30)],
    ],
    ids=["none", "one", "zero", "flat", "groups", "names", "deep", "long"],
)
def test_skeleton_gives_the_same_file(tmp_path: Path, specs: list[DatasetSpec]) -> None:
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    skeleton = creation.create_file(str(first), specs, 7, 500)
    assert first.stat().st_size == skeleton.file_nbytes <= skeletons.max_file_nbytes(specs, 7, 500)
    creation.create_like(str(second), skeleton)
    assert first.read_bytes() == second.read_bytes()
    with h5py.File(second) as file:
        assert [file[spec.key].shape for spec in specs] == [spec.shape for spec in specs]


def test_skeleton_is_compact(tmp_path: Path) -> None:
    specs = [DatasetSpec(f"flat{i}", "float32", (100,)) for i in range(3000)]
    skeleton = creation.create_file(str(tmp_path / "a.h5"), specs, len(specs), 500)
    assert len(skeleton.runs) <= 4
    assert sum(len(data) for _, data in skeleton.runs) < 400 * len(specs)
    adjacent = skeleton.offsets[1:] == skeleton.offsets[:-1] + 400
    assert np.count_nonzero(~adjacent) <= 3
    tiny = creation.create_file(str(tmp_path / "b.h5"), specs[:2], 2, 500)
    assert tiny.file_nbytes < 16 << 10


def test_a_manifest_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    skeleton = creation.create_file(str(tmp_path / "a.h5"), specs_of(tensors()), 7, 500)
    fd = os.open(tmp_path / "a.h5", os.O_RDWR)
    with pytest.raises(ValueError, match="the manifest has"):
        creation.write_manifest(fd, skeleton, b"x" * (skeleton.manifest_capacity + 1))
    os.close(fd)


def test_the_disk_writes_what_is_long_as_soon_as_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(rawio, "start_writeback", lambda _, offset, nbytes: started.append((offset, nbytes)))
    specs = [DatasetSpec(f"v{i}", "float32", (1,)) for i in range(4000)]
    skeleton = creation.create_file(str(tmp_path / "a.h5"), specs, len(specs), 2 << 20)
    (offset, first), _short = skeleton.runs
    assert started == [(offset, len(first))]
    started.clear()
    fd = os.open(tmp_path / "a.h5", os.O_RDWR)
    creation.write_manifest(fd, skeleton, b"{}")
    os.close(fd)
    assert started == [(skeleton.manifest_offset, skeleton.manifest_capacity)]


def test_creating_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        creation.create_file(str(path), specs_of(tensors()), 7, 500)
    skeleton = creation.create_file(str(tmp_path / "other.h5"), specs_of(tensors()), 7, 500)
    with pytest.raises(FileExistsError):
        creation.create_like(str(path), skeleton)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["nowhere/a.h5", "file/a.h5", "n" * 300])
def test_a_file_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot make the file: [A-Z].*, choose another directory or name: '.*"):
        creation.create_file(str(tmp_path / name), specs_of(tensors()), 7, 500)


@pytest.mark.parametrize("room", [True, False], ids=["in memory", "no memory"])
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(skeletons, "_MEMORY", memory if room else tmp_path / "nowhere")
    used: list[str] = []
    create = skeletons._create_datasets
    monkeypatch.setattr(skeletons, "_create_datasets", lambda path, *rest: (used.append(path), create(path, *rest))[1])
    (tmp_path / "run").mkdir()
    creation.create_file(str(tmp_path / "run" / "a.h5"), specs_of(tensors()), 7, 500)
    assert Path(used[0]).parent == (memory if room else tmp_path / "run")
    clash = [DatasetSpec("a", "float32", (3,)), DatasetSpec("a/b", "float32", (3,))]
    with pytest.raises((ValueError, OSError, RuntimeError, KeyError)):
        creation.create_file(str(tmp_path / "run" / "b.h5"), clash, 7, 500)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a.h5"]
    assert list(memory.iterdir()) == []
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0


def test_the_space_is_reserved(tmp_path: Path) -> None:
    specs = [DatasetSpec("w", "float32", (1 << 20,))]
    skeleton = creation.create_file(str(tmp_path / "a.h5"), specs, 1, 500)
    creation.create_like(str(tmp_path / "b.h5"), skeleton)
    for name in ("a.h5", "b.h5"):
        assert (tmp_path / name).stat().st_blocks * 512 >= 4 << 20


@pytest.mark.parametrize("with_skeleton", [False, True])
def test_no_space_is_a_clean_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_skeleton: bool) -> None:
    specs = specs_of(tensors())
    skeleton, path = creation.create_file(str(tmp_path / "a.h5"), specs, 7, 500), str(tmp_path / "b.h5")
    monkeypatch.setattr(creation.rawio.resource, "getrlimit", lambda _: (1000, 1000))
    with pytest.raises(OSError, match="file size limit") as raised:
        creation.create_like(path, skeleton) if with_skeleton else creation.create_file(path, specs, 7, 500)
    assert raised.value.errno == errno.EFBIG
    assert not (tmp_path / "b.h5").exists()


def test_a_real_file_size_limit_does_not_kill_the_interpreter(tmp_path: Path) -> None:
    code = f"""{bare()}
import resource
from distckpt.storage import creation, hdf5
from distckpt.storage.skeleton import DatasetSpec
resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
try:
    specs = [DatasetSpec("w", "float32", (16 << 20,))]
    creation.create_file({str(tmp_path / "file.h5")!r}, specs, 1, 500)
except OSError as error:
    print(error.errno)
creation.create_file({str(tmp_path / "small.h5")!r}, [DatasetSpec("w", "float32", (4,))], 1, 500)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.h5"]


def test_a_full_disk_is_a_clean_error(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(mount)], check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting is not allowed")
    try:
        with pytest.raises(OSError, match=r"No space|bytes free") as raised:
            creation.create_file(str(mount / "file.h5"), [DatasetSpec("w", "float32", (4 << 20,))], 1, 500)
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(mount)
        assert list(mount.iterdir()) == []
        creation.create_file(str(mount / "file.h5"), [DatasetSpec("w", "float32", (1 << 20,))], 1, 500)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# ---- open


def corrupt(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def rewrite_manifest(path: Path, skeleton: Skeleton, change: Any) -> None:
    """Replace the manifest by a changed one with a right checksum."""
    opened = hdf5.open_checkpoint(str(path))
    fd = os.open(path, os.O_RDWR)
    creation.write_manifest(fd, skeleton, manifests.encode(change(opened.manifest)))
    os.close(fd)


def change_variable(variable_key: str, **changes: Any) -> Any:
    def change(manifest: Any) -> Any:
        variables = [
            msgspec.structs.replace(variable, **changes) if variable.key == variable_key else variable
            for variable in manifest.variables
        ]
        return msgspec.structs.replace(manifest, variables=variables)

    return change


def test_open_finds_everything(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors(), n_ranks=2)
    opened = hdf5.open_checkpoint(str(path))
    assert opened.manifest == placed(make_manifest(variables_of(tensors(), 2)), skeleton)
    assert manifests.decode(opened.manifest_bytes) == opened.manifest
    assert np.array_equal(opened.offsets, skeleton.offsets)
    assert opened.file_nbytes == path.stat().st_size
    assert opened.checksums is not None
    assert opened.checksums == StoredChecksums(skeleton.n_checksums, skeleton.checksums_offset)
    assert verify_file(path) == []


def test_the_suffix_may_be_left_out(tmp_path: Path) -> None:
    save(tmp_path / "file-1.h5", tensors())
    assert hdf5.open_checkpoint(str(tmp_path / "file-1")).path == str(tmp_path / "file-1.h5")


def test_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "ckpt-3.h5").write_bytes(b"")
    (tmp_path / "ckpt-12.h5").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match=r"Is the number missing, as in '.*ckpt-12.h5'"):
        hdf5.open_checkpoint(str(tmp_path / "ckpt"))
    with pytest.raises(CheckpointNotFoundError, match=r"The directory has ckpt-3.h5, ckpt-12.h5"):
        hdf5.open_checkpoint(str(tmp_path / "other.h5"))
    with pytest.raises(CheckpointNotFoundError, match=r"directory: pass distckpt\.latest_checkpoint"):
        hdf5.open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match=r"The directory '.*nowhere' does not exist"):
        hdf5.open_checkpoint(str(tmp_path / "nowhere" / "ckpt"))


def test_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors(), hashed=False)
    assert hdf5.open_checkpoint(str(path)).checksums is None
    restored = twins(tensors())
    assert load(path, restored).bytes_verified == 0
    assert all(same_bits(restored[key], tensor) for key, tensor in tensors().items())
    assert "no checksums" in verify_file(path)[0]


def test_an_unknown_checksum_algorithm_cannot_be_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors(), checksums="md5")
    assert hdf5.open_checkpoint(str(path)).checksums is None
    assert "'md5'" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no HDF5 file", b"\x89HDF\r\n\x1a\n" + b"\xff" * 100])
def test_not_hdf5(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.h5").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="HDF5 cannot open"):
        hdf5.open_checkpoint(str(tmp_path / "file.h5"))


def test_another_hdf5_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(CorruptCheckpointError, match="no checkpoint of distckpt"):
        hdf5.open_checkpoint(str(tmp_path / "file.h5"))


@pytest.mark.parametrize("value", [None, 3.0, [1, 2], "text", [[1], [2]]], ids=repr)
def test_a_manifest_that_is_none(tmp_path: Path, value: Any) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        if value is None:
            file.create_group(".manifest")
        else:
            file[".manifest"] = value
    with pytest.raises(CorruptCheckpointError, match=r"manifest|HDF5 cannot read"):
        hdf5.open_checkpoint(str(tmp_path / "file.h5"))


def test_a_manifest_that_was_never_written(tmp_path: Path) -> None:
    creation.create_file(str(tmp_path / "file.h5"), specs_of(tensors()), 7, 500)
    with pytest.raises(CorruptCheckpointError, match="the manifest is damaged"):
        hdf5.open_checkpoint(str(tmp_path / "file.h5"))


@pytest.mark.parametrize("left", [0.99, 0.5, 0.1])
def test_a_truncated_file(tmp_path: Path, left: float) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors())
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        hdf5.open_checkpoint(str(path))


@pytest.mark.parametrize("position", [5, 25, 100, 400, -5])
def test_a_flipped_bit_in_the_manifest(tmp_path: Path, position: int) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors())
    length = len(hdf5.open_checkpoint(str(path)).manifest_bytes)
    flip(path, skeleton.manifest_offset + (position if position >= 0 else length + position))
    with pytest.raises(CorruptCheckpointError, match=r"manifest is damaged|the format is unknown"):
        hdf5.open_checkpoint(str(path))


def test_a_flipped_bit_in_the_padding(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors())
    flip(path, skeleton.manifest_offset + skeleton.manifest_capacity - 1)
    with pytest.raises(CorruptCheckpointError, match="manifest is damaged"):
        hdf5.open_checkpoint(str(path))


def test_another_format_version(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors(), format_version=17)
    with pytest.raises(CorruptCheckpointError, match=r"file.h5: the file has format version 17, .* reads version 2"):
        hdf5.open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (1 << 40, 1 << 10), "shards": [Shard(0, (0, 0), (1 << 40, 1 << 10))]}, "another one"),
        ({"shape": (1 << 60, 1 << 60), "shards": [Shard(0, (0, 0), (1 << 60, 1 << 60))]}, "impossible shape"),
        ({"shape": (-7, -33)}, "impossible shape"),
        ({"shape": (33, 8)}, "in no shard"),
        ({"shape": (7, 33), "shards": [Shard(0, (0, 0), (7, 33))]}, "another one. Expected shape"),
        ({"dtype": "float128"}, "unknown dtype"),
        ({"dtype": "float16"}, "another one"),
        ({"offset": -2}, "impossible offset"),
        ({"offset": 1 << 80}, "impossible offset"),
        ({"shards": [Shard(0, (0, 0), (33, 6))]}, "in no shard"),
        ({"shards": [Shard(0, (1, 0), (33, 7))]}, "outside"),
        ({"shards": [Shard(0, (0, 0), (33, 7))] * 2}, "overlaps"),
        ({"key": "elsewhere"}, "its dataset is missing"),
        ({"key": "model/embedding"}, "same key"),
    ],
)
def test_a_manifest_that_lies(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors())
    rewrite_manifest(path, skeleton, change_variable("model/layers/0/weight", **changes))
    with pytest.raises(CorruptCheckpointError, match=message):
        hdf5.open_checkpoint(str(path))


def test_offsets_that_lie_in_the_middle(tmp_path: Path) -> None:
    """Neither of the first nor of the last variable, which are compared with HDF5."""
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors())
    huge = {"shape": (1 << 50,), "shards": [Shard(0, (0,), (1 << 50,))]}
    lies: list[tuple[dict[str, Any], str]] = [
        ({"offset": 1 << 50}, "not inside the file"),
        (huge, "not inside the file"),
        ({"offset": int(skeleton.offsets[0])}, "overlap"),
    ]
    for number, (changes, message) in enumerate(lies):
        lying = tmp_path / f"{number}.h5"
        shutil.copy(path, lying)
        rewrite_manifest(lying, skeleton, change_variable("model/embedding", **changes))
        with pytest.raises(CorruptCheckpointError, match=message):
            hdf5.open_checkpoint(str(lying))


def test_a_wrong_number_of_checksums(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors())
    shards = [Shard(0, (0, 0), (33, 3)), Shard(0, (0, 3), (33, 4))]
    rewrite_manifest(path, skeleton, change_variable("model/layers/0/weight", shards=shards))
    with pytest.raises(CorruptCheckpointError, match=r"expected 7 checksums. Got 6"):
        hdf5.open_checkpoint(str(path))


def test_a_manifest_dataset_that_claims_too_much(tmp_path: Path) -> None:
    """A chunked dataset may be any size without a byte in the file."""
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_dataset(".manifest", (1 << 50,), "u1", chunks=(1 << 20,))
    with pytest.raises(CorruptCheckpointError, match="are not inside the file"):
        hdf5.open_checkpoint(str(tmp_path / "file.h5"))


def test_data_in_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors())
    (tmp_path / "secret").write_bytes(bytes(10000))
    with h5py.File(path, "r+") as file:
        del file["model/layers/0/weight"]
        file.create_dataset("model/layers/0/weight", (33, 7), "f4", external=[(str(tmp_path / "secret"), 0, 924)])
    with pytest.raises(CorruptCheckpointError, match="in another file"):
        hdf5.open_checkpoint(str(path))
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros((33, 7), "f4")
        del file["model/layers/0/weight"]
        file["model/layers/0/weight"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
    with pytest.raises(CorruptCheckpointError, match="in another file"):
        hdf5.open_checkpoint(str(path))


def test_missing_parts(tmp_path: Path) -> None:
    for key, message in [
        ("save_counter", None),
        (".checksums", "its checksums are missing"),
        (".manifest", "manifest"),
    ]:
        path = tmp_path / f"{key}.h5"
        save(path, tensors())
        with h5py.File(path, "r+") as file:
            del file[key]
        if message is None:
            hdf5.open_checkpoint(str(path))
        else:
            with pytest.raises(CorruptCheckpointError, match=message):
                hdf5.open_checkpoint(str(path))


# ---- rewritten by others


def repack(source: Path, target: Path, *options: str) -> None:
    if shutil.which("h5repack") is None:
        pytest.skip("no h5repack")
    subprocess.run(["h5repack", *options, str(source), str(target)], check=True, timeout=60)


@pytest.mark.parametrize(
    "options", [[], ["-f", "GZIP=6"], ["-l", "CHUNK=11x3"], ["-L"], ["-f", "SHUF", "-f", "GZIP=9"]]
)
def test_a_repacked_file_restores(tmp_path: Path, options: list[str]) -> None:
    saved = {**tensors(), "big": torch.zeros(3 << 20), "flags": torch.arange(100000) % 3 == 0}
    if options:
        del saved["empty"]  # h5repack fails to change a dataset without elements
    save(tmp_path / "file.h5", saved, n_ranks=2)
    repack(tmp_path / "file.h5", tmp_path / "again.h5", *options)
    restored = twins(saved)
    report = load(tmp_path / "again.h5", restored)
    assert all(same_bits(restored[key], tensor) for key, tensor in saved.items())
    assert report.bytes_verified == sum(tensor.nbytes for tensor in saved.values())
    assert verify_file(tmp_path / "again.h5") == []
    if "-f" in options:
        assert (tmp_path / "again.h5").stat().st_size < (tmp_path / "file.h5").stat().st_size / 4
        assert (hdf5.open_checkpoint(str(tmp_path / "again.h5")).offsets == -1).any()


def test_a_damaged_compressed_file(tmp_path: Path) -> None:
    saved = {"a": torch.rand(200, 500), "b": torch.rand(200, 500)}
    save(tmp_path / "file.h5", saved)
    repack(tmp_path / "file.h5", tmp_path / "again.h5", "-f", "a:GZIP=1")
    with h5py.File(tmp_path / "again.h5") as file:
        offset = file["a"].id.get_chunk_info(0).byte_offset
    corrupt(tmp_path / "again.h5", offset + 1000, b"damage" * 10)
    with pytest.raises(CorruptCheckpointError, match="a"):
        load(tmp_path / "again.h5", twins(saved))
    assert len(verify_file(tmp_path / "again.h5")) == 1


def test_a_chunk_that_is_missing_is_damage(tmp_path: Path) -> None:
    """Not the bytes that were read before it."""
    saved = dict.fromkeys("ab", torch.rand(2000))
    save(tmp_path / "file.h5", saved)
    repack(tmp_path / "file.h5", tmp_path / "again.h5", "-f", "GZIP=1")
    with h5py.File(tmp_path / "again.h5", "r+") as file:
        del file["b"]
        half = file.create_dataset("b", 2000, "f4", chunks=(1000,), compression="gzip", fill_time="never")
        half[:1000] = saved["b"][:1000]
    with pytest.raises(CorruptCheckpointError, match=r"^b: "):
        load(tmp_path / "again.h5", twins(saved))
    assert len(verify_file(tmp_path / "again.h5")) == 1


def test_a_dataset_added_by_the_user_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    save(path, tensors())
    with h5py.File(path, "r+") as file:
        file["notes"] = np.arange(1000)
        file["model"].attrs["comment"] = "best so far"
    restored = twins(tensors())
    load(path, restored)
    assert all(same_bits(restored[key], tensor) for key, tensor in tensors().items())


# ---- verify


def test_verify_names_each_damaged_variable(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    skeleton = save(path, tensors(), n_ranks=3)
    flip(path, int(skeleton.offsets[2]) + 70000)
    flip(path, skeleton.checksums_offset)
    problems = verify_file(path)
    assert len(problems) == 2
    assert problems[0].startswith("model/layers/0/weight: the 308 bytes of the piece of shape (11, 7) at (0, 0)")
    assert problems[1].startswith("model/embedding:")
    assert "Expected checksum" in problems[1]


def test_verify_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file.h5").write_bytes(b"nothing")
    assert "HDF5 cannot open" in verify_file(tmp_path / "file.h5")[0]
    with pytest.raises(CheckpointNotFoundError):
        verify_file(tmp_path / "missing.h5")


def test_verify_reports_progress(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    saved: Tensors = {**tensors(), "big": torch.rand(5 << 20)}
    save(path, saved)
    done: list[int] = []
    assert verify_file(path, progress=done.append) == []
    assert sum(done) == sum(tensor.nbytes for tensor in saved.values())


@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_the_program_has_open_itself(mode: str, locking: bool | str | None, tmp_path: Path) -> None:
    path, saved = str(tmp_path / "c.h5"), {"w": torch.arange(5.0)}
    save(path, saved)
    with h5py.File(path, mode, locking=locking) as own:
        dataset = own["w"]
        live = twins(saved)
        assert not same_bits(live["w"], saved["w"])
        load(path, live)
        assert same_bits(live["w"], saved["w"])
        assert dataset[3] == 3.0
