"""Fixtures of the tests on one rank."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from distckpt import Checkpoint, SaveOptions
from distckpt.layout.records import Manifest
from distckpt.storage.hdf5 import open_checkpoint

# The same examples in every run, and no limit on their time: a busy machine or a lucky draw fails nobody's change.
# HYPOTHESIS_PROFILE=default looks further.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


@pytest.fixture
def manifest_of() -> Callable[[str], Manifest]:
    """The manifest of a file."""
    return lambda path: open_checkpoint(path).manifest


@pytest.fixture
def keys_of() -> Callable[[str], set[str]]:
    """The keys of all values in a file, tensors and python values."""

    def keys(path: str) -> set[str]:
        manifest = open_checkpoint(path).manifest
        return {variable.key for variable in manifest.variables} | set(manifest.python_state)

    return keys


@pytest.fixture
def open_files() -> Callable[[], list[str]]:
    """Names of all descriptors that this process has open."""

    def names() -> list[str]:
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # that of the listing itself
                found.append(str(entry.readlink()))
        return sorted(found)

    return names


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Reference counts alone: an object in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a test writes its file."""
    return str(tmp_path / "state")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers in every test, and none taken from the next one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory with one checkpoint, on a path that every user may walk."""
    modes = {parent: parent.stat().st_mode for parent in tmp_path.parents}
    own = [
        parent
        for parent in [tmp_path, *tmp_path.parents]
        if parent.stat().st_uid == os.geteuid() and parent != Path("/")
    ]
    for parent in own:
        parent.chmod(parent.stat().st_mode | 0o055)
    made = tmp_path / "run"
    made.mkdir()
    Checkpoint(x=torch.ones(3)).save(made / "ckpt", options=SaveOptions(durable=False))
    yield made
    made.chmod(0o755)
    for parent in own[1:]:
        parent.chmod(modes[parent])
