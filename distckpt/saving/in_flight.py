"""The saves of one Checkpoint that go on in the background, in order."""

from __future__ import annotations

from collections import deque

from distckpt.coordination.coordinator import Coordinator
from distckpt.saving.background_save import BackgroundSave


class InFlight:
    """Saves whose outcome no collective call has looked at yet: the same on all ranks, whichever have ended where."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._saves: deque[BackgroundSave] = deque()  # oldest first

    def add(self, save: BackgroundSave) -> None:
        """Take in a save that begins. Local."""
        self._saves.append(save)

    @property
    def highest_counter(self) -> int:
        """The highest save counter that one of them stores; 0 when there is none. Local; the same on all ranks."""
        return max((save.file.counter for save in self._saves), default=0)

    def settle(self, operation: str, timeout: float, keep: int = 0) -> None:
        """Wait for saves to end. Collective over the communicator.

        Args:
            operation: Who waits.
            timeout: Seconds to wait for the other ranks, where they are needed.
            keep: How many may go on, the newest.

        Raises:
            CollectiveError: One failed, and nobody on any rank has asked for its result.
            RankTimeoutError: Some ranks did not come.
        """
        while len(self._saves) > keep:
            save = self._saves[0]
            with self._coordinator.interruptible():
                save.wait(None)
            ask = save.error is not None and not self._was_asked(save, operation, timeout)
            self._saves.popleft()  # not before: a rank that leaves above must find it again
            if ask:
                save.outcome()
            save.take()

    def _was_asked(self, save: BackgroundSave, operation: str, timeout: float) -> bool:
        """Whether anybody was given the result, on any rank. Collective."""
        self._coordinator.arrive(f"{operation} after a failed save", 0, 0, timeout)
        return self._coordinator.any_set(save.asked)
