"""What a user sees through `Checkpoint` when directory, disk, file or communicator are bad: one error on every rank."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
import torch

from distckpt import (
    Checkpoint,
    CheckpointError,
    CheckpointManager,
    CheckpointNotFoundError,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RestoreOptions,
    SaveOptions,
    ShardedVariable,
    latest_checkpoint,
)
from distckpt.storage import manifest as manifests
from distckpt.storage.hdf5 import open_checkpoint

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(60)]

FAST = SaveOptions(durable=False)
BOTH = pytest.mark.parametrize("transport", ["posix", "mpio"])
ROWS = 1 << 18  # 1 MiB per rank


@pytest.fixture
def two(subcomm: Any, mpi_dir: Path) -> Any:  # noqa: ARG001  # skip when all ranks have set that up
    """A communicator of two ranks; the others have nothing to do."""
    comm = subcomm(2)
    if comm is None:
        pytest.skip("tests two ranks")
    return comm


class Program:
    """A sharded and a replicated tensor, and a number."""

    def __init__(self, comm: Any, value: float, rows: int = ROWS) -> None:
        self.tensor = torch.full((rows,), value + comm.rank)
        self.replica = torch.full((5,), value)
        sharded = ShardedVariable(self.tensor, (rows * comm.size,), (rows * comm.rank,))
        self.checkpoint = Checkpoint(comm=comm, sharded=sharded, replica=self.replica, step=int(value))

    def values(self) -> list[object]:
        state = (self.checkpoint.step, self.checkpoint.save_counter)
        return [self.tensor.numpy().tobytes(), self.replica.numpy().tobytes(), *state]


def same_error(comm: Any, kind: type[BaseException], call: Callable[[], object]) -> str:
    """The text of the error that the call raises, the same on all ranks."""
    with pytest.raises(kind) as error:
        call()
    texts = comm.allgather(str(error.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


def assert_works(comm: Any, program: Program, directory: Path) -> None:
    path = program.checkpoint.save(directory / "ckpt", options=FAST)
    twin = Program(comm, 50, rows=len(program.tensor))
    twin.checkpoint.restore(path).assert_consumed()
    assert twin.values() == program.values()


# ---- where a checkpoint cannot be --------------------------------------------------------------------------------

BAD_TARGETS = {
    "below a file": ("file/ckpt", ["NotADirectoryError", "file", "choose another directory"]),
    "far below a file": ("file/a/b/ckpt", ["NotADirectoryError", "choose another directory"]),
    "no file system for it": ("/proc/nowhere/ckpt", ["/proc/nowhere", "choose another one"]),
    "no name": ("sub/", ["ValueError", ": expected a path that ends in a name"]),
    "too long a name": ("n" * 300, ["OSError", "File name too long, choose another directory or name"]),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_save_where_no_file_can_be(two: Any, mpi_dir: Path, name: str) -> None:
    target, words = BAD_TARGETS[name]
    if two.rank == 0:
        (mpi_dir / "file").write_text("no directory")
    two.Barrier()
    program = Program(two, 1)
    before = program.values()
    prefix = f"{mpi_dir}/{target}" if not target.startswith("/") else target
    for call in (program.checkpoint.save, program.checkpoint.write):
        text = same_error(two, CollectiveError, lambda: call(prefix))  # noqa: B023
        assert all(word in text for word in words), text
        assert "rank 0" in text
    assert program.values() == before
    assert [path.name for path in mpi_dir.iterdir()] == ["file"]
    assert_works(two, program, mpi_dir)


def test_write_over_the_state_file_or_a_directory(two: Any, mpi_dir: Path) -> None:
    program = Program(two, 1)
    text = same_error(two, CollectiveError, lambda: program.checkpoint.write(mpi_dir / "checkpoint"))
    assert "state file" in text
    if two.rank == 0:
        (mpi_dir / "taken.h5").mkdir()
    two.Barrier()
    same_error(two, CollectiveError, lambda: program.checkpoint.write(mpi_dir / "taken"))
    two.Barrier()
    assert [path.name for path in mpi_dir.iterdir()] == ["taken.h5"]
    assert_works(two, program, mpi_dir)


@pytest.fixture
def mounted(two: Any, mpi_dir: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)`: a tmpfs that all ranks see; unmounted after the test."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        point = mpi_dir / f"mount{len(made)}"
        done = 0
        if two.rank == 0:
            point.mkdir()
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(point)], check=False).returncode
        if two.bcast(done):
            pytest.skip("mounting is not allowed")
        made.append(point)
        return point

    yield mount
    two.Barrier()
    for point in made if two.rank == 0 else ():
        subprocess.run(["umount", str(point)], check=True)


def test_a_read_only_file_system(two: Any, mounted: Callable[[str], Path], mpi_dir: Path) -> None:
    directory = mounted("ro,size=1m")
    program = Program(two, 1)
    text = same_error(two, CollectiveError, lambda: program.checkpoint.save(directory / "ckpt"))
    assert str(directory) in text
    assert "choose another" in text
    text = same_error(two, CollectiveError, lambda: program.checkpoint.save(directory / "sub" / "ckpt"))
    assert str(directory) in text
    assert "choose another" in text
    assert_works(two, program, mpi_dir)


def fill(disk: Path) -> None:
    """Leave half a MiB."""
    free = shutil.disk_usage(disk).free
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free - (1 << 19))


@BOTH
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_a_full_disk(two: Any, mounted: Callable[[str], Path], transport: Any, known: bool) -> None:
    disk = mounted("size=16m")
    program = Program(two, 1)
    options = SaveOptions(transport=transport)
    program.checkpoint.save(disk / "ckpt", options=options)
    if not known:
        program = Program(two, 1)
    before = program.values()
    if two.rank == 0:
        fill(disk)
    two.Barrier()
    for _ in range(2):
        text = same_error(two, CollectiveError, lambda: program.checkpoint.save(disk / "ckpt", options=options))
        assert "bytes free" in text
        assert "delete old checkpoints or save elsewhere" in text
    assert program.values() == before
    two.Barrier()
    assert sorted(path.name for path in disk.iterdir()) == ["checkpoint", "ckpt-1.h5", "filler"]
    assert latest_checkpoint(disk) == str(disk / "ckpt-1.h5")
    two.Barrier()
    if two.rank == 0:
        (disk / "filler").unlink()
    two.Barrier()
    assert_works(two, program, disk)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@BOTH
@pytest.mark.parametrize("limited", [0, 1])
def test_a_file_size_limit_on_one_rank(two: Any, mpi_dir: Path, transport: Any, limited: int) -> None:
    program = Program(two, 1)
    options = SaveOptions(transport=transport)
    program.checkpoint.save(mpi_dir / "ckpt", options=options)
    before = program.values()
    with file_size_limit(3 << 19) if two.rank == limited else file_size_limit(-1):
        text = same_error(two, CollectiveError, lambda: program.checkpoint.save(mpi_dir / "ckpt", options=options))
    assert f"rank {limited}: " in text
    if limited == 0:  # who makes the file knows at once
        assert "step 'create'" in text
        assert "the file size limit of this process is 1572864 bytes; raise it (ulimit -f)" in text
    else:
        assert "step 'write'" in text
        # With "mpio" in the words of HDF5, or of MPI where that says more.
        expected = ("File too large: sharded",) if transport == "posix" else ("file write failed", "File too large")
        assert any(words in text for words in expected)
    assert program.values() == before
    two.Barrier()
    assert sorted(path.name for path in mpi_dir.iterdir()) == ["checkpoint", "ckpt-1.h5"]
    assert_works(two, program, mpi_dir)


@BOTH
def test_a_rank_without_descriptors(two: Any, mpi_dir: Path, transport: Any) -> None:
    """MPI-IO would wait for ever in the opening of the file, on all ranks."""
    program = Program(two, 1)
    options = SaveOptions(transport=transport)
    program.checkpoint.save(mpi_dir / "ckpt", options=options)
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
    spare = 0 if transport == "posix" else 1  # the file itself can be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + spare if two.rank == 1 else limit, most))
    try:
        text = same_error(two, CollectiveError, lambda: program.checkpoint.save(mpi_dir / "ckpt", options=options))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        for fd in held:
            os.close(fd)
    assert "rank 1: OSError: [Errno 24]" in text
    assert_works(two, program, mpi_dir)


# ---- what is no checkpoint ---------------------------------------------------------------------------------------


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def make_plain_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["sharded"] = np.zeros(3)


def change_manifest(path: Path, **changes: Any) -> None:
    """Replace fields, and seal the manifest anew."""
    manifest = open_checkpoint(str(path)).manifest
    with h5py.File(path, "r") as file:
        stored = file[".manifest"].id
        offset, room = stored.get_offset(), stored.get_storage_size()
    data = manifests.encode(msgspec.structs.replace(manifest, **changes))
    assert len(data) <= room
    with path.open("r+b") as raw:
        raw.seek(offset)
        raw.write(data.ljust(room))


def lie_about_shapes(path: Path) -> None:
    manifest = open_checkpoint(str(path)).manifest
    variables = [
        msgspec.structs.replace(variable, shape=(1 << 40,)) if variable.key == "sharded" else variable
        for variable in manifest.variables
    ]
    change_manifest(path, variables=variables)


def lie_about_offsets(path: Path) -> None:
    manifest = open_checkpoint(str(path)).manifest
    variables = [
        msgspec.structs.replace(variable, offset=variable.offset + (1 << 40)) for variable in manifest.variables
    ]
    change_manifest(path, variables=variables)


def flip_in_manifest(path: Path) -> None:
    with h5py.File(path, "r") as file:
        offset = file[".manifest"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(offset + 200)
        byte = raw.read(1)[0]
        raw.seek(offset + 200)
        raw.write(bytes([byte ^ 4]))


BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda path: overwrite(path, b""), ["HDF5 cannot open the file"]),
    "text": (lambda path: overwrite(path, b"no HDF5 at all" * 1000), ["HDF5 cannot open the file"]),
    "other HDF5": (make_plain_hdf5, ["this is an HDF5 file, but no checkpoint of distckpt"]),
    "truncated": (truncate, ["truncated"]),
    "newer": (lambda path: change_manifest(path, format_version=3), ["format version 3", "reads version 2", "newer"]),
    "damaged manifest": (flip_in_manifest, ["the manifest is damaged"]),
    "lying shapes": (lie_about_shapes, ["the manifest", "sharded"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_restore_of_what_is_no_checkpoint(two: Any, mpi_dir: Path, name: str) -> None:
    damage, words = BAD_FILES[name]
    good = Program(two, 1)
    path = good.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    good.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    bad = mpi_dir / "ckpt-2.h5"
    if two.rank == 0:
        damage(bad)
    two.Barrier()
    program = Program(two, 7)
    before = program.values()
    for _ in range(2):
        text = same_error(two, CorruptCheckpointError, lambda: program.checkpoint.restore(bad))
        assert text.startswith(f"{bad}: ")
        assert all(word in text for word in words), text
        assert program.values() == before
    if two.rank == 0:
        with pytest.warns(match=r"ckpt-2.h5 is passed over"):
            assert latest_checkpoint(mpi_dir) == path
    program.checkpoint.restore(path).assert_consumed()
    assert (program.checkpoint.step, program.checkpoint.save_counter) == (1, 1)


def test_offsets_that_lie_are_asked_of_hdf5(two: Any, mpi_dir: Path) -> None:
    good = Program(two, 1)
    path = good.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    if two.rank == 0:
        lie_about_offsets(Path(path))
    two.Barrier()
    program = Program(two, 7)
    program.checkpoint.restore(path).assert_consumed()
    assert program.values() == good.values()


def test_a_file_that_one_rank_cannot_see(two: Any, mpi_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is not shared: the ranks look at different ones."""
    good = Program(two, 1)
    private = mpi_dir / f"node{two.rank}"
    private.mkdir()
    monkeypatch.chdir(private)
    monkeypatch.setattr("distckpt.storage.rawio.open_shared.__kwdefaults__", {"writable": False, "timeout": 0.2})
    text = same_error(two, CollectiveError, lambda: good.checkpoint.save("ckpt"))
    assert "rank 1: CheckpointError: ./.ckpt-1.h5" in text or "rank 1: CheckpointError: .ckpt-1.h5" in text, text
    assert "All ranks must see the same directory: use a shared file system." in text
    two.Barrier()
    assert list(private.iterdir()) == []
    path = Checkpoint(comm=MPI.COMM_SELF, step=two.rank).save("ckpt")
    if two.rank == 1:
        Path(path).unlink()
    two.Barrier()
    twin = Checkpoint(comm=two, step=5)
    text = same_error(two, CollectiveError, lambda: twin.restore("ckpt-1"))
    assert "rank 1: CheckpointError: ckpt-1.h5: expected a file of" in text
    assert twin.step == 5


