"""Which rivals can be measured here, and why others cannot."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from distckpt.bench.runner import gather
from distckpt.bench.setting import Setup

#: Competitors that need a package of their own, and its name.
_PACKAGES = {"torchsnapshot": "torchsnapshot", "safetensors": "safetensors"}
_IN_BACKGROUND = ("async", "overlap", "memory")


def find_missing(setup: Setup) -> dict[str, str]:
    """What of a run cannot be measured on some rank, and why. Collective over the process group.

    Args:
        setup: What the user asked for.

    Returns:
        Name, as the report calls it, to reason; the same on all ranks. Competitors are among the names.
    """
    reasons = gather(dict(_missing(setup)))
    return {name: reason for of_rank in reversed(reasons) for name, reason in of_rank.items()}


def _missing(setup: Setup) -> Iterator[tuple[str, str]]:
    for name in setup.competitors:
        reason = _reason(_PACKAGES[name]) if name in _PACKAGES else ""
        if reason:
            yield name, reason
    if "dcp" in setup.competitors and set(_IN_BACKGROUND) & set(setup.cases) and setup.device == "cpu":
        yield "DCP in a thread, pinned", "for tensors of GPUs only"


def _reason(package: str) -> str:
    """Why a package cannot be imported; empty where it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else f"it cannot be imported: {error}"
    except Exception as error:  # of a package that this torch is too new for
        return f"it cannot be imported: {type(error).__name__}: {error}"
    return ""
