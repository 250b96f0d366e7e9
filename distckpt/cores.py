"""How many cores of a node are there for one of its ranks."""

from __future__ import annotations

import os


def cores_of_rank(ranks_on_node: int) -> int:
    """How many threads of a rank run at the same time when all ranks of its node are as busy.

    Launchers bind ranks to cores of their own, to parts of a node that they share, or not at all. Local.

    Args:
        ranks_on_node: Number of ranks on this rank's node.

    Returns:
        At least 1.
    """
    share = (os.cpu_count() or 1) // ranks_on_node
    return max(1, min(len(os.sched_getaffinity(0)), share))