def test_a_missing_directory(two: Any, mpi_dir: Path) -> None:
    program = Program(two, 1)
    text = same_error(two, CheckpointNotFoundError, lambda: program.checkpoint.restore(mpi_dir / "no" / "ckpt-1"))
    assert "does not exist" in text
    assert latest_checkpoint(mpi_dir / "no") is None


# ---- communicators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comm", [0, "world", MPI.Comm, MPI.Group, MPI.COMM_WORLD.group], ids=repr)
def test_what_is_no_communicator(comm: Any) -> None:
    with pytest.raises(TypeError, match=r"comm: expected an mpi4py intracommunicator .*COMM_WORLD.*Got"):
        Checkpoint(comm=comm, step=1)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_freed_communicator(two: Any, mpi_dir: Path, used: bool) -> None:
    comm = two.Dup()
    checkpoint = Checkpoint(comm=comm, step=1)
    if used:
        checkpoint.save(mpi_dir / "ckpt", options=FAST)
    comm.Free()
    for call in (checkpoint.save, checkpoint.write, checkpoint.restore, checkpoint.read):
        text = same_error(two, CheckpointError, lambda: call(mpi_dir / "ckpt-1"))  # noqa: B023
        assert "has been freed: keep it until the last save or restore" in text
    assert len(list(mpi_dir.glob("*.h5"))) == used
    assert_works(two, Program(two, 1), mpi_dir)


