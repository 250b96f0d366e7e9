"""Restores: files that are missing, damaged or do not fit; nothing changes unless everything can."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWarning,
    CollectiveError,
    CorruptCheckpointError,
    RestoreMismatchError,
    RestoreOptions,
    SaveOptions,
    Trackable,
)
from distckpt.layout.records import Attribute, Node, ObjectGraph
from distckpt.storage.checksum import ChecksumReader
from tests.checkpoint_files import save as save_file

OpenFiles = Callable[[], list[str]]
CAST = RestoreOptions(cast=True)
SKIP = RestoreOptions(on_mismatch="skip")


def full(value: float, n: int = 2) -> torch.Tensor:
    return torch.full((n,), float(value))


class _Everything:
    """One of everything that a restore could change, and a way to see all of it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1 * seed)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, seed)
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()
        self.checkpoint = Checkpoint(
            m=self.model,
            o=self.optimizer,
            s=self.scheduler,
            g=torch.Generator().manual_seed(seed),
            array=np.full(3, float(seed)),
            mixed=[full(seed), seed, [seed]],
            number=seed,
            log=[seed],
        )

    def state(self) -> str:
        c = self.checkpoint
        torch.set_printoptions(precision=10)
        state = [tensor.clone() for tensor in self.model.state_dict().values()], c.mixed, c.number, c.log, c.array
        optimizer = self.optimizer.state_dict(), self.scheduler.state_dict()
        return repr((state, optimizer, c.g.get_state().sum(), c.save_counter))


def test_everything_comes_back(path: str) -> None:
    saved, live = _Everything(3), _Everything(5)
    for i in range(3):
        file = saved.checkpoint.save(path)
        assert saved.checkpoint.save_counter == i + 1
    assert live.state() != saved.state()
    live.checkpoint.restore(file).assert_consumed()
    assert live.state() == saved.state()


# ---- what does not fit -------------------------------------------------------------------------------------------


_CHANGES: dict[str, Callable[[_Everything], None]] = {
    "a longer tensor": lambda e: e.checkpoint.mixed.__setitem__(0, full(1, 3)),
    "a shorter array": lambda e: setattr(e.checkpoint, "array", np.zeros(2)),
    "another dtype": lambda e: e.checkpoint.mixed.__setitem__(0, full(1).double()),
    "a number for a tensor": lambda e: e.checkpoint.mixed.__setitem__(0, 5),
    "a tensor for a number": lambda e: setattr(e.checkpoint, "number", full(1)),
    "other slots": lambda e: e.optimizer.state[e.model[0].weight].__delitem__("exp_avg"),
    "a longer slot": lambda e: e.optimizer.state[e.model[0].weight].update(exp_avg=torch.zeros(9)),
    "an expanded tensor": lambda e: e.checkpoint.mixed.__setitem__(0, torch.zeros(1).expand(2)),
    "a read-only array": lambda e: e.checkpoint.array.setflags(write=False),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_nothing_has_changed_after_a_mismatch(change: str, path: str, open_files: OpenFiles) -> None:
    saved, live = _Everything(3), _Everything(5)
    saved.checkpoint.save(path)
    file = saved.checkpoint.save(path)
    _CHANGES[change](live)
    before, open_before = live.state(), open_files()
    with pytest.raises(RestoreMismatchError, match="Nothing was changed") as caught:
        live.checkpoint.restore(file)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CheckpointError)
    assert live.state() == before
    assert open_files() == open_before


def test_all_mismatches_are_named_at_once_with_both_sides(path: str) -> None:
    file = Checkpoint(a=full(1, 2), b=full(1, 3), c=full(1), d=1, ok=5).write(path)
    live = Checkpoint(a=full(0, 3), b=torch.zeros(3, dtype=torch.int64), c="text", d=full(0), ok=0)
    with pytest.raises(RestoreMismatchError) as caught:
        live.read(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: 4 saved value(s) do not fit")
    assert "a: saved a tensor of shape (2,) and dtype float32, live a tensor of shape (3,) and dtype float32" in text
    assert "b: saved a tensor of shape (3,) and dtype float32, live a tensor of shape (3,) and dtype int64" in text
    assert "c: saved an object or tensor, live the python value 'text'" in text
    assert "d: saved a python value, live a Tensor" in text
    for remedy in ("on_mismatch='skip'", "cast=True", "rename="):
        assert remedy in text
    assert live.ok == 0


def test_a_long_list_of_mismatches_is_cut(path: str) -> None:
    file = Checkpoint(d={str(i): full(1, 2) for i in range(50)}).write(path)
    with pytest.raises(RestoreMismatchError, match=r"50 saved value.*\n(.*\n){20}  \.\.\. and 30 more"):
        Checkpoint(d={str(i): full(1, 3) for i in range(50)}).read(file)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (1, 2), (4,), (0,)])
