"""Schedulers keep one value per parameter group, by position; optimizers match groups by their members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

#: By `id()` of an optimizer whose live groups are in another order than saved: of each live group the saved position.
Orders = Mapping[int, Sequence[int]]

#: What the schedulers of torch keep per group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def in_live_order(state: Any, scheduler: object, orders: Orders) -> None:
    """Bring the saved state of a scheduler into the order of the live groups, in place.

    Args:
        state: What `state_dict()` gave. That of an object which is no scheduler stays as it is.
        scheduler: The live object.
        orders: Of the optimizers whose groups are in another order.
    """
    if not isinstance(scheduler, LRScheduler) or not isinstance(state, dict):
        return
    order = orders.get(id(getattr(scheduler, "optimizer", None)))
    for name in _PER_GROUP if order is not None else ():
        values = state.get(name)
        if isinstance(values, list) and order is not None and len(values) == len(order):
            state[name] = [values[position] for position in order]
    inner, saved = getattr(scheduler, "_schedulers", None), state.get("_schedulers")
    if isinstance(inner, list) and isinstance(saved, list):  # of a SequentialLR or ChainedScheduler
        for part, its_state in zip(inner, saved, strict=False):
            in_live_order(its_state, part, orders)