def test_a_null_communicator(two: Any, mpi_dir: Path) -> None:
    checkpoint = Checkpoint(comm=MPI.COMM_NULL, step=1)
    text = same_error(two, CheckpointError, lambda: checkpoint.save(mpi_dir / "ckpt"))
    assert "a communicator that this rank belongs to" in text


# ---- the user's own values that fail before the ranks have met ---------------------------------------------------

SOON = 10.0  # seconds after which a rank gives up that waits for one which has left


class Unshown(str):
    """A str that cannot be shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


class Nowhere:
    """A path that cannot be told."""

    def __fspath__(self) -> str:
        raise RuntimeError("nowhere")


class Uncounted(Checkpoint):
    """On rank 1 the counter cannot be read."""

    @property
    def save_counter(self) -> int:
        if self._session.coordinator.rank == 1:
            raise RuntimeError("uncounted")
        return super().save_counter


class Secret:
    """What only pickle could store, and what cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("secret")


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"inner": value}
    return value


def options_for(name: str) -> SaveOptions | RestoreOptions:
    return RestoreOptions(timeout=SOON) if name in {"restore", "read"} else SaveOptions(durable=False, timeout=SOON)


@pytest.mark.parametrize("name", ["save", "save_async", "write", "restore", "read"])
def test_a_path_that_cannot_be_told(two: Any, mpi_dir: Path, name: str) -> None:
    program = Program(two, 1)
    path = mpi_dir / "ckpt" if two.rank == 0 else Nowhere()
    call = getattr(program.checkpoint, name)
    text = same_error(two, CollectiveError, lambda: call(path, options=options_for(name)))
    assert "failed on 1 rank(s)" in text
    assert "rank 1: RuntimeError: nowhere (while path was put into words" in text
    assert list(mpi_dir.iterdir()) == []
    assert_works(two, program, mpi_dir)


