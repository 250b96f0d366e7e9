"""Newest call wins, per object, in whatever order objects are attached.

TensorFlow numbers its restores and keeps the number of the last one on every object (`update_uid`). Torch's objects
have no place for that, so it is told the other way round: whatever a restore takes, all older ones that still wait may
not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress

#: The object that a value belongs to, and a name that tells it from the object's other values.
Claim = tuple[object, str]


class Claims:
    """Values of live objects, by identity. Keeps no object alive."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[object], set[str]]] = {}

    def add(self, claims: Iterable[Claim]) -> None:
        """Remember values; those of objects that cannot be referred to weakly (list, dict) are not remembered."""
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
        return None if entry is None or entry[0]() is not owner else entry[1]  # else another object's, dead by now
