"""Checks before the first collective call: of MPI, the user's communicator and the launcher."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from distckpt.coordination.launcher import expected_size, singleton_message
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI


def require_intracomm(comm: object) -> None:
    """Check that an argument is a communicator, without importing MPI if it cannot be one.

    Raises:
        TypeError: It is not an mpi4py intracommunicator.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    # A null communicator has no group, so that of any kind passes here; the first collective call refuses it.
    if mpi is None or not isinstance(comm, mpi.Comm) or (comm and not isinstance(comm, mpi.Intracomm)):
        raise TypeError(
            f"comm: expected an mpi4py intracommunicator such as MPI.COMM_WORLD, or None for COMM_WORLD. "
            f"Got {comm!r} of type {type(comm).__module__}.{type(comm).__qualname__}."
        )


def require_running() -> ModuleType:
    """Import MPI and check that it runs.

    Returns:
        The module mpi4py.MPI.

    Raises:
        CheckpointError: mpi4py cannot be loaded, or MPI is not initialised or already finalised.
    """
    mpi = _load_mpi()
    if not mpi.Is_initialized():
        raise CheckpointError(
            "MPI is not initialised: call MPI.Init_thread() first, or leave mpi4py.rc.initialize at True."
        )
    if mpi.Is_finalized():
        raise CheckpointError("MPI is already finalised: save and restore before MPI.Finalize().")
    return mpi


@cache
def _load_mpi() -> ModuleType:
    try:
        from mpi4py import MPI
    except Exception as error:  # a missing library is an ImportError or, in the wheels of mpi4py 4.1, a RuntimeError
        raise CheckpointError(
            f"mpi4py is installed but does not load: {error}. Load the MPI it was built with (`module load openmpi`), "
            f"or build it anew (`pip install --force-reinstall --no-binary=mpi4py mpi4py`)."
        ) from error
    return MPI


def require_handle(comm: MPI.Intracomm, *, freed: bool = False) -> None:
    """Check that a communicator can still be used.

    Args:
        comm: The communicator.
        freed: Whether it is known to have been freed.

    Raises:
        CheckpointError: The communicator is null or has been freed.
    """
    if freed or not comm:
        raise CheckpointError(
            "the communicator is null or has been freed: keep it until the last save or restore, and pass a "
            "communicator that this rank belongs to."
        )


def require_single(cause: str) -> None:
    """Check that a process without other ranks was started alone.

    Args:
        cause: The reason why it does not see other ranks, as a clause for the message.

    Raises:
        CheckpointError: The launcher has started more processes.
    """
    expected = expected_size()
    if expected is not None and expected.size > 1:
        raise CheckpointError(singleton_message(expected, cause))
