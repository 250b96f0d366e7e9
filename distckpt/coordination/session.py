"""Sessions: the state that all coordinators over one user communicator share."""

from __future__ import annotations

import threading
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import numpy as np

from distckpt.coordination.arrival import Call, arrival_over
from distckpt.coordination.arrival.teams import waits_of
from distckpt.coordination.channel import Channel
from distckpt.coordination.checks import require_handle, require_running, require_single
from distckpt.coordination.collectives import Collectives, MpiCollectives, SingleRank
from distckpt.coordination.job_end import end_job_on_uncaught_timeout
from distckpt.coordination.nodes import Nodes
from distckpt.errors import CheckpointError, RankTimeoutError

if TYPE_CHECKING:
    from mpi4py import MPI

    from distckpt.coordination.background import Background

#: Tag of the arrival protocol on the duplicate, where nobody else sends messages.
_ARRIVAL_TAG = 0


class Session:
    """The duplicate of one user communicator, and the arrival protocol over it.

    `open_session` makes it at the first use and caches it on the communicator; MPI calls `release` when the user frees
    that. Until all ranks have come to a first call, the protocol runs on the user's communicator with the highest tag
    but one, and nothing is duplicated, since a duplication that some ranks do not join cannot be undone. (A program
    that receives there with ANY_TAG could steal such a message.)

    Attributes:
        rank: This rank.
        size: Number of ranks.
        duplicate: The duplicate, for everything but the first arrival; None before that.
        collectives: The collectives of the duplicate; None before the first arrival.
        background: The background thread of the communicator; None before it is needed.
        turn: Lock held by the thread of the program that is in a call.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.size = comm.size
        self.duplicate: MPI.Intracomm | None = None
        self.collectives: Collectives | None = None
        self.background: Background | None = None
        self.turn = threading.RLock()
        self._comm = comm
        self._node: MPI.Intracomm | None = None
        self._nodes: Nodes | None = None
        self._freed = False
        tag_limit = cast("int", MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
        self._arrival = arrival_over(Channel(comm, tag_limit - 1, waits_of(self.size)))

    def require_alive(self) -> None:
        """Check that the communicator can still be used.

        Raises:
            CheckpointError: MPI is finalised or the communicator freed.
        """
        require_running()
        require_handle(self._comm, freed=self._freed)

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`. Collective over the communicator."""
        try:
            agreed = self._arrival.arrive(call)
        except RankTimeoutError:
            end_job_on_uncaught_timeout()
            raise
        if self.duplicate is None:
            self._duplicate()
        return agreed

    def node_communicator(self) -> MPI.Intracomm:
        """The ranks that share memory with this one. Collective over the communicator at the first call."""
        if self._node is None:
            from mpi4py import MPI

            assert self.duplicate is not None, "the ranks have met"
            self._node = cast("MPI.Intracomm", self.duplicate.Split_type(MPI.COMM_TYPE_SHARED))
            self._node.Set_errhandler(MPI.ERRORS_RETURN)
        return self._node

    def nodes(self) -> Nodes:
        """The nodes and their ranks. Collective over the communicator at the first call."""
        if self._nodes is None:
            node, duplicate = self.node_communicator(), self.duplicate
            assert duplicate is not None, "the ranks have met"
            if node.size == self.size:  # the same on all ranks
                self._nodes = Nodes([list(range(self.size))], 0)
            else:
                first, firsts = np.array([self.rank], np.int64), np.empty(self.size, np.int64)
                node.Bcast(first)
                duplicate.Allgather(first, firsts)
                self._nodes = Nodes.of(firsts.tolist(), self.rank)
        return self._nodes

    def release(self) -> None:
        """Free the duplicates, when the user frees the communicator. Collective over it."""
        if self.background is not None:
            self.background.release()
        self._freed = True
        if self._node is not None:
            self._node.Free()
        if self.duplicate is not None:
            self.duplicate.Free()

    def duplicate_again(self, name: str) -> MPI.Intracomm:
        """Make a further duplicate, for other messages. Collective and blocking, so all ranks must have arrived."""
        from mpi4py import MPI

        duplicate = self._comm.Dup()
        duplicate.Set_name(name)
        duplicate.Set_errhandler(MPI.ERRORS_RETURN)
        return duplicate

    def _duplicate(self) -> None:
        # The call blocks, but every rank has confirmed that it is here.
        self.duplicate = self.duplicate_again("distckpt")
        self.collectives = MpiCollectives(self.duplicate)
        # The protocol starts anew on all ranks. Messages still under way on the user's communicator are never read.
        self._arrival = arrival_over(Channel(self.duplicate, _ARRIVAL_TAG, waits_of(self.size)))


class Alone:
    """The session of a process without mpi4py."""

    rank = 0
    size = 1
    duplicate: MPI.Intracomm | None = None

    def __init__(self) -> None:
        self.collectives: Collectives = SingleRank()
        self.background: Background | None = None
        self.turn = threading.RLock()

    def require_alive(self) -> None:
        """See `Session.require_alive`."""

    def node_communicator(self) -> MPI.Intracomm | None:
        """See `Session.node_communicator`."""
        return None

    def nodes(self) -> Nodes:
        """See `Session.nodes`."""
        return Nodes([[0]], 0)

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        return call.balance % 2**64 == 0


class Spoken:
    """The session of a background thread: all ranks are in the same task, so there is no arrival.

    Args:
        collectives: The collectives of the thread.
    """

    duplicate: MPI.Intracomm | None = None
    background: Background | None = None

    def __init__(self, collectives: Collectives) -> None:
        self.rank = collectives.rank
        self.size = collectives.size
        self.collectives = collectives
        self.turn = threading.RLock()

    def require_alive(self) -> None:
        """See `Session.require_alive`; the collectives know when they are closed."""

    def arrive(self, call: Call) -> bool:
        """See `Arrival.arrive`."""
        raise CheckpointError(f"{call.operation}: only the main thread can call for the other ranks.")


@cache
def _alone() -> Alone:
    return Alone()


def open_session(comm: MPI.Intracomm | None) -> Session | Alone:
    """Find or make the session of a communicator. Local.

    Args:
        comm: The user's communicator; None is COMM_WORLD, or this process alone if mpi4py is not installed.

    Raises:
        CheckpointError: MPI is not running, the communicator is freed, or the launcher started more processes than
            COMM_WORLD has.
    """
    if comm is None and find_spec("mpi4py") is None:
        require_single("mpi4py is not installed (`pip install mpi4py`)")
        return _alone()
    mpi = require_running()
    comm = mpi.COMM_WORLD if comm is None else comm
    require_handle(comm)
    if comm == mpi.COMM_WORLD and comm.size == 1:
        library = mpi.Get_library_version().strip().splitlines()[0].split(",")[0]
        require_single(f"in this one MPI_COMM_WORLD has a single rank (mpi4py uses {library})")
    return _session_of(comm)


def _session_of(comm: MPI.Intracomm) -> Session:
    session = cast("Session | None", comm.Get_attr(_session_key()))
    if session is None:
        session = Session(comm)
        comm.Set_attr(_session_key(), session)
    return session


@cache
def _session_key() -> int:
    from mpi4py import MPI

    return MPI.Comm.Create_keyval(delete_fn=_delete_session)


def _delete_session(_comm: MPI.Comm, _key: int, session: Session) -> None:
    from mpi4py import MPI

    # MPI_Finalize deletes the attributes of COMM_WORLD, too, at a time when nothing can be freed any more.
    if not MPI.Is_finalized():
        session.release()
