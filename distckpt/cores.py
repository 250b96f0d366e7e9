"""The share of a node's cores that one of its ranks can use."""

from __future__ import annotations

import os


def cores_of_rank(ranks_on_node: int) -> int:
    """Number of threads that a rank can run at once while all other ranks of its node do the same. Local.

    Launchers bind each rank to cores of its own, to a part of the node that several ranks share, or not at all.

    Args:
        ranks_on_node: Number of ranks on this rank's node.

    Returns:
        Number of threads, at least 1.
    """
    share = (os.cpu_count() or 1) // ranks_on_node
    return max(1, min(len(os.sched_getaffinity(0)), share))
