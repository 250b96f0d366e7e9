from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distckpt.storage import commit as commits
from distckpt.storage.commit import commit, discard, sweep, temp_path
from tests.bare import bare


def write(path: str | Path, content: bytes = b"data") -> Path:
    Path(path).write_bytes(content)
    return Path(path)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


# ---- names


def test_temp_path_is_hidden_unique_and_beside_the_final_one(tmp_path: Path) -> None:
    final = tmp_path / "sub" / "ckpt-3.h5"
    temp = Path(temp_path(final))
    assert temp.parent == final.parent
    assert re.fullmatch(r"\.ckpt-3\.h5\.[0-9a-f]{32}\.tmp", temp.name)
    assert temp_path(final) != str(temp)
    assert temp_path("ckpt-3.h5").startswith(".ckpt-3.h5.")


# ---- commit

NO_RENAMEAT2 = pytest.param(errno.ENOSYS, id="link")
RENAMEAT2 = pytest.param(None, id="renameat2")


@pytest.fixture(params=[RENAMEAT2, NO_RENAMEAT2])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(commits, "_renameat2", lambda *_: request.param)


@pytest.mark.usefixtures("_both_ways")
def test_commit_to_a_free_name(tmp_path: Path) -> None:
    final = tmp_path / "ckpt-1.h5"
    commit(str(write(temp_path(final))), str(final), replace=False, durable=True)
    assert names(tmp_path) == ["ckpt-1.h5"]
    assert final.read_bytes() == b"data"


@pytest.mark.usefixtures("_both_ways")
def test_commit_never_replaces(tmp_path: Path) -> None:
    final = write(tmp_path / "ckpt-1.h5", b"precious")
    temp = write(temp_path(final))
    with pytest.raises(FileExistsError, match=r"another job .*file_prefix of its own.*ckpt-1.h5"):
        commit(str(temp), str(final), replace=False, durable=True)
    assert final.read_bytes() == b"precious"
    assert temp.read_bytes() == b"data"


def test_commit_replaces_on_request(tmp_path: Path) -> None:
    final = write(tmp_path / "model.h5", b"old")
    commit(str(write(temp_path(final))), str(final), replace=True, durable=True)
    assert names(tmp_path) == ["model.h5"]
    assert final.read_bytes() == b"data"


def test_commit_of_a_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for replace in (False, True):
        commit(str(write(temp_path("ckpt-1.h5"))), "ckpt-1.h5", replace=replace, durable=True)
    assert names(tmp_path) == ["ckpt-1.h5"]


def test_commit_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(commits, "_renameat2", lambda *_: errno.EINVAL)
    monkeypatch.setattr(os, "link", refuse)
    final = tmp_path / "ckpt-1.h5"
    commit(str(write(temp_path(final))), str(final), replace=False, durable=False)
    assert names(tmp_path) == ["ckpt-1.h5"]
    with pytest.raises(FileExistsError, match="another job has written this file meanwhile"):
        commit(str(write(temp_path(final), b"second")), str(final), replace=False, durable=False)
    assert final.read_bytes() == b"data"


