"""Programs that need few modules of the package: without all that `import distckpt` loads, they start at once."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bare(*packages: str) -> str:
    """The beginning of a program: `distckpt` and these packages of it are found, but what they import is not loaded."""
    lines = ["import sys, types"]
    for name in ("distckpt", *packages):
        folder = ROOT.joinpath(*name.split("."))
        lines.append(f"sys.modules[{name!r}] = types.ModuleType({name!r})")
        lines.append(f"sys.modules[{name!r}].__path__ = [{str(folder)!r}]")
    return "\n".join([*lines, ""])
