"""What travels when the ranks agree on a layout: each rank's message to rank 0, and rank 0's reply."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from distckpt.coordination.merging import Parts, Reply
from distckpt.layout.merge import Merged, merge
from distckpt.layout.records import LocalLayout, PlanItem, SavePlan
from distckpt.request import check_agreement

_COMMON = msgspec.msgpack.Decoder(tuple[bytes, bytes])
_OWN = msgspec.msgpack.Decoder(tuple[bytes, bytes, list[bytes], list[str], list[str], bytes])
_COMMON_REPLY = msgspec.msgpack.Decoder(tuple[int, list[str], list[int]])
_OWN_REPLY = msgspec.msgpack.Decoder(tuple[list[PlanItem], list[int], list[int]])


def encode_message(request: bytes, layout: LocalLayout) -> Parts:
    """What this rank sends to rank 0: the call and the object graph, which most ranks have alike, and the rest. Local.

    Args:
        request: `Request.encode()` of its call.
        layout: What it holds.
    """
    _, *own = msgspec.structs.astuple(layout)
    return Parts(msgspec.msgpack.encode((request, layout.graph)), msgspec.msgpack.encode(own))


def merge_messages(messages: Sequence[Parts], *, trust_lowest: bool) -> Merged:
    """Merge the layouts of all ranks. Rank 0 only.

    Args:
        messages: The message of each rank, by rank.
        trust_lowest: See `merge`.

    Raises:
        LayoutError: The ranks made different calls, or `merge` refused.
    """
    commons = {common: _COMMON.decode(common) for common in {message.common for message in messages}}
    check_agreement([commons[message.common][0] for message in messages])
    layouts = [LocalLayout(commons[message.common][1], *_OWN.decode(message.own)) for message in messages]
    return merge(layouts, trust_lowest=trust_lowest)


def encode_replies(merged: Merged) -> list[Parts]:
    """What rank 0 answers, by rank: what ranks with the same object graph get alike, and the rest. Rank 0 only."""
    encode = msgspec.msgpack.encode
    commons: dict[tuple[int, int], bytes] = {}  # by identity: the plans of such ranks share these lists
    replies: list[Parts] = []
    for plan in merged.plans:
        shared = id(plan.keys), id(plan.variables)
        if shared not in commons:
            commons[shared] = encode((plan.plan_id, plan.keys, plan.variables))
        replies.append(Parts(commons[shared], encode((plan.items, plan.weights, plan.watched))))
    return replies


def decode_reply(reply: Reply) -> SavePlan:
    """This rank's plan. Local."""
    plan_id, keys, variables = _COMMON_REPLY.decode(reply.common)
    items, weights, watched = _OWN_REPLY.decode(reply.own)
    return SavePlan(plan_id, keys, variables, items, weights, watched)


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
