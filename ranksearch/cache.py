"""Results on disk by the content that determined them, under a size limit."""

import contextlib
import hashlib
import json
import os
import stat
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

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
    # No tempfile: its files are for their owner alone, and these may be read as any other.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Entries under `directory`, the least recently used dropped beyond `max_bytes`.

    A cache that cannot be read or written costs time, never a result: its errors are swallowed here.
    """

    directory: Path
    max_bytes: int = DEFAULT_MAX_BYTES

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
        with contextlib.suppress(OSError):
            write_atomically(self.directory / key, hashlib.sha256(content).digest() + content)
            self._evict()

    def _evict(self) -> None:
        files = [(path.lstat(), path) for path in self.directory.iterdir() if path.is_file()]
        total = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda entry: entry[0].st_mtime):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size
