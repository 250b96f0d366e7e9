"""Schedulers keep one value per parameter group, by position; optimizers match groups by their members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    A live group that the file lacks keeps its value. Saved groups that the optimizer lacks have none: see
    `late_values`.

    Args:
        state: What `state_dict()` gave. That of an object which is no scheduler stays as it is.
        scheduler: The live object.
        orders: By `id()` of the optimizer.
    """
    if not isinstance(scheduler, LRScheduler) or not isinstance(state, dict):
        return
    order = orders.get(id(getattr(scheduler, "optimizer", None)))
    if order is not None:
        live = scheduler.state_dict()
        for name in _PER_GROUP:
            state.update(_reordered(name, state.get(name), live.get(name), order))
    for part, its_state in _inner(scheduler, state):
        in_live_order(its_state, part, orders)


def late_values(
    state: Any, scheduler: object, orders: Mapping[int, GroupOrder]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """What a scheduler that was restored before lacks of saved groups that its optimizer has got since.

    Args:
        state: As saved.
        scheduler: The live object.
        orders: As for `in_live_order`.

    Yields:
        A list of the scheduler, and the values that go to its end, as groups do.
    """
    order = orders.get(id(getattr(scheduler, "optimizer", None)))
    if order is None or not isinstance(state, dict):
        return
    for name in _PER_GROUP:
        saved, live = state.get(name), getattr(scheduler, name, None)
        if isinstance(saved, list) and isinstance(live, list) and len(saved) == order.n_saved:
            late = [None if position is None else saved[position] for position in order.saved_of[len(live) :]]
            if late and all(isinstance(value, int | float) for value in late):
                yield live, late
    for part, its_state in _inner(scheduler, state):
        yield from late_values(its_state, part, orders)


def kept_by_position(scheduler: object, state: object, optimizer: object, n_groups: int) -> list[str]:
    """What a scheduler of the user's own class seems to keep per group of an optimizer, beside what torch's keep.

    Args:
        scheduler: The live object, maybe of a class that is none of torch's.
        state: What `state_dict()` gives now.
        optimizer: The optimizer.
        n_groups: Number of its groups.
    """
    if getattr(scheduler, "optimizer", None) is not optimizer or not isinstance(state, dict):
        return []
    if type(scheduler).__module__.startswith("torch.optim."):
        return []
    known = _PER_GROUP if isinstance(scheduler, LRScheduler) else ()
    lists = [name for name, value in state.items() if isinstance(value, list | tuple) and len(value) == n_groups]
    return [str(name) for name in lists if name not in known]


def _inner(scheduler: object, state: dict[str, Any]) -> Iterator[tuple[object, Any]]:
    """The schedulers inside a SequentialLR or ChainedScheduler, each with its saved state."""
    inner, saved = getattr(scheduler, "_schedulers", None), state.get("_schedulers")
    if isinstance(inner, list) and isinstance(saved, list):
        yield from zip(inner, saved, strict=False)


def _reordered(name: str, saved: object, live: object, order: GroupOrder) -> dict[str, list[Any]]:
    """The entry `name` in the order of the live groups; empty where it has not one value per group."""
    if not isinstance(saved, list) or not isinstance(live, list):
        return {}
    if len(saved) != order.n_saved or len(live) != len(order.saved_of):
        return {}
    pairs = zip(order.saved_of, live, strict=True)
    return {name: [own if position is None else saved[position] for position, own in pairs]}
