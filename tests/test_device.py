"""The device: its lock between processes, and the target's cores."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from ranksearch import device as device_module
from ranksearch.device import check_cores, device_lock, other_cores, timed_cores
from ranksearch.errors import MeasurementError, RuntimeUnavailableError, StudyError
from ranksearch.spec import Target

ROOT = Path(device_module.__file__).resolve().parents[1]
ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pinned = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores of Linux")

TRY_LOCK = """
from ranksearch.device import device_lock
from ranksearch.errors import MeasurementError
from ranksearch.spec import Target
try:
    with device_lock(Target(), timeout_seconds=0.2):
        print("got it")
except MeasurementError as error:
    print(error)
"""


def _in_other_process(script: str, *words: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lock_excludes_a_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.tempfile, "tempdir", str(tmp_path))
    with device_lock(Target()), device_lock(Target(cores="0")):  # the holder may ask again
        assert "another process has been timing" in _in_other_process(TRY_LOCK, TMPDIR=str(tmp_path))
        with device_lock(Target(device="gpu"), timeout_seconds=0):
            pass
    assert _in_other_process(TRY_LOCK, TMPDIR=str(tmp_path)) == "got it\n"


def test_the_first_gpu_has_one_lock_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.tempfile, "tempdir", str(tmp_path))
    for device in ("cuda", "cuda:0", "cuda:1"):
        with device_lock(Target(device=device)):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranksearch-cuda-0.lock", "ranksearch-cuda-1.lock"]


def test_cores_are_numbers_and_ranges() -> None:
    assert Target(cores="0-3,8").core_numbers() == {0, 1, 2, 3, 8}
    assert Target(cores=" 5 , 2-2").core_numbers() == {2, 5}
    assert Target().core_numbers() == frozenset()


@pytest.mark.parametrize("cores", ["", "a", "3-1", "0,,1", "-1", "0-", "1-2-3", "0 1", 3, "12345"])
def test_cores_that_cannot_be_read_are_refused(cores: str) -> None:
    with pytest.raises(StudyError, match=r"Target.cores is .*; write numbers and ranges of cores, such as '0-3,8'"):
        Target(cores=cores)


def test_more_threads_than_named_cores_are_refused() -> None:
    assert Target(cores="0-3", threads=4).threads == 4
    with pytest.raises(StudyError, match=r"threads is 3, and Target.cores '4,5' are 2"):
        Target(cores="4,5", threads=3)


def test_a_target_without_cores_is_written_and_read_as_before() -> None:
    assert "cores" not in repr(Target(threads=1)), "it enters the keys of studies and caches"
    assert repr(Target(cores="0")).endswith("precision='f32', cores='0')")
    old_record = {name: value for name, value in asdict(Target(batch_size=8)).items() if name != "cores"}
    assert Target(**old_record) == Target(batch_size=8)


def test_more_threads_than_cores_are_told_with_both_numbers() -> None:
    check_cores(Target(threads=1))
    check_cores(Target(device="cuda", threads=4096))
    with pytest.raises(MeasurementError, match=rf"threads is 4096, but this process may use {len(ALLOWED)} cores"):
        check_cores(Target(threads=4096))


@pinned
@pytest.mark.parametrize("cores", ["9999", f"{ALLOWED[0] if ALLOWED else 0},9999"])
def test_cores_that_are_not_here_are_told_with_those_that_are(cores: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=rf"9999.* may use core.* {ALLOWED[-1]}"):
        check_cores(Target(cores=cores))
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


@contextmanager
def _second_thread() -> Iterator[int]:
    """The number of a thread that does nothing."""
    done, number = threading.Event(), []
    started = threading.Event()

    def wait() -> None:
        number.append(threading.get_native_id())
        started.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    try:
        yield number[0]
    finally:
        done.set()
        thread.join()


@pinned
def test_every_thread_and_child_keeps_to_the_timed_cores_meanwhile() -> None:
    first, last = ALLOWED[0], ALLOWED[-1]
    child = "import os; print(sorted(os.sched_getaffinity(0)))"
    with _second_thread() as earlier:
        os.sched_setaffinity(earlier, {first})
        with timed_cores(Target(cores=str(last))), _second_thread() as later:
            assert {thread: os.sched_getaffinity(thread) for thread in (0, earlier, later)} == {
                0: {last}, earlier: {last}, later: {last},
            }  # fmt: skip
            assert _in_other_process(child) == f"[{last}]\n"
        assert os.sched_getaffinity(earlier) == {first}, "each runs again where it did"
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


@pinned
def test_the_rest_of_the_study_leaves_the_timed_cores_alone() -> None:
    target = Target(cores=str(ALLOWED[0]))
    with other_cores(target):
        assert sorted(os.sched_getaffinity(0)) == ALLOWED[1:]
        with timed_cores(target):
            assert os.sched_getaffinity(0) == {ALLOWED[0]}
        assert sorted(os.sched_getaffinity(0)) == ALLOWED[1:]
    with other_cores(Target()):
        assert sorted(os.sched_getaffinity(0)) == ALLOWED
    with other_cores(Target(cores=",".join(map(str, ALLOWED)))):
        assert sorted(os.sched_getaffinity(0)) == ALLOWED, "there are no others"


@pinned
def test_a_thread_that_a_runtime_moved_away_is_told() -> None:
    with (
        _second_thread() as strayed,
        pytest.raises(MeasurementError, match=r"1 of this process's threads left Target.cores .* in a fresh process"),
        timed_cores(Target(cores=str(ALLOWED[0]))),
    ):
        os.sched_setaffinity(strayed, ALLOWED)
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


MEASURE = """
import sys
import torch
from torch import nn
from ranksearch.device import other_cores, timed_cores
from ranksearch.errors import MeasurementError
from ranksearch.latency import compare, timed_call
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target

core, *steps = sys.argv[1:]
model, example = nn.Conv2d(4, 4, 3), torch.zeros(2, 4, 8, 8)

def use(name):
    get_runtime(name).prepare(model, example, Target(runtime=name, batch_size=2, threads=2)).run(example.numpy())

def measure(name):
    target = Target(runtime=name, batch_size=2, threads=1, cores=core)
    with timed_cores(target):
        call = timed_call(get_runtime(name).prepare(model, example, target), example.numpy(), target)
    with other_cores(target):
        torch.ones(3).sum()
    with timed_cores(target):
        compare(call, call, n_blocks=6, max_seconds=0.1, block_seconds=0.001)

try:
    for step in steps:
        what, name = step.split(":")
        {"use": use, "measure": measure}[what](name)
    print("kept")
except MeasurementError as error:
    print(error)
"""


@pinned
def test_runtimes_keep_to_the_cores() -> None:
    # torch's threads may be moved later; OpenVINO stays where it was first used, and goes on there.
    steps = ["use:torch", "measure:torch", "measure:openvino", "measure:openvino"]
    assert _in_other_process(MEASURE, str(ALLOWED[-1]), *steps) == "kept\n"


@pinned
def test_a_runtime_that_was_first_used_elsewhere_keeps_to_the_cores_or_says_so() -> None:
    told = _in_other_process(MEASURE, str(ALLOWED[-1]), "use:openvino", "measure:openvino")
    assert told == "kept\n" or "was first used before this process kept to them" in told
