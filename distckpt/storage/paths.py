"""Names of checkpoint files: `<prefix>-<number>.h5`."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from distckpt.errors import CheckpointNotFoundError

SUFFIX = ".h5"
STATE_FILE = "checkpoint"

#: Numbers are below this: an int64 has room for them and for the next one.
NUMBER_LIMIT = 10**18

_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>[0-9]+)\.h5", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A file prefix.

    Attributes:
        directory: Directory of the files, as the caller wrote it.
        name: What their names begin with.
    """

    directory: Path
    name: str

    def numbered(self, number: int) -> str:
        """Path of the checkpoint with this number."""
        return str(self.directory / f"{self.name}-{number}{SUFFIX}")


@dataclass(frozen=True, slots=True, order=True)
class NumberedFile:
    """A file name of the form `<prefix>-<number>.h5`."""

    prefix: str
    number: int
    name: str


def as_text(name: str, path: object) -> str:
    """A path as a user passed it, its text unchanged.

    Args:
        name: Name of the parameter, for the error.
        path: What was passed.

    Raises:
        TypeError: It is no path, or one of bytes.
        ValueError: It has bytes that are no UTF-8, which HDF5 and messages between ranks have no form for.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(
            f"{name}: expected a str or os.PathLike[str]. Got {path!r:.100} (type: {type(path).__qualname__})."
        )
    if not _is_utf8(text):
        raise ValueError(f"{name}: expected a path that is UTF-8. Got {text!r}. Rename the file or directory.")
    return str.__str__(text)  # a plain str, also of a subclass such as NumPy's: it is sent to other ranks


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_here(path: str) -> str:
    """A path that leads to the same file wherever the program changes to. Not normalised: ".." may follow a link.

    Raises:
        OSError: The working directory was removed.
    """
    return path if path.startswith("/") else str(Path.cwd() / path)


def split_prefix(prefix: str | os.PathLike[str], parameter: str = "file_prefix") -> Prefix:
    """Split a file prefix; "a/ckpt" and "a/ckpt.h5" are the same.

    Args:
        prefix: As a user passed it.
        parameter: Its name, for errors.

    Raises:
        TypeError: It is no path.
        ValueError: There is no name in it.
    """
    text = as_text(parameter, prefix)
    name = text.rpartition("/")[2].removesuffix(SUFFIX)
    if name in {"", ".", ".."}:
        raise ValueError(f"{parameter}: expected a path that ends in a name, such as 'run/ckpt'. Got {text!r}.")
    return Prefix(Path(text).parent, name)


def single_path(path: str | os.PathLike[str]) -> str:
    """Path of the file that `write(path)` makes.

    Raises:
        TypeError: It is no path.
        ValueError: There is no name in it, or it is the name of the state file.
    """
    prefix = split_prefix(path, "path")
    if prefix.name == STATE_FILE:
        raise ValueError(
            f"{os.fspath(path)}: {STATE_FILE!r} is the name of the state file of the directory; choose another name"
        )
    return str(prefix.directory / f"{prefix.name}{SUFFIX}")


def parse_numbered(name: str) -> NumberedFile | None:
    """The parts of a file name of the form `<prefix>-<number>.h5`, below `NUMBER_LIMIT`; None for any other name.

    A name that is no UTF-8 is another name: `save` makes none, and `as_text` refuses it.
    """
    match = _NUMBERED.fullmatch(name)
    if match is None or int(match["number"]) >= NUMBER_LIMIT or not _is_utf8(name):
        return None
    return NumberedFile(match["name"], int(match["number"]), name)


def list_directory(directory: str | os.PathLike[str]) -> list[Path]:
    """The entries of a directory; none when there is no such directory."""
    try:
        return list(Path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbered_files(directory: str | os.PathLike[str]) -> list[NumberedFile]:
    """All numbered files of a directory, by prefix and number; none when there is no such directory."""
    names = (path.name for path in list_directory(directory))
    return sorted(found for name in names if (found := parse_numbered(name)) is not None)


def next_number(prefix: Prefix, live_counter: int) -> int:
    """The number of the next checkpoint: one more than the live counter and than any on disk. Rank 0 only.

    Raises:
        ValueError: There is none left.
    """
    on_disk = [file.number for file in numbered_files(prefix.directory) if file.prefix == prefix.name]
    number = 1 + max(live_counter, *on_disk, 0)
    if number >= NUMBER_LIMIT:
        raise ValueError(f"{prefix.numbered(number)}: expected a number below {NUMBER_LIMIT}. Choose another name.")
    return number


def require_newest(prefix: Prefix, number: int, in_flight: int = 0) -> None:
    """Refuse a number that is not above those on disk and in flight, for the highest is the latest. Rank 0 only.

    Args:
        prefix: Prefix of the file.
        number: The wanted number.
        in_flight: The highest number that is being written in the background; 0 for none.

    Raises:
        ValueError: There is a checkpoint with this number or a higher one.
    """
    on_disk = [file.number for file in numbered_files(prefix.directory) if file.prefix == prefix.name]
    highest = max(in_flight, *on_disk, 0)
    if (on_disk or in_flight) and highest >= number:
        newest = Path(prefix.numbered(highest)).name
        raise ValueError(
            f"{prefix.numbered(number)}: expected a number above that of {newest!r}, for the highest number "
            "is the latest checkpoint, and saves never replace one. Choose a higher number or another name, or move "
            "the later checkpoints away."
        )


def resolve(path: str | os.PathLike[str]) -> str:
    """The checkpoint file that a user means, with or without ".h5". Rank 0 only.

    Raises:
        CheckpointNotFoundError: There is none; says what is there.
    """
    text = os.fspath(path)
    for candidate in (text, text + SUFFIX):
        if Path(candidate).is_file():
            return candidate
    raise CheckpointNotFoundError(f"{text}: no such checkpoint. {_hint(Path(text))}")


def _hint(path: Path) -> str:
    if path.is_dir():
        return "This is a directory: pass distckpt.latest_checkpoint(directory)."
    if not path.parent.is_dir():
        return f"The directory {str(path.parent)!r} does not exist."
    name = path.name.removesuffix(SUFFIX)
    files = numbered_files(path.parent)
    same = [file.name for file in files if file.prefix == name]
    if same:
        return f"Is the number missing, as in {str(path.parent / same[-1])!r}?"
    return f"The directory has {', '.join(file.name for file in files[-3:]) or 'no checkpoints'}."


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, where they are missing, and check that files can be made there.

    Raises:
        OSError: It cannot be made or written to; says what to do.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            error.errno, f"cannot save there: {error.filename} is a file, choose another directory", str(directory)
        ) from error
    except OSError as error:
        raise OSError(
            error.errno, f"cannot make the directory: {error.strerror}, choose another one", str(directory)
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(
            errno.EACCES, "cannot make files in this directory: no permission, choose another one", str(directory)
        )
