"""`Checkpoint`: an object graph, saved and restored together by all ranks of a communicator."""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any, TypeVar

import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.graph.adapters.base import Adapter
from distckpt.graph.adapters.registry import adapter_for, refusal, unwrap
from distckpt.graph.adapters.root import RootAdapter
from distckpt.graph.trackable import Trackable, WeakRoot, tracked_attributes
from distckpt.graph.view import LiveGraph, walk
from distckpt.handle import SaveHandle
from distckpt.options import Options, RestoreOptions, SaveOptions, given_or_default
from distckpt.request import Attempt, Request, meet
from distckpt.restoring.restorer import Restorer
from distckpt.restoring.status import RestoreStatus
from distckpt.saving.background_save import BackgroundSave, Epilogue
from distckpt.saving.draft import NewFile
from distckpt.saving.output import Target
from distckpt.saving.saver import Saver
from distckpt.tensor_bytes import require_memory
from distckpt.timing import Timing

T = TypeVar("T", bound=object)


class _Session:
    """What a Checkpoint keeps beside its attributes."""

    __slots__ = ("coordinator", "counter", "restorer", "root", "saver", "timing")

    def __init__(self, owner: Checkpoint, root: object | None, coordinator: Coordinator) -> None:
        self.root = None if root is None else WeakRoot(root)
        self.coordinator = coordinator
        self.counter = 0
        self.timing: Timing | None = None
        self.restorer = Restorer(coordinator, weakref.ref(owner))
        self.saver = Saver(coordinator, self.restorer.forget_dropped)

    @property
    def next_base(self) -> int:
        """What the next save counts from: the save counter, or that of a save in flight. The same on all ranks.

        The counter itself changes when a save is committed, which the ranks hear of at different moments.
        """
        return max(self.counter, self.saver.in_flight.highest_counter)

    def count(self, file: NewFile, timing: Timing) -> None:
        """A save in the background is committed. Local; its thread calls it."""
        self.counter = file.counter
        self.timing = timing


