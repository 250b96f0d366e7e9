"""Verification of pieces whose bytes come in parts: as ranges of units, in row-major order.

See `layout.exchange` for the terms. A piece is a box, so its own bytes come in row-major order as well. A piece is
hashed where its bytes are contiguous: in the unit if it is one range of the file, else in the tensor that contains all
of it. Only if no rank wants all of a strided piece are its bytes collected just for the checksum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from distckpt.layout.box import Box, elements_before, first_element, flat_boxes
from distckpt.layout.exchange import InFile, PieceSpan, Range, Span
from distckpt.storage.checksum import Checksums, Hasher, require_checksum
from distckpt.tensor_bytes import bytes_of


class PieceVerifier:
    """Verifies pieces from the ranges of units.

    Units are fed in one or more streams. Within a stream the ranges come in the order of their spans, and all of a
    piece comes in a single stream. A piece is opened with the first range that has part of it, and compared with its
    checksum after the last. Threads may feed different streams at the same time.

    Args:
        variables: The variables by index.
        pieces: The sorted pieces to verify here, by index of the variable.
        checksums: The file's checksums; None verifies nothing.
        opened: Makes the `OpenPiece` that hashes a piece.
    """

    def __init__(
        self,
        variables: Mapping[int, InFile],
        pieces: Mapping[int, Sequence[PieceSpan]],
        checksums: Checksums | None,
        opened: Callable[[PieceSpan, InFile], OpenPiece],
    ) -> None:
        self._variables = variables
        self._checksums = checksums
        self._opened = opened
        self._pieces = {} if checksums is None else {index: found for index, found in pieces.items() if found}
        self._streams: dict[tuple[int, int], _Stream] = {}  # by number and variable

    @property
    def bytes_verified(self) -> int:
        """Bytes of all pieces that were compared."""
        return sum(stream.bytes_verified for stream in self._streams.values())

    def feed(self, unit: Iterable[Range], memory: memoryview, stream: int = 0) -> None:
        """Hash a unit, or some of its ranges, and compare the checksums of the pieces that end in them.

        Args:
            unit: The ranges, which have been read.
            memory: Their bytes; not used for pieces that are hashed elsewhere.
            stream: Number of the stream.

        Raises:
            CorruptCheckpointError: A checksum is wrong.
        """
        for variable, span, place in unit:
            if variable in self._pieces:
                nbytes = (span.stop - span.start) * self._variables[variable].itemsize
                self._feed_span(stream, variable, span, memory[place : place + nbytes])

    def _feed_span(self, number: int, variable: int, span: Span, data: memoryview) -> None:
        stream = self._streams.get((number, variable))
        if stream is None:
            stream = self._streams[number, variable] = _Stream(list(reversed(self._pieces[variable])))
        for piece in stream.next_pieces(span):
            stream.opened.append(self._opened(piece, self._variables[variable]))
        ended = False
        for each in stream.opened:
            each.feed(span, data)
            if each.span.stop <= span.stop:
                ended = True
                if each.is_whole:
                    self._compare(each)
                    stream.bytes_verified += each.fed
        if ended:
            stream.opened = [each for each in stream.opened if each.span.stop > span.stop]

    def _compare(self, piece: OpenPiece) -> None:
        assert self._checksums is not None, "or nothing would be fed"
        expected = int(self._checksums[piece.checksum])
        require_checksum(piece.variable.key, piece.box, piece.fed, expected, piece.hasher.intdigest())


@dataclass(slots=True)
class _Stream:
    """The pieces of one variable in one stream.

    Attributes:
        left: Those that have not begun, in reverse order.
        opened: Those that have begun and not ended.
        bytes_verified: Bytes of those that were compared.
    """

    left: list[PieceSpan]
    opened: list[OpenPiece] = field(default_factory=list)
    bytes_verified: int = 0

    def next_pieces(self, span: Span) -> list[PieceSpan]:
        """Remove and return the pieces that begin in a span, or before it in elements that no rank wanted."""
        left, found = self.left, []
        while left and left[-1].span.start < span.stop:
            piece = left.pop()
            if piece.span.stop > span.start:
                found.append(piece)
        return found


class OpenPiece(ABC):
    """A piece that is being hashed.

    Attributes:
        hasher: The hash of the bytes so far.
        fed: Number of bytes hashed so far.
    """

    def __init__(self, piece: PieceSpan, variable: InFile) -> None:
        self.span, self.box, self.checksum = piece
        self.variable = variable
        self.hasher: Any = Hasher()
        self.fed = 0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes of the piece have been hashed."""
        return self.fed == self.box.numel * self.variable.itemsize

    @abstractmethod
    def feed(self, span: Span, data: memoryview) -> None:
        """Hash the part of the piece that is in a span; `data` are the bytes of the span."""

    def update(self, data: memoryview) -> None:
        """Hash the next bytes of the piece."""
        self.hasher.update(data)
        self.fed += len(data)


class PieceRead(OpenPiece):
    """A piece that is hashed in the memory of the unit."""

    def feed(self, span: Span, data: memoryview) -> None:
        """See `OpenPiece.feed`."""
        itemsize = self.variable.itemsize
        if self.span.stop - self.span.start == self.box.numel:
            start, stop = max(span.start, self.span.start), min(span.stop, self.span.stop)
            self.update(data[(start - span.start) * itemsize : (stop - span.start) * itemsize])
            return
        shape = self.variable.shape
        for box in flat_boxes(Box.whole(shape), span.start, span.stop):
            overlap = box.overlap(self.box)
            if overlap is not None:
                start = (first_element(box, shape) - span.start) * itemsize
                array = np.ndarray(box.shape, f"V{itemsize}", data, start)
                self.update(np.ascontiguousarray(array[overlap.own]).reshape(-1).view(np.uint8).data)


class PieceTaken(OpenPiece):
    """A piece that is hashed in the tensor it was copied into, where its bytes are contiguous.

    Args:
        piece: The piece.
        variable: Its variable.
        tensor: Its elements, packed, in host memory.
    """

    def __init__(self, piece: PieceSpan, variable: InFile, tensor: torch.Tensor) -> None:
        super().__init__(piece, variable)
        self._tensor = tensor  # keeps the memory
        self._memory = bytes_of(tensor)

    def feed(self, span: Span, data: memoryview) -> None:
        """See `OpenPiece.feed`; the elements of the span have been copied into the tensor."""
        arrived = elements_before(self.box, self.variable.shape, span.stop) * self.variable.itemsize
        self.update(self._memory[self.fed : arrived])
