"""The coordinator: operations of all ranks together, in which a failure on one rank becomes the same error on all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, cast

import msgspec
import numpy as np
import xxhash

from distckpt.coordination import agreement, job_end, merging, outcome
from distckpt.coordination.arrival import Call
from distckpt.coordination.checks import require_intracomm
from distckpt.coordination.collectives import Collectives, SingleRank
from distckpt.coordination.interrupts import INTERRUPTS
from distckpt.coordination.merging import Parts, Reply
from distckpt.coordination.message import Buffer
from distckpt.coordination.nodes import Nodes, Payload, swap
from distckpt.coordination.session import Alone, Session, Spoken, open_session
from distckpt.coordination.shared_memory import SharedMemory, allocate
from distckpt.errors import LayoutError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

#: Seconds to wait for the other ranks in the very first call, if it is not an `arrive`.
_FIRST_CALL_TIMEOUT = 600.0


class Coordinator:
    """The operations that the ranks of a communicator do together.

    A save or restore takes its `turn`, calls `arrive` and then runs its steps: `step` for local work, `on_root` and
    `merge` for work on rank 0, and the other methods for bytes and arrays.

    Every method is collective over the communicator, in the same order on all ranks, unless it says otherwise. The
    first call duplicates the communicator, once for all coordinators over it. Functions and `with` bodies given to a
    coordinator are local: any exception in them is caught, the ranks agree, and then all raise. All ranks raise the
    `LayoutError`, `RestoreMismatchError`, `CorruptCheckpointError` or `CheckpointNotFoundError` of the lowest rank that
    has one; any other exception becomes a `CollectiveError` that names the ranks. On the rank where it was caught, the
    exception is the `__cause__`. Only a rank that is told to exit (KeyboardInterrupt, SystemExit) raises just that.
    """

    def __init__(self, comm: object | None = None) -> None:
        """Local; communicates with no other rank.

        Args:
            comm: An mpi4py intracommunicator; None is COMM_WORLD, looked up at the first use, or this process alone
                if mpi4py is not installed.

        Raises:
            TypeError: `comm` is something else.
        """
        if comm is not None:
            require_intracomm(comm)
        self._comm: MPI.Intracomm | None = comm  # type: ignore[assignment]  # require_intracomm has checked it
        self._session: Session | Alone | Spoken | None = None
        self._node: Coordinator | None = None

    @classmethod
    def over(cls, session: Spoken) -> Self:
        """A coordinator for a background thread. Local."""
        coordinator = cls()
        coordinator._session = session
        return coordinator

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Coordinator cannot be pickled: its communicator exists in this job only")

    @property
    def rank(self) -> int:
        """This rank. Local; may initialise MPI."""
        return self._open().rank

    @property
    def size(self) -> int:
        """Number of ranks. Local; may initialise MPI."""
        return self._open().size

    @property
    def session(self) -> Session | Alone | Spoken:
        """The state that all coordinators over the communicator share. Local; may initialise MPI."""
        return self._open()

    @property
    def turn(self) -> AbstractContextManager[bool]:
        """Lock held during a public call: threads of one process take turns over a communicator. Local.

        Their calls must come in the same order on all ranks, as all MPI calls; else they end in a `LayoutError`.
        """
        return self._open().turn

    @property
    def communicator(self) -> MPI.Intracomm | None:
        """The duplicate, for parallel HDF5; None without mpi4py. Collective at the first use of the communicator."""
        self._connect("communicator")
        return self._open().duplicate

    @property
    def node(self) -> Coordinator:
        """The coordinator of the ranks that share memory with this one. Collective at its first use."""
        if self._node is None:
            self._connect("node")
            session = self._open()
            assert not isinstance(session, Spoken), "a thread in the background exchanges nothing"
            comm = session.node_communicator()
            self._node = self if comm is None else Coordinator(comm)
        return self._node

    @property
    def nodes(self) -> Nodes:
        """The nodes and their ranks. Collective at its first use."""
        self._connect("nodes")
        session = self._open()
        assert not isinstance(session, Spoken), "a thread in the background exchanges nothing"
        return session.nodes()

    @classmethod
    def alone(cls) -> Self:
        """A coordinator of this rank by itself. Local."""
        return cls.over(Spoken(SingleRank()))

    # ---- who is here ---------------------------------------------------------------------------------------------

    def arrive(self, operation: str, shared: int, balance: int, timeout: float) -> bool:
        """Wait for all ranks, and check that they agree. One exchange; starts every operation.

        Args:
            operation: Name of the public call, such as "save"; must be the same on all ranks.
            shared: uint64 that should be the same on all ranks.
            balance: uint64 whose sum over all ranks should be 0 modulo 2**64.
            timeout: Seconds to wait for the other ranks.

        Returns:
            Whether `shared` and `balance` fulfil these conditions. The same on all ranks.

        Raises:
            LayoutError: The ranks are in different operations.
            RankTimeoutError: Some ranks did not come, or this one came after the others had given up.
            CheckpointError: Local, on this rank only: MPI is not running, or the communicator has been freed.
        """
        digest = xxhash.xxh3_64_intdigest(shared.to_bytes(8, "little") + operation.encode())
        with INTERRUPTS.held():
            agreed = self._open().arrive(Call(operation, digest, balance, timeout))
            if not agreed:
                self._require_same_operation(operation)
            return agreed

    def uninterrupted(self) -> AbstractContextManager[None]:
        """Hold KeyboardInterrupt, and what handlers of other signals raise, back over several steps. Local.

        It is let through where ranks can agree on it: in the body of a step, in functions run on rank 0 and while
        waiting for arrivals; otherwise at the end.
        """
        return INTERRUPTS.held()

    def interruptible(self) -> AbstractContextManager[None]:
        """Let such interrupts through, also within `uninterrupted`, while no rank depends on this one. Local."""
        return INTERRUPTS.allowed()

    # ---- local work ----------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, name: str, *, remedy: str = "", clear_frames: bool = False) -> Iterator[None]:
        """Run the body, then agree on whether it failed on any rank. One reduction of a flag.

        Args:
            name: Name of the step, shown in errors.
            remedy: Advice to the user, shown with a `CollectiveError`.
            clear_frames: If the body fails, clear the local variables of the functions that it called before agreeing,
                so that they keep no HDF5 object open. Those of the function that contains the body stay.

        Raises:
            CheckpointError: As the class describes, if the body failed on any rank.
        """
        with INTERRUPTS.held():
            collectives = self._connect(name)
            own: BaseException | None = None
            try:
                with INTERRUPTS.allowed():
                    yield
            except BaseException as error:
                own = error
                if clear_frames:
                    agreement.clear_frames(error)
            try:
                outcome.agree(collectives, name, own, remedy)
            finally:
                own = None  # else the exception and this frame keep each other alive, with all their objects

    def any_set(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. One reduction; raises nothing.

        Ranks may use it to stop together, and raise their errors in a later step of more ranks than these.
        """
        with INTERRUPTS.held():
            return self._connect("agree").any_set(flag)

    # ---- work on rank 0 ------------------------------------------------------------------------------------------

    def on_root(self, name: str, fn: Callable[[], T], result_type: type[T], *, remedy: str = "") -> T:
        """Run a function on rank 0 and give all ranks its result. One broadcast if the result is small.

        Args:
            name: Name of the step, shown in errors.
            fn: Run on rank 0 only.
            result_type: Type of the result: any type that msgspec can encode; `type(None)` for no result.
            remedy: Advice to the user, shown with a `CollectiveError`.

        Returns:
            The result as decoded from its encoding, also on rank 0.

        Raises:
            CheckpointError: As the class describes, if the function failed.
        """
        with INTERRUPTS.held():
            collectives = self._connect(name)
            encoded, own = b"", None
            if collectives.rank == 0:
                try:
                    with INTERRUPTS.allowed():
                        encoded = msgspec.msgpack.encode(fn())
                except BaseException as error:
                    own = error
            try:
                announced = outcome.announce(collectives, name, encoded, own, remedy)
            finally:
                own = None
            return msgspec.msgpack.decode(announced, type=result_type)

    def merge(
        self, name: str, value: bytes, fn: Callable[[list[bytes]], Sequence[bytes]], *, remedy: str = ""
    ) -> bytes:
        """Gather a value of every rank on rank 0, run a function on them there, and hand out its replies.

        Args:
            name: Name of the step, shown in errors.
            value: This rank's value.
            fn: Run on rank 0 only; takes all values in rank order, and returns one reply per rank.
            remedy: Advice to the user, shown with a `CollectiveError`.

        Returns:
            This rank's reply.

        Raises:
            CheckpointError: As the class describes, if the function failed.
        """

        def merge(values: list[Parts]) -> list[Parts]:
            return [Parts(b"", reply) for reply in fn([bytes(value.own) for value in values])]

        return bytes(self.merge_parts(name, Parts(b"", value), merge, remedy=remedy).own)

    def merge_parts(
        self, name: str, value: Parts, fn: Callable[[list[Parts]], Sequence[Parts]], *, remedy: str = ""
    ) -> Reply:
        """As `merge`, for values and replies that are partly the same on many ranks; common parts are sent once."""
        with INTERRUPTS.held():
            return merging.merge(self._connect(name), name, value, fn, remedy)

    # ---- bytes and arrays ----------------------------------------------------------------------------------------

    def gather_all(self, name: str, value: bytes) -> list[bytes]:
        """Give all ranks the values of all ranks.

        Args:
            name: Name of the step, shown in errors.
            value: This rank's value.

        Returns:
            All values in rank order.
        """
        with INTERRUPTS.held():
            collectives = self._connect(name)
            lengths = collectives.lengths(len(value))
            values = outcome.allocate(collectives, name, sum(lengths))
            collectives.gather(value, lengths, values)
            collectives.broadcast(values)
            with self.step(name):
                return outcome.split(values, lengths)

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Give rank 0 a few numbers of every rank. One gather; no failure is expected in it.

        Args:
            row: The numbers, one-dimensional; of the same length and type on all ranks.

        Returns:
            On rank 0: an array with one row for each rank. None on the others.
        """
        with INTERRUPTS.held():
            return self._connect("gather rows").gather_rows(row)

    def gather_into(self, root: int, data: Buffer, lengths: Sequence[int], memory: bytearray | memoryview) -> None:
        """Concatenate the bytes of all ranks in the memory of one rank. One gather; no failure is expected in it.

        Args:
            root: The rank that receives.
            data: This rank's bytes.
            lengths: On the root: the number of bytes of each rank; at most `collectives.CALL_LIMIT` together.
            memory: On the root: receives the bytes; as long as all of them.
        """
        with INTERRUPTS.held():
            collectives = self._connect("gather into")
            collectives.gather(data, lengths if self.rank == root else (), memory, root)

    def share(self, array: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        """Give all ranks the array of rank 0.

        Args:
            array: On rank 0: an array of numbers. Ignored on the others.

        Returns:
            An array of the same type and shape; on rank 0 the one passed, if it is contiguous.

        Raises:
            CheckpointError: As the class describes, if the array cannot be sent.
        """
        name = "share"
        with INTERRUPTS.held():
            collectives = self._connect(name)
            announced = self.on_root(name, functools.partial(_array_type, array), _ArrayType)
            with self.step(name):
                if collectives.rank == 0:
                    shared = np.asarray(array, order="C")
                else:
                    shared = np.empty(announced.shape, dtype=announced.dtype)
            collectives.broadcast(shared.reshape(-1).view(np.uint8).data)
            return shared

    def any(self, flags: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """For each flag, whether it is set on any rank.

        Args:
            flags: Booleans or uint8, one-dimensional, of the same length on all ranks.

        Returns:
            uint8, the elementwise maximum over all ranks.
        """
        with INTERRUPTS.held():
            collectives = self._connect("any")
            with self.step("any"):
                result = np.array(flags, dtype=np.uint8)
            collectives.maximum(result)
            return result

    def shared_memory(self, nbytes: int) -> SharedMemory | None:
        """Allocate memory that all ranks of a node share, with a part for each. For a coordinator of a node (`node`).

        Args:
            nbytes: Bytes of each part, the same on all ranks.

        Returns:
            The memory; None on all ranks if any cannot allocate it.
        """
        with INTERRUPTS.held():
            collectives = self._connect("shared memory")
            return allocate(collectives, nbytes)

    def swap(self, outgoing: Payload, incoming: Payload) -> None:
        """Send bytes to one rank and receive bytes from another; no message is sent for an empty payload.

        Not collective: only the ranks that exchange messages call it, each pair with the same sizes.
        """
        with INTERRUPTS.held():
            self._connect("swap")
            swap(self._open().duplicate, outgoing, incoming)

    # ---- steps that cannot be agreed on --------------------------------------------------------------------------

    def watchdog(self, name: str, timeout: float) -> AbstractContextManager[None]:
        """End the job, naming the step, if the body takes longer than the timeout. Local.

        For calls that can hang on all ranks if they fail on one. h5py holds the GIL while it opens a file, so the
        watchdog cannot run on the ranks that hang there. Therefore the body must contain the agreement after such a
        call: the rank that failed waits there, and its watchdog ends the job.

        Args:
            name: Name of the step, for the message.
            timeout: Seconds that the body may take.
        """
        return job_end.watchdog(name, self.rank, timeout)

    # ---- parts of the above --------------------------------------------------------------------------------------

    def _open(self) -> Session | Alone | Spoken:
        if self._session is None:
            self._session = open_session(self._comm)
        self._session.require_alive()
        return self._session

    def _connect(self, name: str) -> Collectives:
        """The collectives of the duplicate. The very first call makes the duplicate, after the ranks have arrived."""
        session = self._open()
        if session.collectives is None:
            self.arrive(name, 0, 0, _FIRST_CALL_TIMEOUT)
        return cast("Collectives", session.collectives)

    def _require_same_operation(self, operation: str) -> None:
        texts = outcome.gather_texts(self._connect(operation), operation.encode())
        if len(set(texts)) > 1:
            raise LayoutError(_different_operations([text.decode() for text in texts]))


class _ArrayType(msgspec.Struct, frozen=True, array_like=True):
    """dtype and shape of an array that is about to be shared."""

    dtype: str
    shape: tuple[int, ...]


def _array_type(array: np.ndarray[Any, Any] | None) -> _ArrayType:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        raise TypeError(f"expected an array of numbers on rank 0. Got {array!r:.100}.")
    return _ArrayType(array.dtype.str, array.shape)


def _different_operations(operations: list[str]) -> str:
    calls = "; ".join(
        f"{name} on rank {', '.join(str(rank) for rank, other in enumerate(operations) if other == name)}"
        for name in sorted(set(operations))
    )
    return f"the ranks are in different calls: {calls}. Make the same collective calls in the same order on every rank."
