"""`distckpt show FILE`: prints the object graph of a checkpoint as a tree, or how long its save took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from distckpt.cli.terminal import console, printable
from distckpt.graph.python_value import decode
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.keys import PER_RANK, dict_key
from distckpt.layout.records import OWN_VALUE, Attribute, Manifest, Variable
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.latest import file_of
from distckpt.storage.paths import resolve
from distckpt.timing import Timing
from distckpt.words import nbytes_in_words, time_in_words


def show(
    file: Annotated[Path, typer.Argument(help="Checkpoint file, with or without .h5; a directory means its latest.")],
    python: Annotated[bool, typer.Option("--python/--no-python", help="Show python values.")] = True,
    timing: Annotated[bool, typer.Option("--timing", help="Show how long the save took, step by step.")] = False,
) -> None:
    """Prints the object graph of a checkpoint: shapes, dtypes, sharding, sizes."""
    opened = open_checkpoint(resolve(file_of(file)))
    output = console()
    for line in _header(opened.path, opened.manifest):
        output.print(line)
    if not timing:
        output.print(_Drawing(opened.manifest, python).tree())
    elif opened.manifest.timing is None:
        output.print("the file does not say how long its save took")
    else:
        output.print(f"{opened.manifest.timing.seconds:.3f} s from the call until the manifest was written")
        output.print(_table(opened.manifest.timing))


def _table(timing: Timing) -> Table:
    """A table of the seconds that each step took, over the ranks."""
    table = Table("step", box=None, pad_edge=False)
    for column in ("min", "median", "max", "slowest rank"):
        table.add_column(column, justify="right")
    for name, step in timing.steps.items():
        seconds = (f"{value:.6f}" for value in (step.min, step.median, step.max))
        table.add_row(name, *seconds, str(step.slowest_rank))
    return table


def _header(path: str, manifest: Manifest) -> list[str]:
    total = sum(_nbytes(variable) for variable in manifest.variables)
    counter = "no counter" if manifest.save_counter is None else f"save {manifest.save_counter}"
    made = (
        f"format {manifest.format_version}, {counter}, {manifest.world_size} rank(s) on {_markup(manifest.host)}, "
        f"{time_in_words(manifest.time)}, transport {manifest.transport}, checksums {manifest.checksums or 'none'}"
    )
    size = (
        f"{len(manifest.variables)} tensors of {nbytes_in_words(total)}, {len(manifest.python_state)} python values, "
        f"file of {nbytes_in_words(manifest.file_nbytes)}"
    )
    return [f"[bold]{_markup(path)}[/]", made, size]


def _nbytes(variable: Variable) -> int:
    numel = 1
    for extent in variable.shape:
        numel *= extent
    return numel * dtype_info(variable.dtype).itemsize


@dataclass
class _Drawing:
    """Draws a manifest as a tree; `tree` adds the nodes, values and slots with the other methods."""

    manifest: Manifest
    python: bool
    first_path: dict[int, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)

    def tree(self) -> Tree:
        """The whole tree. Drawn breadth-first, so that a shared object is shown at the path of its key."""
        self.variables = {variable.key: variable for variable in self.manifest.variables}
        tree = Tree("[bold](root)[/]", guide_style="dim")
        nodes = self.manifest.object_graph.nodes
        self.first_path[0] = "(root)"
        queue = deque([(0, tree, "")])
        while queue:
            node_id, branch, path = queue.popleft()
            of_ranks = [
                attribute for attribute in nodes[node_id].attributes if attribute.name.startswith(f"{PER_RANK}/")
            ]
            for attribute in nodes[node_id].attributes:
                if attribute.name != OWN_VALUE and attribute not in of_ranks:
                    self.add_value(branch, attribute.name, attribute.checkpoint_key)
            self.add_ranks(branch, of_ranks)
            for child in nodes[node_id].children:
                name = str(dict_key(child.local_name))
                child_path = f"{path}/{name}" if path else name
                if child.node_id in self.first_path:
                    branch.add(f"{_markup(name)} [dim]= {_markup(self.first_path[child.node_id])}[/]")
                    continue
                self.first_path[child.node_id] = child_path
                queue.append((child.node_id, self.add_node(branch, name, child.node_id), child_path))
            self.add_slots(branch, node_id)
        return tree

    def add_node(self, branch: Tree, name: str, node_id: int) -> Tree:
        """Add a node, with its own value if it has one; returns its branch."""
        for attribute in self.manifest.object_graph.nodes[node_id].attributes:
            if attribute.name == OWN_VALUE:
                return branch.add(self.describe(name, attribute.checkpoint_key))
        return branch.add(f"[bold]{_markup(name)}[/]")

    def add_value(self, branch: Tree, name: str, key: str) -> None:
        """Add a value of a node."""
        if key in self.variables or self.python:
            branch.add(self.describe(name, key))

    def add_slots(self, branch: Tree, node_id: int) -> None:
        """Add the slots of an optimizer, by variable."""
        slots = self.manifest.object_graph.nodes[node_id].slot_variables
        by_variable: dict[int, list[str]] = {}
        for slot in slots:
            values = by_variable.setdefault(slot.original_variable_node_id, [])
            for attribute in self.manifest.object_graph.nodes[slot.slot_variable_node_id].attributes:
                values.append(self.describe_briefly(slot.slot_name, attribute.checkpoint_key))
        below = branch.add(f"[bold].slots[/] [dim]({len(slots)})[/]") if slots else branch
        for variable, values in by_variable.items():
            below.add(f"{_markup(self.key_of(variable))}: {', '.join(values)}")

    def add_ranks(self, branch: Tree, attributes: list[Attribute]) -> None:
        """Add the per-rank values of a node, one line for each rank."""
        by_rank: dict[str, list[str]] = {}
        for attribute in attributes:
            _, rank, *rest = attribute.name.split("/", 2)
            by_rank.setdefault(rank, []).append(self.describe_briefly("".join(rest), attribute.checkpoint_key))
        for rank, values in by_rank.items():
            branch.add(f"[bold].rank/{rank}[/]: {', '.join(values)}")

    def describe_briefly(self, name: str, key: str) -> str:
        """A value in a few words."""
        variable = self.variables.get(key)
        if variable is None:
            return f"{_markup(name)} {_markup(_shown(self.manifest.python_state[key]))}".strip()
        return f"{_markup(name)} [dim]{variable.dtype} {_shape(variable)}[/]"

    def key_of(self, node_id: int) -> str:
        """Key of a variable."""
        attributes = self.manifest.object_graph.nodes[node_id].attributes
        return attributes[0].checkpoint_key if attributes else f"node {node_id}"

    def describe(self, name: str, key: str) -> str:
        """A value in one line."""
        variable = self.variables.get(key)
        if variable is None:
            return f"{_markup(name)} = [cyan]{_markup(_shown(self.manifest.python_state[key]))}[/]"
        return (
            f"{_markup(name)} [green]{variable.dtype}[/] {_shape(variable)} [dim]{_sharding(variable)}"
            f"{nbytes_in_words(_nbytes(variable))}[/]"
        )


def _markup(text: str) -> str:
    """Escape a name or value, so that rich prints it unchanged."""
    return escape(printable(text))


def _shape(variable: Variable) -> str:
    return "x".join(map(str, variable.shape)) or "scalar"


def _shown(encoded: bytes | msgspec.Raw) -> str:
    try:
        text = repr(decode(bytes(encoded)))
    except ValueError as error:  # the value is damaged, or an int with more digits than Python prints
        text = f"({error})"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _sharding(variable: Variable) -> str:
    """The number of shards, the dimensions along which they divide the tensor, and the number of writers."""
    if len(variable.shards) <= 1:
        return ""
    axes = [
        str(axis)
        for axis in range(len(variable.shape))
        if any(shard.shape[axis] != variable.shape[axis] for shard in variable.shards)
    ]
    ranks = len({shard.rank for shard in variable.shards})
    return f"{len(variable.shards)} shards along dim {', '.join(axes)} by {ranks} rank(s), "
