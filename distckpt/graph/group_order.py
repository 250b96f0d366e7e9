"""Schedulers keep one value per parameter group, by position; optimizers match groups by their members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, slots=True)
class GroupOrder:
    """Which saved group each live group of an optimizer is.

    Attributes:
        n_saved: Number of saved groups.
        saved_of: Of each live group the position of the saved one; None for one that the file lacks.
    """

    n_saved: int
    saved_of: list[int | None]

    @property
    def is_as_saved(self) -> bool:
        """Whether the live groups are the saved ones, in their order."""
        return self.saved_of == [*range(self.n_saved)]


#: What the schedulers of torch keep per group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def in_live_order(state: Any, scheduler: object, orders: Mapping[int, GroupOrder]) -> None:
    """Bring the saved state of a scheduler into the order of the live groups, in place.

    A live group that the file lacks keeps its value. Those of saved groups that the optimizer lacks come last, since it
    may get these later.

    Args:
        state: What `state_dict()` gave. That of an object which is no scheduler stays as it is.
        scheduler: The live object.
        orders: By `id()` of the optimizer, for those whose groups are not as saved.
    """
    if not isinstance(scheduler, LRScheduler) or not isinstance(state, dict):
        return
    order = orders.get(id(getattr(scheduler, "optimizer", None)))
    if order is not None:
        live = scheduler.state_dict()
        for name in _PER_GROUP:
            state.update(_reordered(name, state.get(name), live.get(name), order))
    inner, saved = getattr(scheduler, "_schedulers", None), state.get("_schedulers")
    if isinstance(inner, list) and isinstance(saved, list):  # of a SequentialLR or ChainedScheduler
        for part, its_state in zip(inner, saved, strict=False):
            in_live_order(its_state, part, orders)


def kept_by_position(scheduler: object, optimizer: object, n_groups: int) -> list[str]:
    """What a scheduler of the user's own class seems to keep per group of an optimizer, beside what torch's keep."""
    if not isinstance(scheduler, LRScheduler) or getattr(scheduler, "optimizer", None) is not optimizer:
        return []
    if type(scheduler).__module__.startswith("torch.optim."):
        return []
    own = {name: value for name, value in vars(scheduler).items() if name not in _PER_GROUP}
    return [name for name, value in own.items() if isinstance(value, list | tuple) and len(value) == n_groups]


def _reordered(name: str, saved: object, live: object, order: GroupOrder) -> dict[str, list[Any]]:
    """The entry `name` in the order of the live groups; empty where it has not one value per group."""
    if not isinstance(saved, list) or not isinstance(live, list):
        return {}
    if len(saved) != order.n_saved or len(live) != len(order.saved_of):
        return {}
    pairs = zip(order.saved_of, live, strict=True)
    values = [own if position is None else saved[position] for position, own in pairs]
    return {name: values + [value for position, value in enumerate(saved) if position not in order.saved_of]}
