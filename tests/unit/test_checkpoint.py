"""`Checkpoint` itself: names, numbers, paths, copies, and what a save that fails leaves behind."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointError,
    CollectiveError,
    LayoutError,
    SaveOptions,
    Trackable,
    latest_checkpoint,
)
from distckpt.saving import draft as drafts
from distckpt.saving import output as outputs


def full(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def files(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# ---- names -------------------------------------------------------------------------------------------------------

_METHODS = {name for cls in (Checkpoint, Trackable) for name in vars(cls) if not name.startswith("__")}
_PARAMETERS = {"root", "comm", "file_prefix", "path", "save_path", "options"}


@pytest.mark.parametrize("name", sorted(_METHODS | _PARAMETERS))
def test_names_of_methods_and_parameters_are_refused(name: str) -> None:
    assert {"save", "write", "restore", "read", "save_counter", "retry_pending", "track", "_root"} <= _METHODS
    checkpoint = Checkpoint(a=1)
    with pytest.raises(ValueError, match=rf"^{name}: the name belongs to a method or parameter"):
        setattr(checkpoint, name, 5)
    with pytest.raises(ValueError, match=rf"^{name}: the name belongs"):
        checkpoint.track(torch.ones(1), name)
    if name != "comm":  # the constructor's own
        with pytest.raises(ValueError, match=rf"^{name}: the name belongs"):
            Checkpoint(**{name: 5})


def test_other_names_are_free(path: str) -> None:
    names = ["self", "_private", "step", "checkpoint", "model", "saved", "Save", "counter"]
    checkpoint = Checkpoint(**dict.fromkeys(names, 1))
    live = Checkpoint(**dict.fromkeys(names, 0))
    live.read(checkpoint.write(path)).assert_consumed()
    assert all(getattr(live, name) == 1 for name in names)


def test_the_root_comes_by_position_only() -> None:
    with pytest.raises(ValueError, match=r"^root: the name belongs"):
        Checkpoint(root=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="positional"):
        Checkpoint(nn.Linear(1, 1), None)  # type: ignore[misc]


@pytest.mark.parametrize("comm", [5, "world", object()], ids=["number", "text", "object"])
def test_a_communicator_is_a_communicator(comm: Any) -> None:
    with pytest.raises(TypeError, match=r"comm: expected an mpi4py intracommunicator.*Got"):
        Checkpoint(comm=comm)


def test_attributes_are_ordinary_attributes() -> None:
    model = nn.Linear(1, 1)
    checkpoint = Checkpoint(model=model, items=[1])
    assert checkpoint.model is model
    assert type(checkpoint.items) is list
    checkpoint.model = None
    assert checkpoint.model is None
    with pytest.raises(AttributeError, match="nothing"):
        _ = checkpoint.nothing


def test_making_one_talks_to_nobody() -> None:
    """Neither MPI nor HDF5 is loaded before it is needed."""
    code = (
        "import sys, torch, distckpt\n"
        "c = distckpt.Checkpoint(torch.nn.Linear(1, 1), step=0)\n"
        "c.x = 1; c.save_counter; repr(c)\n"
        "assert not {'mpi4py.MPI', 'h5py'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(distckpt.__file__).parents[1])


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_the_counter_counts_saves_that_succeeded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    assert checkpoint.save_counter == 0
    paths = [checkpoint.save(tmp_path / "ckpt") for _ in range(3)]
    assert paths == [str(tmp_path / f"ckpt-{i}.h5") for i in (1, 2, 3)]
    assert checkpoint.save_counter == 3
    assert type(checkpoint.save_counter) is int
    checkpoint.write(tmp_path / "other")
    assert checkpoint.save_counter == 3
    assert files(tmp_path) == ["checkpoint", "ckpt-1.h5", "ckpt-2.h5", "ckpt-3.h5", "other.h5"]
    with pytest.raises(AttributeError):
        del checkpoint.save_counter


def test_numbers_continue_after_the_largest_on_disk(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    for _ in range(3):
        checkpoint.save(tmp_path / "ckpt")
    assert Checkpoint(a=full(2)).save(tmp_path / "ckpt") == str(tmp_path / "ckpt-4.h5")
    before = (tmp_path / "ckpt-4.h5").read_bytes()
    checkpoint.restore(tmp_path / "ckpt-1")
    assert checkpoint.save_counter == 1
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-5.h5")
    assert checkpoint.save_counter == 5
    assert (tmp_path / "ckpt-4.h5").read_bytes() == before
    (tmp_path / "ckpt-0070.h5").touch()  # whatever it is, it has a number
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-71.h5")


def test_a_number_that_no_checkpoint_can_have(tmp_path: Path) -> None:
    (tmp_path / f"c-{10**18}.h5").write_bytes(b"of somebody else")
    checkpoint = Checkpoint(a=1)
    assert checkpoint.save(tmp_path / "c") == str(tmp_path / "c-1.h5")
    assert distckpt.latest_checkpoint(tmp_path) == str(tmp_path / "c-1.h5")
    (tmp_path / f"c-{10**18 - 1}.h5").write_bytes(b"of somebody else")
    with pytest.raises(CollectiveError, match=rf"c-{10**18}\.h5: expected a number below .*Choose another name"):
        checkpoint.save(tmp_path / "c")


def test_the_counter_may_be_ahead_of_the_disk(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    for _ in range(3):
        checkpoint.save(tmp_path / "ckpt")
    for i in (1, 2, 3):
        (tmp_path / f"ckpt-{i}.h5").unlink()
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-4.h5")


def test_prefixes_have_numbers_of_their_own_and_one_counter(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    assert checkpoint.save(tmp_path / "a") == str(tmp_path / "a-1.h5")
    assert checkpoint.save(tmp_path / "b") == str(tmp_path / "b-2.h5")
    assert Checkpoint(a=full(1)).save(tmp_path / "a") == str(tmp_path / "a-2.h5")
    assert Checkpoint(a=full(1)).save(tmp_path / "ab") == str(tmp_path / "ab-1.h5")
    assert Checkpoint(a=full(1)).save(tmp_path / "a-7") == str(tmp_path / "a-7-1.h5")
    assert json.loads((tmp_path / "checkpoint").read_text())["prefixes"] == ["a", "a-7", "ab", "b"]


def test_the_number_in_the_file_is_that_of_its_name(tmp_path: Path) -> None:
    first = Checkpoint(a=full(1))
    for _ in range(3):
        file = first.save(tmp_path / "ckpt")
    file = Checkpoint(a=full(1)).save(tmp_path / "ckpt")
    assert file.endswith("ckpt-4.h5")
    live = Checkpoint(a=full(0))
    live.restore(file)
    assert live.save_counter == 4


def test_write_replaces_and_save_never_does(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1), n=1)
    for value in (1, 2, 3):
        checkpoint.a.fill_(value)
        checkpoint.n = "x" * value
        assert checkpoint.write(tmp_path / "m") == str(tmp_path / "m.h5")
        live = Checkpoint(a=full(0), n=0)
        live.read(tmp_path / "m").assert_consumed().assert_existing_objects_matched().assert_nontrivial_match()
        assert live.a.tolist() == [value, value]
        assert live.n == "x" * value
    assert files(tmp_path) == ["m.h5"]  # no state file either


# ---- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["ckpt", "ckpt.h5", "./ckpt", "new/and/deep/ckpt", "ckpt-5", "a.b", "with space", "ü"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_paths(prefix: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative stays relative, ".h5" at the end makes no difference, directories are made, text comes back."""
    monkeypatch.chdir(tmp_path)
    name = str(Path(prefix)).removesuffix(".h5")
    checkpoint = Checkpoint(a=full(1))
    saved, written = checkpoint.save(kind(prefix)), checkpoint.write(kind(prefix))
    assert (saved, written) == (f"{name}-1.h5", f"{name}.h5")
    assert type(saved) is str
    for file in (saved, written):
        live = Checkpoint(a=full(0))
        live.read(kind(file)).assert_consumed()
        assert live.a.tolist() == [1, 1]
    assert json.loads((tmp_path / prefix).with_name("checkpoint").read_text())["latest"] == Path(saved).name


