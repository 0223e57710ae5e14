"""Can a file crash what reads it? Plans, exports, caches and studies' homes, changed at random and read again.

Target: of 20,000 files (`--quick`: 400) each is read or refused by an error of ours, nothing is written outside of its
folder, and memory grows by no more than 1 GB, files of three gigabytes included. The files are those of a study that
is run for it, the hashes in them mostly made right again, so that what is changed is looked at. They are read in
processes of their own, so that one that dies is counted too. The runtime's own artefact is left as it is: a model that
is run takes what time and memory it asks for.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Answer, scratch
from faults_subjects import Subject, subjects, write_subjects

from ranksearch.errors import RankSearchError

N_FILES, N_QUICK, BATCH = 20_000, 400, 200
MOST_MEMORY_MB, MOST_SECONDS = 1024, 120
HUGE_BYTES = 3 << 30
# Every so many files one is that large, of which the disk holds nothing.
HUGE_EVERY = 200
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's names of what changes a file system: where its arguments have paths, and the folders that these start from.
CHANGES = {
    "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),), "os.remove": ((0, 1),), "os.chmod": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),),
}  # fmt: skip


class _TooLong(BaseException):  # noqa: N818 - no error, for nothing on the way shall take it for one
    """A file took longer than any may."""


@dataclass
class Tally:
    """What became of some files."""

    files: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    writes_outside: list[str] = field(default_factory=list)
    memory_mb: float = 0.0
    slowest_s: float = 0.0

    def add(self, other: "Tally") -> None:
        self.files += other.files
        self.refused += other.refused
        self.crashes += other.crashes
        self.writes_outside += other.writes_outside
        self.memory_mb = max(self.memory_mb, other.memory_mb)
        self.slowest_s = max(self.slowest_s, other.slowest_s)


def answer(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Fuzzes until all files were read."""
    n_files = N_QUICK if arguments.quick else N_FILES
    tally, started = Tally(), time.monotonic()
    with scratch() as folder:
        assert _in_a_process(lambda: write_subjects(folder / "whole"), folder) == 0, "the study is run and exported"
        for first in range(0, n_files, BATCH):
            found = _batch(folder, first, min(BATCH, n_files - first))
            _say("\n".join([*found.crashes, *found.writes_outside]))
            tally.add(found)
            _say(f"{sum(tally.files.values())} files, {len(tally.crashes)} crashes, {tally.memory_mb:.0f} MB")
    holds = not tally.crashes and not tally.writes_outside and tally.memory_mb <= MOST_MEMORY_MB
    scope = f"{sum(tally.files.values()):,} files: {', '.join(f'{n:,} {kind}' for kind, n in tally.files.items())}"
    figures = {
        "files": dict(tally.files),
        "refused": tally.refused,
        "crashes": len(tally.crashes),
        "first_crashes": tally.crashes[:10],
        "writes_outside": tally.writes_outside[:10],
        "memory_growth_mb": round(tally.memory_mb),
        "slowest_s": round(tally.slowest_s, 2),
        "seconds": round(time.monotonic() - started),
        "target": {"crashes": 0, "writes_outside": 0, "memory_growth_mb": MOST_MEMORY_MB},
    }
    lines = [
        f"{tally.refused:,} refused by an error of ours, {len(tally.crashes)} crashes, "
        f"{len(tally.writes_outside)} writes outside of the folder; memory grew by {tally.memory_mb:.0f} MB at most; "
        f"the slowest file took {tally.slowest_s:.1f} s; target: 0 crashes, 0 writes, {MOST_MEMORY_MB} MB",
        *tally.crashes[:10],
    ]
    return {"figures": figures, "holds": holds, "scope": scope}, lines


