"""Whether the ranks of a mesh see the same mesh, and the same placements of a tensor on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from distckpt.words import listing, rank_list

#: Numbers `first`, `first + step`, ... below `stop`.
Stride = tuple[int, int, int]


class Spread(msgspec.Struct, frozen=True, array_like=True):
    """How a tensor is spread, as one rank sees it.

    Attributes:
        words: Placements and mesh in words.
        processes: The processes of the mesh, by their numbers in torch.distributed, ascending.
    """

    words: str
    processes: tuple[Stride, ...]


class Spreads(msgspec.Struct, frozen=True, array_like=True):
    """How one rank spreads tensors.

    Attributes:
        process: Its number in torch.distributed; -1 where it has none.
        spreads: The different ways.
        spread_of: uint32 for each key: 1 + index in `spreads`; 0 for a tensor without one. Empty without `spreads`.
    """

    process: int = -1
    spreads: list[Spread] = []
    spread_of: bytes = b""

    @classmethod
    def of(cls, process: int, keys: Sequence[str], found: Mapping[str, Spread]) -> Spreads:
        """From the spread of each key that has one.

        Args:
            process: This rank's number in torch.distributed; -1 where it has none.
            keys: All keys.
            found: Key to spread.
        """
        if not found:
            return cls()
        numbers = {spread: number for number, spread in enumerate(dict.fromkeys(found.values()), 1)}
        spread_of = [numbers[found[key]] if key in found else 0 for key in keys]
        return cls(process, list(numbers), np.array(spread_of, np.uint32).tobytes())


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


def disagreements(keys: Sequence[str], of_ranks: Sequence[Spreads]) -> list[str]:
    """What is wrong with tensors that ranks of one mesh spread differently, one sentence each.

    Ranks of different meshes may: each replica of a model has a mesh of its own. A rank may also lack the tensor.

    Args:
        keys: Keys of the tensors.
        of_ranks: How each rank spreads them.
    """
    holders: dict[Spread, list[int]] = {}
    for rank, own in enumerate(of_ranks):
        for spread in own.spreads:
            holders.setdefault(spread, []).append(rank)
    if not holders:
        return []
    numbers = {spread: number for number, spread in enumerate(holders, 1)}
    seen = np.zeros((len(of_ranks), len(keys)), np.uint32)
    for rank, own in enumerate(of_ranks):
        if own.spreads:
            own_numbers = np.array([0, *(numbers[spread] for spread in own.spreads)], np.uint32)
            seen[rank] = own_numbers[np.frombuffer(own.spread_of, np.uint32)]
    rank_of = {own.process: rank for rank, own in enumerate(of_ranks)}
    wrong = np.zeros(len(keys), np.bool_)
    for spread, number in numbers.items():
        members = [rank_of[process] for process in _processes(spread) if process in rank_of]
        by_members = seen[members]
        used = (seen[holders[spread]] == number).any(axis=0)
        wrong |= used & ((by_members != number) & (by_members != 0)).any(axis=0)
    return [f"{keys[index]}: {_sentence(seen[:, index], list(holders))}" for index in np.flatnonzero(wrong).tolist()]


def _processes(spread: Spread) -> Iterator[int]:
    for stride in spread.processes:
        yield from range(*stride)


def _sentence(seen: npt.NDArray[np.uint32], spreads: Sequence[Spread]) -> str:
    ranks: dict[int, list[int]] = {}
    for rank, number in enumerate(seen.tolist()):
        if number:
            ranks.setdefault(number, []).append(rank)
    on_ranks = [f"{spreads[number - 1].words} on {rank_list(on)}" for number, on in ranks.items()]
    return f"the ranks of a mesh disagree on it. It has {listing(on_ranks, 4)}."
