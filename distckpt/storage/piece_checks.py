"""Verification of pieces whose bytes come in parts: as ranges of units, in row-major order.

See `layout.exchange` for what a unit is. A piece is a box, so that is also the order of the bytes within a piece. A
piece is hashed where its bytes are contiguous: in the unit if it is one range of the file, else in the tensor that has
all of it. Only if no rank wants all of a piece, its bytes are collected just for the checksum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from distckpt.layout.box import Box, elements_before, first_element, flat_boxes
from distckpt.layout.exchange import InFile, PieceSpan, Range, Span
from distckpt.storage.checksum import Checksums, Hasher, require_checksum
from distckpt.storage.reading import ReadReport
from distckpt.tensor_bytes import bytes_of


class PieceVerifier:
    """Verifies pieces from the ranges of units.

    Units come in one or more streams. In each, ranges come in the order of their spans; a piece is in one of them.

    Attributes:
        report: Counts the bytes that were verified.

    Args:
        variables: The variables by index.
        pieces: The pieces to verify here, sorted, by index of the variable.
        checksums: The file's checksums; None: nothing is verified.
        report: See above.
        opened: Makes the `OpenPiece` that hashes a piece.
    """

    def __init__(
        self,
        variables: Mapping[int, InFile],
        pieces: Mapping[int, Sequence[PieceSpan]],
        checksums: Checksums | None,
        report: ReadReport,
        opened: Callable[[PieceSpan, InFile], OpenPiece],
    ) -> None:
        self._variables = variables
        self._checksums = checksums
        self.report = report
        self._opened = opened
        self._pieces = {} if checksums is None else {index: found for index, found in pieces.items() if found}
        self._left: dict[tuple[int, int], list[PieceSpan]] = {}  # by stream and variable; the next one is the last
        self._open: dict[tuple[int, int], list[OpenPiece]] = {}

    def feed(self, unit: Iterable[Range], memory: memoryview, stream: int = 0) -> None:
        """Take a unit, or some of its ranges; compare the pieces that end in them.

        Args:
            unit: What has been read.
            memory: Its bytes; not used for pieces that are hashed elsewhere.
            stream: Number of the stream.

        Raises:
            CorruptCheckpointError: A checksum is wrong.
        """
        for variable, span, place in unit:
            if variable in self._pieces:
                nbytes = (span.stop - span.start) * self._variables[variable].itemsize
                self._feed_span(stream, variable, span, memory[place : place + nbytes])

    def _feed_span(self, stream: int, variable: int, span: Span, data: memoryview) -> None:
        open_pieces = self._open.setdefault((stream, variable), [])
        for piece in self._next_pieces(stream, variable, span):
            open_pieces.append(self._opened(piece, self._variables[variable]))
        for each in open_pieces:
            each.feed(span, data)
            if each.span.stop <= span.stop and each.is_whole:
                self._compare(each)
        open_pieces[:] = [each for each in open_pieces if each.span.stop > span.stop]

    def _next_pieces(self, stream: int, variable: int, span: Span) -> Iterator[PieceSpan]:
        """The pieces that begin in a span, or before it in a part that nobody wanted."""
        left = self._left.get((stream, variable))
        if left is None:
            left = self._left[stream, variable] = list(reversed(self._pieces[variable]))
        while left and left[-1].span.start < span.stop:
            piece = left.pop()
            if piece.span.stop > span.start:
                yield piece

    def _compare(self, piece: OpenPiece) -> None:
        assert self._checksums is not None, "or nothing would be fed"
        expected = int(self._checksums[piece.checksum])
        require_checksum(piece.variable.key, piece.box, piece.fed, expected, piece.hasher.intdigest())
        self.report.bytes_verified += piece.fed


class OpenPiece(ABC):
    """A piece that is being hashed.

    Attributes:
        hasher: Has hashed the bytes so far.
        fed: Number of bytes so far.
    """

    def __init__(self, piece: PieceSpan, variable: InFile) -> None:
        self.span, self.box, self.checksum = piece
        self.variable = variable
        self.hasher: Any = Hasher()
        self.fed = 0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes were hashed."""
        return self.fed == self.box.numel * self.variable.itemsize

    @abstractmethod
    def feed(self, span: Span, data: memoryview) -> None:
        """Hash the part of the piece that is in a span; `data` are the bytes of the span."""

    def update(self, data: memoryview) -> None:
        """Hash the next bytes."""
        self.hasher.update(data)
        self.fed += len(data)


class PieceRead(OpenPiece):
    """A piece that is hashed in the memory it was read into."""

    def feed(self, span: Span, data: memoryview) -> None:
        """See `OpenPiece.feed`."""
        itemsize = self.variable.itemsize
        if self.span.stop - self.span.start == self.box.numel:
            start, stop = max(span.start, self.span.start), min(span.stop, self.span.stop)
            self.update(data[(start - span.start) * itemsize : (stop - span.start) * itemsize])
            return
        shape = self.variable.shape
        for box in flat_boxes(Box.whole(shape), span.start, span.stop):
            common = box.intersect(self.box)
            if common is not None:
                start = (first_element(box, shape) - span.start) * itemsize
                array = np.ndarray(box.shape, f"V{itemsize}", data, start)
                within = common.relative_to(box)
                self.update(np.ascontiguousarray(array[slices(within)]).reshape(-1).view(np.uint8).data)


class PieceTaken(OpenPiece):
    """A piece that is hashed in the tensor it was copied into, where its bytes lie together.

    Args:
        piece: The piece.
        variable: Its variable.
        tensor: Its elements, packed, in memory of the CPU.
    """

    def __init__(self, piece: PieceSpan, variable: InFile, tensor: torch.Tensor) -> None:
        super().__init__(piece, variable)
        self._tensor = tensor  # keeps the memory
        self._memory = bytes_of(tensor)

    def feed(self, span: Span, data: memoryview) -> None:
        """See `OpenPiece.feed`; all of the span is in the tensor."""
        arrived = elements_before(self.box, self.variable.shape, span.stop) * self.variable.itemsize
        self.update(self._memory[self.fed : arrived])


def slices(box: Box) -> tuple[slice | EllipsisType, ...]:
    """The index of a box in an array of the global shape; the result is an array also without dimensions."""
    return (*(slice(start, start + extent) for start, extent in zip(*box, strict=True)), ...)