def test_shapes_are_equal_or_not(shape: tuple[int, ...], path: str) -> None:
    file = Checkpoint(t=full(1, 2)).write(path)
    with pytest.raises(RestoreMismatchError, match=r"t: saved a tensor of shape \(2,\)"):
        Checkpoint(t=torch.zeros(shape)).read(file)


def test_skipped_values_stay_and_are_reported(path: str) -> None:
    file = Checkpoint(a=full(1, 2), b=full(1), n=1, only=full(1)).write(path)
    live = Checkpoint(a=full(0, 3), b=full(0), n=full(0), mine=0)
    with pytest.warns(CheckpointWarning) as caught:
        status = live.read(file, options=SKIP)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert texts[0].startswith(f"{file}: a skipped: saved a tensor of shape (2,)")
    assert texts[1].startswith(f"{file}: n skipped: saved a python value, live a Tensor")
    assert (live.a.tolist(), live.b.tolist(), live.n.tolist()) == ([0, 0, 0], [1, 1], [0, 0])
    assert status.mismatched[0] == (
        "a",
        "a tensor of shape (2,) and dtype float32",
        "a tensor of shape (3,) and dtype float32",
    )
    assert status.mismatched[0].key == "a"
    assert status.unexpected == ("a", "n", "only")
    assert status.pending == ("only",)
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched):
        with pytest.raises(AssertionError, match=r"(?s)were skipped.*a: saved .*n: saved"):
            assertion()
    status.assert_nontrivial_match()


# ---- casts -------------------------------------------------------------------------------------------------------

_FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
_INTS = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16]


@pytest.mark.parametrize("kinds", [_FLOATS, _INTS], ids=["floats", "ints"])
def test_casts_within_a_kind(kinds: list[torch.dtype], path: str) -> None:
    for saved in kinds:
        file = Checkpoint(t=torch.arange(6).reshape(2, 3).to(saved)).write(path)
        for live in kinds:
            checkpoint = Checkpoint(t=torch.zeros(2, 3).to(live))
            if saved is not live:
                with pytest.raises(
                    RestoreMismatchError, match=rf"dtype {str(saved)[6:]}, live .*dtype {str(live)[6:]}"
                ):
                    checkpoint.read(file)
            checkpoint.read(file, options=CAST).assert_consumed()
            assert checkpoint.t.dtype is live
            assert checkpoint.t.double().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (torch.float32, torch.int32),
        (torch.int64, torch.float32),
        (torch.bool, torch.int8),
        (torch.uint8, torch.bool),
        (torch.complex64, torch.complex128),
        (torch.float32, torch.complex64),
    ],
    ids=str,
)
def test_no_casts_between_kinds(saved: torch.dtype, live: torch.dtype, path: str) -> None:
    file = Checkpoint(t=torch.ones(2, dtype=saved)).write(path)
    with pytest.raises(RestoreMismatchError, match="t: saved"):
        Checkpoint(t=torch.zeros(2, dtype=live)).read(file, options=CAST)


def test_a_cast_never_changes_a_shape(path: str) -> None:
    file = Checkpoint(t=torch.ones(2, dtype=torch.float64)).write(path)
    with pytest.raises(RestoreMismatchError, match=r"shape \(2,\).*shape \(3,\)"):
        Checkpoint(t=torch.zeros(3)).read(file, options=CAST)


def test_a_cast_of_a_large_strided_tensor_is_verified(path: str) -> None:
    saved = torch.randn(900, 800, dtype=torch.float64)
    file = Checkpoint(t=saved).write(path)
    live = torch.zeros(900, 1600)[:, ::2]
    Checkpoint(t=live).read(file, options=CAST)
    assert torch.equal(live, saved.float())
    _damage(file, "t")
    with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(file)}: t: "):
        Checkpoint(t=live).read(file, options=CAST)


def test_a_module_buffer_called_step_is_cast_like_any_other(path: str) -> None:
    class Counter(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros((), dtype=dtype))

    saved, live = Counter(torch.int64), Counter(torch.int32)
    saved.step += 7
    Checkpoint(m=live).read(Checkpoint(m=saved).write(path), options=CAST).assert_consumed()
    assert live.step == 7


# ---- files -------------------------------------------------------------------------------------------------------


