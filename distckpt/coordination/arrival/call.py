"""The values that a rank brings to a collective call, and the errors of a call that does not start."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.errors import RankTimeoutError

_SHOWN_RANKS = 20


@dataclass(frozen=True, slots=True)
class Call:
    """The values that one rank brings to a collective call.

    Attributes:
        operation: Name of the call, for messages.
        digest: uint64 that must be the same on all ranks.
        balance: uint64 whose sum over all ranks must be 0 modulo 2**64.
        timeout: Seconds to wait for the other ranks.
    """

    operation: str
    digest: int
    balance: int
    timeout: float


def absent_error(call: Call, absent: tuple[int, ...], size: int) -> RankTimeoutError:
    """The error of a rank that came in time, while others did not come.

    Args:
        call: The call of this rank.
        absent: Ranks that did not come.
        size: Number of ranks.
    """
    shown = ", ".join(map(str, absent[:_SHOWN_RANKS]))
    more = f" and {len(absent) - _SHOWN_RANKS} more" if len(absent) > _SHOWN_RANKS else ""
    return RankTimeoutError(
        f"{call.operation}: {len(absent)} of {size} ranks did not come within {call.timeout:g} s: rank {shown}{more}. "
        f"{call.operation} is collective: call it on every rank, in the same order as every other collective call "
        f"(not under `if rank == 0`). If all ranks do call it, the absent ones have died, hang, or need a longer "
        f"timeout.",
        absent,
    )


def late_error(call: Call, rank: int) -> RankTimeoutError:
    """The error of a rank that came after the others had given up."""
    return RankTimeoutError(
        f"{call.operation}: rank {rank} came when the others had given up waiting for it, and none of them is in a "
        f"newer call. {call.operation} is collective: call it on every rank, in the same order as every other "
        f"collective call; where a rank needs longer than the others, raise the timeout."
    )