class Checkpoint(Trackable):
    """Groups objects whose state is saved and restored together.

    Every rank builds its own over the objects it holds. Methods that communicate say so; call them on every rank.

    Example:
        >>> checkpoint = Checkpoint(model=model, optimizer=optimizer, step=0)
        >>> checkpoint.restore(latest_checkpoint("runs/a"))
        >>> checkpoint.step = 100
        >>> checkpoint.save("runs/a/ckpt")
        'runs/a/ckpt-1.h5'
    """

    _untracked_names = frozenset({"_self_tracking", "_self_session"})

    def __init__(self, root: object | None = None, /, *, comm: object | None = None, **trackables: Any) -> None:
        """Local: the first collective call meets the other ranks.

        Args:
            root: Object whose own children become the top of the graph; may be a `weakref.ref`.
            comm: mpi4py communicator of the ranks that save together; None for `MPI.COMM_WORLD`.
            **trackables: Further children, assigned as attributes in the order of their names.

        Raises:
            TypeError: `comm` is no communicator.
            ValueError: A value cannot be checkpointed, or a name is taken.
        """
        object.__setattr__(self, "_self_session", _Session(self, root, Coordinator(comm)))
        if root is not None and adapter_for(unwrap(self._root())) is None:
            raise ValueError(f"root: a {type(root).__qualname__} cannot be checkpointed.")
        for name, value in sorted(trackables.items()):
            problem = refusal(value)
            if problem is not None:
                raise ValueError(f"{name}: {problem}")
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._require_free(name, value)
        super().__setattr__(name, value)

    def track(self, value: T, name: str, *, overwrite: bool = False) -> T:
        """Track an object under a name that need not be an attribute. Local. See `Trackable.track`."""
        self._require_free(name, value)
        return super().track(value, name, overwrite=overwrite)

    def __deepcopy__(self, memo: dict[int, object]) -> Checkpoint:
        """An independent Checkpoint over copies, on the same communicator."""
        import copy

        session = self._session
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        root = None if session.root is None else copy.deepcopy(session.root(), memo)
        object.__setattr__(twin, "_self_session", _Session(twin, root, session.coordinator))
        twin._session.counter = session.counter
        for name, value in vars(self).items():
            if name != "_self_session":
                object.__setattr__(twin, name, copy.deepcopy(value, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A Checkpoint holds a communicator, which exists in this process only."""
        raise TypeError("a Checkpoint cannot be pickled. Call save() and restore() instead.")

    # ---- the collective calls ----

    @property
    def save_counter(self) -> int:
        """How many times `save` succeeded in the life of this state: restored with it, 0 at the start."""
        return self._session.counter

    @property
    def save_timing(self) -> Timing | None:
        """How long the last save took that was committed, step by step, whatever method it was; None before. Local."""
        return self._session.timing

    def save(self, file_prefix: str | os.PathLike[str], *, options: SaveOptions | None = None) -> str:
        """Save everything as `<file_prefix>-<N>.h5`. Collective over the communicator.

        N is 1 + the larger of the save counter and the highest number of that prefix on disk; an existing file is
        never replaced. On return the file is durable and the newest of its directory.

        Args:
            file_prefix: Directory and start of the file name; ".h5" at its end is ignored.
            options: The same on all ranks.

        Returns:
            Path of the file.

        Raises:
            LayoutError: What the ranks hold is not one checkpoint. Nothing was written.
            RankTimeoutError: Some ranks did not come.
            CollectiveError: A step failed on some rank. The previous checkpoint stays the latest.
        """
        return self._save_numbered(file_prefix, None, self._options("save", options, SaveOptions))

    def save_async(self, file_prefix: str | os.PathLike[str], *, options: SaveOptions | None = None) -> SaveHandle:
        """Begin to save everything as `<file_prefix>-<N>.h5`. Collective over the communicator.

        On return everything is copied, so that the program may go on and change it (with `SaveOptions(overlap=True)`:
        go on, and change it by optimizer steps). A thread writes the file, the same as that of `save`, and commits it:
        then it is the newest of its directory, and the save counter changes. Before that nothing of it is seen. Where
        MPI does not give THREAD_MULTIPLE, the commit is made by the next collective call.

        The next save or restore first waits for it, up to `SaveOptions.max_in_flight`, and raises its error if nobody
        has asked for it. At exit the program waits for it, within `SaveOptions.timeout`.

        Args:
            file_prefix: Directory and start of the file name; ".h5" at its end is ignored.
            options: The same on all ranks. The transport is "posix".

        Returns:
            A handle, which knows when the checkpoint is durable, and what failed.

        Raises:
            LayoutError: What the ranks hold is not one checkpoint. Nothing was written.
            RankTimeoutError: Some ranks did not come.
            CollectiveError: A step failed on some rank, or an earlier save in the background did. What fails in the
                background, also for want of space, is raised by `SaveHandle.result`.
        """
        options = self._options("save_async", options, SaveOptions)
        return SaveHandle(self._start_numbered(file_prefix, None, options, None))

    def write(self, path: str | os.PathLike[str], *, options: SaveOptions | None = None) -> str:
        """Write everything to `path`, without number, counter and state file. Collective over the communicator.

        Args:
            path: The file; ".h5" is added where it is missing. An existing file is replaced atomically.
            options: The same on all ranks.

        Returns:
            Path of the file.

        Raises:
            LayoutError: What the ranks hold is not one checkpoint. Nothing was written.
            RankTimeoutError: Some ranks did not come.
            CollectiveError: A step failed on some rank. The file at `path` is the old or the new one, never a part.
        """
        options = self._options("write", options, SaveOptions)
        session, saver = self._session, self._session.saver
        walk = functools.partial(self._walk_for_save, with_counter=False)
        with session.coordinator.turn:
            saver.in_flight.settle("write", options.timeout)
            saved = saver.save("write", walk, Target(path, 0, None), options)
            session.timing = saved.timing
        return saved.path

    def restore(
        self, save_path: str | os.PathLike[str] | None, *, options: RestoreOptions | None = None
    ) -> RestoreStatus:
        """Restore a file made by `save`, the save counter included. Collective over the communicator.

        Args:
            save_path: The file, with or without ".h5"; None restores nothing.
            options: The same on all ranks.

        Returns:
            What matched. Values for names that do not exist yet wait until they do.

        Raises:
            TypeError: `save_path` is no path.
            CheckpointNotFoundError: There is no such file.
            CorruptCheckpointError: The file is damaged.
            RestoreMismatchError: Saved and live values differ in kind, shape or dtype. Nothing was changed.
            LayoutError: The ranks passed different arguments.
            RankTimeoutError: Some ranks did not come.
            CollectiveError: A step failed on some rank.
        """
        return self._restore("restore", save_path, self._options("restore", options, RestoreOptions))

    def read(self, path: str | os.PathLike[str], *, options: RestoreOptions | None = None) -> RestoreStatus:
        """Restore a file made by `write`; the save counter stays as it is. Collective over the communicator.

        Args:
            path: The file, with or without ".h5".
            options: The same on all ranks.

        Returns:
            What matched.

        Raises:
            TypeError: `path` is no path.
            CheckpointError: As `restore`.
        """
        return self._restore("read", path, self._options("read", options, RestoreOptions))

    def retry_pending(self) -> int:
        """Apply values that waited for names which exist now. Local.

        The statuses of earlier restores show on this rank what has been restored since.

        Returns:
            Number of values applied.

        Raises:
            RestoreMismatchError: A waiting value does not fit; the live value stays as it was.
        """
        return self._session.restorer.retry_pending()

    def _options(self, operation: str, options: Options | None, kind: type[Options]) -> Options:
        """The options that were passed, or the defaults. Collective if some rank passed others: then all raise."""
        given = Attempt.of(lambda: given_or_default(options, kind))
        coordinator = self._session.coordinator
        if given.error is not None and coordinator.size > 1:
            with coordinator.turn, coordinator.uninterrupted():
                timeout = kind().timeout
                self._session.saver.in_flight.settle(operation, timeout)
                meet(coordinator, Request(operation, {}), given.error, timeout)
        given.require()
        return given.value

    def _save_numbered(self, file_prefix: str | os.PathLike[str], number: int | None, options: SaveOptions) -> str:
        """`save`, with a number of the caller's choice for the file name. Collective over the communicator."""
        session = self._session
        walk = functools.partial(self._walk_for_save, with_counter=True)
        with session.coordinator.turn:
            session.saver.in_flight.settle("save", options.timeout)
            target = Target(file_prefix, session.next_base, number)
            with session.coordinator.uninterrupted():
                saved = session.saver.save("save", walk, target, options)
                session.counter, session.timing = saved.counter, saved.timing
        return saved.path

    def _start_numbered(
        self,
        file_prefix: str | os.PathLike[str],
        number: int | None,
        options: SaveOptions,
        epilogue: Epilogue | None,
    ) -> BackgroundSave:
        """`save_async`, with a number of the caller's choice and an epilogue. Collective over the communicator."""
        session = self._session
        walk = functools.partial(self._walk_for_save, with_counter=True)
        with session.coordinator.turn:
            session.saver.in_flight.settle("save_async", options.timeout, options.max_in_flight - 1)
            target = Target(file_prefix, session.next_base, number)
            return session.saver.start(walk, target, options, session.count, epilogue)

    def _restore(
        self, operation: str, save_path: str | os.PathLike[str] | None, options: RestoreOptions
    ) -> RestoreStatus:
        session = self._session
        with session.coordinator.turn:
            session.saver.in_flight.settle(operation, options.timeout)
            return session.restorer.restore(operation, save_path, options)

    # ---- the graph ----

    @property
    def _session(self) -> _Session:
        session: _Session = vars(self)["_self_session"]
        return session

    def _root(self) -> object:
        root = self._session.root
        return self if root is None else root()

    def _walk_for_save(self, *, with_counter: bool) -> LiveGraph:
        graph = self._walk(with_counter=with_counter)
        self._session.restorer.before_save(graph)
        return graph

    def _walk(self, *, with_counter: bool) -> LiveGraph:
        """Walk the live graph. Local."""
        require_memory()
        session = self._session
        root = unwrap(self._root())
        inner = adapter_for(root)
        assert inner is not None, "checked by the constructor"
        attached = {} if session.root is None else dict(tracked_attributes(self))
        counter = torch.tensor(session.next_base, dtype=torch.int64, device="cpu") if with_counter else None
        adapter = RootAdapter(self, inner, attached, counter)
        adapter.on_attached = self._set_attached
        adapter.on_counter = self._set_counter
        return walk(root, adapter, session.coordinator.rank)

    def _set_attached(self, name: str, value: object) -> None:
        super().__setattr__(name, value)

    def _set_counter(self, value: int) -> None:
        self._session.counter = value

    def _require_free(self, name: str, value: object) -> None:
        """Methods, the children of a positional root and the attached ones share one name space."""
        if name in _RESERVED_NAMES:
            raise ValueError(f"{name}: the name belongs to a method or parameter of Checkpoint. Choose another.")
        if self._session.root is None or name in vars(self):  # it was free; a walk tells if the root gets one, too
            return
        root = unwrap(self._root())
        adapter: Adapter | None = adapter_for(root)
        assert adapter is not None
        for part in adapter.parts(root, 0):
            if part.name == name and getattr(part, "target", part) is not unwrap(value):
                raise ValueError(f"{name}: the root already has a child of that name. Choose another.")


#: Private methods, too: an attribute of the same name would be called in their place.
_RESERVED_NAMES = frozenset(
    {name for cls in (Checkpoint, Trackable) for name in vars(cls) if not name.startswith("__")}
    | {"root", "comm", "file_prefix", "path", "save_path", "options"}
    | Checkpoint._untracked_names
)
