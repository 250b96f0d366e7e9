"""How ranks spread tensors over meshes: what they must agree on, and what not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout.meshes import Sharding, Shardings, disagreements, strides

KEYS = ["a", "b", "c"]


@given(st.sets(st.integers(0, 60)))
def test_strides_are_the_numbers(numbers: set[int]) -> None:
    found = strides(numbers)
    assert [number for stride in found for number in range(*stride)] == sorted(numbers)
    assert all(first < stop and step > 0 for first, stop, step in found)


def test_meshes_are_few_strides() -> None:
    assert strides(range(4096)) == ((0, 4096, 1),)
    assert strides(range(3, 4096, 8)) == ((3, 4092, 8),)
    assert strides([7]) == ((7, 8, 1),)
    assert strides([]) == ()


def on(words: str, *processes: int) -> Sharding:
    return Sharding(words, strides(processes))


def test_ranks_of_a_mesh_must_agree() -> None:
    rows, columns = on("rows", 0, 1, 2), on("columns", 0, 1, 2)
    of_ranks = [Shardings.of(rank, KEYS, {"a": rows, "b": rows}) for rank in (0, 1)]
    of_ranks.append(Shardings.of(2, KEYS, {"a": columns, "b": rows}))
    assert disagreements(KEYS, of_ranks) == [
        "a: the ranks of a mesh disagree on it. It has rows on ranks 0-1, columns on rank 2."
    ]


def test_a_mesh_that_only_one_rank_sees() -> None:
    of_ranks = [Shardings.of(0, KEYS, {"c": on("wide", 0, 1)}), Shardings.of(1, KEYS, {"c": on("own", 1)})]
    assert disagreements(KEYS, of_ranks) == [
        "c: the ranks of a mesh disagree on it. It has wide on rank 0, own on rank 1."
    ]


def test_what_is_no_disagreement() -> None:
    assert disagreements(KEYS, [Shardings(), Shardings()]) == []
    # Ranks of different meshes; a rank without the tensor; processes that are no ranks; other numbers of the ranks.
    left, right = on("left", 4, 5, 9), on("right", 6, 7)
    spreads = [{"a": left}, {"a": left, "b": left}, {"a": right}, {"b": right}]
    of_ranks = [Shardings.of(4 + rank, KEYS, found) for rank, found in enumerate(spreads)]
    assert disagreements(KEYS, [*of_ranks, Shardings()]) == []
