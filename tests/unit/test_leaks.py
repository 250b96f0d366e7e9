"""Restores leave nothing behind: no object, no reference cycle, no descriptor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, PythonState, RestoreOptions, Trackable

OpenFiles = Callable[[], list[str]]
PARTIAL = RestoreOptions(expect_partial=True)


def growth(action: Callable[[int], object], times: int) -> int:
    """By how many container objects the process grows when something is done so many times."""
    for i in range(20):  # caches fill
        action(i)
    before = len(gc.get_objects())
    for i in range(times):
        action(i)
    return len(gc.get_objects()) - before


class _Note(PythonState):
    text = "note"

    def serialize(self) -> str:
        return self.text

    def deserialize(self, value: str | bytes) -> None:
        self.text = str(value)


def program(value: float) -> Checkpoint:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=value)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return Checkpoint(model=model, optimizer=optimizer, note=_Note(), d={"t": torch.ones(1), "n": value}, step=value)


@pytest.mark.usefixtures("without_collector")
def test_a_thousand_restores_into_one_program(path: str, open_files: OpenFiles) -> None:
    saved, live = program(1.0), program(2.0)
    file, descriptors = saved.save(path), open_files()
    assert growth(lambda _: live.restore(file), 1000) < 50
    assert live.step == 1
    assert open_files() == descriptors


@pytest.mark.usefixtures("without_collector")
def test_a_thousand_restores_that_wait(path: str, open_files: OpenFiles) -> None:
    """Each is superseded by the next, or given up with its Checkpoint; the objects live on. Nobody ever saves."""
    model = Trackable()
    model.here, model.child = 0, Trackable()
    source = Trackable()
    source.here, source.child, source.later = 1, Trackable(), torch.ones(2)
    source.child.x = torch.ones(2)
    files = [Checkpoint(m=source).save(path) for _ in range(30)]
    descriptors = open_files()
    assert growth(lambda i: Checkpoint(m=model).restore(files[i % 30]), 1000) < 50
    assert open_files() == descriptors
    live = Checkpoint(m=model)
    assert growth(lambda i: (live.restore(files[i % 30]), setattr(live, "unrelated", i)), 300) < 200
    model.later = torch.zeros(2)
    model.child.x = torch.zeros(2)
    assert model.later.tolist() == model.child.x.tolist() == [1, 1]
    assert open_files() == descriptors


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("what", ["matched", "pending", "mismatched", "failed"])
def test_everything_goes_with_its_last_reference(what: str, path: str, open_files: OpenFiles) -> None:
    """Row 63: objects with pending restores are freed by reference counts alone."""
    file = Checkpoint(m=nn.Linear(2, 2), t=torch.ones(2), n=1, later=torch.ones(1)).save(path)
    descriptors = open_files()
    live = Checkpoint(m=nn.Linear(2, 2), t=torch.zeros(3 if "m" in what[:1] and what != "matched" else 2), n=0)
    if what == "failed":
        live.t = torch.zeros(3)
        with pytest.raises(ValueError, match="t: saved"):
            live.restore(file)
    elif what == "mismatched":
        with pytest.warns(UserWarning, match="t skipped"):
            live.restore(file, options=RestoreOptions(on_mismatch="skip", expect_partial=True))
    else:
        status = live.restore(file, options=PARTIAL)
        if what == "matched":
            live.later = torch.zeros(1)
            status.assert_consumed()
        del status
    references: list[weakref.ref[Any]] = [weakref.ref(live), weakref.ref(live.m), weakref.ref(live.m.weight)]
    del live
    assert [reference() for reference in references] == [None, None, None]
    assert open_files() == descriptors


@pytest.mark.usefixtures("without_collector")
def test_a_restore_that_waits_keeps_no_object_alive(path: str) -> None:
    file = Checkpoint(m=nn.Linear(2, 2), n=1, later=torch.ones(1)).save(path)
    live = Checkpoint(m=nn.Linear(2, 2), n=0)
    status = live.restore(file, options=PARTIAL)
    module = weakref.ref(live.m)
    del live.m
    assert module() is None
    live.later = torch.zeros(1)
    assert live.later.item() == 1
    status.assert_consumed()


@pytest.mark.usefixtures("without_collector")
def test_a_thousand_saves(path: str) -> None:
    live = program(1.0)
    assert growth(lambda _: live.write(path), 300) < 50
