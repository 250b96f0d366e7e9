"""Where the checksum of every piece stands in the file's checksum dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from distckpt.layout.box import Shape, piece_count
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Variable


@dataclass(frozen=True, slots=True)
class ChecksumIndex:
    """Checksums by writing rank, within that in order of variables, shards, pieces: each rank writes its own at once.

    Attributes:
        firsts: For each variable, for each of its shards: index of the first of its checksums.
        total: Number of checksums in the file.
    """

    firsts: list[list[int]]
    total: int


def index_checksums(variables: Sequence[Variable]) -> ChecksumIndex:
    """Find the place of every checksum; writers and readers find the same."""
    counts = [_piece_counts(variable) for variable in variables]
    per_rank: dict[int, int] = {}
    for variable, of_shards in zip(variables, counts, strict=True):
        for shard, count in zip(variable.shards, of_shards, strict=True):
            per_rank[shard.rank] = per_rank.get(shard.rank, 0) + count
    ranks = sorted(per_rank)
    *starts, total = accumulate((per_rank[rank] for rank in ranks), initial=0)
    following = dict(zip(ranks, starts, strict=True))
    firsts = []
    for variable, of_shards in zip(variables, counts, strict=True):
        of_variable = []
        for shard, count in zip(variable.shards, of_shards, strict=True):
            of_variable.append(following[shard.rank])
            following[shard.rank] += count
        firsts.append(of_variable)
    return ChecksumIndex(firsts, total)


def _piece_counts(variable: Variable) -> list[int]:
    """Number of pieces of each shard; shards of one shape are counted once."""
    itemsize = dtype_info(variable.dtype).itemsize
    known: dict[Shape, int] = {}
    counts = []
    for shard in variable.shards:
        count = known.get(shard.shape)
        if count is None:
            count = known[shard.shape] = piece_count(shard.shape, itemsize)
        counts.append(count)
    return counts