def test_commit_when_the_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer it did not get: done, and yet an error."""
    final = tmp_path / "ckpt-1.h5"

    def renames_twice(source: Path, target: Path) -> int:
        source.rename(target)
        return errno.ENOENT

    monkeypatch.setattr(commits, "_renameat2", renames_twice)
    commit(str(write(temp_path(final))), str(final), replace=False, durable=False)
    assert final.read_bytes() == b"data"
    link = os.link

    def links_twice(source: Path, target: Path, **options: Any) -> None:
        link(source, target, **options)
        raise FileExistsError(errno.EEXIST, "exists", str(target))

    monkeypatch.setattr(commits, "_renameat2", lambda *_: errno.ENOSYS)
    monkeypatch.setattr(os, "link", links_twice)
    second = tmp_path / "ckpt-2.h5"
    commit(str(write(temp_path(second))), str(second), replace=False, durable=False)
    assert names(tmp_path) == ["ckpt-1.h5", "ckpt-2.h5"]


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_renameat2", lambda *_: errno.EDQUOT)
    final = tmp_path / "ckpt-1.h5"
    with pytest.raises(OSError, match=r"quota.*ckpt-1.h5"):
        commit(str(write(temp_path(final))), str(final), replace=False, durable=False)


def test_durable_means_that_the_directory_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(commits.rawio, "sync_directory", synced.append)
    for number, durable in enumerate((False, True)):
        final = tmp_path / f"ckpt-{number}.h5"
        commit(str(write(temp_path(final))), str(final), replace=False, durable=durable)
    assert synced == [tmp_path]


def test_renameat2_is_there() -> None:
    """Else the tests above test the same way twice."""
    assert hasattr(ctypes.CDLL(None), "renameat2")


# ---- discard and sweep


def test_discard_removes_what_mpi_left_too(tmp_path: Path) -> None:
    final = tmp_path / "ckpt-1.h5"
    temp, other = write(temp_path(final)), write(temp_path(final))
    write(f"{temp}.locktest.0")
    write(f"{temp}.locktest.11")
    discard(str(temp))
    assert names(tmp_path) == [other.name]
    discard(str(temp))


def test_sweep_leaves_everything_else_alone(tmp_path: Path) -> None:
    kept = ["ckpt-1.h5", ".ckpt-1.h5.tmp", ".bashrc", "checkpoint", f".x.{'0' * 31}.tmp", f"x.{'0' * 32}.tmp", ".tmp"]
    for name in kept:
        age(write(tmp_path / name), 1000)
    assert sweep(tmp_path) == []
    assert names(tmp_path) == sorted(kept)
    assert sweep(tmp_path / "nowhere") == []


def test_sweep_keeps_the_files_of_a_living_writer(tmp_path: Path) -> None:
    temp = write(temp_path(tmp_path / "ckpt-1.h5"))
    write(f"{temp}.locktest.0")
    assert sweep(tmp_path) == []
    assert len(names(tmp_path)) == 2


def test_sweep_removes_old_files(tmp_path: Path) -> None:
    foreign = write(tmp_path / f".ckpt-1.h5.{'ab' * 16}.tmp")
    assert sweep(tmp_path) == []
    age(foreign, 23)
    assert sweep(tmp_path) == []
    age(foreign, 25)
    assert sweep(tmp_path) == [foreign.name]


def test_sweep_removes_the_files_of_a_dead_writer(tmp_path: Path) -> None:
    code = f"""{bare()}
from distckpt.storage.commit import temp_path
temp = temp_path({str(tmp_path / "ckpt-1.h5")!r})
for name in (temp, temp + ".locktest.3"):
    open(name, "w").close()
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        assert sweep(tmp_path) == []
        writer.kill()
        writer.wait(60)
    assert len(sweep(tmp_path)) == 2
    assert names(tmp_path) == []


def test_sweep_knows_a_reused_process_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(temp_path(tmp_path / "ckpt-1.h5"))
    monkeypatch.setattr(commits, "_process_start", lambda _: "another!")
    assert len(sweep(tmp_path)) == 1


def test_sweep_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_read_or_empty", lambda _: "")
    temp = write(temp_path(tmp_path / "ckpt-1.h5"))
    assert sweep(tmp_path) == []
    dead = subprocess.Popen(["true"])
    dead.wait(60)
    writer = commits._this_writer()
    write(str(temp).replace(writer, f"{writer[:8]}{dead.pid:08x}{writer[16:]}"))
    assert len(sweep(tmp_path)) == 1
    assert names(tmp_path) == [temp.name]


def test_sweep_goes_on_after_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / f".a.{'ab' * 16}.tmp"
    directory.mkdir()
    file = write(tmp_path / f".b.{'ab' * 16}.tmp")
    age(directory, 25)
    age(file, 25)
    assert sweep(tmp_path) == [file.name]
    assert directory.name in caplog.text


def test_a_writer_that_has_ended_but_was_not_waited_for_is_gone(tmp_path: Path) -> None:
    final = str(tmp_path / "ckpt-1.h5")
    code = f"{bare()}from distckpt.storage.commit import temp_path; open(temp_path({final!r}), 'w')"
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []
    child.wait()
