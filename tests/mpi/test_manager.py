"""CheckpointManager over several ranks: rank 0 decides, and all ranks do the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    CheckpointWarning,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RankTimeoutError,
    SaveOptions,
    ShardedVariable,
    latest_checkpoint,
)
from distckpt.storage.hdf5 import open_checkpoint

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(120)]

Agree = Callable[..., None]


def make(comm: Any, value: float = 0.0) -> Checkpoint:
    """Replicated and sharded tensors, and python values."""
    rows = torch.full((2, 3), value + comm.rank)
    shard = ShardedVariable(rows, (2 * comm.size, 3), (2 * comm.rank, 0))
    return Checkpoint(comm=comm, shard=shard, w=torch.full((4,), value), step=0)


def set_to(checkpoint: Checkpoint, value: float, rank: int) -> None:
    checkpoint.shard.tensor.fill_(value + rank)
    checkpoint.w.fill_(value)


def holds(checkpoint: Checkpoint, value: float, rank: int) -> bool:
    return bool((checkpoint.shard.tensor == value + rank).all() and (checkpoint.w == value).all())


def files(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.h5"))


def spoil(path: str, key: str = "shard") -> None:
    """Flip a bit of the last row of a variable, which is the last rank's."""
    variable = next(variable for variable in open_checkpoint(path).manifest.variables if variable.key == key)
    last = variable.offset + 4 * torch.Size(variable.shape).numel() - 1
    with Path(path).open("r+b") as file:
        file.seek(last)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 1]))


