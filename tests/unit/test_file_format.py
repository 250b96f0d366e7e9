"""Files that earlier versions have written still restore; `tests/data/make.py` wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distckpt import CheckpointReader, CheckpointWarning
from distckpt.layout.records import FORMAT_VERSION
from distckpt.storage.verify import verify_file
from tests.data.make import program

DATA = Path(__file__).resolve().parents[1] / "data"
FILES = sorted(DATA.glob("format-*.h5"))


def test_there_is_a_file_of_the_present_format() -> None:
    assert DATA / f"format-{FORMAT_VERSION}.h5" in FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_stored_file_restores(file: Path) -> None:
    expected, live = program(None, 2.0), program(None, 3.0)
    assert not torch.equal(live.model[0].weight, expected.model[0].weight)
    assert verify_file(file) == []
    with pytest.warns(CheckpointWarning, match="seen/.rank/1"):  # the second rank's own value has no place here
        live.read(file).assert_existing_objects_matched()
    for ours, saved in zip(live.model.state_dict().values(), expected.model.state_dict().values(), strict=True):
        assert torch.equal(ours, saved)
    ours, saved = live.optimizer.state_dict(), expected.optimizer.state_dict()
    assert ours["param_groups"] == saved["param_groups"]
    for number, slots in saved["state"].items():
        assert all(torch.equal(ours["state"][number][name], slot) for name, slot in slots.items())
    assert torch.equal(live.rows.tensor, expected.rows.tensor)
    assert torch.equal(live.half, expected.half)
    assert (live.step, live.names) == (2, {"a.b/c": [2.0, None], 7: b"bytes"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_stored_file_is_read_by_key(file: Path) -> None:
    with CheckpointReader(file) as reader:
        assert [(shard.rank, shard.offset) for shard in reader["rows"].shards] == [(0, (0, 0)), (1, (2, 0))]
        assert np.array_equal(reader["rows"].read(), np.full((4, 5), 2.0))
