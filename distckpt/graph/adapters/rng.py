"""Values that every rank has for itself: `PerRank`, `RNGState`; and `torch.Generator`, which is a replicated value."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from distckpt.graph.adapters.base import Adapter, Part
from distckpt.graph.adapters.containers import assign_python_value
from distckpt.graph.adapters.registry import unwrap
from distckpt.graph.python_value import is_python_value
from distckpt.graph.trackable import PerRank, RNGState
from distckpt.graph.values import Edge, PythonValue, replicated
from distckpt.layout.keys import PER_RANK
from distckpt.layout.records import OWN_VALUE


class GeneratorAdapter(Adapter):
    """`torch.Generator`: its state as one uint8 tensor."""

    def handles(self, cls: type) -> bool:
        """Generators."""
        return issubclass(cls, torch.Generator)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """A copy of the state."""
        assert isinstance(obj, torch.Generator)
        return (replicated(obj.get_state(), in_place=False),)

    def exact(self, name: str) -> bool:
        """The state of a generator of another kind or device has another length."""
        return True

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set the state."""
        state = saved[OWN_VALUE]
        assert isinstance(obj, torch.Generator)
        assert isinstance(state, torch.Tensor)
        obj.set_state(state)


class PerRankAdapter(Adapter):
    """`PerRank`: the value below `.rank/<r>`."""

    per_rank = True

    def handles(self, cls: type) -> bool:
        """`PerRank` and its subclasses."""
        return issubclass(cls, PerRank)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """This rank's value, as an edge or as a python value."""
        assert isinstance(obj, PerRank)
        if is_python_value(obj.value):
            return (PythonValue(f"{PER_RANK}/{rank}", obj.value),)
        return (Edge(str(rank), unwrap(obj.value)),)

    def restore(self, obj: object, saved: Mapping[str, object]) -> None:
        """Set this rank's value."""
        assert isinstance(obj, PerRank)
        (value,) = saved.values()
        if not assign_python_value(obj.value, value):
            obj.value = value


class RNGStateAdapter(Adapter):
    """`RNGState`: the generators of this process, each as an integer tensor, so that the manifest stays small."""

    per_rank = True

    def handles(self, cls: type) -> bool:
        """`RNGState` and its subclasses."""
        return issubclass(cls, RNGState)

    def parts(self, obj: object, rank: int) -> Iterable[Part]:
        """A copy of each generator's state."""
        prefix = f"{PER_RANK}/{rank}"
        for name, state in _states().items():
            yield replicated(state, f"{prefix}/{name}", in_place=False)

    def exact(self, name: str) -> bool:
        """All but the number that python may have drawn in advance."""
        return not name.endswith("/python_gauss")

    def restore(self, obj: object, saved: Mapping[str, Any]) -> None:
        """Set the generators whose state was saved."""
        for name, state in saved.items():
            _restore_state(name.split("/", 2)[2], state)


def _states() -> dict[str, torch.Tensor]:
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, numpy_words, position, has_gauss, cached = numpy_state
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64, device="cpu"),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64, device="cpu"),
        "numpy": torch.from_numpy(numpy_words.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64, device="cpu"),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64, device="cpu"),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            states[f"cuda{index}"] = torch.cuda.get_rng_state(index)
    return states


def _restore_state(name: str, state: torch.Tensor) -> None:
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, numpy_words, position, has_gauss, cached = numpy_state
    match name:
        case "torch":
            torch.set_rng_state(state)
        case "python":
            random.setstate((version, tuple(state.tolist()), gauss))
        case "python_gauss":
            random.setstate((version, words, state.item() if state.numel() else None))
        case "numpy":
            np.random.set_state((kind, state.numpy().astype(np.uint32), position, has_gauss, cached))
        case "numpy_position":
            position, has_gauss = state.tolist()
            np.random.set_state((kind, numpy_words, position, has_gauss, cached))
        case "numpy_gauss":
            np.random.set_state((kind, numpy_words, position, has_gauss, state.item()))
        case _ if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[4:]))
