"""Objects that users build checkpoints from."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from distckpt.layout.box import Box, Shape, flat_boxes
from distckpt.layout.placement import max_flat_boxes

T = TypeVar("T", bound=object)


class NoDependency:
    """Wraps what is not to be saved: an attribute of a `Trackable`, which then holds `value` itself, or an element of a
    list, tuple or dict, which stays wrapped.
    """

    def __init__(self, value: object) -> None:
        """Local.

        Args:
            value: What the attribute will be.
        """
        self.value = value


class Listener(Protocol):
    """Is told of attributes that are set on a `Trackable`."""

    def on_attribute(self, name: str) -> None:
        """An attribute was set."""


class Tracking:
    """What a `Trackable` knows about its edges beside the attributes themselves.

    Attributes:
        opted_out: Names of attributes set through `NoDependency`.
        explicit: Edges made by `track()`, by name.
        listeners: Told of every attribute that was set; restores wait here for names. Not kept alive.
    """

    __slots__ = ("explicit", "listeners", "opted_out")

    def __init__(self) -> None:
        self.opted_out: set[str] = set()
        self.explicit: dict[str, object] = {}
        self.listeners: weakref.WeakKeyDictionary[Listener, None] = weakref.WeakKeyDictionary()

    def tell(self, name: str) -> None:
        """An attribute was set."""
        for listener in tuple(self.listeners):
            listener.on_attribute(name)

    def __deepcopy__(self, memo: dict[int, object]) -> Tracking:
        """A copy tracks its own children, and no restore waits on it."""
        twin = Tracking()
        twin.opted_out = set(self.opted_out)
        twin.explicit = copy.deepcopy(self.explicit, memo)
        return twin


class Trackable:
    """An object whose checkpointable attributes are saved with it.

    Assigning an attribute tracks it, deleting it untracks it, and whatever it holds when `save` or `restore` runs is
    what counts. Values that cannot be checkpointed are left out. Subclasses need not call `__init__`. One that is a
    module, too, is saved as any module: its other attributes are not.
    """

    if TYPE_CHECKING:  # any attribute may be assigned; at run time a missing one is an AttributeError as usual

        def __getattr__(self, name: str) -> Any: ...

    #: Attributes that are never saved.
    _untracked_names: frozenset[str] = frozenset({"_self_tracking"})

    def __setattr__(self, name: str, value: Any) -> None:
        tracking = tracking_of(self)
        if isinstance(value, NoDependency):
            tracking.opted_out.add(name)
            value = value.value
        else:
            tracking.opted_out.discard(name)
        super().__setattr__(name, value)  # a module, which may be the next class, keeps its parameters there
        tracking.explicit.pop(name, None)
        tracking.tell(name)

    def __delattr__(self, name: str) -> None:
        tracking = tracking_of(self)
        tracking.opted_out.discard(name)
        if tracking.explicit.pop(name, None) is None or name in vars(self):
            super().__delattr__(name)

    def track(self, value: T, name: str, *, overwrite: bool = False) -> T:
        """Track an object under a name without an attribute.

        Args:
            value: The object.
            name: The local name of the edge.
            overwrite: Replace another object of that name.

        Returns:
            The object.

        Raises:
            TypeError: The object cannot be checkpointed.
            ValueError: Another object has the name, and `overwrite` is False.
        """
        from distckpt.graph.adapters.registry import refusal

        problem = refusal(value)
        if problem is not None:
            raise TypeError(f"track({name!r}): {problem}")
        current = dict(tracked_attributes(self)).get(name, value)
        if current is not value and not overwrite:
            raise ValueError(f"track({name!r}): the name belongs to another object. Pass overwrite=True to replace it.")
        tracking = tracking_of(self)
        tracking.opted_out.discard(name)
        if name in vars(self):
            object.__setattr__(self, name, value)
        else:
            tracking.explicit[name] = value
        tracking.tell(name)
        return value


def tracking_of(trackable: Trackable) -> Tracking:
    """The tracking state of a trackable, created at first use because subclasses forget `super().__init__()`."""
    tracking: Tracking | None = vars(trackable).get("_self_tracking")
    if tracking is None:
        tracking = Tracking()
        object.__setattr__(trackable, "_self_tracking", tracking)
    return tracking


def tracked_attributes(trackable: Trackable) -> Iterator[tuple[str, object]]:
    """Names and values of what may be tracked: attributes in order of first assignment, then `track()`ed objects."""
    tracking = tracking_of(trackable)
    for name, value in vars(trackable).items():
        if name not in trackable._untracked_names and name not in tracking.opted_out:
            yield name, value
    yield from tracking.explicit.items()


class PythonState:
    """State that the user turns into a str or bytes. Subclass and override both methods."""

    def serialize(self) -> str | bytes:
        """The state to store."""
        raise NotImplementedError(f"{type(self).__qualname__}.serialize()")

    def deserialize(self, value: str | bytes) -> None:
        """Take back what `serialize` returned.

        Args:
            value: The stored state, of the type that `serialize` returned.
        """
        raise NotImplementedError(f"{type(self).__qualname__}.deserialize()")


class ShardedVariable:
    """A tensor that is this rank's block of a larger one.

    Attributes:
        tensor: This rank's block, by reference; may be non-contiguous.
        global_shape: Shape of the whole tensor.
        offset: Start of the block in the whole tensor, in elements, one per dimension. Ignored for an empty block.
        start: For a flat range the number of its first element in the whole tensor; else None.
    """

    def __init__(self, tensor: torch.Tensor, global_shape: Shape, offset: Shape) -> None:
        """Local.

        Args:
            tensor: This rank's block.
            global_shape: Shape of the whole tensor.
            offset: Start of the block, in elements.

        Raises:
            ValueError: The block does not lie inside the global shape.
        """
        box = Box(tuple(int(o) for o in offset), tuple(tensor.shape))
        shape = tuple(int(size) for size in global_shape)
        if tensor.numel() == 0 and len(box.shape) == len(shape):
            box = Box((0,) * len(shape), box.shape)
        if not box.within(shape):
            raise ValueError(
                f"ShardedVariable: expected a block inside global_shape {shape}. Got offset {box.offset} and shape "
                f"{box.shape}."
            )
        self.tensor = tensor
        self.global_shape = shape
        self.offset = box.offset
        self.start: int | None = None

    @classmethod
    def flat(cls, tensor: torch.Tensor, global_shape: Shape, start: int) -> ShardedVariable:
        """A range of the whole tensor's elements in row-major order, as ZeRO partitions hold them. Local.

        Args:
            tensor: This rank's elements, of one dimension; may be empty.
            global_shape: Shape of the whole tensor.
            start: Number of the first of them among all elements. Ignored where there are none.

        Raises:
            ValueError: `tensor` has not one dimension, or the range does not lie inside the global shape.
        """
        shape = tuple(int(size) for size in global_shape)
        numel, stop = math.prod(shape), int(start) + tensor.numel()
        if tensor.dim() != 1:
            raise ValueError(
                f"ShardedVariable.flat: expected a tensor of one dimension. Got shape {tuple(tensor.shape)}. Pass "
                "tensor.view(-1), or use ShardedVariable(tensor, global_shape, offset) for a block."
            )
        if tensor.numel() and not 0 <= start < stop <= numel:
            raise ValueError(
                f"ShardedVariable.flat: expected a range inside of the {numel} elements of global_shape {shape}. Got "
                f"{tensor.numel()} elements from {start} on."
            )
        if tensor.numel() == 0 and not shape:
            raise ValueError(
                "ShardedVariable.flat: expected the one element of global_shape (). Got none. Leave the variable out "
                "on ranks that do not hold it."
            )
        variable = cls.__new__(cls)
        variable.tensor = tensor
        variable.global_shape = shape
        variable.start = int(start)
        variable.offset = variable.boxes[0].offset
        return variable

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes that it covers: one, or those of a flat range, filled up with empty ones."""
        if self.start is None:
            return (Box(self.offset, tuple(self.tensor.shape)),)
        return _flat_boxes(self.global_shape, self.start, self.start + self.tensor.numel())


