"""Entries on disk: whole or not there, and no more of them than allowed."""

import os
from pathlib import Path

import pytest

from ranksearch.cache import Cache, cache_directory, content_hash, write_atomically


def test_what_was_put_is_got(tmp_path: Path) -> None:
    cache = Cache(directory=tmp_path / "new" / "folder")
    assert cache.get("a") is None
    cache.put("a", b"content")
    cache.put("empty", b"")
    assert cache.get("a") == b"content" and cache.get("empty") == b""
    cache.put("a", b"newer")
    assert cache.get("a") == b"newer"


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:20], lambda d: b"", lambda d: d[:-1] + b"?"])
def test_a_damaged_entry_is_none_and_can_be_put_again(damage: "type[bytes]", tmp_path: Path) -> None:
    cache = Cache(directory=tmp_path)
    cache.put("a", b"content")
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    assert cache.get("a") is None
    cache.put("a", b"content")
    assert cache.get("a") == b"content"


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = Cache(directory=tmp_path, max_bytes=3 * (32 + 100))
    for age, key in enumerate(("c", "b", "a")):
        cache.put(key, bytes(100))
        os.utime(tmp_path / key, (1000 + age, 1000 + age))
    assert cache.get("c") is not None  # used now, so no longer the oldest
    cache.put("d", bytes(100))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_a_sixteenth_is_put_between_two_looks_at_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: looks.append(path) or iterdir(path))
    cache = Cache(directory=tmp_path, max_bytes=16 * 100)
    for number in range(300):
        cache.put(str(number), bytes(10))
    assert len(looks) == 1 + 299 // 11
    assert sum(path.stat().st_size for path in iterdir(tmp_path)) <= 16 * 100 + 11 * (32 + 10)


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(directory=tmp_path / "file")
    cache.put("a", b"content")
    assert cache.get("a") is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_files_are_readable_like_any_other(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_bytes(b"")
    write_atomically(ours, b"")
    assert ours.stat().st_mode == plain.stat().st_mode


def test_hashes_tell_parts_apart() -> None:
    assert content_hash("a", "b") == content_hash("a", "b")
    assert len({content_hash("a", "b"), content_hash("ab"), content_hash("b", "a"), content_hash(b"a", b"b")}) == 4
    assert content_hash({"x": 1, "y": 2}) == content_hash({"y": 2, "x": 1})


def test_the_directory_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEARCH_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.delenv("RANKSEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_directory() == Path("/xdg/ranksearch")
