"""Options: frozen, by keyword, checked when they are made."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

from distckpt import Checkpoint, LayoutError, RestoreOptions, SaveOptions
from distckpt.layout.records import Manifest

_SAVE_DEFAULTS = {
    "timeout": 600.0,
    "transport": "auto",
    "collective": False,
    "hints": None,
    "durable": True,
    "checksums": True,
    "replicas": "check",
    "overlap": False,
    "host_memory": None,
    "max_in_flight": 1,
    "metadata": None,
}
_RESTORE_DEFAULTS = {
    "timeout": 600.0,
    "strict": False,
    "on_mismatch": "error",
    "cast": False,
    "rename": None,
    "only": None,
    "skip_slots": False,
    "per_rank": "keep",
    "expect_partial": False,
    "verify": True,
}


@pytest.mark.parametrize(("cls", "defaults"), [(SaveOptions, _SAVE_DEFAULTS), (RestoreOptions, _RESTORE_DEFAULTS)])
def test_defaults(cls: type, defaults: dict[str, Any]) -> None:
    options = dataclasses.asdict(cls())
    assert {name: options[name] for name in defaults} == defaults
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in inspect.signature(cls).parameters.values())
    assert all(p.default is not inspect.Parameter.empty for p in inspect.signature(cls).parameters.values())


@pytest.mark.parametrize("cls", [SaveOptions, RestoreOptions])
def test_options_are_frozen_and_have_no_other_names(cls: Any) -> None:
    options = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.timeout = 1.0
    with pytest.raises(TypeError, match="durabel"):
        cls(durabel=True)
    with pytest.raises(TypeError, match="positional"):
        cls(5.0)
    assert cls() == cls()


_BAD_TIMES: list[Any] = [0, -1, math.nan, 10**400, True, "5", None]
_BAD_SAVE: list[dict[str, Any]] = [
    *({"timeout": value} for value in _BAD_TIMES),
    {"transport": "mpi"},
    {"transport": None},
    {"replicas": "all"},
    {"collective": 1},
    {"durable": None},
    {"durable": "no"},
    {"checksums": np.bool_(True)},
    {"hints": "cb_nodes=8"},
    {"hints": {1: "8"}},
    {"hints": {"cb_nodes": 8}},
    {"overlap": 1},
    *({"max_in_flight": value} for value in (0, -1, True, 1.0, None)),
    *({"host_memory": value} for value in (0, True, 2.0, "1GiB")),
    {"metadata": [1]},
    {"metadata": {1: 2}},
]
_BAD_RESTORE: list[dict[str, Any]] = [
    *({"timeout": value} for value in _BAD_TIMES),
    {"strict": 0},
    {"cast": "yes"},
    {"on_mismatch": "ignore"},
    {"on_mismatch": []},
    {"per_rank": "drop"},
    {"rename": "a=b"},
    {"rename": {1: "a"}},
    {"rename": {"a": 1}},
    {"only": "model"},
    {"only": ["model", 1]},
    {"only": {"model"}},
    {"skip_slots": 1},
    {"expect_partial": None},
    {"verify": 1},
]


@pytest.mark.parametrize("values", _BAD_SAVE, ids=str)
def test_bad_values_of_save_options(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(values))}: expected"):
        SaveOptions(**values)


@pytest.mark.parametrize("values", _BAD_RESTORE, ids=str)
def test_bad_values_of_restore_options(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(values))}: expected"):
        RestoreOptions(**values)


@pytest.mark.parametrize("value", [1, 0.5, math.inf])
def test_any_positive_number_is_a_timeout(value: float, path: str) -> None:
    checkpoint = Checkpoint(x=1)
    checkpoint.read(checkpoint.write(path, options=SaveOptions(timeout=value)), options=RestoreOptions(timeout=value))


@pytest.mark.parametrize(
    "options",
    [
        SaveOptions(transport="posix"),
        SaveOptions(durable=False),
        SaveOptions(checksums=False),
        SaveOptions(replicas="check_all"),
        SaveOptions(replicas="first"),
        SaveOptions(collective=True, hints={"cb_nodes": "2"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("verify", [True, False])
def test_every_option_gives_a_file_that_restores(options: SaveOptions, verify: bool, path: str) -> None:
    saved = Checkpoint(x=torch.arange(5.0), n=3)
    saved.save(path)
    saved.x += 1
    file = saved.save(path, options=options)
    live = Checkpoint(x=torch.zeros(5), n=0)
    live.restore(file, options=RestoreOptions(verify=verify)).assert_consumed()
    assert live.x.tolist() == [1, 2, 3, 4, 5]
    assert live.n == 3


def test_checksums_are_left_out_when_told(path: str, manifest_of: Any) -> None:
    checkpoint = Checkpoint(x=torch.ones(2))
    algorithms = [
        manifest_of(checkpoint.save(path, options=SaveOptions(checksums=checksums))).checksums
        for checksums in (True, False, True)
    ]
    assert algorithms == ["xxh3-64", None, "xxh3-64"]


def test_metadata_is_stored_as_it_is(path: str, manifest_of: Any) -> None:
    import msgspec

    from distckpt.graph.python_value import decode

    metadata = {"run": "a", "loss": 0.5, "sizes": (1, 2), "nested": {"x": [None, b"y"]}}
    manifest: Manifest = manifest_of(Checkpoint(x=1).write(path, options=SaveOptions(metadata=metadata)))
    assert decode(msgspec.json.encode(manifest.metadata)) == metadata
    assert decode(msgspec.json.encode(manifest_of(Checkpoint(x=1).write(path)).metadata)) is None


def test_metadata_that_only_pickle_could_store_is_refused(path: str) -> None:
    with pytest.raises(LayoutError, match=r"SaveOptions\.metadata: .*set") as caught:
        Checkpoint(x=1).write(path, options=SaveOptions(metadata={"a": {1, 2}}))
    assert isinstance(caught.value, ValueError)


def test_options_do_not_come_by_position(path: str) -> None:
    with pytest.raises(TypeError, match="positional"):
        Checkpoint(x=1).save(path, SaveOptions())  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Checkpoint(x=1).restore(path, RestoreOptions())  # type: ignore[misc]


def test_options_of_the_other_kind_are_refused(path: str) -> None:
    checkpoint = Checkpoint(x=torch.ones(2))
    with pytest.raises(TypeError, match=r"expected SaveOptions or None\. Got RestoreOptions"):
        checkpoint.save(path, options=RestoreOptions())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected RestoreOptions or None\. Got dict"):
        checkpoint.restore(None, options={})  # type: ignore[arg-type]