def test_none_restores_nothing() -> None:
    live = Checkpoint(t=full(5), n=1)
    status = live.restore(None)
    assert status.path is None
    assert status.missing == status.unexpected == status.pending == status.mismatched == ()
    assert status.initialize_or_restore() is status
    assert status.expect_partial() is status
    status.close()
    for assertion in (status.assert_consumed, status.assert_existing_objects_matched, status.assert_nontrivial_match):
        with pytest.raises(AssertionError, match=r"restore\(None\) restored nothing"):
            assertion()
    assert live.t.tolist() == [5, 5]


def test_restoring_nothing_does_not_undo_an_earlier_restore(path: str) -> None:
    file = Checkpoint(t=full(1), later=full(2)).write(path)
    live = Checkpoint(t=full(0))
    status = live.read(file)
    live.restore(None)
    assert live.t.tolist() == [1, 1]
    live.later = full(0)
    assert live.later.tolist() == [2, 2]
    status.assert_consumed()


@pytest.mark.parametrize("method", ["restore", "read"])
def test_a_missing_file_is_named_with_a_hint(method: str, tmp_path: Path) -> None:
    live = Checkpoint(t=full(5))
    Checkpoint(t=full(1)).save(tmp_path / "ckpt")
    Checkpoint(t=full(1)).save(tmp_path / "ckpt")

    def message(path: Path) -> str:
        with pytest.raises(CheckpointNotFoundError) as caught:
            getattr(live, method)(path)
        assert isinstance(caught.value, FileNotFoundError)
        return str(caught.value)

    assert message(tmp_path / "ckpt") == (
        f"{tmp_path}/ckpt: no such checkpoint. Is the number missing, as in '{tmp_path}/ckpt-2.h5'?"
    )
    assert "Is the number missing" in message(tmp_path / "ckpt.h5")
    assert message(tmp_path / "other-7").endswith("The directory has ckpt-1.h5, ckpt-2.h5.")
    assert message(tmp_path / "gone" / "ckpt-1").endswith(f"The directory '{tmp_path}/gone' does not exist.")
    assert "pass distckpt.latest_checkpoint(directory)" in message(tmp_path)
    assert live.t.tolist() == [5, 5]


def test_the_suffix_and_the_type_of_the_path_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Checkpoint(t=full(1)).save(tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    for path in (file, file.removesuffix(".h5"), Path(file), Path(file.removesuffix(".h5")), "ckpt-1", "./ckpt-1.h5"):
        live = Checkpoint(t=full(0))
        assert live.restore(path).assert_consumed().path is not None
        assert live.t.tolist() == [1, 1]


def _damage(file: str, key: str, nbytes: int = 1) -> None:
    """Flip bits in the middle of a variable's data."""
    with h5py.File(file) as f:
        offset, size = f[key].id.get_offset(), f[key].id.get_storage_size()
    with Path(file).open("r+b") as f:
        f.seek(offset + size // 2)
        data = f.read(nbytes)
        f.seek(offset + size // 2)
        f.write(bytes(byte ^ 0x40 for byte in data))


def test_damaged_data_are_found_and_named(path: str, tmp_path: Path, open_files: OpenFiles) -> None:
    def make(value: float) -> Checkpoint:
        return Checkpoint(a=full(value), m={"weight": full(value, 100_000)}, z=full(value))

    saved, live = make(1.0), make(0.0)
    saved.save(path)
    file = saved.save(path)
    _damage(file, "m/weight")
    before = open_files()
    with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(file)}: m/weight: .*damaged.*checksum") as caught:
        live.restore(file)
    assert not isinstance(caught.value, CollectiveError)
    assert live.save_counter == 0
    assert open_files() == before
    live.restore(tmp_path / "state-1").assert_consumed()  # another file mends what was undefined
    assert live.m["weight"].unique().tolist() == [1]
    assert live.save_counter == 1
    live.restore(file, options=RestoreOptions(verify=False)).assert_consumed()
    assert live.m["weight"].unique().numel() == 2


def test_a_flipped_checksum_is_damage_of_its_variable(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(2)).write(path)
    _damage(file, ".checksums")
    with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(file)}: (a|b): .*checksum"):
        Checkpoint(a=full(0), b=full(0)).read(file)


def test_damage_of_values_that_nobody_takes_goes_unnoticed(path: str) -> None:
    file = Checkpoint(a=full(1), b=full(2)).write(path)
    _damage(file, "a")
    live = Checkpoint(b=full(0))
    live.read(file, options=RestoreOptions(expect_partial=True))
    assert live.b.tolist() == [2, 2]


def test_a_file_without_checksums_restores(path: str) -> None:
    file = Checkpoint(a=full(1)).write(path, options=SaveOptions(checksums=False))
    live = Checkpoint(a=full(0))
    live.read(file).assert_consumed()
    assert live.a.tolist() == [1, 1]


_WRECKS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no HDF5 at all\n" * 1000),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "another program's": lambda file: (
        file.unlink(),
        h5py.File(file, "w").create_dataset("a", data=[1.0]).file.close(),
    ),
}


