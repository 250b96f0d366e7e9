"""`init_process_group`: torch's ranks are MPI's, whatever the environment says, and errors are the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from distckpt.cluster import init_process_group, process_group
from distckpt.errors import CollectiveError, RankTimeoutError

MPI = pytest.importorskip("mpi4py.MPI")
pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # there may be more ranks than GPUs
    yield
    MPI.COMM_WORLD.Barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def assert_same_error(error: pytest.ExceptionInfo[CollectiveError]) -> None:
    assert len(set(MPI.COMM_WORLD.allgather(str(error.value)))) == 1


def test_ranks_and_sums_are_those_of_mpi() -> None:
    device = init_process_group()
    assert (dist.get_rank(), dist.get_world_size()) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    total = torch.tensor([dist.get_rank() + 1], device=device)
    dist.all_reduce(total)
    assert total.item() == sum(range(1, MPI.COMM_WORLD.size + 1))


def test_an_agreeing_environment_and_a_second_call_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(MPI.COMM_WORLD.rank))
    monkeypatch.setenv("WORLD_SIZE", str(MPI.COMM_WORLD.size))
    init_process_group()
    group = dist.group.WORLD
    init_process_group(MPI.COMM_WORLD)
    assert dist.group.WORLD is group


@pytest.mark.mpi(min_size=2)
def test_the_ranks_are_those_of_the_communicator() -> None:
    reverse = MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank)
    init_process_group(reverse, "gloo")
    assert dist.get_rank() == MPI.COMM_WORLD.size - 1 - MPI.COMM_WORLD.rank
    with pytest.raises(CollectiveError, match=r"rank in the process group: expected \d, as in MPI\. Got \d"):
        init_process_group(MPI.COMM_WORLD)
    reverse.Free()


def test_each_rank_may_be_a_group_of_its_own() -> None:
    init_process_group(MPI.COMM_SELF)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)


@pytest.mark.parametrize(("name", "value"), [("RANK", "7"), ("WORLD_SIZE", "64"), ("RANK", "")])
def test_a_disagreeing_environment_on_one_rank_is_an_error_on_all(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = MPI.COMM_WORLD.size - 1
    with monkeypatch.context() as patch:
        if last == MPI.COMM_WORLD.rank:
            patch.setenv(name, value)
        with pytest.raises(
            CollectiveError, match=f"(?s)rank {last}: ValueError: {name}: expected .*Unset RANK"
        ) as error:
            init_process_group()
    assert_same_error(error)
    assert not dist.is_initialized()
    init_process_group()
    assert dist.get_world_size() == MPI.COMM_WORLD.size


@pytest.mark.mpi(min_size=2)
def test_a_process_group_on_some_ranks_only_is_an_error_on_all() -> None:
    half = MPI.COMM_WORLD.Split(min(MPI.COMM_WORLD.rank, 1))
    if MPI.COMM_WORLD.rank == 0:
        init_process_group(half)
    with pytest.raises(CollectiveError, match="expected a process group, as rank 0 has one") as error:
        init_process_group()
    assert_same_error(error)
    half.Free()


def test_a_backend_that_does_not_exist_is_the_same_error_on_all_ranks() -> None:
    with pytest.raises(CollectiveError, match="nosuch") as error:
        init_process_group(backend="nosuch")
    assert_same_error(error)
    assert not dist.is_initialized()


@pytest.mark.mpi(min_size=2)
def test_a_gpu_that_ranks_share_is_the_same_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher shows each rank one GPU, as number 0; two ranks have got the same one."""
    gpus = [f"GPU-{max(rank, 1)}" for rank in range(MPI.COMM_WORLD.size)]
    with monkeypatch.context() as patch:
        patch.setattr(process_group, "_gpu_of_nccl", lambda *_: gpus[MPI.COMM_WORLD.rank])
        with pytest.raises(CollectiveError) as error:
            init_process_group()
    assert_same_error(error)
    assert "rank 0: ValueError: expected a GPU for each rank" in str(error.value)
    assert "shared with rank 1" in str(error.value)
    assert "CUDA_VISIBLE_DEVICES" in str(error.value)
    assert not dist.is_initialized()
    init_process_group()


def broken(_: torch.device) -> None:
    raise RuntimeError("no driver")


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_a_gpu_that_cannot_be_asked_is_an_error_where_nccl_uses_it(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    if backend == "gloo":
        init_process_group(backend=backend)
        assert dist.is_initialized()
    else:
        with pytest.raises(CollectiveError, match="rank 0: RuntimeError: no driver") as error:
            init_process_group(backend=backend)
        assert_same_error(error)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_does_not_come_is_named() -> None:
    last = MPI.COMM_WORLD.size - 1
    comm = MPI.COMM_WORLD.Dup()
    if comm.rank != last:
        with pytest.raises(RankTimeoutError, match="init_process_group: 1 of") as error:
            init_process_group(comm, timeout=0.3)
        assert error.value.absent == (last,)
    MPI.COMM_WORLD.Barrier()
    if comm.rank == last:
        with pytest.raises(RankTimeoutError, match="came when the others had given up"):
            init_process_group(comm, timeout=0.3)
    MPI.COMM_WORLD.Barrier()
    init_process_group(comm)
    assert dist.get_world_size() == comm.size
    dist.destroy_process_group()
    comm.Free()
