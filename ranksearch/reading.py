"""Files that a stranger may have written: read within bounds, as JSON of one meaning, and never from elsewhere."""

import json
import re
import reprlib
from pathlib import Path
from typing import Any

# A plan of ten thousand layers has 3 MB. What JSON takes in memory is some twenty times its text.
MAX_TEXT_BYTES = 16 << 20
# A candidate table holds a dozen choices for each layer.
MAX_TABLE_BYTES = 64 << 20

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 120


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The file's text. Raises OSError where it cannot be read, ValueError where it is too large or no UTF-8."""
    with path.open("rb") as file:
        # Not by its size: a pipe has none, and a file may grow.
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes >> 20} MB")
    return content.decode()


def read_own_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The same of a file that must lie in its folder itself; ValueError as well where it does not."""
    check_own_file(path)
    return read_text(path, max_bytes)


def check_lines(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> None:
    """Raises ValueError where a line of the file is longer, before memory is taken for it."""
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            end = chunk.rfind(b"\n")
            n_bytes = n_bytes + len(chunk) if end < 0 else len(chunk) - end - 1
            if n_bytes > max_bytes:
                raise ValueError(f"a line is longer than {max_bytes >> 20} MB")


def parse_json(text: str) -> Any:
    """The value. Raises ValueError for what is no JSON, is nested too deeply, or has a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: object) -> str:
    """A value that was read as an error message shows it, cut where it is long."""
    return _SHOWN.repr(value)


def printable(text: str) -> str:
    """The text without what tells a terminal to do something, new lines and tabs apart."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def is_file_name(name: str) -> bool:
    """Whether a name that was read means a file in its folder, and no other."""
    return name.isprintable() and name not in ("", ".", "..") and not {"/", "\\"} & {*name}


def check_own_file(path: Path) -> None:
    """Raises ValueError where the path is a link that leads out of its folder, a pipe or a device."""
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(f"{path} is a link out of its folder; copy the folder with what it links to (cp -rL)")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device; put a file in its place")


def check_own_files(folder: Path) -> None:
    """The same of all that lies in a folder."""
    for path in folder.iterdir():
        check_own_file(path)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for i, name in enumerate(names) if name in names[:i])!r} twice")
    return found
