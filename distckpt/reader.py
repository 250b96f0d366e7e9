"""`CheckpointReader`: reads the values of a checkpoint in one process, without MPI and without live objects."""

from __future__ import annotations

import difflib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import msgspec
import numpy as np
import torch

from distckpt.dry_run import CheckpointDiff, DryRun
from distckpt.errors import CorruptCheckpointError
from distckpt.graph.assignment import TensorRead
from distckpt.graph.python_value import decode, resolve
from distckpt.graph.values import TensorValue
from distckpt.layout.aliases import find_key
from distckpt.layout.box import Box, Shape
from distckpt.layout.records import OWN_VALUE, Node, ObjectGraph, Shard
from distckpt.layout.slicing import Index, Part, parts_of, select
from distckpt.options import RestoreOptions, given_or_default
from distckpt.source import Source, open_local
from distckpt.storage.latest import file_of
from distckpt.storage.threads import threads_of_rank
from distckpt.storage.transfer import sub_tensor
from distckpt.tensor_bytes import copy_bits, torch_dtype

#: Most keys that an unknown key is compared with; comparing this many takes a second.
_MAX_COMPARED = 20_000


class VariableHandle:
    """A stored tensor. Indexing reads a slice of it, as with an h5py dataset.

    Attributes:
        key: Checkpoint key.
        shape: Global shape.
        dtype: torch dtype.
        shards: The shards as the ranks wrote them; they tile the shape.
    """

    def __init__(self, source: Source, index: int) -> None:
        variable = source.manifest.variables[index]
        self.key = variable.key
        self.shape: Shape = variable.shape
        self.dtype = torch_dtype(variable.dtype)
        self.shards: tuple[Shard, ...] = tuple(variable.shards)
        self._source = source
        self._index = index
        self._numpy = variable.numpy

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor | np.ndarray:
        """Read the whole tensor, as `handle[...]`.

        Raises:
            CorruptCheckpointError: The bytes do not match their checksum.
        """
        return self[...]

    def __getitem__(self, index: Index) -> torch.Tensor | np.ndarray:
        """Read a slice. Only its bytes are read from the file, and gaps between them of less than a page.

        Args:
            index: Ints, slices with positive steps, and `...`, alone or in a tuple.

        Returns:
            A CPU tensor, or a NumPy array if one was saved.

        Raises:
            CorruptCheckpointError: A piece within the slice does not match its checksum. Pieces that are only partly
                within it cannot be verified.
            IndexError: An int is out of bounds, or there are too many indices.
            TypeError: The index has something else in it, such as None, a bool or a mask.
            ValueError: A step is not positive, or the reader is closed.
        """
        selection = select(index, self.shape)
        out = torch.empty(selection.extents, dtype=self.dtype, device="cpu")
        for part in parts_of(selection, self.shape, self.dtype.itemsize):
            self._read(part, sub_tensor(out, part.taken, Box.whole(selection.extents)))
        result = out.view(selection.shape)
        return result.numpy() if self._numpy else result

    def _read(self, part: Part, target: torch.Tensor) -> None:
        direct = part.box.shape == part.taken.shape
        tensor = target if direct else torch.empty(part.box.shape, dtype=self.dtype, device="cpu")
        value = TensorValue(OWN_VALUE, tensor, self.shape, (part.box,))
        reads = [TensorRead(self.key, self._index, value)]
        with self._source.named_in_errors():
            self._source.read(reads, verify=True, threads=threads_of_rank(1))
        if not direct:
            copy_bits(target, tensor[tuple(slice(None, None, step) for step in part.steps)])

    def __repr__(self) -> str:
        return f"<{self.key}: shape {self.shape}, {self.dtype}, {len(self.shards)} shard(s)>"


