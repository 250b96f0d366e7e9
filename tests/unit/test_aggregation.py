"""Small parts that one rank writes for all: which, and how they are put together, against NumPy."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout.aggregation import (
    BIN_NBYTES,
    EXTENT_NBYTES,
    MIN_SHARDS,
    Assembly,
    Extents,
    SmallParts,
    aggregators,
    count_bins,
    rounds_of,
)


def extents(pairs: list[tuple[int, int]]) -> Extents:
    """Of (start, size)."""
    starts, sizes = np.array(pairs, np.int64).reshape(-1, 2).T
    return Extents(starts, sizes)


@st.composite
def holdings(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """For each rank its parts of a bin, disjoint, with gaps between some; at least one part."""
    n_ranks = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=30))
    begin = draw(st.integers(0, 100))
    owners = draw(st.lists(st.integers(-1, n_ranks - 1), min_size=len(lengths), max_size=len(lengths)))
    owners[-1] = max(owners[-1], 0)
    by_rank: list[list[tuple[int, int]]] = [[] for _ in range(n_ranks)]
    for owner, (start, stop) in zip(owners, pairwise(accumulate(lengths, initial=begin)), strict=True):
        if owner >= 0:  # else it is a gap
            by_rank[owner].append((start, stop - start))
    return by_rank


@given(holdings())
def test_a_bin_is_put_together_in_file_order_and_its_gaps_stay_out(by_rank: list[list[tuple[int, int]]]) -> None:
    content = np.random.default_rng(0).integers(1, 256, 1000).astype(np.uint8)
    expected = np.zeros_like(content)
    for start, size in (part for parts in by_rank for part in parts):
        expected[start : start + size] = content[start : start + size]
    sent = [content[start : start + size] for parts in by_rank for start, size in parts]
    assembly = Assembly.of([Extents.decode(memoryview(extents(parts).encode())) for parts in by_rank])
    assert assembly.lengths == [sum(size for _, size in parts) for parts in by_rank]
    ordered = assembly.put_together(np.concatenate(sent), np.full(assembly.nbytes, 255, np.uint8))
    file, position = np.zeros_like(content), 0
    for offset, nbytes in assembly.runs:
        assert file[offset - 1] == 0 or offset == 0, "runs that touch are one"
        file[offset : offset + nbytes] = ordered[position : position + nbytes]
        position += nbytes
    assert position == assembly.nbytes
    assert np.array_equal(file, expected)


def test_the_wire_form_has_a_fixed_size() -> None:
    some = extents([(5, 2), (9, 1), (1 << 40, 3)])
    assert len(some.encode()) == 3 * EXTENT_NBYTES
    again = Extents.decode(memoryview(some.encode()))
    assert (again.starts.tolist(), again.sizes.tolist()) == (some.starts.tolist(), some.sizes.tolist())


def test_a_variable_is_in_the_bin_in_which_it_begins() -> None:
    offsets = np.array([0, 100, BIN_NBYTES - 8, BIN_NBYTES - 8, 2 * BIN_NBYTES], np.int64)
    parts = SmallParts.of_variables(
        offsets, Extents(offsets + np.array([0, 4, 0, 8, 0]), np.full(5, 4)), np.ones(5, np.bool_)
    )
    assert [parts.within(number) for number in range(4)] == [slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 5)]


@pytest.mark.parametrize("n_ranks", [2, 3, 1000])
def test_only_crowded_bins_are_aggregated(n_ranks: int) -> None:
    enough = -(-MIN_SHARDS // n_ranks)
    offsets = np.repeat([0, BIN_NBYTES, 2 * BIN_NBYTES], [enough - 1, enough, enough])
    is_shard = np.repeat([True, True, False], [enough - 1, enough, enough])
    parts = SmallParts.of_variables(offsets, Extents(offsets, np.ones_like(offsets)), is_shard)
    assert parts.crowded(4, n_ranks).tolist() == [0, 1, 0, 0]


def test_bins_and_their_aggregators() -> None:
    assert [count_bins(size) for size in (1, BIN_NBYTES, BIN_NBYTES + 1)] == [1, 1, 2]
    assert aggregators(3, 6) == [0, 2, 4]
    assert aggregators(4, 2) == [0, 0, 1, 1]
    assert aggregators(0, 2) == []


@given(st.integers(0, 40), st.integers(1, 9))
def test_in_each_round_a_rank_writes_at_most_one_bin(n_bins: int, n_ranks: int) -> None:
    roots = aggregators(n_bins, n_ranks)
    rounds = rounds_of(roots)
    assert sorted(number for numbers in rounds for number in numbers) == list(range(n_bins))
    assert all(len({roots[number] for number in numbers}) == len(numbers) for numbers in rounds)
    assert len(rounds) == -(-n_bins // n_ranks)