@pytest.mark.parametrize("wreck", _WRECKS)
def test_files_that_are_no_complete_checkpoint(wreck: str, path: str, open_files: OpenFiles) -> None:
    file = Path(Checkpoint(a=full(1, 1000), n=1).save(path))
    good = shutil.copy(file, file.with_name("copy.h5"))
    _WRECKS[wreck](file)
    live, before = Checkpoint(a=full(0, 1000), n=0), open_files()
    with pytest.raises(CorruptCheckpointError, match=r"state-1\.h5"):
        live.restore(file)
    assert live.a.unique().tolist() == [0]
    assert live.n == 0
    assert open_files() == before
    live.restore(good).assert_consumed()


def test_a_damaged_manifest_is_found(path: str) -> None:
    file = Checkpoint(a=full(1), n=1).write(path)
    with h5py.File(file) as f:
        offset = f[".manifest"].id.get_offset()
    with Path(file).open("r+b") as f:
        f.seek(offset + 200)
        f.write(b"#")
    with pytest.raises(CorruptCheckpointError, match="manifest is damaged"):
        Checkpoint(a=full(0), n=0).read(file)


@pytest.mark.parametrize("value", [b"[1]", b'{"type":"pickle","value":""}', b'{"type":"float","value":"0"}'])
def test_a_python_value_that_nobody_encoded_is_damage(value: bytes, tmp_path: Path, open_files: OpenFiles) -> None:
    file = tmp_path / "f.h5"
    graph = ObjectGraph([Node(attributes=[Attribute("a", "a"), Attribute("n", "n")])])
    save_file(file, {"a": full(1)}, object_graph=graph, python_state={"n": msgspec.Raw(value)})
    live, before = Checkpoint(a=full(0), n=0), open_files()
    with pytest.raises(CorruptCheckpointError, match=rf"^{re.escape(str(file))}: n: "):
        live.restore(file)
    assert (live.a.tolist(), live.n) == ([0, 0], 0)
    assert open_files() == before


def test_a_failure_of_the_users_code_leaves_the_counter(path: str, open_files: OpenFiles) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("not this one")

    checkpoint = Checkpoint(p=Picky())
    file = checkpoint.save(path)
    live, before = Checkpoint(p=Picky()), open_files()
    with pytest.raises(CollectiveError, match="not this one") as caught:
        live.restore(file)
    assert caught.value.failures == {0: "KeyError: 'not this one' (while p was given its saved state)"}
    assert live.save_counter == 0
    assert open_files() == before