@pytest.mark.parametrize("prefix", ["", ".", "..", "a/", "a/.", ".h5"])
@pytest.mark.parametrize("method", ["save", "write"])
def test_a_path_ends_in_a_name(prefix: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="expected a path that ends in a name, such as"):
        getattr(Checkpoint(a=full(1)), method)(prefix)
    assert files(tmp_path) == []


def test_the_name_of_the_state_file_is_taken(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    with pytest.raises(CheckpointError, match="'checkpoint' is the name of the state file"):
        checkpoint.write(tmp_path / "checkpoint")
    assert checkpoint.save(tmp_path / "checkpoint") == str(tmp_path / "checkpoint-1.h5")
    assert distckpt.latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1.h5")


def test_a_directory_can_be_moved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    checkpoint.save(tmp_path / "old" / "ckpt")
    (tmp_path / "old").rename(tmp_path / "new")
    latest = distckpt.latest_checkpoint(tmp_path / "new")
    assert latest == str(tmp_path / "new" / "ckpt-1.h5")
    live = Checkpoint(a=full(0))
    live.restore(latest).assert_consumed()


_NO_PATH = [3, b"run/ckpt", [Path("ckpt")]]
_PARAMETER = {
    "save": "file_prefix",
    "save_async": "file_prefix",
    "write": "path",
    "restore": "save_path",
    "read": "path",
}


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for method in _PARAMETER for path in _NO_PATH] + [("save", None), ("write", None)],
)
def test_what_is_no_path_is_refused_by_the_name_of_the_parameter(method: str, path: Any) -> None:
    checkpoint = Checkpoint(a=full(1))
    got = rf"{re.escape(repr(path))} \(type: {type(path).__name__}\)"
    words = rf"{_PARAMETER[method]}: expected a str or os.PathLike\[str\]. Got {got}"
    with pytest.raises((TypeError, CollectiveError), match=words):
        getattr(checkpoint, method)(path)
    assert checkpoint.save_counter == 0


