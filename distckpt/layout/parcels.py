"""Parcels: the parts of a unit that are sent to another node, and their layout in the message.

See `layout.exchange` for the definition of a unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distckpt.layout.box import Box, first_element, flat_boxes
from distckpt.layout.exchange import InFile, Range, Unit


class Cell(NamedTuple):
    """A box of a variable whose elements are packed in some memory, in row-major order.

    Attributes:
        variable: Index of the variable.
        box: The elements, in the global tensor.
        place: Position of the first byte in that memory; a multiple of the element size.
    """

    variable: int
    box: Box
    place: int


class Parcel(NamedTuple):
    """The part of a unit that a node wants, as a message.

    Attributes:
        cells: The layout of the message.
        origins: For each cell: the cell of the unit that contains it.
        nbytes: Size of the message, at most that of the unit; 0 if the node wants nothing.
        is_whole: Whether the message is the unit itself.
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
    start, stop = part.span
    shape = variable.shape
    row = math.prod(shape[1:])
    if shape and start % row == 0 and stop % row == 0:  # the usual case: units are cut between rows
        offset = (start // row, *itertools.repeat(0, len(shape) - 1))
        return [Cell(part.variable, Box(offset, ((stop - start) // row, *shape[1:])), part.place)]
    return [
        Cell(part.variable, box, part.place + (first_element(box, shape) - start) * variable.itemsize)
        for box in flat_boxes(Box.whole(shape), start, stop)
    ]


def parcel_of(unit: Unit, variables: Mapping[int, InFile], wanted: Mapping[int, Sequence[Box]]) -> Parcel:
    """The parcel of a unit for one node. The rank that sends it and those that receive it compute the same.

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
            # The boxes want the whole range, or some elements several times. Sending the range unchanged makes no
            # message longer than its unit.
            found = [(origin, origin.box) for origin in _cells_of_range(part, variable)]
        else:
            is_whole = False
        for origin, box in found:
            place = -(-used // variable.itemsize) * variable.itemsize
            cells.append(Cell(part.variable, box, place))
            origins.append(origin)
            used = place + box.numel * variable.itemsize
    return Parcel(cells, origins, used, is_whole)
