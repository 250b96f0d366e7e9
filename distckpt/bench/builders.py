"""Construction of the competitors of a run. Packages that may be missing are imported only when needed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from functools import partial

import torch.distributed as dist

from distckpt.bench.competitor import BackgroundCompetitor, Competitor
from distckpt.bench.raw import Raw, supports_direct
from distckpt.bench.runner import gather, over_ranks
from distckpt.bench.setting import Bench
from distckpt.bench.state import State
from distckpt.storage.threads import threads_of_rank

Builder = Callable[[State], Competitor]
BackgroundBuilder = Callable[[State], BackgroundCompetitor]

COMPETITORS = ("distckpt", "raw", "dcp", "torchsnapshot", "torch.save", "safetensors")

#: Competitors whose files can be restored only onto the ranks and shards that wrote them.
OF_ONE_LAYOUT = ("raw", "torchsnapshot", "torch.save", "safetensors")


def names_without(bench: Bench, *names: str) -> tuple[str, ...]:
    """The competitors that the user chose, without `names`."""
    return tuple(name for name in bench.setup.competitors if name not in names)


def builders(bench: Bench, names: Iterable[str], *, saving: bool) -> list[Builder]:
    """Builders of the competitors with some names. Collective over the process group.

    Args:
        bench: The setup that all cases share.
        names: Some of `COMPETITORS`.
        saving: Whether the competitors are to save; else they are to restore.

    Returns:
        At least one builder for each name, in their order.
    """
    return [build for name in names for build in _builders_of(bench, name, saving=saving)]


def builders_without_checksums(bench: Bench) -> list[Builder]:
    """The builder of distckpt without checksums, if the user chose distckpt. Local."""
    from distckpt.bench.product import Distckpt

    return [partial(Distckpt, checksums=False)] if "distckpt" in bench.setup.competitors else []


def background_builders(bench: Bench, *, overlap: bool) -> list[BackgroundBuilder]:
    """Builders of the chosen competitors that can save in the background. Local.

    Args:
        bench: The setup that all cases share.
        overlap: Whether they copy the state in the background, too, if they can.

    Returns:
        One or more builders for each competitor.
    """
    found: list[BackgroundBuilder] = []
    if "distckpt" in bench.setup.competitors:
        from distckpt.bench.product import DistckptAsync

        found.append(partial(DistckptAsync, overlap=overlap))
    if "dcp" in bench.setup.competitors:
        from distckpt.bench.dcp import DcpAsync, modes

        found += [partial(DcpAsync, mode=mode, overlap=overlap) for mode in modes(bench.device)]
    if "torchsnapshot" in bench.setup.competitors:
        from distckpt.bench.torchsnapshot import TorchsnapshotAsync

        found.append(TorchsnapshotAsync)
    return found


def _direct_builders(bench: Bench) -> list[Builder]:
    """The raw limit with O_DIRECT, if all ranks can use it. Collective over the process group."""
    can = over_ranks(supports_direct(bench.directory), dist.ReduceOp.MIN)
    return [partial(Raw, direct=True)] if can else []


def _threaded_builders() -> list[Builder]:
    """The raw limit with as many threads as distckpt uses, if it uses several. Collective over the process group."""
    nodes = gather(platform.node())
    threads = min(gather(threads_of_rank(nodes.count(platform.node()))))
    return [partial(Raw, threads=threads)] if threads > 1 else []


def _builders_of(bench: Bench, name: str, *, saving: bool) -> list[Builder]:
    if name == "raw":
        return [Raw, *(_direct_builders(bench) if saving else _threaded_builders())]
    if name == "dcp":
        from distckpt.bench.dcp import THREAD_COUNTS, Dcp

        return [partial(Dcp, threads=threads) for threads in THREAD_COUNTS] if saving else [Dcp]
    if name == "torchsnapshot":
        from distckpt.bench.torchsnapshot import Torchsnapshot

        return [Torchsnapshot]
    if name == "torch.save":
        from distckpt.bench.torch_save import TorchSave

        return [TorchSave]
    if name == "safetensors":
        from distckpt.bench.safetensors import Safetensors

        return [Safetensors]
    from distckpt.bench.product import Distckpt

    return [Distckpt] if saving else [partial(Distckpt, verify=False), Distckpt]
