"""Disks that take nothing more, or never did: told in a sentence that names the file and what would do."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ranksearch.errors import RankSearchError, StorageError, StudyError

# What would do, by what the system says. A disk that is full may have room again; the others are there to stay.
_FULL = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}
_CLOSED = {
    errno.EROFS: "it can only be read: mount it for writing",
    errno.EACCES: "let this user in there",
    errno.EPERM: "let this user in there",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "it is a folder",
    errno.EIO: "look after the disk",
}
_KNOWN = _FULL | _CLOSED
# Libraries that write files themselves hand on no number. That a file is too large, other programs say too: here Rust's
# words, which are those of safetensors.
_FULL_TEXTS = {
    os.strerror(errno.ENOSPC): errno.ENOSPC,
    os.strerror(errno.EDQUOT): errno.EDQUOT,
    f"{os.strerror(errno.EFBIG)} (os error": errno.EFBIG,
    "database or disk is full": errno.ENOSPC,
}
PROBE_BYTES = 1 << 20
GO_ON = ", and run the same command again: what is finished is kept"


def check_room(folder: Path, n_bytes: int = 0) -> None:
    """Raises OSError where the folder takes no file of a megabyte, or its disk has fewer bytes left than asked for."""
    probe = folder / f".room.{uuid.uuid4().hex}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        with suppress(OSError):
            probe.unlink()
    usage = shutil.disk_usage(folder)
    # Some file systems of networks tell no sizes.
    if usage.total and usage.free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def told_full(error: BaseException, where: Path | None = None) -> str | None:
    """What a user is told of an error that a full disk is behind, `where` it names no file; None of any other."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return _sentence(found, where)
        for text, number in _FULL_TEXTS.items():
            if text in str(found):
                return _sentence(OSError(number, os.strerror(number)), where)
        found = found.__cause__ or found.__context__
    return None


def told_closed(error: BaseException) -> str | None:
    """What a user is told of a file that the system does not let be read or written; None of any other error."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _KNOWN:
        return None
    return f"{error.filename}: {error.strerror}; {_KNOWN[error.errno]}"


@contextmanager
def at_the_door(path: Path, instead: str) -> Iterator[None]:
    """Before anything is begun: turns an OSError of the block into a StudyError about `path`, with what would do."""
    try:
        yield
    except OSError as error:
        told = OSError(error.errno, error.strerror or str(error), str(path))
        raise StudyError(f"{_sentence(told, path)}{', or' if told.errno in _KNOWN else ';'} {instead}") from None


@contextmanager
def under_way(where: Path) -> Iterator[None]:
    """While a study runs: turns what a full disk or one that fails is behind into a StorageError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RankSearchError):
            raise
        fails = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EIO)
        told = _sentence(error, where) if isinstance(error, OSError) and fails else told_full(error, where)
        if told is None:
            raise
        raise StorageError(told + GO_ON) from error


def _sentence(error: OSError, where: Path | None) -> str:
    path, would_do = error.filename or where, _KNOWN.get(error.errno or 0)
    told = f"{'a file' if path is None else path} cannot be written: {error.strerror or error}"
    return told if would_do is None else f"{told}; {would_do}"