@pytest.mark.parametrize("method", _PARAMETER)
def test_a_path_that_is_no_utf8_is_refused_by_the_name_of_the_parameter(method: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff/ckpt")
    with pytest.raises(
        (ValueError, CollectiveError), match=rf"{_PARAMETER[method]}: expected a path that is UTF-8\. Got"
    ):
        getattr(checkpoint, method)(path)
    assert checkpoint.save_counter == 0
    assert not list(tmp_path.iterdir())


def test_other_functions_refuse_it_too(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    for ask in (
        distckpt.latest_checkpoint,
        distckpt.load_checkpoint,
        partial(distckpt.CheckpointManager, Checkpoint()),
    ):
        with pytest.raises(ValueError, match=r"(directory|path): expected a path that is UTF-8\. Got"):
            ask(path)


@pytest.mark.parametrize("path", [3, b"run", None], ids=repr)
def test_other_functions_name_the_parameter_too(path: Any, tmp_path: Path) -> None:
    expected = rf": expected a str or os.PathLike\[str\]. Got {re.escape(repr(path))} \(type: {type(path).__name__}\)"
    with pytest.raises(TypeError, match=f"^directory{expected}"):
        distckpt.CheckpointManager(Checkpoint(a=1), path)
    with pytest.raises(TypeError, match=f"^directory{expected}"):
        distckpt.latest_checkpoint(path)
    with pytest.raises(TypeError, match=f"^path{expected}"):
        distckpt.load_checkpoint(path)
    with pytest.raises(CollectiveError, match=f"TypeError: path{expected}"):
        distckpt.CheckpointManager(Checkpoint(a=1), tmp_path).pin(path)


# ---- copies ------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_independent(path: str) -> None:
    checkpoint = Checkpoint(model=nn.Linear(2, 2), tree=Trackable(), n=[1])
    checkpoint.tree.x = full(1)
    checkpoint.tree.hidden = distckpt.NoDependency(full(9))
    checkpoint.tree.track(full(3), "by_name")
    checkpoint.save(path)
    twin = copy.deepcopy(checkpoint)
    assert twin.save_counter == 1
    assert twin.model is not checkpoint.model
    assert twin.tree.x is not checkpoint.tree.x
    twin.tree.x.fill_(5)
    twin.n.append(2)
    twin.extra = full(2)
    assert twin.save(path) == f"{path}-2.h5"
    assert checkpoint.save_counter == 1
    assert checkpoint.tree.x.tolist() == [1, 1]
    assert checkpoint.n == [1]
    checkpoint.extra = full(0)
    checkpoint.restore(f"{path}-2").assert_consumed()
    assert checkpoint.tree.x.tolist() == [5, 5]
    assert checkpoint.n == [1, 2]
    assert checkpoint.save_counter == 2


def test_a_deep_copy_keeps_what_is_shared(path: str) -> None:
    model = nn.Linear(2, 2)
    state = {"checkpoint": Checkpoint(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)), "model": model}
    twin = copy.deepcopy(state)
    assert twin["model"] is not model
    assert twin["checkpoint"].optimizer.param_groups[0]["params"][0] is twin["model"].weight
    file = twin["checkpoint"].save(path)
    assert not torch.equal(nn.Linear(2, 2).weight, model.weight)
    with torch.no_grad():
        twin["model"].weight.zero_()
    twin["checkpoint"].restore(file).assert_consumed()
    assert torch.equal(twin["model"].weight, model.weight)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_is_refused(protocol: int) -> None:
    with pytest.raises(TypeError, match=r"a Checkpoint cannot be pickled. Call save\(\) and restore\(\) instead"):
        pickle.dumps(Checkpoint(a=1), protocol)
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(Checkpoint(a=1))


# ---- saves of a known layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["save", "write"])
def test_a_further_save_encodes_of_its_manifest_only_what_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint = Checkpoint(a=full(1), step=1)
    getattr(checkpoint, call)(tmp_path / "ckpt")
    monkeypatch.setattr("distckpt.storage.manifest.tilings_of", None)
    checkpoint.a.fill_(2)
    checkpoint.step = 2
    path = getattr(checkpoint, call)(tmp_path / "ckpt", options=SaveOptions(metadata={"loss": 0.5}))
    twin = Checkpoint(a=full(0), step=0)
    twin.read(path).expect_partial()
    assert (twin.a.tolist(), twin.step) == ([2, 2], 2)
    with distckpt.load_checkpoint(path) as reader:
        assert reader.metadata == {"loss": 0.5}


# ---- saves that fail ---------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(a=full(1))
    checkpoint.save(tmp_path / "ckpt")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    checkpoint.bad = torch.zeros(1, device="meta")
    for method in ("save", "write"):
        with pytest.raises(LayoutError, match="bad"):
            getattr(checkpoint, method)(tmp_path / "ckpt")
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert checkpoint.save_counter == 1
    del checkpoint.bad
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-2.h5")


@pytest.mark.parametrize("calls", [("pwrite", "pwritev"), ("fsync",)])
@pytest.mark.parametrize("background", [False, True])
def test_an_error_of_the_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[str, ...], background: bool
) -> None:
    checkpoint = Checkpoint(a=full(1))
    checkpoint.save(tmp_path / "ckpt")

    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    for name in calls:
        monkeypatch.setattr(os, name, refuse)
    save = (lambda prefix: checkpoint.save_async(prefix).result()) if background else checkpoint.save
    with pytest.raises(CollectiveError, match=f"Input/output error: '{tmp_path}(/ckpt-2.h5)?'"):
        save(tmp_path / "ckpt")
    assert files(tmp_path) == ["checkpoint", "ckpt-1.h5"]


