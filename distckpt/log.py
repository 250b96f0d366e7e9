"""Logging and warnings. Progress goes to the logger "distckpt"; warnings are given on rank 0."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distckpt.errors import CheckpointWarning


class _Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that may be used between two agreements of the ranks: it raises nothing, whatever its handlers do."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message; what handlers and filters raise is shown on standard error."""
        kwargs.setdefault("stacklevel", 2)  # the line of the caller, not this one
        try:
            super().log(level, msg, *args, **kwargs)
        except Exception:
            if logging.raiseExceptions:  # as for what fails inside of logging's own handlers
                traceback.print_exc()


log = _Log(logging.getLogger("distckpt"))

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