METADATA = {
    "deep": (lambda: nested(1000), "Store it flat"),
    "unshown": (Secret, "test_bad_input.Secret cannot be stored"),
}


@pytest.mark.parametrize("name", ["save", "save_async", "write"])
@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["one", "all"])
def test_metadata_that_cannot_be_stored(two: Any, mpi_dir: Path, name: str, kind: str, ranks: list[int]) -> None:
    program = Program(two, 1)
    make, words = METADATA[kind]
    metadata = {"note": make() if two.rank in ranks else 1}
    options = SaveOptions(durable=False, timeout=SOON, metadata=metadata)
    call = getattr(program.checkpoint, name)
    text = same_error(two, LayoutError, lambda: call(mpi_dir / "ckpt", options=options))
    assert text.startswith("SaveOptions.metadata: ")
    assert words in text
    assert list(mpi_dir.iterdir()) == []
    assert_works(two, program, mpi_dir)


def test_options_that_cannot_be_shown(two: Any, mpi_dir: Path) -> None:
    program = Program(two, 1)
    path = program.checkpoint.save(mpi_dir / "ckpt", options=FAST)
    text = Unshown("8") if two.rank == 1 else "8"
    hints = SaveOptions(timeout=SOON, hints={"cb_nodes": text})
    error = same_error(two, CollectiveError, lambda: program.checkpoint.save(mpi_dir / "ckpt", options=hints))
    assert "rank 1: RuntimeError: not to be shown (while hints was put into words" in error
    rename = {"step": text}
    options = RestoreOptions(timeout=SOON, rename=rename)
    error = same_error(two, CollectiveError, lambda: program.checkpoint.restore(path, options=options))
    assert "(while rename was put into words" in error
    rename["step"] = "number"
    status = program.checkpoint.restore(path, options=options)
    rename["step"] = text
    error = same_error(two, AssertionError, status.assert_consumed)
    assert "step" in error, "the status has the options as they were"
    assert_works(two, program, mpi_dir)


