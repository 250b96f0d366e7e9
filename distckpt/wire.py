"""What travels when the ranks agree on a layout: each rank's message to rank 0, and rank 0's reply."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from distckpt.layout.merge import Merged, merge
from distckpt.layout.records import LocalLayout, SavePlan
from distckpt.request import check_agreement

_message = msgspec.msgpack.Decoder(tuple[bytes, LocalLayout])
_plan = msgspec.msgpack.Decoder(SavePlan)


def encode_message(request: bytes, layout: LocalLayout) -> bytes:
    """What this rank sends to rank 0. Local.

    Args:
        request: `Request.encode()` of its call.
        layout: What it holds.
    """
    return msgspec.msgpack.encode((request, layout))


def merge_messages(messages: Sequence[bytes], *, trust_lowest: bool) -> Merged:
    """Merge the layouts of all ranks. Rank 0 only.

    Args:
        messages: Of all ranks, by rank.
        trust_lowest: See `merge`.

    Raises:
        LayoutError: The ranks made different calls, or `merge` refused.
    """
    decoded = [_message.decode(message) for message in messages]
    check_agreement([request for request, _ in decoded])
    return merge([layout for _, layout in decoded], trust_lowest=trust_lowest)


def encode_replies(merged: Merged) -> list[bytes]:
    """What rank 0 answers, by rank. Rank 0 only."""
    return [msgspec.msgpack.encode(plan) for plan in merged.plans]


def decode_reply(reply: bytes) -> SavePlan:
    """This rank's plan. Local."""
    return _plan.decode(reply)


def weights_of(plan: SavePlan) -> np.ndarray:
    """`plan.weights` as uint64, modulo 2**64. Local."""
    return np.array(plan.weights, np.int64).view(np.uint64)


def balance_of(layout: LocalLayout, weights: np.ndarray) -> int:
    """This rank's part of a sum that is 0 modulo 2**64 when all replicas agree. Local.

    Args:
        layout: What it holds now.
        weights: See `weights_of`.
    """
    return int((np.frombuffer(layout.fingerprints, np.uint64) * weights).sum(dtype=np.uint64))