def _batch(folder: Path, first: int, n_files: int) -> Tally:
    """Some files, in a process; where that dies, its file is a crash, and the rest are read in another."""
    done = 0
    tally = Tally()
    while done < n_files:
        log = folder / "log.jsonl"
        log.write_text("")
        status = _in_a_process(lambda: _fuzz(folder, first + done, n_files - done, log), folder)  # noqa: B023
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            tally.add(Tally(**{**line, "files": Counter(line["files"])}))
        done += len(lines)
        if status != 0:
            kind = _chosen(first + done)[0].kind
            tally.add(Tally(files=Counter([kind]), crashes=[f"file {first + done}: the process ended with {status}"]))
            done += 1
    return tally


def _fuzz(folder: Path, first: int, n_files: int, log: Path) -> None:
    """Reads so many files, and writes a line for each as it was read."""
    case, before = folder / "case", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder / "whole", case)
    written: list[str] = []
    _watch_writes(case, log, written)
    with log.open("a") as told:
        for number in range(first, first + n_files):
            tally = _read(folder, case, number)
            tally.writes_outside, written[:] = list(written), []
            tally.memory_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(json.dumps(vars(tally)), file=told, flush=True)


def _read(folder: Path, case: Path, number: int) -> Tally:
    """One file, changed, read, and put back."""
    subject, rng = _chosen(number)
    path, tally = case / subject.file, Tally(files=Counter([subject.kind]))
    whole = (folder / "whole" / subject.file).read_bytes()
    path.write_bytes(rng.choice(subject.mutations)(whole, rng))
    if rng.random() < 0.8:
        subject.sign(case)
    if number % HUGE_EVERY == 0:
        os.truncate(path, HUGE_BYTES)
    started = time.monotonic()
    try:
        with _time_limit(), redirect_stdout(io.StringIO()):
            subject.read(case)
    except RankSearchError:
        tally.refused = 1
    except (Exception, _TooLong) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        what = f"file {number}, {subject.file}, {subject.read.__name__}"
        tally.crashes.append(f"{what}: {type(error).__name__} at {where}: {str(error)[:120]}")
    tally.slowest_s = time.monotonic() - started
    for changed in {path.parent, case / "out"}:
        _restore(folder / "whole" / changed.relative_to(case), changed)
    return tally


def _chosen(number: int) -> tuple[Subject, random.Random]:
    """The file of this number, and the random numbers that change it."""
    rng = random.Random(number)
    kind = rng.choice(("plan", "export", "cache", "home"))
    return rng.choice([subject for subject in subjects() if subject.kind == kind]), rng


def _restore(whole: Path, changed: Path) -> None:
    """The folder's own files as they were."""
    for path in whole.iterdir():
        other = changed / path.name
        if path.is_file() and (not other.is_file() or other.stat().st_mtime_ns != path.stat().st_mtime_ns):
            shutil.copy2(path, other)


@contextmanager
def _time_limit() -> Iterator[None]:
    """What takes longer is a crash."""

    def stop(_number: int, _frame: Any) -> None:
        raise _TooLong(f"it took more than {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _watch_writes(case: Path, log: Path, written: list[str]) -> None:
    """Has this process note what it changes beside the folder of the case."""
    allowed = (str(case.resolve()), str(log.resolve()), "/dev/null", "/proc/self/")
    tempfile.gettempdir()  # which tries once whether it can write there

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        places = CHANGES.get(event, ())
        if event == "open" and arguments[2] & WRITES:
            places = ((0, None),)
        for path, base in places:
            place = _place(arguments[path], -1 if base is None else arguments[base])
            if not place.startswith(allowed):
                written.append(f"{event} {place}")

    sys.addaudithook(hear)


def _place(path: int | str | bytes | os.PathLike[Any], base: int) -> str:
    """Where a path leads that starts from an open folder, or from the working directory (-1)."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    start = Path.cwd() if base == -1 else Path(f"/proc/self/fd/{base}").readlink()
    return os.path.realpath(start / os.fsdecode(path))


def _in_a_process(work: Any, folder: Path) -> int:
    """The exit status of a process that does the work."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)
