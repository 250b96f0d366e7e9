"""Sizes and times in words."""

from __future__ import annotations

import time


def nbytes_in_words(nbytes: int) -> str:
    """A number of bytes with a binary unit, such as "1.5 MiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_in_words(seconds: float) -> str:
    """Local date and time of seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
