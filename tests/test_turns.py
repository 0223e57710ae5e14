"""While one times on a device, those who work on it wait; and nobody waits for ever."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ranksearch.turns import Alone, FileTurns, giving_way


def test_nobody_works_while_one_times(tmp_path: Path) -> None:
    n_workers, stop = 3, threading.Event()
    steps = [0] * n_workers

    def work(number: int) -> None:
        turns = FileTurns(tmp_path / "cpu")
        with turns.working():
            while not stop.is_set():
                steps[number] += 1
                time.sleep(0.001)
                turns.give_way()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(n_workers)]
    for thread in threads:
        thread.start()
    timer = FileTurns(tmp_path / "cpu")
    for _ in range(5):
        before = list(steps)
        wait_until(lambda before=before: all(n > then for n, then in zip(steps, before, strict=True)))
        with timer.timing():
            here = list(steps)
            time.sleep(0.05)
            assert steps == here
    stop.set()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_timings_take_turns_and_batches_give_way(tmp_path: Path) -> None:
    first, second, timed = FileTurns(tmp_path), FileTurns(tmp_path), list[str]()

    def time_too() -> None:
        with second.timing():
            timed.append("second")

    with first.timing():
        thread = threading.Thread(target=time_too)
        thread.start()
        time.sleep(0.05)
        timed.append("first")
    thread.join(timeout=10)
    assert timed == ["first", "second"]
    with first.working():
        batches = giving_way([1, 2, 3], first)
        assert next(batches) == 1
        thread = threading.Thread(target=time_too)
        thread.start()
        # It gets its turn between two batches, and no later.
        assert list(batches) == [2, 3]
        thread.join(timeout=0.01)
        for _ in range(1000):
            first.give_way()
            if not thread.is_alive():
                break
            time.sleep(0.001)
        assert timed[-1] == "second" and not thread.is_alive()


def test_who_is_killed_lets_go(tmp_path: Path) -> None:
    held = (
        "import pathlib, sys, time; from ranksearch.turns import FileTurns\n"
        "with FileTurns(pathlib.Path(sys.argv[1])).timing():\n    print('holds', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        process.kill()
    with FileTurns(tmp_path).working():
        pass


def test_alone_nobody_waits() -> None:
    with Alone().timing(), Alone().working():
        assert list(giving_way("ab", Alone())) == ["a", "b"]


def wait_until(reached: Callable[[], bool], timeout_s: float = 30.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < give_up, "never"
        time.sleep(0.002)
