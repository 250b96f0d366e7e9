r"""Names of edges and values: escaped components joined to the keys that are also dataset paths.

A user's name never gives a component with one leading dot that this package uses itself:

    name          component
    "."           ".."
    "/"           ".S"
    NUL           ".0"
    ""            ".E"
    int key k     ".i<k>"
    other key k   ".k<repr(k)>", in what `state_dict()` returns only

Edges are named by strings everywhere. An int dict key k has the name "\0i<k>"; the rare string key that looks like one
("\0i5") gets one more leading NUL as its name. `edge_name` and `dict_key` convert; only `escape` and `unescape` know.
"""

from __future__ import annotations

import re

PER_RANK = ".rank"
SLOTS = ".slots"

# Canonical decimal integers only: each int has one name, and any other text stays an ordinary string.
_INT = r"0|-?[1-9][0-9]*"
_INT_NAME = re.compile(rf"\0i({_INT})")
_SHIFTED_NAME = re.compile(rf"\0\0+i({_INT})")
_LOOKS_LIKE_INT_NAME = re.compile(rf"\0+i({_INT})")
_INT_COMPONENT = re.compile(rf"\.i({_INT})")
_PLAIN_COMPONENT = re.compile(r"(?:[^./\0]|\.[.S0])+")
_UNESCAPES = {"..": ".", ".S": "/", ".0": "\0"}


def edge_name(key: str | int) -> str:
    """The `local_name` of the edge for a dict key."""
    if isinstance(key, str):
        return f"\0{key}" if key[:1] == "\0" and _LOOKS_LIKE_INT_NAME.fullmatch(key) else key
    return f"\0i{int(key)}"


def dict_key(local_name: str) -> str | int:
    """The dict key of an edge; inverse of `edge_name`."""
    match = _INT_NAME.fullmatch(local_name)
    if match:
        return int(match[1])
    return local_name[1:] if _SHIFTED_NAME.fullmatch(local_name) else local_name


def escape(local_name: str) -> str:
    """The key component of an edge. Different names give different components."""
    if local_name.isidentifier() or local_name.isalnum():
        return local_name
    if local_name.startswith("\0"):
        key = dict_key(local_name)
        if isinstance(key, int):
            return f".i{key}"
        local_name = key
    return local_name.replace(".", "..").replace("/", ".S").replace("\0", ".0") or ".E"


def unescape(component: str) -> str:
    """The `local_name` of a key component; inverse of `escape`.

    Raises:
        ValueError: The component is no escaped name, such as ".slots".
    """
    if component == ".E":
        return ""
    match = _INT_COMPONENT.fullmatch(component)
    if match:
        return f"\0i{match[1]}"
    if not _PLAIN_COMPONENT.fullmatch(component):
        raise ValueError(f"{component!r} is no escaped name: '.' must be followed by '.', 'S' or '0'.")
    return edge_name(re.sub(r"\.[.S0]", lambda match: _UNESCAPES[match[0]], component))


def join(parent: str, component: str) -> str:
    """A key below `parent`; the root has the empty key."""
    return f"{parent}/{component}" if parent else component


def child_key(parent: str, local_name: str, per_rank: bool) -> str:
    """The key of a child; `per_rank` says that the parent is a `PerRank`, whose edges are named by rank."""
    return join(join(parent, PER_RANK) if per_rank else parent, escape(local_name))


def slots_key(optimizer: str, variable: str) -> str:
    """The key below which the slots of a variable are, from the keys of the optimizer and of the variable."""
    slots = join(optimizer, SLOTS)
    return join(slots, variable) if variable else slots


def slot_key(optimizer: str, variable: str, slot_name: str) -> str:
    """The key of a slot, from the keys of the optimizer and of the variable."""
    return join(slots_key(optimizer, variable), escape(slot_name))
