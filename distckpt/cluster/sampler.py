"""`ElasticSampler`: a batch sampler whose position is that of all ranks, whatever their number."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import Sampler

from distckpt.coordination.coordinator import Coordinator

T = TypeVar("T")


class ElasticSampler(Sampler[list[int]]):
    """Batches for one rank, from an order and a position shared by all ranks.

    An epoch is one order of all samples, the same on all ranks. A step takes the next `batch_size` of them, and each
    rank gets its part of these. The state is the order and the position in it, so that training that goes on with
    another number of ranks sees every remaining sample once, in the same order, in the same global batches.

    Track it in the Checkpoint, and pass it to a DataLoader as `batch_sampler`. If the loader has workers, which fetch
    batches ahead, iterate over `sampler.consume(loader)`: then only batches that were handed over count as seen.

    Example:
        >>> sampler = ElasticSampler(dataset, batch_size=256, seed=1)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        >>> checkpoint = distckpt.Checkpoint(model=model, sampler=sampler)
        >>> while sampler.epoch < 10:
        ...     for batch in sampler.consume(loader):
        ...         train(batch)

    Attributes:
        epoch: Number of epochs completed.
        position: Number of samples seen in the current epoch, over all ranks, including the current batch.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        comm: object | None = None,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        """Local; may initialise MPI.

        Args:
            dataset: The dataset; only its length is used.
            batch_size: Samples in a step, over all ranks. The parts of two ranks differ by at most one sample.
            shuffle: Give each epoch another order, derived from `seed`; else all have the order of the dataset.
            seed: Seed of the orders; the same on all ranks.
            drop_last: Leave out the samples at the end of an epoch that do not fill a batch. Else the last batch is
                smaller; if it has fewer samples than there are ranks, ranks left without one get one of them again, so
                that all make the same steps.
            comm: mpi4py communicator of the ranks; None for `MPI.COMM_WORLD`.
            rank: Index of this data-parallel group, in place of the rank in `comm`; for programs in which several ranks
                see the same samples.
            size: Number of data-parallel groups; goes with `rank`.

        Raises:
            TypeError: `dataset` has no length, or `comm` is not a communicator.
            ValueError: An option has a bad value.
        """
        if (rank is None) != (size is None):
            raise ValueError(f"rank, size: expected both or none. Got {rank} and {size}.")
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset: expected something with a length. Got {dataset!r:.100}.")
        coordinator = Coordinator(comm)
        self._rank = coordinator.rank if rank is None else _integer("rank", rank)
        self._size = coordinator.size if size is None else _integer("size", size)
        self._samples = len(dataset)
        self._batch_size = _integer("batch_size", batch_size)
        self._shuffle = shuffle
        self._seed = _integer("seed", seed)
        self._drop_last = drop_last
        self._consuming = False
        self.epoch = 0
        self.position = 0
        if not 0 <= self._rank < self._size:
            raise ValueError(f"rank, size: expected 0 <= rank < size. Got {self._rank} and {self._size}.")
        if self._batch_size < self._size:
            raise ValueError(f"batch_size: expected a sample for each of {self._size} ranks or more. Got {batch_size}.")

    def __len__(self) -> int:
        """Number of batches left in this epoch."""
        return -(-(self._end() - self.position) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's parts of the batches left in this epoch, as indices into the dataset."""
        count = not self._consuming
        order, start, end = self._order(), self.position, self._end()
        while start < end:
            batch = order[start : min(start + self._batch_size, end)]
            start += len(batch)
            if count:
                self.position = start
            yield self._part(batch)
        if count:
            self._begin_epoch()

    def consume(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over a loader that uses this sampler; each batch counts as seen once it is handed over.

        Args:
            loader: A DataLoader, or a wrapper of one.
        """
        end = self._end()
        self._consuming = True
        try:
            for batch in loader:
                self.position = min(self.position + self._batch_size, end)
                yield batch
        finally:
            self._consuming = False
        self._begin_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The order and the position; the same on all ranks. Local."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "samples": self._samples,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved position, in the saved order; batch size and ranks stay those of this sampler. Local.

        Raises:
            ValueError: The dataset has another length, or the position is not in it.
        """
        if state["samples"] != self._samples:
            raise ValueError(
                f"ElasticSampler: expected a dataset of {state['samples']} samples, as saved. Got one of "
                f"{self._samples}: positions in it mean other samples. Restore without the sampler to start it anew."
            )
        if not 0 <= state["position"] <= self._samples:
            raise ValueError(
                f"position: expected 0 to {self._samples}, the samples of an epoch. Got {state['position']}."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._seed, self._shuffle = state["seed"], state["shuffle"]

    # ---- parts of the above ----

    def _order(self) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._samples, device="cpu")
        seed = (self._seed + self.epoch) % 2**64  # as torch takes negative ones; larger ones it refuses
        return torch.randperm(self._samples, generator=torch.Generator().manual_seed(seed), device="cpu")

    def _end(self) -> int:
        """Position at which this epoch ends, in samples."""
        left = self._samples - self.position
        return self._samples - (left % self._batch_size if self._drop_last else 0)

    def _part(self, batch: torch.Tensor) -> list[int]:
        first, last = (len(batch) * rank // self._size for rank in (self._rank, self._rank + 1))
        part: list[int] = batch[first:last].tolist()
        return part or [int(batch[self._rank % len(batch)])]

    def _begin_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0


def _integer(name: str, value: Any) -> int:
    """An integer of any kind, such as NumPy's."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected an integer. Got {value!r:.100}.") from error
