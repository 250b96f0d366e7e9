"""Messages by which ranks agree on a layout: from each rank to rank 0, and its replies."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from distckpt.coordination.merging import Parts, Reply
from distckpt.layout.merge import Merged, merge
from distckpt.layout.records import LocalLayout, PlanItem, SavePlan
from distckpt.request import check_agreement

_COMMON = msgspec.msgpack.Decoder(tuple[bytes, bytes])
_OWN = msgspec.msgpack.Decoder(tuple[bytes, bytes, list[bytes], list[str], list[str], bytes, list[str], list[str]])
_COMMON_REPLY = msgspec.msgpack.Decoder(tuple[int, list[str], list[int]])
_OWN_REPLY = msgspec.msgpack.Decoder(tuple[list[PlanItem], list[int], list[int]])


def encode_message(request: bytes, layout: LocalLayout) -> Parts:
    """Encode this rank's message to rank 0. Local.

    The common part has the request and the object graph, which are the same on most ranks; the own part has the rest.

    Args:
        request: `Request.encode()` of this rank's call.
        layout: The local layout of this rank.
    """
    _, *own = msgspec.structs.astuple(layout)
    return Parts(msgspec.msgpack.encode((request, layout.graph)), msgspec.msgpack.encode(own))


def merge_messages(messages: Sequence[Parts], *, trust_lowest: bool) -> Merged:
    """Merge the layouts of all ranks. Rank 0 only.

    Args:
        messages: The message of each rank, by rank.
        trust_lowest: See `merge`.

    Raises:
        LayoutError: The ranks made different calls, or their layouts cannot be merged.
    """
    commons = {common: _COMMON.decode(common) for common in {message.common for message in messages}}
    check_agreement([commons[message.common][0] for message in messages])
    layouts = [LocalLayout(commons[message.common][1], *_OWN.decode(message.own)) for message in messages]
    return merge(layouts, trust_lowest=trust_lowest)


def encode_replies(merged: Merged) -> list[Parts]:
    """Encode the reply for each rank; ranks with the same object graph have the common part alike. Rank 0 only."""
    encode = msgspec.msgpack.encode
    commons: dict[tuple[int, int], bytes] = {}  # by identity, as the plans of ranks with the same graph share the lists
    replies: list[Parts] = []
    for plan in merged.plans:
        shared = id(plan.keys), id(plan.variables)
        if shared not in commons:
            commons[shared] = encode((plan.plan_id, plan.keys, plan.variables))
        replies.append(Parts(commons[shared], encode((plan.items, plan.weights, plan.watched))))
    return replies


def decode_reply(reply: Reply) -> SavePlan:
    """Decode this rank's save plan. Local."""
    plan_id, keys, variables = _COMMON_REPLY.decode(reply.common)
    items, weights, watched = _OWN_REPLY.decode(reply.own)
    return SavePlan(plan_id, keys, variables, items, weights, watched)


def weights_of(plan: SavePlan) -> np.ndarray:
    """`plan.weights` as uint64, modulo 2**64. Local."""
    return np.array(plan.weights, np.int64).view(np.uint64)


def balance_of(layout: LocalLayout, weights: np.ndarray) -> int:
    """This rank's part of a sum over all ranks that is 0 modulo 2**64 if all replicas agree. Local.

    Args:
        layout: The local layout of this rank, with its present fingerprints.
        weights: See `weights_of`.
    """
    return int((np.frombuffer(layout.fingerprints, np.uint64) * weights).sum(dtype=np.uint64))
