"""The rivals that cannot be measured here, with the reasons."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from distckpt.bench.runner import gather
from distckpt.bench.setting import Setup

#: For each competitor that needs a package: the package's name.
_PACKAGES = {"torchsnapshot": "torchsnapshot", "safetensors": "safetensors"}
_IN_BACKGROUND = ("async", "overlap", "memory")


def find_missing(setup: Setup) -> dict[str, str]:
    """Find the competitors of a run that cannot be measured on some rank. Collective over the process group.

    Args:
        setup: The setup of the run.

    Returns:
        For each name, as in the report: the reason; the same on all ranks. Missing competitors are under their names.
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
    """The reason why a package cannot be imported; empty if it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else f"it cannot be imported: {error}"
    except Exception as error:  # raised by a package that is too old for this torch
        return f"it cannot be imported: {type(error).__name__}: {error}"
    return ""
