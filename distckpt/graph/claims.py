"""Claims: for each object the newest restore wins, in whatever order objects are attached.

TensorFlow numbers its restores and keeps the number of the last one on every object (`update_uid`). Torch's objects
have no place for that, so here the older restores keep the record: a value that a restore has claimed may not be set
any more by older restores that still wait for objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress

#: The object that a value belongs to, and the name that distinguishes it from the object's other values.
Claim = tuple[object, str]


class Claims:
    """A set of values of live objects, by identity. Keeps no object alive."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[object], set[str]]] = {}

    def add(self, claims: Iterable[Claim]) -> None:
        """Add values; those of objects without weak references (list, dict) are ignored."""
        for owner, name in claims:
            known = self._names_of(owner)
            if known is not None:
                known.add(name)
                continue
            with suppress(TypeError):
                self._names[id(owner)] = weakref.ref(owner), {name}

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, claim: Claim) -> bool:
        owner, name = claim
        return name in (self._names_of(owner) or ())

    def _names_of(self, owner: object) -> set[str] | None:
        entry = self._names.get(id(owner))
        return None if entry is None or entry[0]() is not owner else entry[1]  # else the id of a dead object, reused
