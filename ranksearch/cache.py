"""Results on disk by the content that determined them, under a size limit."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 1 << 30
HASH_BYTES = 32


def cache_directory() -> Path:
    """Where caches lie: `$RANKSEARCH_CACHE`, else the user's cache directory."""
    if chosen := os.environ.get("RANKSEARCH_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ranksearch"
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ranksearch"


def content_hash(*parts: object) -> str:
    """Thirty-two hex digits of the SHA-256 of the parts: bytes as they are, anything else as canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        try:
            aside.write_bytes(data)
        except OSError as error:
            # Of a write that failed the system names no file.
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside it to write to, which takes its place when the block ends well; else it stays as it is."""
    # No tempfile: its files are for their owner alone, and these may be read as any other.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Entries under `directory`, the least recently used dropped beyond `max_bytes`, or up to a sixteenth later.

    A cache that cannot be read or written costs time, never a result: its errors end here, with one warning.
    """

    directory: Path
    max_bytes: int = DEFAULT_MAX_BYTES
    # How many bytes may be put until all files are looked at again; of thousands that takes longer than the writing.
    _unlooked: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None; each entry carries its own checksum, so a damaged one is None."""
        path = self.directory / key
        try:
            status = path.lstat()
            # A link or a pipe is none of ours.
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.max_bytes + HASH_BYTES:
                return None
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        checksum, content = data[:HASH_BYTES], data[HASH_BYTES:]
        return content if hashlib.sha256(content).digest() == checksum else None

    def put(self, key: str, content: bytes) -> None:
        """Keeps `content` under `key`."""
        try:
            write_atomically(self.directory / key, hashlib.sha256(content).digest() + content)
            self._unlooked[0] -= len(content)
            if self._unlooked[0] < 0:
                self._evict()
                self._unlooked[0] = self.max_bytes // 16
        except OSError as error:
            _warn_once(self.directory.parent, error.strerror or str(error))

    def _evict(self) -> None:
        files = [(path.lstat(), path) for path in self.directory.iterdir() if path.is_file()]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda entry: entry[0].st_mtime):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size


@functools.cache
def _warn_once(directory: Path, reason: str) -> None:
    text = "the cache in %s cannot be written (%s): what it lacks is computed again each time; set RANKSEARCH_CACHE"
    logger.warning(text, directory, reason)
