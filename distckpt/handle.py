"""`SaveHandle`, the result of `save_async`."""

from __future__ import annotations

from distckpt.saving.background_save import BackgroundSave
from distckpt.timing import Timing


class SaveHandle:
    """A save that goes on in the background.

    If MPI provides THREAD_MULTIPLE, as it does by default with mpi4py, `result` and `done` are local, and the
    checkpoint is committed without a further call. Otherwise they are collective over the communicator, and the
    checkpoint is committed by the first of them, by the next save or restore, or at exit.
    """

    def __init__(self, save: BackgroundSave) -> None:
        """Made by `save_async`."""
        self._save = save

    def __repr__(self) -> str:
        return f"SaveHandle({self._save.file.path!r})"

    @property
    def path(self) -> str:
        """Path of the checkpoint once it is committed. Local."""
        return self._save.file.path

    @property
    def is_local(self) -> bool:
        """Whether `result` and `done` are local. Local; the same on all ranks."""
        return self._save.speaks

    @property
    def timing(self) -> Timing | None:
        """Durations of the steps of the save; None until this rank knows that it is committed. Local."""
        return self._save.timing

    def result(self, timeout: float | None = None) -> str:
        """Wait until the checkpoint is durable and committed. Local, or collective: see `is_local`.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            Path of the file.

        Raises:
            ValueError: `timeout` is not a number >= 0.
            TimeoutError: The timeout has passed. The save goes on, and `result` may be called again.
            CollectiveError: The save failed on some rank; the same on all ranks. The previous checkpoint stays the
                latest.
            RankTimeoutError: The call is collective, and some ranks did not come.
        """
        _require_seconds(timeout)
        if not self._save.wait(timeout):
            raise TimeoutError(f"{self.path}: not saved after {timeout:g} s. The save goes on; call result() again.")
        return self._save.outcome()

    def done(self) -> bool:
        """Whether the save has ended, successfully or not. Local, or collective: see `is_local`."""
        return self._save.wait(0)

    def wait_staged(self) -> None:
        """Wait until all values that this rank saves are copied, so that tensors may change. Local.

        Without `SaveOptions(overlap=True)` they are copied when `save_async` returns.
        """
        self._save.stage()


def _require_seconds(timeout: object) -> None:
    if timeout is not None and not (isinstance(timeout, int | float) and timeout >= 0):
        raise ValueError(f"timeout: expected seconds >= 0, or None for no limit. Got {timeout!r}.")
