"""Is anything lost when a study is killed: its coordinator or a worker, at any moment, again and again?

Target: of 200 kills (SIGKILL) over small studies none loses a finished trial, none has a plan evaluated again that was,
and each study ends with as many finished trials as an undisturbed one.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import Answer, scratch
from small_study import import_all, start, write_script

from ranksearch.errors import StudyError
from ranksearch.optimization import TrialRecord, read_records, read_study

N_KILLS, N_KILLS_QUICK, KILLS_EACH, N_TRIALS = 200, 6, 5, 8
EXECUTORS = (("--executor", "inline"), ("--executor", "processes", "--workers", "2"))
GIVE_UP_S = 300.0


@dataclass
class Found:
    """What went wrong, and how much was tried."""

    kills: int = 0
    worker_kills: int = 0
    studies: int = 0
    lost: int = 0
    repeated: int = 0
    unequal: int = 0
    codes: list[int] = field(default_factory=list)


def answer(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Kills studies until there were as many kills as asked for."""
    wanted = arguments.kills or (N_KILLS_QUICK if arguments.quick else N_KILLS)
    found, rng = Found(), random.Random(arguments.seed)
    import_all()
    started = time.monotonic()
    with scratch() as folder:
        while found.kills < wanted:
            _one_study(Path(folder), min(KILLS_EACH, wanted - found.kills), found, rng)
    figures = {
        name: getattr(found, name) for name in ("kills", "worker_kills", "studies", "lost", "repeated", "unequal")
    }
    return {
        **figures,
        "seconds": time.monotonic() - started,
        "target": {"lost": 0, "repeated": 0, "unequal": 0},
        "holds": not (found.lost or found.repeated or found.unequal or set(found.codes) - {0}),
        "scope": f"{wanted} kills at random moments, studies of {N_TRIALS} trials, {KILLS_EACH} kills each; in one "
        "process, and in three, of which a worker is killed in half of the cases",
    }, [
        f"{found.kills} kills over {found.studies} studies, {found.worker_kills} of them of a worker: {found.lost} "
        f"finished trials lost, {found.repeated} repeated, {found.unequal} studies not equal to an undisturbed one"
    ]


def _one_study(base: Path, n_kills: int, found: Found, rng: random.Random) -> None:
    folder = base / f"study-{found.studies}"
    folder.mkdir()
    write_script(folder, sleep_s=0.05)
    executor = EXECUTORS[found.studies % len(EXECUTORS)]
    words = (
        "run",
        "study.py",
        "--trials",
        str(N_TRIALS),
        "--tracking-uri",
        f"sqlite:///{folder / 'runs.db'}",
        *executor,
    )
    environment = {
        "RANKSEARCH_CACHE": str(base / "cache"),
        "RANKSEARCH_MAX_TIMING_SECONDS": "0.02",
        "OMP_NUM_THREADS": "1",
    }
    before: set[int] = set()
    for _ in range(n_kills):
        pid = start(folder, *words, log=folder / "log", **environment)
        _kill(pid, found, rng)
        done = _finished(folder)
        found.lost += len(before - set(done))
        before = set(done)
    found.codes.append(_wait(start(folder, *words, log=folder / "log", **environment)))
    records = _finished(folder)
    found.lost += len(before - set(records))
    hashes = [record.plan_hash for record in records.values() if record.duplicate_of is None]
    found.repeated += len(hashes) - len(set(hashes))
    found.unequal += sum(record.counted for record in records.values()) != N_TRIALS
    found.studies += 1
    print(found, file=sys.stderr, flush=True)


def _kill(pid: int, found: Found, rng: random.Random) -> None:
    """Kills the command, or a worker of it and then the command, at a moment of its life."""
    wait_s = rng.uniform(0.0, rng.choice((2.0, 6.0, 15.0)))
    give_up, worker = time.monotonic() + wait_s, rng.random() < 0.5
    while time.monotonic() < give_up:
        if os.waitpid(pid, os.WNOHANG)[0]:
            # It was done before.
            return
        time.sleep(0.01)
    if worker and (workers := list(_workers(pid))):
        os.kill(rng.choice(workers), signal.SIGKILL)
        found.kills, found.worker_kills = found.kills + 1, found.worker_kills + 1
        time.sleep(rng.uniform(0.0, 3.0))
    if not os.waitpid(pid, os.WNOHANG)[0]:
        os.kill(pid, signal.SIGKILL)
        found.kills += 1
        os.waitpid(pid, 0)


def _workers(parent: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields, words = path.read_text().rsplit(")", 1)[1].split(), (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"process_worker" in words:
            yield int(path.parent.name)


def _wait(pid: int) -> int:
    give_up = time.monotonic() + GIVE_UP_S
    while time.monotonic() < give_up:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1


def _finished(folder: Path) -> dict[int, TrialRecord]:
    """The finished trials as they are on disk, by number; none before the study has begun."""
    try:
        study = read_study(folder / ".ranksearch" / "small", "small")
    except StudyError:
        return {}
    return {record.number: record for record in read_records(study) if record.state in ("complete", "pruned")}
