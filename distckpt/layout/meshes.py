"""Whether the ranks of a mesh see the same mesh, and the same placements of a tensor on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from distckpt.words import listing, rank_list

#: Numbers `first`, `first + step`, ... below `stop`.
Stride = tuple[int, int, int]


class Sharding(msgspec.Struct, frozen=True, array_like=True):
    """How a tensor is sharded, as one rank sees it.

    Attributes:
        words: Placements and mesh in words.
        processes: The processes of the mesh, by their numbers in torch.distributed, ascending.
    """

    words: str
    processes: tuple[Stride, ...]


class Shardings(msgspec.Struct, frozen=True, array_like=True):
    """How one rank shards tensors.

    Attributes:
        process: Its number in torch.distributed; -1 where it has none.
        shardings: The different ways.
        sharding_of: uint32 for each key: 1 + index in `shardings`; 0 for none. Empty without `shardings`.
    """

    process: int = -1
    shardings: list[Sharding] = []
    sharding_of: bytes = b""

    @classmethod
    def of(cls, process: int, keys: Sequence[str], found: Mapping[str, Sharding]) -> Shardings:
        """From the sharding of each key that has one.

        Args:
            process: This rank's number in torch.distributed; -1 where it has none.
            keys: All keys.
            found: Key to sharding.
        """
        if not found:
            return cls()
        numbers: dict[Sharding, int] = {}
        number_of = {key: numbers.setdefault(sharding, len(numbers) + 1) for key, sharding in found.items()}
        sharding_of = [number_of.get(key, 0) for key in keys]
        return cls(process, list(numbers), np.array(sharding_of, np.uint32).tobytes())


def strides(numbers: Iterable[int]) -> tuple[Stride, ...]:
    """Numbers as strides, ascending: the processes of a mesh are one stride, or a few."""
    found: list[Stride] = []
    for number in sorted(numbers):
        first, stop, step = found[-1] if found else (number, number, 1)
        if stop - first == 1:
            step = number - first
        if found and number - first == step * -(-(stop - first) // step):
            found[-1] = (first, number + 1, step)
        else:
            found.append((number, number + 1, 1))
    return tuple(found)


def disagreements(keys: Sequence[str], of_ranks: Sequence[Shardings]) -> list[str]:
    """What is wrong with tensors that ranks of one mesh shard differently, one sentence each.

    Ranks of different meshes may: each replica of a model has a mesh of its own. A rank may also lack the tensor.

    Args:
        keys: Keys of the tensors.
        of_ranks: How each rank shards them.
    """
    if all((own.shardings, own.sharding_of) == (of_ranks[0].shardings, of_ranks[0].sharding_of) for own in of_ranks):
        return []  # nearly always
    holders: dict[Sharding, list[int]] = {}
    for rank, own in enumerate(of_ranks):
        for sharding in own.shardings:
            holders.setdefault(sharding, []).append(rank)
    numbers = {sharding: number for number, sharding in enumerate(holders, 1)}
    seen = np.zeros((len(of_ranks), len(keys)), np.uint32)
    for rank, own in enumerate(of_ranks):
        if own.shardings:
            own_numbers = np.array([0, *(numbers[sharding] for sharding in own.shardings)], np.uint32)
            seen[rank] = own_numbers[np.frombuffer(own.sharding_of, np.uint32)]
    rank_of = {own.process: rank for rank, own in enumerate(of_ranks)}
    wrong = np.zeros(len(keys), np.bool_)
    for sharding, number in numbers.items():
        members = [rank_of[process] for process in _processes(sharding) if process in rank_of]
        by_members = seen[members]
        used = (seen[holders[sharding]] == number).any(axis=0)
        wrong |= used & ((by_members != number) & (by_members != 0)).any(axis=0)
    return [f"{keys[index]}: {_sentence(seen[:, index], list(holders))}" for index in np.flatnonzero(wrong).tolist()]


def _processes(sharding: Sharding) -> Iterator[int]:
    for stride in sharding.processes:
        yield from range(*stride)


def _sentence(seen: npt.NDArray[np.uint32], shardings: Sequence[Sharding]) -> str:
    ranks: dict[int, list[int]] = {}
    for rank, number in enumerate(seen.tolist()):
        if number:
            ranks.setdefault(number, []).append(rank)
    on_ranks = [f"{shardings[number - 1].words} on {rank_list(on)}" for number, on in ranks.items()]
    return f"the ranks of a mesh disagree on it. It has {listing(on_ranks, 4)}."
