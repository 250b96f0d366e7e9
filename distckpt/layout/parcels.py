"""The part of a unit that is sent to another node, and its layout in the message.

See `layout.exchange` for what a unit is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distckpt.layout.box import Box, first_element, flat_boxes
from distckpt.layout.exchange import InFile, Range, Unit


class Cell(NamedTuple):
    """A box of a variable in some memory, where its elements are packed in row-major order.

    Attributes:
        variable: Index of the variable.
        box: The elements, in the global tensor.
        place: Position of the first byte; a multiple of the element's size.
    """

    variable: int
    box: Box
    place: int


class Parcel(NamedTuple):
    """The part of a unit that a node wants, as a message.

    Attributes:
        cells: The layout of the message.
        origins: For each cell: the cell of the unit that it is a part of.
        nbytes: Size of the message, at most that of the unit; 0 where nothing is wanted.
        is_whole: The message is the unit itself.
    """

    cells: list[Cell]
    origins: list[Cell]
    nbytes: int
    is_whole: bool


NO_PARCEL = Parcel([], [], 0, is_whole=True)


def cells_of(unit: Unit, variables: Mapping[int, InFile]) -> list[Cell]:
    """The layout of a unit."""
    return [cell for part in unit for cell in _cells_of_range(part, variables[part.variable])]


def _cells_of_range(part: Range, variable: InFile) -> list[Cell]:
    start, shape = part.span.start, variable.shape
    return [
        Cell(part.variable, box, part.place + (first_element(box, shape) - start) * variable.itemsize)
        for box in flat_boxes(Box.whole(shape), start, part.span.stop)
    ]


def parcel_of(unit: Unit, variables: Mapping[int, InFile], wanted: Mapping[int, Sequence[Box]]) -> Parcel:
    """What is wanted of a unit; the same on the rank that sends it and on those that receive it.

    Args:
        unit: The unit.
        variables: The variables by index.
        wanted: The boxes that the ranks of a node want, by index of the variable. They may overlap.
    """
    cells: list[Cell] = []
    origins: list[Cell] = []
    used, is_whole = 0, True
    for part in unit:
        variable = variables[part.variable]
        boxes = wanted.get(part.variable, ())
        found = [
            (origin, common)
            for origin in (_cells_of_range(part, variable) if boxes else ())
            for box in boxes
            if (common := origin.box.intersect(box))
        ]
        if sum(common.numel for _, common in found) >= part.span.stop - part.span.start:
            # All, or the same elements more than once: the range as it is, so that no message is longer than its unit.
            found = [(origin, origin.box) for origin in _cells_of_range(part, variable)]
        else:
            is_whole = False
        for origin, box in found:
            place = -(-used // variable.itemsize) * variable.itemsize
            cells.append(Cell(part.variable, box, place))
            origins.append(origin)
            used = place + box.numel * variable.itemsize
    return Parcel(cells, origins, used, is_whole)
