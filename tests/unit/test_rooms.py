"""The rooms of the package: who may import whom. Read from the source; nothing of it is imported here."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "distckpt"

FOUNDATION = {"cores", "device", "errors", "interval", "log", "options", "tensor_bytes", "timing", "words"}
ROOMS = {"layout", "graph", "coordination", "storage"}

#: Room or module below distckpt/ to those it may import. Modules that are not named here stand above the rooms.
MAY_IMPORT = {
    "cores": set[str](),
    "device": {"tensor_bytes"},
    "errors": set[str](),
    "interval": set[str](),
    "log": {"errors"},
    "options": {"errors"},
    "tensor_bytes": {"errors"},
    "timing": {"words"},
    "words": set[str](),
    "layout": FOUNDATION,
    "graph": FOUNDATION | {"layout"},
    "coordination": FOUNDATION | {"layout"},
    "storage": FOUNDATION | {"layout"},
    "exchange": FOUNDATION | ROOMS | {"log", "request", "source"},
    # A status names the class of its Checkpoint, which it keeps; a restorer that of the one it restores into.
    "restoring": FOUNDATION | ROOMS | {"checkpoint", "exchange", "progress", "request", "source"},
    "saving": FOUNDATION | ROOMS | {"exchange", "progress", "request", "wire"},
    "cluster": FOUNDATION | {"layout", "coordination", "storage"},
}
#: The command line and the benchmark use the package as its users do.
USERS = {"cli", "bench", "__main__"}
#: Packages with an outside world behind them, and the only rooms that speak to it, inside functions.
DOORS = {"mpi4py": {"coordination", "cluster"}, "h5py": {"storage"}}
#: Third-party packages of the rooms that are kept pure.
THIRD_PARTY = {
    "errors": set[str](),
    "options": set[str](),
    "layout": {"numpy", "msgspec"},
    "coordination": {"mpi4py", "msgspec", "numpy", "xxhash"},
}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: what it names, where, and whether it runs when the module is loaded."""

    importer: str
    target: str
    line: int
    at_load: bool
    for_types: bool = False

    @property
    def importing_room(self) -> str:
        return room_of(self.importer)

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def room_of(module: str) -> str:
    """The part of a dotted name below `distckpt`; `distckpt` itself for the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


class ImportVisitor(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, importer: str) -> None:
        self.importer = importer
        self.found: list[Import] = []
        self._functions = 0
        self._type_blocks = 0

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        for_types = "TYPE_CHECKING" in ast.unparse(node.test)
        self._type_blocks += for_types
        for statement in node.body:
            self.visit(statement)
        self._type_blocks -= for_types
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.importer}:{node.lineno}: relative import"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}", node.lineno)

    def _add(self, target: str, line: int) -> None:
        at_load = not self._functions and not self._type_blocks
        self.found.append(Import(self.importer, target, line, at_load, bool(self._type_blocks)))


def imports_of(source: str, importer: str) -> list[Import]:
    visitor = ImportVisitor(importer)
    visitor.visit(ast.parse(source))
    return visitor.found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(path.read_text(), name)]


def module_of(target: str) -> str | None:
    """The module of ours that `target`, perhaps a name inside it, belongs to; None for others' packages."""
    while target.partition(".")[0] == PACKAGE:
        if target in MODULES:
            return target
        target = target.rpartition(".")[0]
    return None


def our_imports() -> Iterator[tuple[Import, str]]:
    for found in IMPORTS:
        module = module_of(found.target)
        if module is not None and module != found.importer:
            yield found, module


def may_import(importing: str, imported: str) -> bool:
    if imported == importing or importing in USERS:
        return True
    if importing in MAY_IMPORT:
        return imported in MAY_IMPORT[importing]
    if importing == PACKAGE:
        return imported not in USERS
    return imported not in USERS | {"cluster", PACKAGE}


def listing(found: Iterable[object]) -> str:
    return "\n".join(map(str, found))


def test_the_package_is_found() -> None:
    assert {f"{PACKAGE}.errors", f"{PACKAGE}.layout.box"} <= MODULES.keys()
    assert any(module == f"{PACKAGE}.errors" for _, module in our_imports())


def test_every_package_is_a_known_room() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert folders <= MAY_IMPORT.keys() | USERS


@pytest.mark.parametrize("room", ["coordination", "exchange", "graph", "layout", "restoring", "saving", "storage"])
def test_the_map_of_a_room_names_its_modules(room: str) -> None:
    folder = ROOT / PACKAGE / room
    words = set(re.findall(r"\w+", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""))
    assert {path.stem for path in folder.glob("[!_]*.py")} <= words


def test_arrows_point_downwards() -> None:
    wrong = [found for found, module in our_imports() if not may_import(found.importing_room, room_of(module))]
    assert not wrong, listing(wrong)


def test_there_are_no_import_cycles() -> None:
    # Inside one room a function may reach back, as a registry does to its entries; and an annotation may, anywhere.
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found, module in our_imports():
        if found.at_load or (found.importing_room != room_of(module) and not found.for_types):
            graph[found.importer].add(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", sorted(DOORS))
def test_each_outside_world_has_one_door(package: str) -> None:
    found = [item for item in IMPORTS if item.target.partition(".")[0] == package and not item.for_types]
    wrong = [item for item in found if item.importing_room not in DOORS[package] or item.at_load]
    assert not wrong, listing(wrong)


@pytest.mark.parametrize("room", sorted(THIRD_PARTY))
def test_pure_rooms_stay_pure(room: str) -> None:
    allowed = THIRD_PARTY[room] | sys.stdlib_module_names | {PACKAGE}
    found = [item for item in IMPORTS if item.importing_room == room and not item.for_types]
    wrong = [item for item in found if item.target.partition(".")[0] not in allowed]
    assert not wrong, listing(wrong)


def test_importing_the_package_loads_neither_mpi_nor_hdf5() -> None:
    """Nor what costs a second and few programs need: DTensor, and with it sympy."""
    loaded = "print(sorted({'mpi4py', 'h5py', 'sympy', 'torch.distributed.tensor'} & sys.modules.keys()))"
    program = f"import sys, {PACKAGE}\n{loaded}\nimport {PACKAGE}.cli.main\n{loaded}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n[]\n", done.stderr


SOURCE = """
import json
if TYPE_CHECKING:
    from mpi4py import MPI
else:
    import a
def f():
    import h5py.h5f
    async def g():
        from b import c, d
"""


def test_imports_are_told_apart() -> None:
    found = {(item.target, item.at_load, item.for_types) for item in imports_of(SOURCE, "distckpt.x")}
    assert found == {
        ("json", True, False),
        ("mpi4py.MPI", False, True),
        ("a", True, False),
        ("h5py.h5f", False, False),
        ("b.c", False, False),
        ("b.d", False, False),
    }


@pytest.mark.parametrize(
    ("importing", "imported", "allowed"),
    [
        ("layout", "errors", True),
        ("layout", "graph", False),
        ("graph", "storage", False),
        ("coordination", "layout", True),
        ("storage", PACKAGE, False),
        ("checkpoint", "storage", True),
        ("checkpoint", "status", True),
        ("checkpoint", "cli", False),
        ("storage", "checkpoint", False),
        ("cluster", "coordination", True),
        ("checkpoint", "cluster", False),
        ("cli", PACKAGE, True),
        (PACKAGE, "checkpoint", True),
        (PACKAGE, "cli", False),
    ],
)
def test_the_rules(importing: str, imported: str, allowed: bool) -> None:
    assert may_import(importing, imported) == allowed
