"""Disks that are full or closed, at the start and in the middle: a sentence, and the same command goes on."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import TRIALS, Commands, Ended, Searched, write_study

from ranksearch.home import StudyHome
from ranksearch.optimization import read_records, read_study

# A training that fills the disk of a file, or limits what may be written, as a file beside the script says.
TRAINING = """
import json, os, pathlib, resource

HERE = pathlib.Path(__file__).parent


def fine_tune(model, budget):
    told = HERE / "what_to_do.json"
    what = json.loads(told.read_text()) if told.exists() else {}
    if what.get("left") == 0 and "ballast" in what:
        with open(what["ballast"], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
            os.ftruncate(file.fileno(), max(0, file.tell() - what["spare"]))
    if what.get("left") == 0 and "limit" in what:
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["limit"],) * 2)
    if what:
        told.write_text(json.dumps(what | {"left": what["left"] - 1}))


space = rs.Space(decompositions=("none", "svd"), rank_multiple=8)
study = __import__("dataclasses").replace(study, space=space, recovery=rs.Recovery(fine_tune=fine_tune, steps=1))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass
    return ballast


def assert_told(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err + ended.out, ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: "), ended.err
    for part in parts:
        assert part in last, last


CLOSED = {
    "a file": (lambda folder: folder / "study.py" / "in", "Not a directory; a part of the path is a file, or "),
    "no disk": (lambda _folder: Path("/proc/in"), "No such file or directory; "),
}


@pytest.mark.parametrize("name", list(CLOSED))
def test_what_cannot_be_written_is_told_before_anything_is_begun(
    searched: Searched, commands: Commands, tmp_path: Path, name: str
) -> None:
    write_study(tmp_path)
    where, told = CLOSED[name]
    path = where(tmp_path)
    run = ("run", "study.py", "--trials", "1")
    assert_told(commands.run(tmp_path, *run, "--home", path), 2, f"{path}/tiny", told, "choose another --home")
    ended = commands.run(tmp_path, *run, "--tracking-uri", f"sqlite:///{path}/runs.db")
    assert_told(ended, 2, f"{path}/runs.db", told.split(";")[0], "give another --tracking-uri")
    ended = commands.run(tmp_path, "export", "--home", searched.home, "--study", "tiny", "-o", path / "x")
    assert_told(ended, 2, f"{path}/x", told.split(";")[0], "choose another folder")
    assert "loading" not in ended.out and not (tmp_path / ".ranksearch").exists()


def test_a_full_disk_is_told_before_anything_is_begun(
    searched: Searched, commands: Commands, tmp_path: Path, disk: Path
) -> None:
    write_study(tmp_path)
    (disk / "export").mkdir()
    fill(disk)
    run = ("run", "study.py", "--trials", "1")
    full = "No space left on device; free space there, or "
    assert_told(commands.run(tmp_path, *run, "--home", disk), 2, str(disk), full + "choose another --home")
    uri = f"sqlite:///{disk}/runs.db"
    assert_told(commands.run(tmp_path, *run, "--tracking-uri", uri), 2, f"{disk}/runs.db", full + "give another --tr")
    ended = commands.run(tmp_path, "export", "--home", searched.home, "--study", "tiny", "-o", disk / "export")
    assert_told(ended, 2, f"{disk}/export", full + "choose another folder")
    assert list((disk / "export").iterdir()) == []
    assert {path.name for path in disk.iterdir()} <= {"export", "ballast", "tiny"}


def test_a_cache_that_cannot_be_written_costs_a_warning(searched: Searched, commands: Commands, tmp_path: Path) -> None:
    write_study(tmp_path)
    cache = {"RANKSEARCH_CACHE": str(tmp_path / "study.py" / "in")}
    ended = commands.run(tmp_path, "profile", "study.py", **cache)
    assert ended.code == 0 and "Verdict" in ended.out
    assert ended.err.count(f"the cache in {cache['RANKSEARCH_CACHE']} cannot be written (Not a directory)") == 1


@pytest.mark.parametrize("spare", [0, 48 << 10], ids=["to the last byte", "but for the journal"])
def test_a_disk_that_fills_up_ends_the_run_and_nothing_is_lost(
    commands: Commands, tmp_path: Path, disk: Path, spare: int
) -> None:
    write_study(tmp_path, after=TRAINING)
    told, ballast = tmp_path / "what_to_do.json", disk / "ballast"
    told.write_text(json.dumps({"left": 2, "ballast": str(ballast), "spare": spare}))
    check_that_it_goes_on(commands, tmp_path, StudyHome(disk / "tiny"), ballast.unlink, "No space left on device")


def test_a_limit_on_files_ends_the_run_and_nothing_is_lost(commands: Commands, tmp_path: Path) -> None:
    write_study(tmp_path, after=TRAINING)
    (tmp_path / "what_to_do.json").write_text(json.dumps({"left": 2, "limit": 16 << 10}))
    home = StudyHome(tmp_path / "home" / "tiny")
    check_that_it_goes_on(commands, tmp_path, home, lambda: None, "File too large; raise the limit")


def test_the_exit_code_is_right_where_nothing_can_be_printed() -> None:
    words = [sys.executable, "-c", "from ranksearch import cli; print('a line'); cli._exit('no space', 75)"]
    # So that the line waits to be written until the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, stdout=full, stderr=full, env=environment).returncode == 75


def check_that_it_goes_on(commands, folder, home, make_room, told) -> None:  # type: ignore[no-untyped-def]
    run = ("run", "study.py", "--trials", TRIALS, "--home", str(home.directory.parent))
    ended = commands.run(folder, *map(str, run))
    assert_told(ended, 75, str(home.directory), told, "run the same command again: what is finished is kept")
    before = [record for record in read_records(read_study(home.directory, "tiny")) if record.state == "complete"]
    assert before and not list(home.plans.glob(".*")), "no half of a folder"

    make_room()
    (folder / "what_to_do.json").unlink()
    again = commands.run(folder, *map(str, run))
    assert again.code == 0, again.err
    records = read_records(read_study(home.directory, "tiny"))
    assert [record for record in records if record in before] == before
    assert sum(record.counted for record in records) == TRIALS
    ran = Counter(r.plan_hash for r in records if r.state in ("complete", "pruned") and r.duplicate_of is None)
    assert max(ran.values()) == 1
    assert {r.plan_hash for r in records if r.state == "failed"} <= set(ran), "what was interrupted is queued again"
    assert commands.run(folder, "export", "--home", home.directory.parent, "-o", "best").code == 0
    shutil.rmtree(folder / "best")
