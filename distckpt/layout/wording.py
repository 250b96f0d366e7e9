"""How problems of a layout are worded: ranks, shortened values, and the one error that lists them all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distckpt.errors import LayoutError

_MAX_PROBLEMS = 20
_MAX_RANGES = 8
_MAX_CHARS = 60


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


def shortened(encoded: bytes) -> str:
    """An encoded python value as text of bounded length."""
    text = encoded.decode(errors="backslashreplace")
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."


def listing(items: Sequence[str], limit: int) -> str:
    """The first few items, and how many there are more."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def layout_error(problems: Collection[str]) -> LayoutError:
    """One error for all problems; the first 20 of them are listed."""
    lines = list(problems)[:_MAX_PROBLEMS]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more problems")
    text = "\n  ".join(lines)
    return LayoutError(f"This state cannot be saved as one checkpoint, {len(problems)} problem(s):\n  {text}")
