"""The plan of an exchange: which rank moves which ranges between the file and memory, and in which round.

See `layout.exchange` for the terms.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Box, Shape
from distckpt.layout.exchange import InFile, Range, Span, Unit, hull

#: Greater than the index of any element.
_NEVER = np.iinfo(np.int64).max


class Wanted:
    """The spans of a variable that a rank reads: the hulls of the boxes that it wants, joined."""

    def __init__(self, boxes: Sequence[Box], shape: Shape) -> None:
        self._set([hull(box, shape) for box in boxes])

    @classmethod
    def union(cls, parts: Sequence[Wanted]) -> Wanted:
        """The elements that any of several ranks wants."""
        joined = cls((), ())
        joined._set([span for part in parts for span in part._spans])
        return joined

    def _set(self, spans: Iterable[Span]) -> None:
        self._spans: list[Span] = []
        for span in sorted(spans):
            if self._spans and span.start <= self._spans[-1].stop:
                self._spans[-1] = Span(self._spans[-1].start, max(self._spans[-1].stop, span.stop))
            else:
                self._spans.append(span)
        self._stops = [span.stop for span in self._spans]

    def of(self, span: Span) -> list[Span]:
        """The parts of a span that are wanted, ascending."""
        found: list[Span] = []
        for start, stop in self._spans[bisect.bisect_right(self._stops, span.start) :]:
            if start >= span.stop:
                break
            found.append(Span(max(start, span.start), min(stop, span.stop)))
        return found

    def touches_each(self, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
        """For each span, whether any of its elements is wanted; shape (spans,)."""
        own = np.array([*self._spans, (_NEVER, _NEVER)], np.int64)
        starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
        first = np.searchsorted(own[:, 1], starts, side="right")  # the first one that ends after the span's start
        touched: npt.NDArray[np.bool_] = own[first, 0] < stops
        return touched


class Party(NamedTuple):
    """Ranks that share what they read: those of a node, or of several nodes that want the same.

    Attributes:
        wanted: For each variable, by index: the elements that they want.
        movers: Numbers of those that move bytes between the file and memory: ranks, or threads of ranks.
    """

    wanted: Mapping[int, Wanted]
    movers: Sequence[int]


def plan_rounds(
    files: Mapping[int, InFile],
    moved: Mapping[int, Sequence[Span]],
    parties: Sequence[Party],
    size: int,
    unit_nbytes: int,
) -> list[list[Unit]]:
    """Divide spans evenly by bytes among movers and rounds; each goes to a mover of a party that wants part of it.

    Args:
        files: The variables, by indices in file order.
        moved: For each variable, by index: its spans, ascending. Each span is moved by one mover, in order.
        parties: The parties, with the elements that each wants.
        size: Number of movers.
        unit_nbytes: Most bytes that a mover moves in one round; at least the size of an element.

    Returns:
        For each round, for each mover: its unit, empty if the mover has nothing left to move.
    """
    shares = _Shares(parties)
    dealt = {index: list(zip(spans, shares.of(index, spans), strict=True)) for index, spans in moved.items()}
    for index, spans_of in dealt.items():
        for span, share in spans_of:
            share.total += (span.stop - span.start) * files[index].itemsize
    units = [_Units(unit_nbytes) for _ in range(size)]
    for index in sorted(dealt):
        itemsize, row = files[index].itemsize, math.prod(files[index].shape[1:])
        for span, share in dealt[index]:
            mover = share.next_mover((span.stop - span.start) * itemsize)
            for wanted in share.wanted(index).of(span):
                for part in _cut(wanted, unit_nbytes // itemsize, row):
                    units[mover].add(index, part, itemsize)
    rounds = itertools.zip_longest(*(of_mover.units for of_mover in units), fillvalue=[])
    return [list(of_movers) for of_movers in rounds]


class _Share:
    """The spans that the same set of parties wants; each mover of these parties gets a contiguous stretch of them.

    Attributes:
        total: Bytes of all spans of the share.
    """

    def __init__(self, parties: list[Party]) -> None:
        self.total = 0
        self._parties = parties
        self._wanted: dict[int, Wanted] = {}
        self._movers = sorted(mover for party in parties for mover in party.movers)
        self._done = 0

    def wanted(self, index: int) -> Wanted:
        """The elements of a variable that any of the parties wants."""
        if index not in self._wanted:
            found = [party.wanted[index] for party in self._parties if index in party.wanted]
            self._wanted[index] = found[0] if len(found) == 1 else Wanted.union(found)
        return self._wanted[index]

    def next_mover(self, nbytes: int) -> int:
        """The one that moves the next span, of `nbytes` bytes; mover 0 if no party wants it."""
        place = self._done * len(self._movers) // self.total
        self._done += nbytes
        return self._movers[min(place, len(self._movers) - 1)] if self._movers else 0


class _Shares:
    """The shares, one for each set of parties that want the same spans."""

    def __init__(self, parties: Sequence[Party]) -> None:
        self._parties = parties
        self._shares: dict[bytes, _Share] = {}

    def of(self, index: int, spans: Sequence[Span]) -> list[_Share]:
        """The share of each span of a variable; a single party has all of them."""
        if len(self._parties) == 1:
            return [self._share(b"\x80")] * len(spans)
        touched = np.zeros((len(self._parties), len(spans)), np.bool_)
        for number, party in enumerate(self._parties):
            if index in party.wanted:
                touched[number] = party.wanted[index].touches_each(spans)
        return [self._share(column.tobytes()) for column in np.packbits(touched, axis=0).T]

    def _share(self, bits: bytes) -> _Share:
        """The share of the parties whose bits are set."""
        if bits not in self._shares:
            flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(self._parties))
            self._shares[bits] = _Share([party for party, flag in zip(self._parties, flags, strict=True) if flag])
        return self._shares[bits]


class _Units:
    """Fills the units of one mover, one after the other."""

    def __init__(self, unit_nbytes: int) -> None:
        self.units: list[Unit] = []
        self._unit_nbytes = unit_nbytes
        self._used = unit_nbytes  # of the last unit, in bytes

    def add(self, variable: int, span: Span, itemsize: int) -> None:
        nbytes = (span.stop - span.start) * itemsize
        place = -(-self._used // itemsize) * itemsize
        if place + nbytes > self._unit_nbytes:
            self.units.append([])
            place = 0
        self.units[-1].append(Range(variable, span, place))
        self._used = place + nbytes


def _cut(span: Span, max_numel: int, row: int) -> Iterator[Span]:
    """Cut a span into spans of at most `max_numel` elements, between rows if a cut there makes the span shorter."""
    start = span.start
    while start < span.stop:
        stop = min(start + max_numel, span.stop)
        at_row = stop // row * row
        if stop < span.stop and at_row > start:
            stop = at_row
        yield Span(start, stop)
        start = stop
