"""The base class of all roles in the protocol: it counts calls and give-ups."""

from __future__ import annotations

import abc
import math

from distckpt.coordination.arrival.call import Call, absent_error, late_error
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel
from distckpt.coordination.message import Kind, Message
from distckpt.errors import RankTimeoutError

ROOT = 0


class Arrival(abc.ABC):
    """One rank's role in the protocol. `Session.arrive` calls `arrive` once for each collective call."""

    def __init__(self, channel: Channel, teams: Teams) -> None:
        self._channel = channel
        self._teams = teams
        self._rank = channel.rank
        self._size = channel.size
        self._waits = channel.waits
        self._call = 0
        self._generation = 0
        # Time at which this rank stops waiting because it was told of a give-up; infinity without a notice.
        self._notice_end = math.inf

    @abc.abstractmethod
    def arrive(self, call: Call) -> bool:
        """Wait until all ranks have come to the same call. Collective over the communicator.

        Args:
            call: The values that this rank brings.

        Returns:
            Whether all digests are equal and the balances add up to 0.

        Raises:
            RankTimeoutError: Some ranks did not come, or this one came after the others had given up.
        """

    def _send(self, destination: int, kind: Kind, call: int, *, flag: bool = False) -> None:
        self._channel.send(destination, Message(kind, call, self._generation, flag))

    @property
    def _noticed(self) -> bool:
        return self._notice_end < math.inf

    def _is_news(self, message: Message) -> bool:
        """Whether a message tells of a give-up that this rank does not know of."""
        return message.kind in (Kind.ABORT, Kind.ROLL) and message.generation >= self._generation

    def _note(self, message: Message) -> None:
        """Take an ABORT or ROLL of a call that this rank is not in as a notice, unless the give-up is known."""
        if self._is_news(message):
            self._generation = message.generation + 1
            self._notice_end = self._channel.now() + self._waits.notice

    def _gave_up(self, call: Call, absent: tuple[int, ...]) -> RankTimeoutError:
        """The error of a give-up. A rank that is itself among the absent, or has a notice, came too late."""
        if not absent or self._rank in absent:
            return late_error(call, self._rank)
        return absent_error(call, absent, self._size)
