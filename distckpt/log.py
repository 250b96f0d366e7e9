"""Logging and warnings. Progress goes to the logger "distckpt"; warnings are given on rank 0."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from distckpt.errors import CheckpointWarning

log = logging.getLogger("distckpt")

_PACKAGE = str(Path(__file__).parent)


def warn(messages: Iterable[str]) -> None:
    """Give a `CheckpointWarning` for each message, pointing at the caller's line. Rank 0 only."""
    for message in messages:
        warnings.warn(message, CheckpointWarning, stacklevel=_depth_of_caller())


def _depth_of_caller() -> int:
    """The `stacklevel`, for `warn`, of the first frame outside this package."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    return depth
