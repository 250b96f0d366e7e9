"""The torch process group of a job started by mpirun or srun: rank, size and address come from MPI."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CheckpointError, CollectiveError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_REST_SECONDS = 0.1
_CONNECT_TIMEOUT = timedelta(seconds=60)
_AGREE_WITH_MPI = "Unset RANK and WORLD_SIZE, or destroy the process group, and let mpirun or srun alone start the job."
_ONE_RANK_PER_GPU = (
    "Start one rank per GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES= with nothing behind it) to compute on the CPU."
)
_REACH_RANK_0 = "Set MASTER_ADDR to an address of rank 0 that every node reaches, GLOO_SOCKET_IFNAME to its network."


@dataclass(frozen=True, slots=True)
class _Place:
    """This rank's place in the communicator and on its node.

    Attributes:
        rank: Index in the communicator.
        size: Ranks in the communicator.
        local_rank: Index among the ranks of this node.
        local_size: Ranks on this node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True, slots=True)
class _Address:
    """Address of rank 0's store: a host name or IP address, and a TCP port."""

    host: str
    port: int


def init_process_group(
    comm: MPI.Intracomm | None = None, backend: str | None = None, *, timeout: float = 600.0
) -> torch.device:
    """Initialise `torch.distributed` with the ranks of an MPI communicator. Collective over the communicator.

    Each rank first binds the GPU of its local rank, if there are GPUs. Rank 0 opens a store at a free port and sends
    its address to the others, so that no environment variable needs to be set. On several nodes MASTER_ADDR, if set on
    rank 0, is taken as its address, for hosts with more than one network. A process group that exists already and
    agrees with the communicator is kept.

    Args:
        comm: mpi4py communicator of the ranks; None for `MPI.COMM_WORLD`.
        backend: As in `torch.distributed.init_process_group`. None for gloo, with NCCL for GPU tensors if there are
            GPUs.
        timeout: Seconds to wait for the other ranks.

    Returns:
        The device of this rank: its GPU, or the CPU.

    Raises:
        CheckpointError: mpi4py is not installed; or the launcher started several processes, but this one is alone in
            COMM_WORLD, as under `srun` without `--mpi=pmix`.
        RankTimeoutError: Some ranks did not come.
        CollectiveError: RANK, WORLD_SIZE or an existing process group disagree with MPI, ranks share a GPU that NCCL
            is to use, or the ranks cannot reach rank 0. The same on all ranks.
    """
    comm = _world() if comm is None else comm
    Coordinator(comm).arrive("init_process_group", 0, 0, timeout)
    place = _place(comm)
    _agreed(comm, _AGREE_WITH_MPI, _check_agreement, place, comm.allgather(dist.is_initialized()))
    device = _device(place)
    if not dist.is_initialized():
        backend = backend or _default_backend(device)
        gpus = comm.allgather(_agreed(comm, _ONE_RANK_PER_GPU, _gpu_of_nccl, device, backend))
        _agreed(comm, _ONE_RANK_PER_GPU, _require_own_gpu, place, device, gpus)
        served = _agreed(comm, _REACH_RANK_0, _serve, place)
        address = comm.bcast(_Address(served.host, served.port) if served else None)
        store = _agreed(comm, _REACH_RANK_0, _connect, served, address)
        _agreed(comm, _REACH_RANK_0, _join, store, place, device, backend)
        atexit.unregister(_rest)
        atexit.register(_rest)
    return device


def _world() -> MPI.Intracomm:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise CheckpointError(f"A process group under mpirun needs mpi4py ({error}): pip install mpi4py.") from error
    return MPI.COMM_WORLD


def _place(comm: MPI.Intracomm) -> _Place:
    """Find this rank's place. Collective over the communicator."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = _Place(comm.Get_rank(), comm.Get_size(), node.Get_rank(), node.Get_size())
    node.Free()
    return place


def _agreed(comm: MPI.Intracomm, remedy: str, action: Callable[[*Ts], T], *args: *Ts) -> T:
    """Run a local action; if it raises on any rank, raise one error on all. Collective over the communicator."""
    cause = None
    try:
        result = action(*args)
    except Exception as error:  # the other ranks must learn of it
        cause = error
    texts = comm.allgather(f"{type(cause).__name__}: {cause}" if cause else None)
    failures = {rank: text for rank, text in enumerate(texts) if text is not None}
    if failures:
        raise CollectiveError("process group", failures, remedy) from cause
    return result


def _check_agreement(place: _Place, initialized: list[bool]) -> None:
    """Refuse an environment or a process group that disagrees with MPI about rank or size."""
    if any(initialized) and not dist.is_initialized():
        raise ValueError(f"expected a process group, as rank {initialized.index(True)} has one. Got none.")
    wrong = [
        f"{name}: expected {expected}, as in MPI. Got {got!r}."
        for name, expected, got in _claims(place)
        if str(got) != str(expected)
    ]
    if wrong:
        raise ValueError(" ".join(wrong))


def _claims(place: _Place) -> list[tuple[str, int, str | int]]:
    """Other sources for this rank and size: (name, value in MPI, value there) of each."""
    expected = {"RANK": place.rank, "WORLD_SIZE": place.size}
    claims: list[tuple[str, int, str | int]] = []
    claims.extend((name, value, os.environ[name]) for name, value in expected.items() if name in os.environ)
    if dist.is_initialized():
        claims.append(("rank in the process group", place.rank, dist.get_rank()))
        claims.append(("size of the process group", place.size, dist.get_world_size()))
    return claims


def _device(place: _Place) -> torch.device:
    """The device of this rank. A launcher that shows each rank only its own GPU leaves index 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())


def _default_backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _gpu_of_nccl(device: torch.device, backend: str) -> str | None:
    """UUID of the GPU that NCCL will use; None if it uses none. Indices would not do: each rank may see only GPU 0."""
    if device.type != "cuda" or "nccl" not in backend:
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _require_own_gpu(place: _Place, device: torch.device, gpus: list[str | None]) -> None:
    """Refuse ranks that share a GPU. NCCL would refuse them at the first collective, with an obscure message."""
    sharing = [rank for rank, gpu in enumerate(gpus) if gpu is not None and gpu == gpus[place.rank]]
    if len(sharing) > 1:
        others = ", ".join(str(rank) for rank in sharing if rank != place.rank)
        raise ValueError(f"expected a GPU for each rank, as NCCL needs. Got {device}, shared with rank {others}.")


def _serve(place: _Place) -> TCPStore | None:
    """Open the store on rank 0; None on others. The system picks the port, so that no one can take it before."""
    if place.rank != 0:
        return None
    one_node = place.local_size == place.size
    host = "127.0.0.1" if one_node else os.environ.get("MASTER_ADDR") or socket.gethostname()
    return TCPStore(host, 0, place.size, is_master=True, timeout=_CONNECT_TIMEOUT, wait_for_workers=False)


def _connect(served: TCPStore | None, address: _Address) -> TCPStore:
    if served is not None:
        return served
    return TCPStore(address.host, address.port, timeout=_CONNECT_TIMEOUT, wait_for_workers=False)


def _join(store: TCPStore, place: _Place, device: torch.device, backend: str) -> None:
    """Initialise torch's default process group, bound to the device. Collective over the communicator."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)


def _rest() -> None:
    """Give gloo's threads time to free the tensors of the last collective, before the interpreter ends.

    They need the interpreter for it; one that still waits when it has ended aborts the process with SIGABRT.
    """
    time.sleep(_REST_SECONDS)
