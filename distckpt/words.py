"""Sizes, times, ranks and lists as text."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

_MAX_RANGES = 8


def nbytes_in_words(nbytes: int) -> str:
    """A number of bytes with a binary unit, such as "1.5 MiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_in_words(seconds: float) -> str:
    """Local date and time of seconds since the epoch; "?" if no calendar has it, since a file may say anything."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def rank_list(ranks: Collection[int]) -> str:
    """Ranks as text: "rank 3", "ranks 0-3, 7"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges[:_MAX_RANGES]]
    if len(ranges) > _MAX_RANGES:
        texts.append(f"... ({len(ranks)} ranks)")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(texts)}"


def texts_of_ranks(texts: Sequence[Sequence[str]]) -> list[str]:
    """The texts of all ranks, each once; one that not all ranks have begins with those that have it.

    Args:
        texts: The texts of each rank, by rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, own in enumerate(texts):
        for text in dict.fromkeys(own):
            ranks.setdefault(text, []).append(rank)
    return [text if len(on) == len(texts) else f"{rank_list(on)}: {text}" for text, on in ranks.items()]


def listing(items: Sequence[str], limit: int) -> str:
    """The first `limit` items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
