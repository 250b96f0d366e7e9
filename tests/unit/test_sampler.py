"""`ElasticSampler`: whatever the number of ranks, and however often it changes, every sample once, in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import distckpt
from distckpt.cluster import ElasticSampler


def samplers(samples: int, batch_size: int, size: int, **options: Any) -> list[ElasticSampler]:
    """Those of all ranks."""
    return [ElasticSampler(range(samples), batch_size, rank=rank, size=size, **options) for rank in range(size)]


def take(ranks: Sequence[ElasticSampler], steps: int) -> list[list[int]]:
    """The next global batches of the epoch, at most so many; each one the parts of the ranks behind one another."""
    iterators = [iter(sampler) for sampler in ranks]
    batches = []
    for _ in range(steps):
        parts = [next(iterator, None) for iterator in iterators]
        if None in parts:
            assert parts == [None] * len(parts), "all ranks make the same steps"
            break
        batches.append([index for part in parts for index in part or ()])
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(6, 20),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=4),
    shuffle=st.booleans(),
)
def test_ranks_that_come_and_go_see_every_sample_once_in_the_order_of_one_rank(
    samples: int, batch_size: int, sizes: list[tuple[int, int]], shuffle: bool
) -> None:
    options = {"shuffle": shuffle, "seed": 3}
    expected = flat(take(samplers(samples, batch_size, 1, **options), 100))
    seen: list[int] = []
    state = None
    for size, steps in [*sizes, (1, 100)]:
        ranks = samplers(samples, batch_size, size, **options)
        for sampler in ranks if state is not None else ():
            sampler.load_state_dict(state)
        if ranks[0].epoch:
            break
        for batch in take(ranks, steps):
            tail = samples - len(seen)
            seen += batch[:tail] if tail >= size else list(dict.fromkeys(batch))
        assert len({str(sampler.state_dict()) for sampler in ranks}) == 1
        state = ranks[0].state_dict()
    assert sorted(seen) == list(range(samples))
    if samples % batch_size == 0 or samples % batch_size >= 6:
        assert seen == expected


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    whole = take(samplers(64, 8, 1), 8)
    assert [take(samplers(64, 8, size), 8) for size in (2, 3, 8)] == [whole] * 3
    assert sorted(flat(whole)) == list(range(64))


def test_epochs_differ_and_follow_from_the_seed() -> None:
    (sampler,) = samplers(32, 8, 1, seed=5)
    first, second = take([sampler], 9), take([sampler], 9)
    assert (sampler.epoch, sampler.position) == (2, 0)
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second))
    assert first == take(samplers(32, 8, 1, seed=5), 9)
    assert first != take(samplers(32, 8, 1, seed=6), 9)
    assert take(samplers(6, 4, 1, shuffle=False), 9) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**80])
def test_seeds_of_any_size(seed: int) -> None:
    (sampler,) = samplers(32, 8, 1, seed=seed)
    epochs = [take([sampler], 9) for _ in range(3)]
    assert all(sorted(flat(epoch)) == list(range(32)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    if seed < 0:
        order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
        assert flat(epochs[0]) == order.tolist(), "as torch takes it"


def test_parts_differ_by_one_sample_at_most() -> None:
    assert [len(next(iter(sampler))) for sampler in samplers(100, 8, 3)] == [2, 3, 3]


def test_drop_last() -> None:
    ranks = samplers(21, 8, 2, drop_last=True, shuffle=False)
    assert len(ranks[0]) == 2
    assert take(ranks, 9) == [list(range(8)), list(range(8, 16))]
    assert ranks[0].epoch == 1
    assert len(samplers(21, 8, 2)[0]) == 3


def test_a_last_batch_smaller_than_the_number_of_ranks_gives_each_a_sample() -> None:
    ranks = samplers(5, 4, 4, shuffle=False)
    assert take(ranks, 1) == [[0, 1, 2, 3]]
    assert len(ranks[0]) == 1
    assert take(ranks, 1) == [[4, 4, 4, 4]]


def test_a_change_of_the_batch_size_keeps_the_order() -> None:
    (sampler,) = samplers(40, 8, 1)
    whole = flat(take(samplers(40, 8, 1), 9))
    seen = flat(take([sampler], 2))
    (other,) = samplers(40, 5, 1, seed=99, shuffle=False)
    other.load_state_dict(sampler.state_dict())
    assert seen + flat(take([other], 9)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_workers_fetched_ahead_do_not_count(workers: int) -> None:
    (sampler,) = samplers(40, 4, 1)
    dataset = TensorDataset(torch.arange(40))
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    seen = []
    for (batch,) in sampler.consume(loader):
        seen += batch.tolist()
        assert sampler.position == len(seen)
        if len(seen) == 12:
            break
    (other,) = samplers(40, 4, 1)
    assert other.position == 0
    other.load_state_dict(sampler.state_dict())
    loader = DataLoader(dataset, batch_sampler=other, num_workers=workers)
    assert len(loader) == 7
    for (batch,) in other.consume(loader):
        seen += batch.tolist()
    assert seen == flat(take(samplers(40, 4, 1), 99))
    assert (other.epoch, other.position) == (1, 0)


def test_it_is_saved_and_restored_with_a_checkpoint(path: str) -> None:
    (sampler,) = samplers(40, 8, 1, seed=2)
    rest = take(samplers(40, 8, 1, seed=2), 9)[2:]
    take([sampler], 2)
    distckpt.Checkpoint(sampler=sampler).write(path)
    (other,) = samplers(40, 8, 1, seed=7)
    distckpt.Checkpoint(sampler=other).read(path).assert_consumed()
    assert (other.epoch, other.position) == (0, 16)
    assert take([other], 9) == rest


def test_another_dataset_is_refused(path: str) -> None:
    distckpt.Checkpoint(sampler=samplers(40, 8, 1)[0]).write(path)
    with pytest.raises(distckpt.CheckpointError, match=r"expected a dataset of 40 samples, as saved\. Got one of 41"):
        distckpt.Checkpoint(sampler=samplers(41, 8, 1)[0]).read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank, size: expected both or none"),
        ({"rank": 2, "size": 2}, "expected 0 <= rank < size. Got 2 and 2"),
        ({"rank": 0.0, "size": 2}, r"rank: expected an integer\. Got 0\.0"),
        ({"rank": 0, "size": 2, "seed": "1"}, r"seed: expected an integer\. Got '1'"),
        ({"rank": 0, "size": 9}, "batch_size: expected a sample for each of 9 ranks or more. Got 8"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticSampler(range(10), 8, **options)  # type: ignore[arg-type]


def test_a_batch_size_that_is_no_integer() -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected an integer\. Got 4\.0"):
        ElasticSampler(range(10), 4.0, rank=0, size=1)  # type: ignore[arg-type]


def test_a_position_that_is_in_no_epoch() -> None:
    sampler = ElasticSampler(range(10), 4, rank=0, size=1)
    for position in (-1, 11):
        with pytest.raises(ValueError, match=f"position: expected 0 to 10, the samples of an epoch. Got {position}"):
            sampler.load_state_dict({**sampler.state_dict(), "position": position})
    assert sampler.position == 0


def test_a_dataset_without_a_length() -> None:
    with pytest.raises(TypeError, match=r"dataset: expected something with a length\. Got 10"):
        ElasticSampler(10, 2, rank=0, size=1)  # type: ignore[arg-type]
