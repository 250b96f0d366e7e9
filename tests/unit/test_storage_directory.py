"""Names on disk, the state file, and the search for the latest checkpoint."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpoint, CheckpointManager, SaveOptions
from distckpt.errors import CheckpointNotFoundError, CheckpointWarning
from distckpt.storage import latest, paths, state
from distckpt.storage.latest import is_complete, latest_checkpoint
from distckpt.storage.paths import next_number, numbered_files, resolve, single_path, split_prefix
from distckpt.storage.state import DamagedStateError, known_prefixes, read_state, record_save, write_state
from tests.checkpoint_files import save

TENSORS = {"w": torch.arange(100.0), "v": torch.arange(7)}


def make(directory: Path, name: str, **changes: Any) -> str:
    """A checkpoint that was saved, with its entry in the state file."""
    number = int(name.rpartition("-")[2].removesuffix(".h5"))
    save(directory / name, TENSORS, **{"save_counter": number, "time": float(number), **changes})
    record_save(directory / name, durable=False)
    return str(directory / name)


# ---- names


@pytest.mark.parametrize("prefix", ["a/ckpt", "a/ckpt.h5", Path("a/ckpt"), Path("a/ckpt.h5")], ids=repr)
def test_split_prefix(prefix: Any) -> None:
    split = split_prefix(prefix)
    assert (str(split.directory), split.name) == ("a", "ckpt")
    assert split.numbered(12) == "a/ckpt-12.h5"


def test_paths_stay_as_they_were_written() -> None:
    assert split_prefix("ckpt").numbered(1) == "ckpt-1.h5"
    assert split_prefix("/x/../y/ckpt").numbered(1) == "/x/../y/ckpt-1.h5"
    assert single_path("a/m") == single_path("a/m.h5") == "a/m.h5"
    assert single_path("m-3") == "m-3.h5"


@pytest.mark.parametrize("prefix", ["", "a/", ".", "a/..", "a/.h5", "/"])
def test_prefixes_without_a_name(prefix: str) -> None:
    with pytest.raises(ValueError, match="expected a path that ends in a name"):
        split_prefix(prefix)
    with pytest.raises(ValueError, match="expected a path that ends in a name"):
        single_path(prefix)


def test_the_name_of_the_state_file_is_refused_without_a_number() -> None:
    for path in ("a/checkpoint", "checkpoint.h5"):
        with pytest.raises(ValueError, match="state file"):
            single_path(path)
    assert split_prefix("a/checkpoint").numbered(1) == "a/checkpoint-1.h5"


def test_numbered_files(tmp_path: Path) -> None:
    for name in ("b-2.h5", "b-10.h5", "a-1.h5", "a-b-3.h5", "b.h5", "b-2.h5.tmp", ".b-3.h5.0.tmp", "b-x.h5", "b-٣.h5"):
        (tmp_path / name).touch()
    (tmp_path / os.fsdecode(b"latin\xff-3.h5")).touch()  # no call would take this path
    assert [(file.prefix, file.number) for file in numbered_files(tmp_path)] == [
        ("a", 1),
        ("a-b", 3),
        ("b", 2),
        ("b", 10),
    ]
    assert numbered_files(tmp_path / "nowhere") == []


def test_next_number(tmp_path: Path) -> None:
    prefix = split_prefix(tmp_path / "new" / "ckpt")
    assert next_number(prefix, 0) == 1
    assert next_number(prefix, 7) == 8
    prefix.directory.mkdir()
    for name in ("ckpt-9.h5", "ckpt-10.h5", "ckpt2-99.h5", "ckpt-x-50.h5"):
        (prefix.directory / name).touch()
    assert next_number(prefix, 0) == 11
    assert next_number(prefix, 10) == 11
    assert next_number(prefix, 20) == 21


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ckpt-1.h5", "bare"):
        Path(name).touch()
    assert resolve("ckpt-1") == resolve("ckpt-1.h5") == "ckpt-1.h5"
    assert resolve(Path("bare")) == "bare"
    with pytest.raises(
        CheckpointNotFoundError, match=r"ckpt: no such checkpoint\. Is the number missing, as in 'ckpt-1.h5'"
    ):
        resolve("ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"The directory has ckpt-1.h5"):
        resolve("x")


def test_make_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.make_directory(tmp_path / "a" / "b")
    paths.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(NotADirectoryError, match="is a file, choose another directory"):
            paths.make_directory(directory)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(PermissionError, match="no permission, choose another one"):
        paths.make_directory(tmp_path / "a")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(FileNotFoundError, match=r"cannot make the directory: .*choose another one: '/proc/zz'"):
        paths.make_directory(Path("/proc/zz"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="cannot make the directory: Permission denied, choose another one"):
        paths.make_directory(tmp_path / "c")


# ---- the state file


def test_the_state_file(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "nowhere") is None
    record_save(tmp_path / "ckpt-1.h5", durable=True)
    record_save(tmp_path / "best-4.h5", durable=True)
    fields = read_state(tmp_path)
    assert fields is not None
    write_state(tmp_path, {**fields, "manager": {"pinned": ["ckpt-1.h5"]}}, durable=True)
    record_save(tmp_path / "ckpt-2.h5", durable=True)
    expected = {"latest": "ckpt-2.h5", "prefixes": ["best", "ckpt"], "manager": {"pinned": ["ckpt-1.h5"]}}
    assert read_state(tmp_path) == json.loads((tmp_path / "checkpoint").read_text()) == expected
    assert known_prefixes(expected) == {"best", "ckpt"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record_save("ckpt-1.h5", durable=True)
    assert read_state(".") == {"latest": "ckpt-1.h5", "prefixes": ["ckpt"]}


def test_only_numbered_files_are_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="<prefix>-<number>"):
        record_save(tmp_path / "model.h5", durable=False)


SURROGATE = b'{"prefixes": ["\\udc80"]}'


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff", b"{}", b'{"prefixes": [1]}', b"[" * 100000, SURROGATE]
)
def test_a_damaged_state_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(DamagedStateError, match="the state file is damaged"):
        read_state(tmp_path)
    record_save(tmp_path / "ckpt-1.h5", durable=False)
    assert read_state(tmp_path) == {"latest": "ckpt-1.h5", "prefixes": ["ckpt"]}


_NO_STATE_FILES: dict[str, Callable[[Path], Any]] = {
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 33)),
}


@pytest.mark.parametrize("kind", _NO_STATE_FILES)
def test_what_is_no_state_file_is_not_read(tmp_path: Path, kind: str) -> None:
    """The reading of some of these would not end, or take all memory."""
    save(tmp_path / "ckpt-1.h5", TENSORS, save_counter=1)
    _NO_STATE_FILES[kind](tmp_path / "checkpoint")
    with pytest.warns(CheckpointWarning, match="the state file is damaged: it "):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")
    if kind != "a directory":
        record_save(tmp_path / "ckpt-1.h5", durable=False)
        assert read_state(tmp_path) == {"latest": "ckpt-1.h5", "prefixes": ["ckpt"]}


def test_the_state_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, {"prefixes": ["a"]}, durable=True)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.rawio, "write_all", refuse)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/checkpoint'"):
        write_state(tmp_path, {"prefixes": ["b"]}, durable=True)
    assert read_state(tmp_path) == {"prefixes": ["a"]}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# ---- the latest checkpoint


def test_an_empty_directory_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "notes.txt").touch()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["ckpt", "ckpt.h5", "ckpt-1.h5", "checkpoint"])
def test_a_file_or_a_prefix_is_no_directory(tmp_path: Path, name: str) -> None:
    make(tmp_path, "ckpt-1.h5")
    expected = rf"/{name} is no directory.*Expected a directory, such as '{tmp_path}'"
    with pytest.warns(CheckpointWarning, match=expected) as warned:
        assert latest_checkpoint(tmp_path / name) is None
    assert warned[0].filename == __file__
    assert latest_checkpoint(tmp_path / "other") is None  # a fresh start: a warning would be an error here
    assert CheckpointManager(Checkpoint(x=1), tmp_path / "ckpt").latest_checkpoint is None


def test_the_highest_number_is_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (2, 9, 10):
        make(tmp_path, f"ckpt-{number}.h5")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-10.h5")
    monkeypatch.chdir(tmp_path.parent)
    assert latest_checkpoint(tmp_path.name) == f"{tmp_path.name}/ckpt-10.h5"
    monkeypatch.chdir(tmp_path)
    assert latest_checkpoint(".") == "ckpt-10.h5"


def test_the_state_file_is_only_a_hint(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    save(tmp_path / "ckpt-2.h5", TENSORS, save_counter=2)  # committed, and the job died before the state file
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2.h5")
    (tmp_path / "checkpoint").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2.h5")
    (tmp_path / "ckpt-2.h5").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")


def test_of_several_prefixes_the_last_one_saved(tmp_path: Path) -> None:
    make(tmp_path, "a-7.h5", time=100.0)
    make(tmp_path, "b-2.h5", time=200.0)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "b-2.h5")
    make(tmp_path, "a-8.h5", time=300.0)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "a-8.h5")


def test_files_of_write_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    save(tmp_path / "model.h5", TENSORS, save_counter=None, time=1e9)
    save(tmp_path / "export-9.h5", TENSORS, save_counter=None, time=1e9)
    save(tmp_path / "ckpt-9.h5", TENSORS, save_counter=None, time=1e9)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")
    (tmp_path / "checkpoint").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")


def test_other_prefixes_do_not_count_when_there_is_a_state_file(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    save(tmp_path / "copied-5.h5", TENSORS, save_counter=5, time=1e9)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")


def test_a_damaged_state_file_is_warned_about(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    (tmp_path / "checkpoint").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match="state file is damaged.*looking at all"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")


def test_damaged_files_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make(tmp_path, f"ckpt-{number}.h5")
    os.truncate(tmp_path / "ckpt-3.h5", 5000)
    (tmp_path / "ckpt-4.h5").write_bytes(b"rubbish")
    with pytest.warns(CheckpointWarning) as warned:
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2.h5")
    assert [str(tmp_path / name) in str(warned[i].message) for i, name in enumerate(("ckpt-4.h5", "ckpt-3.h5"))] == [
        True,
        True,
    ]
    assert "passed over" in str(warned[0].message)


def test_a_newer_format_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    make(tmp_path, "ckpt-2.h5", format_version=99)
    with pytest.warns(CheckpointWarning, match="format version 99"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")


def test_verify_reads_the_data_too(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    skeleton = save(tmp_path / "ckpt-2.h5", TENSORS, save_counter=2, time=2.0)
    with (tmp_path / "ckpt-2.h5").open("r+b") as file:
        file.seek(int(skeleton.offsets[0]) + 40)
        file.write(b"damage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2.h5")
    with pytest.warns(CheckpointWarning, match=r"ckpt-2.h5 is passed over: w: .*damaged"):
        assert latest_checkpoint(tmp_path, verify=True) == str(tmp_path / "ckpt-1.h5")


def test_what_has_no_checksums_is_not_taken_for_damaged(tmp_path: Path) -> None:
    checkpoint = Checkpoint(x=1)
    path = checkpoint.save(tmp_path / "ckpt", options=SaveOptions(checksums=False))
    with pytest.warns(CheckpointWarning, match=r"ckpt-1.h5 is not verified: it was saved without checksums"):
        assert latest_checkpoint(tmp_path, verify=True) == path


def test_a_file_that_is_removed_during_the_look_has_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training job that keeps one checkpoint goes on while another program looks for it."""
    make(tmp_path, "ckpt-1.h5")
    open_checkpoint = latest.open_checkpoint

    def open_late(path: str) -> Any:
        if path.endswith("ckpt-1.h5"):
            make(tmp_path, "ckpt-2.h5")
            (tmp_path / "ckpt-1.h5").unlink()
        return open_checkpoint(path)

    monkeypatch.setattr(latest, "open_checkpoint", open_late)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-2.h5")


def test_a_link_that_leads_nowhere_is_passed_over_once(tmp_path: Path) -> None:
    make(tmp_path, "ckpt-1.h5")
    (tmp_path / "ckpt-2.h5").symlink_to(tmp_path / "gone.h5")
    with pytest.warns(CheckpointWarning, match=r"ckpt-2.h5 is passed over: no such checkpoint") as warned:
        assert latest_checkpoint(tmp_path) == str(tmp_path / "ckpt-1.h5")
    assert [warning.filename for warning in warned] == [__file__]


def test_is_complete(tmp_path: Path) -> None:
    path = make(tmp_path, "ckpt-1.h5")
    assert is_complete(path) is None
    os.truncate(path, 5000)
    assert "truncated" in str(is_complete(path))
    assert "no such checkpoint" in str(is_complete(tmp_path / "ckpt-9.h5"))
