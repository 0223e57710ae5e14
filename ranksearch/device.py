"""The device that is timed on: its lock between processes, and its cores, on which nothing else of the study runs."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.spec import Target

_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_THREADS = Path("/proc/self/task")
# More than Linux takes (8192 on x86).
MAX_CORES = 10_000


@contextmanager
def device_lock(target: Target, timeout_seconds: float | None = None) -> Iterator[None]:
    """Holds the target's device alone among all processes of this machine that time on it; may be nested.

    Raises MeasurementError where it is not free within `timeout_seconds` (None waits for ever).
    """
    # The device's, whatever the cores: two processes that time on other cores still share caches, memory and power.
    path = Path(tempfile.gettempdir()) / f"ranksearch-{_physical(target.device)}.lock"
    if path in _HELD.get():
        yield
        return
    descriptor = _open_lock(path)
    try:
        _lock(descriptor, path, timeout_seconds)
        token = _HELD.set(_HELD.get() | {path})
        try:
            yield
        finally:
            _HELD.reset(token)
    finally:
        os.close(descriptor)  # which also unlocks


@contextmanager
def timed_cores(target: Target) -> Iterator[None]:
    """While open, every thread of this process, and what it starts, runs on the target's cores alone, if it names any.

    To be open while a model is prepared or opened, and again while it is timed. Runtimes differ: torch's and ONNX
    Runtime's threads may be moved at any time; OpenVINO reads the process's cores once, when its CPU plugin is first
    used, and moves its threads back to those before each inference, unless ENABLE_CPU_PINNING is off and it computes
    on one thread. So this is open before OpenVINO is first asked for anything.

    Raises RuntimeUnavailableError for cores that are not there or not this process's to use, and MeasurementError
    where a runtime has meanwhile moved threads elsewhere.
    """
    cores = target.core_numbers()
    if not cores:
        yield
        return
    with _on_cores(cores):
        _check_taken(cores, target)
        yield
        _check_kept(cores, target)


@contextmanager
def other_cores(target: Target) -> Iterator[None]:
    """While open, this process and the workers that it starts leave the target's cores alone.

    Nothing changes where the target names no cores, or where there are no others.
    """
    cores = target.core_numbers()
    others = _usable_cores() - cores if cores else frozenset()
    if not others:
        yield
        return
    with _on_cores(others):
        yield


def check_cores(target: Target) -> None:
    """Raises where the target's threads cannot each have a core here.

    RuntimeUnavailableError for named cores that are not there or not this process's to use; MeasurementError for
    more threads than cores: they would wait for each other, and runtimes quietly take fewer.
    """
    if target.device != "cpu":
        return
    if target.cores is not None:
        with timed_cores(target):
            return
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if target.threads is not None and target.threads > n_cores:
        raise MeasurementError(
            f"Target.threads is {target.threads}, but this process may use {n_cores} cores of this machine: "
            "ask for as many threads or fewer, or give the process more cores"
        )


@contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """While open, all threads run on `cores`; then each again where it did, and new ones where this thread does."""
    if not hasattr(os, "sched_setaffinity"):
        raise RuntimeUnavailableError("this system cannot keep a process on given cores; leave Target.cores out")
    here = os.sched_getaffinity(0)
    before = {thread: found for thread in _threads() if (found := _cores_of(thread)) is not None}
    try:
        for thread in before:
            _move(thread, cores)
        yield
    finally:
        for thread in _threads():
            _move(thread, before.get(thread, here))


def _check_taken(cores: frozenset[int], target: Target) -> None:
    if missing := cores - os.sched_getaffinity(0):
        raise RuntimeUnavailableError(
            f"Target.cores is {target.cores!r}, but {_listed(missing)} cannot be used here; "
            f"this process may use {_listed(_usable_cores())}"
        )


def _check_kept(cores: frozenset[int], target: Target) -> None:
    """What a runtime moves, it moves while it computes: so it is seen afterwards."""
    strayed = [thread for thread in _threads() if not (_cores_of(thread) or cores) <= cores]
    if strayed:
        raise MeasurementError(
            f"{len(strayed)} of this process's threads left Target.cores {target.cores!r} while it was timed: the "
            f"runtime {target.runtime!r} was first used before this process kept to them; time in a fresh process"
        )


def _usable_cores() -> frozenset[int]:
    """The cores that the system lets this thread have, whatever it is kept to at the moment."""
    kept = os.sched_getaffinity(0)
    try:
        # The system takes the cores that are there and allowed, and leaves out the others.
        os.sched_setaffinity(0, range(MAX_CORES))
        return frozenset(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, kept)


def _threads() -> list[int]:
    return [int(path.name) for path in _THREADS.iterdir()] if _THREADS.is_dir() else [0]


def _cores_of(thread: int) -> set[int] | None:
    """None for a thread that has ended."""
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None


def _move(thread: int, cores: frozenset[int] | set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        return
    except OSError as error:
        raise RuntimeUnavailableError(
            f"the system does not let this process have {_listed(cores)}: {error.strerror}; "
            f"it may use {_listed(_usable_cores())}"
        ) from None


def _listed(cores: frozenset[int] | set[int]) -> str:
    return f"core{'s' if len(cores) != 1 else ''} {', '.join(str(core) for core in sorted(cores))}"


def _physical(device: str) -> str:
    """The device's name among all processes: of GPUs a process may see some alone, which it numbers anew."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device.replace(":", "-")
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    number = int(index or 0)
    return f"cuda-{visible[number] if number < len(visible) and visible[number] else number}"


def _open_lock(path: Path) -> int:
    try:
        # Another user's file opens for reading only, which suffices for a lock.
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


def _lock(descriptor: int, path: Path, timeout_seconds: float | None) -> None:
    if timeout_seconds is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    give_up = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise MeasurementError(
                    f"another process has been timing on this device for {timeout_seconds} s and holds {path}"
                ) from None
            time.sleep(0.05)