class Fleeting:
    """A path that can be told once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.told = False

    def __fspath__(self) -> str:
        if self.told:
            raise RuntimeError("told already")
        self.told = True
        return self.path


class FleetingNames(Mapping[str, str]):
    """A mapping that can be asked so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __getitem__(self, key: str) -> str:
        self.times -= 1
        if self.times < 0:
            raise RuntimeError("asked already")
        return {"step": "number"}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["step"])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("name", ["restore", "read"])
def test_the_path_and_the_names_of_a_restore_are_asked_for_once(two: Any, mpi_dir: Path, name: str) -> None:
    saved = Checkpoint(comm=two, step=1).save(mpi_dir / "ckpt", options=FAST)
    twin = Checkpoint(comm=two, number=2)
    for rank in (0, 1):
        twin.number = 2
        path = Fleeting(saved) if two.rank == rank else saved
        rename = FleetingNames(2) if two.rank == rank else {"step": "number"}  # the construction asks, too
        options = RestoreOptions(timeout=SOON, rename=rename)
        getattr(twin, name)(path, options=options).assert_existing_objects_matched()
        assert twin.number == 1
    rename = FleetingNames(1) if two.rank == 1 else {"step": "number"}
    options = RestoreOptions(timeout=SOON, rename=rename)
    text = same_error(two, CollectiveError, lambda: getattr(twin, name)(saved, options=options))
    assert "rank 1: RuntimeError: asked already (while rename was put into words" in text


WRONG_OPTIONS: dict[str, Callable[[CheckpointManager, str, Any], object]] = {
    "save": lambda manager, path, options: manager.checkpoint.save(path, options=options),
    "save_async": lambda manager, path, options: manager.checkpoint.save_async(path, options=options),
    "write": lambda manager, path, options: manager.checkpoint.write(path, options=options),
    "restore": lambda manager, path, options: manager.checkpoint.restore(path, options=options),
    "read": lambda manager, path, options: manager.checkpoint.read(path, options=options),
    "manager.save": lambda manager, _, options: manager.save(options=options),
    "manager.save_async": lambda manager, _, options: manager.save_async(options=options),
    "manager.restore": lambda manager, _, options: manager.restore_or_initialize(options),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["one", "all"])
def test_options_of_another_kind(two: Any, mpi_dir: Path, name: str, ranks: list[int]) -> None:
    program = Program(two, 1)
    manager = CheckpointManager(program.checkpoint, mpi_dir)
    right: Any = options_for(name.removeprefix("manager."))
    options = {"timeout": 1} if two.rank in ranks else right
    path = str(mpi_dir / "ckpt")
    text = same_error(two, CollectiveError, lambda: WRONG_OPTIONS[name](manager, path, options))
    expected = f"rank 1: TypeError: options: expected {type(right).__name__} or None. Got dict."
    assert expected in text
    assert list(mpi_dir.iterdir()) == []
    assert_works(two, program, mpi_dir)


def test_what_a_manager_cannot_show(two: Any, mpi_dir: Path) -> None:
    program = Program(two, 1)
    manager = CheckpointManager(program.checkpoint, mpi_dir)
    unshown: Any = Secret() if two.rank == 1 else True
    options = SaveOptions(durable=False, timeout=SOON)
    for call in (manager.save, manager.save_async):
        text = same_error(two, CollectiveError, lambda: call(check_interval=unshown, options=options))  # noqa: B023
        assert "rank 1: RuntimeError: secret (while check_interval was put into words" in text
    path = manager.save(options=options, metrics={"loss": unshown} if two.rank == 1 else None)
    assert path == str(mpi_dir / "ckpt-1.h5"), "the metrics of rank 0 alone count"
    assert_works(two, program, mpi_dir)


def test_a_restore_asks_nothing_of_a_subclass_between_the_agreements(two: Any, mpi_dir: Path) -> None:
    path = Checkpoint(comm=two, step=1).save(mpi_dir / "ckpt", options=FAST)
    twin = Uncounted(comm=two, step=2)
    twin.restore(path).assert_consumed()
    assert (twin.step, Checkpoint.save_counter.fget(twin)) == (1, 1)  # type: ignore[attr-defined]