def test_after_a_save_that_fails_the_layout_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, create, created = Checkpoint(a=full(1)), outputs.create_file, list[str]()

    def count(path: str, *how: Any) -> Any:
        created.append(path)
        return create(path, *how)

    def fail(owner: object, name: str, **options: bool) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(CollectiveError, match="No space left"):
                checkpoint.save(tmp_path / "ckpt", options=SaveOptions(**options))

    monkeypatch.setattr(outputs, "create_file", count)
    fail(drafts, "commit")
    assert len(created) == 1
    checkpoint.a += 4
    Checkpoint(a=full(0)).restore(checkpoint.save(tmp_path / "ckpt")).assert_consumed()
    fail(outputs, "create_file", checksums=False)
    assert len(created) == 1
    live = Checkpoint(a=full(0))
    live.restore(checkpoint.save(tmp_path / "ckpt", options=SaveOptions(checksums=False))).assert_consumed()
    assert live.a.tolist() == [5, 5]
    assert len(created) == 2  # files without checksums are of another form


def test_a_file_in_the_way_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checkpoint = Checkpoint(a=full(1))
    with pytest.raises(CollectiveError, match="file") as caught:
        checkpoint.save(tmp_path / "file" / "ckpt")
    assert list(caught.value.failures) == [0]
    assert isinstance(caught.value.__cause__, OSError)
    assert checkpoint.save_counter == 0
    assert checkpoint.save(tmp_path / "ckpt").endswith("ckpt-1.h5")