def test_a_restore_that_does_not_verify_reads_no_checksums(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Checkpoint(a=torch.ones(300)).write(path)

    def refuse(*_: object) -> None:
        raise OSError("the checksums cannot be read")

    monkeypatch.setattr(ChecksumReader, "_read", refuse)
    live = Checkpoint(a=torch.zeros(300))
    with pytest.raises(CollectiveError, match="the checksums cannot be read"):
        live.read(file)
    twin = Checkpoint(a=torch.zeros(300))
    twin.read(file, options=RestoreOptions(verify=False))
    assert torch.equal(twin.a, torch.ones(300))


@pytest.mark.parametrize("numel", [300, 300_000])
def test_two_values_restored_into_the_same_memory(path: str, numel: int) -> None:
    """Such as weights that were tied by a view since. Each is what the file says when it comes, and not damaged."""
    file = Checkpoint(a=torch.full((numel,), 1.0), b=torch.full((numel,), 2.0), c=torch.full((9,), 3.0)).write(path)
    memory, other = torch.zeros(numel), torch.zeros(9)
    Checkpoint(a=memory, b=memory.view(numel), c=other).read(file)
    assert torch.equal(memory, torch.full((numel,), 2.0))
    assert torch.equal(other, torch.full((9,), 3.0))


# ---- files of other programs' making, and of other commands ------------------------------------------------------


def test_a_file_rewritten_by_another_program_restores(path: str) -> None:
    """As `h5repack` does: other offsets, chunks, compression."""
    saved = Checkpoint(
        a=torch.randn(50, 40), b=torch.randn(7).bfloat16(), n=1, empty=torch.zeros(0), s=torch.tensor(5.0)
    )
    file = saved.write(path)
    repacked = f"{path}-repacked.h5"
    with h5py.File(file) as source, h5py.File(repacked, "w") as target:
        target.create_dataset("a", data=source["a"][...], chunks=(7, 9), compression="gzip")
        for name in ("b", "empty", "s", ".manifest", ".checksums"):
            source.copy(name, target)
    live = Checkpoint(a=torch.zeros(50, 40), b=torch.zeros(7).bfloat16(), n=0, empty=torch.ones(0), s=torch.tensor(0.0))
    live.read(repacked).assert_consumed()
    assert torch.equal(live.a, saved.a)
    assert torch.equal(live.b, saved.b)
    assert (live.n, live.s.item()) == (1, 5)


# ---- save and restore, write and read ----------------------------------------------------------------------------


def test_the_counter_comes_back_with_restore_and_not_with_read(path: str) -> None:
    saved = Checkpoint(t=full(1))
    for _ in range(3):
        file = saved.save(path)
    live = Checkpoint(t=full(0))
    live.read(file).assert_consumed()
    assert live.save_counter == 0
    live.restore(file).assert_consumed()
    assert live.save_counter == 3


def test_a_written_file_has_no_counter(path: str, keys_of: Callable[[str], set[str]]) -> None:
    saved = Checkpoint(t=full(1))
    saved.save(path)
    file = saved.write(path)
    assert keys_of(file) == {"t"}
    live = Checkpoint(t=full(0))
    live.save(path)
    live.save(path)
    live.restore(file).assert_consumed().assert_nontrivial_match()
    assert live.save_counter == 3
    assert live.t.tolist() == [1, 1]


def test_reading_a_saved_file_leaves_nothing_open(path: str, open_files: OpenFiles) -> None:
    file = Checkpoint(t=full(1)).save(path)
    before = open_files()
    live = Checkpoint(t=full(0))
    status = live.read(file)
    assert open_files() == before
    assert status.pending == status.unexpected == ()


def test_a_value_called_like_the_counter_deeper_down_is_an_ordinary_one(path: str) -> None:
    saved, live = Checkpoint(n=Trackable(), d={"save_counter": 7}), Checkpoint(n=Trackable(), d={"save_counter": 0})
    saved.n.save_counter, live.n.save_counter = full(3), full(0)
    live.read(saved.save(path)).assert_consumed()
    assert live.n.save_counter.tolist() == [3, 3]
    assert live.d == {"save_counter": 7}


def test_the_log_has_one_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    file = Checkpoint(a=full(1), b=1, later=1).save(path)
    with caplog.at_level(logging.INFO, "distckpt"):
        Checkpoint(a=full(0), b=0, mine=0).restore(file, options=RestoreOptions(expect_partial=True))
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 1
    assert lines[0].startswith(f"restored 2 of 3 values, 1 pending, 1 missing, 0 skipped from {file} in 0.")


def test_latest_checkpoint_finds_what_was_saved(tmp_path: Path) -> None:
    assert distckpt.latest_checkpoint(tmp_path) is None
    checkpoint = Checkpoint(t=full(1))
    checkpoint.write(tmp_path / "zzz")
    assert distckpt.latest_checkpoint(tmp_path) is None
    for i in (1, 2):
        assert distckpt.latest_checkpoint(tmp_path) == (str(tmp_path / f"ckpt-{i - 1}.h5") if i > 1 else None)
        checkpoint.save(tmp_path / "ckpt")
    os.truncate(tmp_path / "ckpt-2.h5", 1000)
    with pytest.warns(CheckpointWarning, match=r"ckpt-2\.h5 is passed over"):
        latest = distckpt.latest_checkpoint(tmp_path)
    assert latest == str(tmp_path / "ckpt-1.h5")


def test_three_lives_of_a_program(tmp_path: Path) -> None:
    for life in range(3):
        model = nn.Linear(1, 1)
        checkpoint = Checkpoint(model=model, step=0)
        checkpoint.restore(distckpt.latest_checkpoint(tmp_path))
        assert checkpoint.step == 10 * life
        for _ in range(10):
            checkpoint.step += 1
        with torch.no_grad():
            model.weight.fill_(life) if life == 0 else model.weight.add_(1)
        checkpoint.save(tmp_path / "ckpt")
        assert checkpoint.save_counter == life + 1
        assert model.weight.item() == life