class CheckpointReader:
    """The values of a checkpoint, by key. Works in one process, without the classes of the objects that were saved.

    The file stays open until `close`, even if it is deleted meanwhile.

    Example:
        >>> with load_checkpoint("runs/a") as reader:
        ...     rows = reader["model/fc/weight"][10:20]
        ...     step = reader["step"]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a checkpoint.

        Args:
            path: The file, with or without ".h5"; or a directory, which means its latest checkpoint.

        Raises:
            TypeError: `path` is not a path.
            CheckpointNotFoundError: There is no such file, or no complete checkpoint in the directory.
            CorruptCheckpointError: The file is not a complete checkpoint.
        """
        self._source = open_local(file_of(path))
        self._manifest = self._source.manifest
        self._variables = {variable.key: index for index, variable in enumerate(self._manifest.variables)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Keys, metadata and other contents of the manifest stay readable. May be called again."""
        self._source.close()

    @property
    def path(self) -> str:
        """Path of the file."""
        return self._source.path

    @property
    def save_counter(self) -> int | None:
        """The save counter; None for a file made by `write`."""
        return self._manifest.save_counter

    @property
    def world_size(self) -> int:
        """Number of ranks that saved the checkpoint."""
        return self._manifest.world_size

    @property
    def object_graph(self) -> ObjectGraph:
        """The stored object graph."""
        return self._manifest.object_graph

    @property
    def metadata(self) -> Any:
        """The metadata passed as `SaveOptions(metadata=...)`; None if there was none."""
        return self._decode("the metadata", msgspec.json.encode(self._manifest.metadata))

    # ---- values ----

    def keys(self) -> list[str]:
        """The keys of all values: tensors in file order, then python values. A shared object has only one key."""
        return [*self._variables, *self._manifest.python_state]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._variables) + len(self._manifest.python_state)

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str) -> Any:
        """Look up one value.

        Args:
            key: As in `keys`, or another path to a shared object; a leading slash is ignored.

        Returns:
            A `VariableHandle` for a tensor or array; a python value as it was saved, with the tensors in it.

        Raises:
            KeyError: There is no such value; the message names similar keys.
            CorruptCheckpointError: The value is damaged.
        """
        found = self._find(key)
        if found is None:
            raise KeyError(f"{self.path} has no value {key!r}. {self._suggest(str(key).strip('/'))}")
        index = self._variables.get(found)
        return self._python_value(found) if index is None else VariableHandle(self._source, index)

    def _find(self, path: object) -> str | None:
        if not isinstance(path, str):
            return None
        key = path.removeprefix("/")
        if key in self._variables or key in self._manifest.python_state:
            return key
        return find_key(self.object_graph, key)

    def _suggest(self, path: str) -> str:
        keys = self.keys()
        near = [key for key in keys if key.startswith(f"{path}/") or key.endswith(f"/{path}")]
        near = near or difflib.get_close_matches(path, keys[:_MAX_COMPARED], n=5)
        return f"Similar: {', '.join(near[:5])}." if near else "See keys() for those it has."

    def _python_value(self, key: str) -> Any:
        """Decode a python value. The tensors it refers to are values of the same node."""
        attributes = self._node_of.get(key, Node()).attributes
        names = {of.name: of.checkpoint_key for of in attributes if of.checkpoint_key in self._variables}
        value = self._decode(key, bytes(self._manifest.python_state[key]))
        return resolve(value, _Tensors(f"{self.path}: {key}", names, lambda other: self[other].read()))

    @functools.cached_property
    def _node_of(self) -> dict[str, Node]:
        """The node of each value."""
        return {attribute.checkpoint_key: node for node in self.object_graph.nodes for attribute in node.attributes}

    def _decode(self, what: str, data: bytes) -> Any:
        try:
            return decode(data)
        except ValueError as error:
            raise CorruptCheckpointError(f"{self.path}: {what}: {error}") from error

    # ---- live objects ----

    def match(self, live: object, *, options: RestoreOptions | None = None) -> dict[str, str]:
        """The values that a restore into a live object would restore, without changing it. Local.

        The save counter is not counted.

        Args:
            live: A `Checkpoint`, or an object to be its positional root; a dict stands for `Checkpoint(**live)`.
            options: Options of the restore.

        Returns:
            Saved key to live key, for each saved value that fits.

        Raises:
            TypeError: The object cannot be checkpointed.
        """
        return self._dry_run(live, options).matches()

    def diff(self, live: object, *, options: RestoreOptions | None = None) -> CheckpointDiff:
        """The differences that a restore into a live object would find, without changing it. Local.

        The save counter is not counted.

        Args:
            live: As for `match`.
            options: Options of the restore.

        Returns:
            The differences, as the status of the restore would have them.

        Raises:
            TypeError: The object cannot be checkpointed.
        """
        return self._dry_run(live, options).diff()

    def _dry_run(self, live: object, options: RestoreOptions | None) -> DryRun:
        return DryRun(self._source, live, given_or_default(options, RestoreOptions))

    def __repr__(self) -> str:
        tensors, python_values = len(self._variables), len(self._manifest.python_state)
        return f"<CheckpointReader of {self.path}: {tensors} tensors, {python_values} python values>"


class _Tensors(dict[str, Any]):
    """The tensors that a python value refers to, by name; each is read on access.

    Args:
        owner: The python value, for messages.
        keys: Key of each tensor.
        read: Reads the tensor of a key.
    """

    def __init__(self, owner: str, keys: Mapping[str, str], read: Callable[[str], Any]) -> None:
        self._owner = owner
        self._keys = keys
        self._read = read

    def __missing__(self, name: str) -> Any:
        if name not in self._keys:
            raise CorruptCheckpointError(f"{self._owner}: it refers to {name!r}, which is no tensor of the file.")
        return self._read(self._keys[name])


def load_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
    """Open a checkpoint for reading in one process.

    Args:
        path: The file, with or without ".h5"; or a directory, which means its latest checkpoint.

    Returns:
        The reader, which is a context manager.

    Raises:
        TypeError: `path` is not a path.
        CheckpointNotFoundError: There is no such file, or no complete checkpoint in the directory.
        CorruptCheckpointError: The file is not a complete checkpoint.
    """
    return CheckpointReader(path)


def list_variables(path: str | os.PathLike[str]) -> list[tuple[str, Shape]]:
    """The key and global shape of every tensor and array in a checkpoint, sorted.

    Args:
        path: As for `load_checkpoint`.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    with load_checkpoint(path) as reader:
        return sorted((variable.key, variable.shape) for variable in reader._manifest.variables)


def load_variable(path: str | os.PathLike[str], key: str) -> Any:
    """Read one value of a checkpoint.

    Args:
        path: As for `load_checkpoint`.
        key: As for `CheckpointReader`.

    Returns:
        A CPU tensor, a NumPy array if one was saved, or a python value.

    Raises:
        KeyError: There is no such value; the message names similar keys.
        CheckpointError: As `load_checkpoint`.
    """
    with load_checkpoint(path) as reader:
        value = reader[key]
        return value.read() if isinstance(value, VariableHandle) else value