def test_rank_0_decides(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    """Clocks, steps and metrics of the other ranks are nonsense (rows 109, 111, 119, 196)."""
    now, step = [0.0], [0]
    root = comm.rank == 0
    checkpoint = make(comm)
    manager = CheckpointManager(
        checkpoint,
        mpi_dir / "run",
        max_to_keep=1,
        keep_every_n_hours=1,
        keep_best=("loss", "min", 1),
        step_counter=lambda: step[0] if root else -7,
        checkpoint_interval=2,
        checkpoint_interval_seconds=100,
        clock=lambda: now[0] if root else 5.0,
    )
    agree((manager.latest_checkpoint, manager.checkpoints) == (None, []))
    saved = []
    for now[0], step[0], loss in [
        (0, 0, 3),
        (9, 1, 0),
        (10, 2, 1),
        (11, 3, 9),
        (111, 3, 8),
        (4000, 4, 7),
        (8000, 9, 6),
    ]:
        path = manager.save(metrics={"loss": loss if root else -loss})
        saved.append(path and Path(path).stem)
    agree(saved == ["ckpt-1", None, "ckpt-2", None, "ckpt-3", "ckpt-4", "ckpt-5"], str(saved))
    left = files(mpi_dir / "run")
    agree(left == ["ckpt-2", "ckpt-4", "ckpt-5"], str(left))
    managed = [Path(path).stem for path in manager.checkpoints]
    agree(managed == ["ckpt-2", "ckpt-5"], str(managed))
    agree(manager.latest_checkpoint == str(mpi_dir / "run" / "ckpt-5.h5"))


@pytest.mark.parametrize(("mtbf", "saved"), [(1e12, [1]), (1e-6, [1, 2, 3, 4])])
def test_rank_0_alone_measures_for_the_automatic_interval(
    comm: Any, mpi_dir: Path, agree: Agree, mtbf: float, saved: list[int]
) -> None:
    """The clocks of the other ranks stand still, and their failures are said to be of another number."""
    now, root = [0.0], comm.rank == 0
    checkpoint = make(comm)
    manager = CheckpointManager(
        checkpoint,
        mpi_dir,
        checkpoint_interval="auto",
        mtbf=mtbf if root else 1.0,
        step_counter="step",
        clock=lambda: now[0] if root else 5.0,
    )
    found = []
    for checkpoint.step in range(1, 5):
        now[0] += 100.0
        if manager.save() is not None:
            now[0] += 1.0
            found.append(checkpoint.step)
    agree(found == saved, str(found))
    agree(manager.save_seconds is not None)


def test_five_lives_over_sharded_variables(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    """Each life restores what the last one left, on any rank count (rows 196, 198)."""
    step = 0
    for life in range(5):
        checkpoint = make(comm, -1.0)
        manager = CheckpointManager(checkpoint, mpi_dir, max_to_keep=2, step_counter="step")
        checkpoint.restore(manager.latest_checkpoint)
        agree(checkpoint.step == step)
        agree(life == 0 or holds(checkpoint, step, comm.rank))
        for _ in range(2):
            step += 1
            checkpoint.step = step
            set_to(checkpoint, step, comm.rank)
            path = manager.save(checkpoint_number=torch.tensor(step))
            agree(path == str(mpi_dir / f"ckpt-{step}.h5") == manager.latest_checkpoint)
        agree(checkpoint.save_counter == step)
    agree(files(mpi_dir) == ["ckpt-10", "ckpt-9"])


def three_saves(comm: Any, directory: Path) -> list[str]:
    checkpoint = make(comm)
    manager = CheckpointManager(checkpoint, directory)
    paths = []
    for value in range(3):
        set_to(checkpoint, value, comm.rank)
        paths.append(manager.save())
    comm.Barrier()
    return paths


def test_all_ranks_fall_back_alike(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    paths = three_saves(comm, mpi_dir)
    if comm.rank == 0:
        spoil(paths[2])
        os.truncate(paths[1], 5000)
    comm.Barrier()
    twin = make(comm, 9.0)
    manager = CheckpointManager(twin, mpi_dir, step_counter="step", checkpoint_interval=1)
    with pytest.warns(CheckpointWarning) if comm.rank == 0 else nullcontext() as caught:
        restored = manager.restore_or_initialize()
    agree(restored == paths[0] == manager.latest_checkpoint)
    agree(caught is None or len(caught) == 2, "one warning for each damaged file")
    agree(holds(twin, 0.0, comm.rank))
    manager.status.assert_consumed()
    agree(manager.save(check_interval=False) is None, "the step is that of the restored checkpoint")


def test_nothing_starts_anew_where_all_is_damaged(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    paths = three_saves(comm, mpi_dir)
    if comm.rank == 0:
        for path in paths:
            spoil(path)
    comm.Barrier()
    manager = CheckpointManager(make(comm), mpi_dir, init_fn=pytest.fail)
    with (
        pytest.warns(CheckpointWarning) if comm.rank == 0 else nullcontext(),
        pytest.raises(CorruptCheckpointError, match="no checkpoint can be restored") as caught,
    ):
        manager.restore_or_initialize()
    agree(all(path in str(caught.value) for path in paths))


def test_init_fn_is_called_on_all_ranks(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    calls: list[int] = []
    manager = CheckpointManager(make(comm), mpi_dir, init_fn=lambda: calls.append(comm.rank))
    agree(manager.restore_or_initialize() is None)
    agree(calls == [comm.rank])
    last = comm.size - 1

    def fail() -> None:
        if comm.rank == last:
            raise KeyError("seed")

    failing = CheckpointManager(make(comm), mpi_dir, init_fn=fail)
    with pytest.raises(CollectiveError) as caught:
        failing.restore_or_initialize()
    agree(list(caught.value.failures) == [last])
    agree(failing.save() is not None)


def test_ranks_that_disagree(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    manager = CheckpointManager(make(comm), mpi_dir)
    with pytest.raises(LayoutError, match="checkpoint_number differs"):
        manager.save(comm.rank + 1)
    with pytest.raises(LayoutError, match="check_interval differs"):
        manager.save(check_interval=comm.rank == 0)
    elsewhere = CheckpointManager(make(comm), mpi_dir / str(comm.rank))
    with pytest.raises(LayoutError, match="directory differs"):
        elsewhere.save()
    with pytest.raises(LayoutError, match="different calls"):
        manager.save() if comm.rank == 0 else manager.restore_or_initialize()
    with pytest.raises(CollectiveError, match="checkpoint_number: expected an integer") as caught:
        manager.save("7" if comm.rank == 1 else 7)  # type: ignore[arg-type]
    agree(list(caught.value.failures) == [1])
    agree(files(mpi_dir) == [])
    agree(manager.save(7) == str(mpi_dir / "ckpt-7.h5"))


def test_a_rank_that_does_not_come(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    manager = CheckpointManager(make(comm), mpi_dir)
    agree(manager.save() is not None)
    if comm.rank == 0:
        with pytest.raises(RankTimeoutError):
            manager.save(options=SaveOptions(timeout=0.5))
    comm.Barrier()
    agree(manager.save() == str(mpi_dir / "ckpt-2.h5"))


def failing_on_root(comm: Any, error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        assert comm.rank == 0, "only rank 0 may be asked"
        raise error

    return fail


@pytest.mark.parametrize("name", ["sweep_temporary_files", "complete_checkpoints", "read_entry"])
def test_a_directory_that_cannot_be_read(
    comm: Any, mpi_dir: Path, agree: Agree, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    manager = CheckpointManager(make(comm), mpi_dir)
    with monkeypatch.context() as patch:
        patch.setattr(f"distckpt.managed_directory.{name}", failing_on_root(comm, OSError("stale handle")))
        for look in (lambda: manager.checkpoints, manager.save, manager.restore_or_initialize):
            with pytest.raises(CollectiveError, match="stale handle"):
                look()
    agree(manager.save() == manager.latest_checkpoint)


@pytest.mark.parametrize("name", ["write_entry", "remove_checkpoints"])
def test_old_checkpoints_that_cannot_be_removed(
    comm: Any, mpi_dir: Path, agree: Agree, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoint = make(comm)
    manager = CheckpointManager(checkpoint, mpi_dir, max_to_keep=1)
    manager.save()
    with monkeypatch.context() as patch:
        patch.setattr(f"distckpt.managed_directory.{name}", failing_on_root(comm, OSError("no space")))
        with pytest.raises(CollectiveError, match=r"no space(.|\n)*new checkpoint is complete"):
            manager.save()
    agree(checkpoint.save_counter == 2)
    agree(latest_checkpoint(mpi_dir) == str(mpi_dir / "ckpt-2.h5"))
    agree(manager.save() == str(mpi_dir / "ckpt-3.h5"))
    agree(files(mpi_dir) == ["ckpt-3"])


def test_a_step_that_cannot_be_read(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    checkpoint = make(comm)
    manager = CheckpointManager(checkpoint, mpi_dir, step_counter="epoch", checkpoint_interval=1)
    with pytest.raises(CollectiveError, match="epoch") as caught:
        manager.save()
    agree(list(caught.value.failures) == [0])
    checkpoint.epoch = 3
    agree(manager.save() is not None)


def test_pins(comm: Any, mpi_dir: Path, agree: Agree) -> None:
    checkpoint = make(comm)
    manager = CheckpointManager(checkpoint, mpi_dir, max_to_keep=1)
    manager.pin(manager.save())
    manager.save()
    manager.save()
    agree(manager.checkpoints == [str(mpi_dir / "ckpt-1.h5"), str(mpi_dir / "ckpt-3.h5")])
    with pytest.raises(CheckpointNotFoundError):
        manager.pin(mpi_dir / "ckpt-2")
    manager.unpin(mpi_dir / "ckpt-1")
    manager.save()
    agree(files(mpi_dir) == ["ckpt-4"])


def test_another_number_of_ranks(mpi_dir: Path, agree: Agree, subcomm: Any) -> None:
    alone = subcomm(1)
    if alone is not None:
        three_saves(alone, mpi_dir)
    world = MPI.COMM_WORLD
    world.Barrier()
    twin = Checkpoint(comm=world, w=torch.ones(4), step=1)
    manager = CheckpointManager(twin, mpi_dir, max_to_keep=1)
    agree(manager.restore_or_initialize() == str(mpi_dir / "ckpt-3.h5"))
    manager.status.expect_partial()
    agree(bool((twin.w == 2.0).all()))
    manager.save()
    agree(files(mpi_dir) == ["ckpt-4"])
