"""`ShardedVariable`: blocks and flat ranges, and how they are cut for the file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpoint, ShardedVariable, load_variable
from distckpt.graph.sharding import tensor_value
from distckpt.graph.values import TensorValue
from distckpt.layout.box import Box
from distckpt.layout.records import OWN_VALUE

SHAPE = (3, 4, 5)


def value_of(variable: ShardedVariable) -> TensorValue:
    return TensorValue(OWN_VALUE, variable.tensor, variable.global_shape, variable.boxes)


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))]


@given(st.lists(st.integers(1, 6), max_size=4).map(tuple), st.data())
def test_a_flat_range_is_a_few_boxes_with_its_elements(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    whole = torch.arange(numel).reshape(shape)
    variable = ShardedVariable.flat(whole.view(-1)[start:stop].clone(), shape, start)
    assert len(variable.boxes) == max(1, 2 * len(shape) - 1)  # of the same form on all ranks
    blocks = value_of(variable).blocks()
    assert 1 <= len(blocks) <= max(1, 2 * len(shape) - 1)
    assert sum(block.box.numel for block in blocks) == stop - start
    for block in blocks:
        assert torch.equal(block.tensor, part(whole, block.box))
        assert block.tensor.untyped_storage().data_ptr() == variable.tensor.untyped_storage().data_ptr()
        assert value_of(variable).block_with(block.box).box == block.box


def test_a_flat_range_knows_where_it_starts() -> None:
    variable = ShardedVariable.flat(torch.zeros(7), SHAPE, 23)
    assert (variable.start, variable.offset, variable.global_shape) == (23, (1, 0, 3), SHAPE)
    assert ShardedVariable(torch.zeros(1, 4, 5), SHAPE, (1, 0, 0)).start is None


def test_a_range_without_elements_ignores_its_start() -> None:
    variable = ShardedVariable.flat(torch.zeros(0), SHAPE, 10_000)
    assert value_of(variable).blocks() == []
    assert len(variable.boxes) == 5


def test_a_range_in_a_strided_tensor(tmp_path: Path) -> None:
    """ZeRO's ranges are views; a view may be strided."""
    memory = torch.zeros(120)
    variable = ShardedVariable.flat(memory[::2], SHAPE, 0)
    path = Checkpoint(w=torch.arange(60.0).reshape(SHAPE)).write(tmp_path / "w")
    Checkpoint(w=variable).read(path).assert_consumed()
    assert torch.equal(memory[::2], torch.arange(60.0))
    assert not memory[1::2].any()


@pytest.mark.parametrize(
    ("tensor", "shape", "start", "message"),
    [
        (torch.zeros(2, 2), SHAPE, 0, r"one dimension. Got shape \(2, 2\). Pass tensor.view\(-1\)"),
        (
            torch.zeros(2),
            SHAPE,
            59,
            r"inside of the 60 elements of global_shape \(3, 4, 5\). Got 2 elements from 59 on",
        ),
        (torch.zeros(2), SHAPE, -1, r"Got 2 elements from -1 on"),
        (torch.zeros(0), (), 0, r"one element of global_shape \(\). Got none. Leave the variable out"),
    ],
)
def test_ranges_that_cannot_be(tensor: torch.Tensor, shape: tuple[int, ...], start: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedVariable.flat(tensor, shape, start)


def test_one_element_of_a_scalar(tmp_path: Path) -> None:
    path = Checkpoint(x=ShardedVariable.flat(torch.tensor([2.5]), (), 0)).write(tmp_path / "x")
    assert torch.equal(load_variable(path, "x"), torch.tensor(2.5))
    twin = torch.zeros(1)
    Checkpoint(x=ShardedVariable.flat(twin, (), 0)).read(path).assert_consumed()
    assert twin.item() == 2.5


def test_an_optimizer_over_a_flat_range_has_slots_of_the_same_range(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(60.0))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.arange(60.0)
    optimizer.step()
    path = Checkpoint(w=ShardedVariable.flat(weight, SHAPE, 0), optimizer=optimizer).write(tmp_path / "w")
    assert load_variable(path, "optimizer/.slots/w/exp_avg").shape == SHAPE
    for already_stepped in (False, True):
        plain = torch.nn.Parameter(torch.zeros(SHAPE))
        twin = torch.optim.Adam([plain])
        if already_stepped:
            plain.grad = torch.ones(SHAPE)
            twin.step()
        Checkpoint(w=plain, optimizer=twin).read(path).assert_consumed()
        assert torch.equal(twin.state[plain]["exp_avg"].view(-1), optimizer.state[weight]["exp_avg"])
        assert torch.equal(plain.view(-1), weight)
    flat = torch.nn.Parameter(torch.zeros(60))
    back = torch.optim.Adam([flat])
    Checkpoint(w=ShardedVariable.flat(flat, SHAPE, 0), optimizer=back).read(path).assert_consumed()
    assert torch.equal(back.state[flat]["exp_avg_sq"], optimizer.state[weight]["exp_avg_sq"])


def test_a_plain_tensor_is_one_block() -> None:
    tensor = torch.zeros(2, 3)
    (block,) = tensor_value(tensor).blocks()
    assert block.tensor is tensor
    assert block.box == Box((0, 0), (2, 3))