def test_another_job_takes_the_number_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, commit = Checkpoint(a=full(1)), drafts.commit

    def commit_late(temp: str, final: str, **how: bool) -> None:
        if not Path(final).exists():
            Path(final).write_bytes(b"of another job")
        commit(temp, final, **how)

    monkeypatch.setattr(drafts, "commit", commit_late)
    with pytest.raises(CollectiveError, match=r"another job .* save again, .* a file_prefix of its own: '.*ckpt-1.h5'"):
        checkpoint.save(tmp_path / "ckpt")
    assert files(tmp_path) == ["ckpt-1.h5"]
    assert checkpoint.save_counter == 0
    monkeypatch.undo()
    assert checkpoint.save(tmp_path / "ckpt") == str(tmp_path / "ckpt-2.h5")
    assert (tmp_path / "ckpt-1.h5").read_bytes() == b"of another job"
    Checkpoint(a=full(0)).restore(tmp_path / "ckpt-2").assert_consumed()


def test_a_restore_or_save_in_another_thread(tmp_path: Path) -> None:
    checkpoint, results = Checkpoint(a=full(1)), []

    def work() -> None:
        results.append(checkpoint.save(tmp_path / "ckpt"))
        results.append(checkpoint.restore(tmp_path / "ckpt-1").assert_consumed().path)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [str(tmp_path / "ckpt-1.h5")] * 2


def test_threads_take_turns(tmp_path: Path) -> None:
    checkpoint, saved = Checkpoint(a=torch.zeros(100, 100)), list[str]()
    calls: list[Callable[[], str]] = [
        lambda: checkpoint.save(tmp_path / "c"),
        lambda: checkpoint.write(tmp_path / "w"),
        lambda: checkpoint.save_async(tmp_path / "c").result(),
        lambda: Checkpoint(b=1).save(tmp_path / "d"),
    ] * 3
    threads = [threading.Thread(target=lambda call=call: saved.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbered = [f"c-{number}.h5" for number in range(1, 7)] + [f"d-{number}.h5" for number in range(1, 4)]
    assert sorted(Path(path).name for path in saved) == [*numbered, "w.h5", "w.h5", "w.h5"]
    assert files(tmp_path) == sorted([*numbered, "checkpoint", "w.h5"])


def test_many_saves_keep_nothing_open(tmp_path: Path, open_files: Callable[[], list[str]]) -> None:
    checkpoint = Checkpoint(a=full(1), n=0)
    checkpoint.save(tmp_path / "ckpt")
    before = open_files()
    for i in range(30):
        checkpoint.n = i
        checkpoint.restore(checkpoint.save(tmp_path / "ckpt", options=SaveOptions(durable=False))).assert_consumed()
    assert open_files() == before
    assert checkpoint.save_counter == 31
    assert not any(name.startswith(".") for name in files(tmp_path))


def test_saves_of_different_checkpoints_share_a_directory(tmp_path: Path) -> None:
    generator, critic = Checkpoint(g=full(1)), Checkpoint(c=full(2))
    assert generator.save(tmp_path / "gan") == str(tmp_path / "gan-1.h5")
    assert critic.save(tmp_path / "critic") == str(tmp_path / "critic-1.h5")
    live = Checkpoint(c=full(0))
    live.restore(distckpt.latest_checkpoint(tmp_path)).assert_consumed()
    assert live.c.tolist() == [2, 2]


def test_graphs_deeper_than_the_stack(tmp_path: Path) -> None:
    def chain(value: float) -> distckpt.Trackable:
        top = distckpt.Trackable()
        top.x = torch.full((2,), value)
        for _ in range(1500):
            below, top = top, distckpt.Trackable()
            top.n = below
        return top

    saved, found = distckpt.Checkpoint(top=chain(1.0)), distckpt.Checkpoint(top=chain(2.0))
    found.restore(saved.save(tmp_path / "ckpt")).assert_consumed()
    node = found.top
    while "n" in vars(node):
        node = node.n
    assert node.x.tolist() == [1.0, 1.0]


def test_paths_may_be_a_kind_of_str(tmp_path: Path) -> None:
    checkpoint = Checkpoint(step=1)
    saved = checkpoint.save(np.str_(tmp_path / "ckpt"))
    assert type(saved) is str
    twin = Checkpoint(step=2)
    twin.restore(np.str_(saved)).assert_consumed()
    assert twin.step == 1
    assert latest_checkpoint(np.str_(tmp_path)) == saved
