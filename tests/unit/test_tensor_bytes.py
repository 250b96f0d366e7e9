"""Tensors laid out in memory."""

from __future__ import annotations

import itertools
import random
import struct
import weakref

import pytest
import torch

from distckpt.tensor_bytes import Memory, bytes_of, sharing_memory

LIKE = {
    "vector": torch.randn(5),
    "matrix": torch.randn(3, 4, dtype=torch.float64),
    "transposed": torch.randn(3, 4).t(),
    "one column": torch.randn(6, 4)[:, :1],
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.empty(3, 0),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "float8": torch.randn(7).to(torch.float8_e4m3fn),
    "bytes": torch.arange(13, dtype=torch.uint8),
}


def test_a_view_keeps_the_memory() -> None:
    tensor = torch.full((1 << 20,), 7.0)
    kept = weakref.ref(tensor)
    data = bytes_of(tensor)[4:8]
    expected = bytes(data)
    del tensor
    assert kept() is not None
    others = [torch.zeros(1 << 20) for _ in range(4)]  # would get memory that is free
    assert bytes(data) == expected == struct.pack("<f", 7.0)
    del others, data
    assert kept() is None


@pytest.mark.parametrize("nbytes", [1280, 1279])
def test_rooms_are_contiguous_and_do_not_touch_each_other(nbytes: int) -> None:
    memory = Memory(torch.zeros(nbytes, dtype=torch.uint8))
    rooms = {name: memory.room(like, 128 * place) for place, (name, like) in enumerate(LIKE.items())}
    for name, like in LIKE.items():
        rooms[name].copy_(like)
    base = memory.data.data_ptr()
    for place, (name, like) in enumerate(LIKE.items()):
        room = rooms[name]
        assert (room.shape, room.dtype, room.is_contiguous(), room.is_conj()) == (like.shape, like.dtype, True, False)
        assert not room.numel() or room.data_ptr() == base + 128 * place
        assert torch.equal(room, like.resolve_conj())


def test_the_last_room_ends_with_the_memory() -> None:
    memory = Memory(torch.zeros(100, dtype=torch.uint8))
    assert memory.room(torch.empty(5), 80).untyped_storage().nbytes() == 100
    with pytest.raises(RuntimeError):
        memory.room(torch.empty(6), 80)


# ---- memory in common --------------------------------------------------------------------------------------------


def test_those_that_share_memory_are_found() -> None:
    memory, other = torch.zeros(10, 12), torch.zeros(4)
    assert sharing_memory([]) == set()
    assert sharing_memory([memory[:5], other, memory[5:], memory[3:3]]) == set()
    assert sharing_memory([memory[:5], other, memory[4:]]) == {0, 2}
    assert sharing_memory([memory, other, memory, memory[9, 11:]]) == {0, 2, 3}
    assert sharing_memory([memory[:, 4:8], memory[:, :4], memory[:, 8:]]) == set()
    assert sharing_memory([memory[:, :5], memory[:, 4:8], other[::2], other[1::2]]) == {0, 1}
    assert sharing_memory([memory.t(), memory[:, 3]]) == {0, 1}
    assert sharing_memory([memory[::2], memory[1::2]]) == set()
    assert sharing_memory([memory[:, 0, None], memory[0]]) == {0, 1}


def test_parts_of_a_vector_share_memory_where_they_overlap() -> None:
    memory = torch.zeros(100)
    assert sharing_memory([memory[:50], memory[50:], memory[3:3]]) == set()
    assert sharing_memory([memory[:50], torch.zeros(4), memory[49:]]) == {0, 2}
    assert sharing_memory([memory, memory]) == {0, 1}
    assert sharing_memory([memory[:50:2], memory[50::2]]) == set()
    assert sharing_memory([memory[::2], memory[1::2]]) == set()  # side by side
    assert sharing_memory([memory[::2], memory[::4]]) == {0, 1}


def test_none_that_shares_memory_is_missed() -> None:
    random.seed(0)
    numbers = torch.arange(200)
    for _ in range(300):
        views = []
        for _ in range(random.randint(2, 4)):
            sizes = [random.randint(1, 4) for _ in range(random.randint(0, 3))]
            strides = [random.choice([1, 2, 3, 4, 8, 12, 24]) for _ in sizes]
            views.append(numbers.as_strided(sizes, strides, random.randint(0, 50)))
        elements = [set(view.reshape(-1).tolist()) for view in views]
        pairs = itertools.combinations(range(len(views)), 2)
        sharing = {index for pair in pairs if elements[pair[0]] & elements[pair[1]] for index in pair}
        assert sharing_memory(views) >= sharing