def _flat_boxes(shape: Shape, start: int, stop: int) -> tuple[Box, ...]:
    """The boxes of a range, filled up with empty ones: all ranks' records then have the same form, and merge as one."""
    empty = Box((0,) * len(shape), (0,) * len(shape))
    found = flat_boxes(Box.whole(shape), start, stop) if start < stop else []
    return (*found, *[empty] * (max_flat_boxes(len(shape)) - len(found)))


class PerRank:
    """Holds one value per rank, which may differ.

    Attributes:
        value: This rank's value.
    """

    def __init__(self, value: Any) -> None:
        """Local.

        Args:
            value: Anything that can be checkpointed.
        """
        self.value = value


class RNGState:
    """The random number generators of this rank: python, NumPy, torch on the CPU and on every visible CUDA device.

    Saved and restored per rank; it holds nothing itself.
    """


class WeakRoot:
    """Dereferences a root that is given as a weak reference, or holds it."""

    def __init__(self, root: object) -> None:
        self._root = root

    def __call__(self) -> object:
        """The root.

        Raises:
            ReferenceError: It was given as a weak reference and is gone.
        """
        if not isinstance(self._root, weakref.ref):
            return self._root
        root = self._root()
        if root is None:
            raise ReferenceError("the root of this Checkpoint was given as a weak reference and no longer exists")
        return root
