"""What an adapter is, and the parts that it gives of an object."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from distckpt.graph.claims import Claim
from distckpt.graph.values import Edge, Value
from distckpt.layout.records import OWN_VALUE


@dataclass(frozen=True, slots=True)
class Problem:
    """A part of an object that cannot be stored.

    Attributes:
        name: As `layout.records.Attribute.name`; "" for the object itself.
        text: What is wrong and what to do.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Omission:
    """A part that is left out, although others of its kind are stored: a warning to the user.

    Attributes:
        name: As `layout.records.Attribute.name`.
        text: Why, and what to do.
    """

    name: str
    text: str


Part = Edge | Value | Problem | Omission


class Adapter:
    """How objects of one kind are saved and restored; one instance serves all of them.

    A walk asks for their `parts`, to save or to match them. A restore asks `takes` about stored values without a live
    one and `refusal` about the others; it reads tensors in place where it can, and hands all else to `restore`. `claim`
    identifies a value where several restores want it.
    """

    #: Edges and values are named by rank (see `layout.records.Node.per_rank`).
    per_rank = False
    #: The values are one state that is restored as a whole; the file decides which names it has.
    takes_all = False
    #: Name of the value without which the others cannot be restored.
    needs: str | None = None
    #: The objects are lists, tuples or dicts; see `elements`.
    is_container = False

    def takes(self, name: str, live: Mapping[str, Value]) -> bool:
        """Whether `restore` accepts a stored value for which the live object has none of that name.

        Args:
            name: Attribute name.
            live: The live object's values by name.
        """
        return self.takes_all and name != OWN_VALUE

    def structure_of(self, name: str) -> str | None:
        """Name of the structure that a value belongs to: a python value that refers to tensors of the object by name.
        They are restored together, or none of them.

        Args:
            name: Attribute name, of the structure or of a tensor.

        Returns:
            None for a value of its own.
        """
        return self.needs

    def handles(self, cls: type) -> bool:
        """Whether objects of this class are of this kind."""
        raise NotImplementedError

    def elements(self, obj: object) -> Iterable[tuple[object, object]]:
        """What a container holds, each with its key or index before it.

        A container without anything trackable inside is a python value, and no node.
        """
        raise NotImplementedError

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """Edges to other objects and own values, in their stored order. Must not change the object.

        Args:
            obj: The live object.
            rank: This process's rank.

        Raises:
            UnsaveableError: The object cannot be stored at all.
        """
        raise NotImplementedError

    def refusal(self, obj: object, name: str, encoded: bytes | None) -> str | None:
        """Why a stored value cannot be put into the live object, whatever its shape or dtype; asked before anything
        is restored.

        Args:
            obj: The live object.
            name: Attribute name.
            encoded: The stored python value, encoded; None for a tensor.

        Returns:
            What the live value is, for the error; None where nothing is in the way.
        """
        return None

    def exact(self, name: str) -> bool:
        """Whether `restore` takes only a tensor of the shape and dtype of the live one, which it replaces.

        Args:
            name: Attribute name.
        """
        return False

    def claim(self, obj: object, name: str) -> Claim:
        """Identifies a live value, among the values that restores set: the newest restore wins.

        Args:
            obj: The live object.
            name: Attribute name.
        """
        return obj, name

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Put values back into a live object.

        Args:
            obj: The live object.
            saved: Attribute name to python value, or to the tensor that was read where the live value is not restored
                in place.
        """
        raise NotImplementedError(f"{type(self).__name__} has no values to restore into a {type(obj).__qualname__}")

    def drop(self, obj: object, names: Collection[str]) -> None:
        """Remove from a container of python values the elements that the stored one does not have.

        Args:
            obj: The live object.
            names: Their attribute names; of a sequence the last ones.
        """
        raise NotImplementedError(f"{type(self).__name__} has no elements to drop from a {type(obj).__qualname__}")
