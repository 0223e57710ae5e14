"""Latency as a ratio to a reference: interleaved blocks, an interval, a lock per device."""

import fcntl
import gc
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch.errors import MeasurementError
from ranksearch.runtimes import get_runtime
from ranksearch.runtimes.structure import leaves_of, structure_of
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

Call = Callable[[], None]
Clock = Callable[[], float]

# Fewer blocks cannot give a 95 % interval for a median.
MIN_BLOCKS = 6
N_WARM_UP_CALLS = 3
MAX_CALLS_PER_RUN = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """A candidate's latency over the reference's, with its 95 % interval; times are of single calls."""

    ratio: float
    ratio_low: float
    ratio_high: float
    latency_ms: float
    latency_p95_ms: float
    reference_ms: float
    n_blocks: int


def compare(
    candidate: Call,
    reference: Call,
    *,
    n_blocks: int = 20,
    max_seconds: float = 10.0,
    block_seconds: float = 0.01,
    narrow: float = 0.01,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Latency:
    """The candidate's latency relative to the reference's, measured side by side.

    A block runs candidate, reference, reference, candidate, or the mirror image, in random order, each run lasting
    `block_seconds` or one call, so that a drifting machine touches both alike. The ratio is the median over blocks,
    its interval that of order statistics. At least 6 blocks; `n_blocks` unless `max_seconds` are over before; then
    more, up to four times as many, until the interval is within `narrow` of the ratio on either side.
    `$RANKSEARCH_MAX_TIMING_SECONDS` caps `max_seconds`: a quick look, paid for with wider intervals.
    """
    max_seconds = min(max_seconds, float(os.environ.get("RANKSEARCH_MAX_TIMING_SECONDS", "inf")))
    start = clock()
    calls = {name: _Timed(call, block_seconds, clock) for name, call in (("c", candidate), ("r", reference))}
    order = random.Random(seed)
    ratios: list[float] = []
    with _no_garbage_collection():
        while not _is_enough(ratios, n_blocks, narrow, clock() - start, max_seconds):
            if len(ratios) % 2 == 0:
                pair = order.sample(("crrc", "rccr"), 2)
            seconds = {"c": 0.0, "r": 0.0}
            for name in pair[len(ratios) % 2]:
                seconds[name] += calls[name].run()
            if seconds["r"] <= 0.0 or seconds["c"] <= 0.0:
                raise MeasurementError("the clock does not advance while the model runs; use a finer clock")
            ratios.append(seconds["c"] / seconds["r"])
    low, high = median_interval(ratios)
    candidate_ms = sorted(1000 * call for call in calls["c"].seconds)
    return Latency(
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        latency_ms=statistics.median(candidate_ms),
        latency_p95_ms=candidate_ms[math.ceil(0.95 * len(candidate_ms)) - 1],
        reference_ms=1000 * statistics.median(calls["r"].seconds),
        n_blocks=len(ratios),
    )


def noise_floor(first: Call, second: Call, **options: Any) -> float:
    """How far from 1 the ratio of the same model to itself may lie: the farther end of its interval.

    `first` and `second` are the same model, opened twice; options are those of compare.
    """
    latency = compare(first, second, **options)
    return max(abs(latency.ratio_high - 1), abs(latency.ratio_low - 1))


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median from order statistics; with fewer than 6 values, all that were seen."""
    ordered, n = sorted(values), len(values)
    outside, chance = 0, 0.0
    while outside < (n - 1) // 2:
        chance += math.comb(n, outside) / 2**n
        if 2 * chance > 0.05:
            break
        outside += 1
    below = max(outside - 1, 0)
    return ordered[below], ordered[n - 1 - below]


def measure_latency(
    candidate: "nn.Module", reference: "nn.Module", target: Target, example: Any, **options: Any
) -> Latency:
    """The candidate's latency on the target relative to the reference's, for inputs shaped as `example`.

    Takes the device's lock; options are those of compare. Raises RuntimeUnavailableError where the target cannot
    be run here.
    """
    runtime = get_runtime(target.runtime)
    runtime.check(target)
    arrays = structure_of(example).arrange([leaf.detach().cpu().numpy() for leaf in leaves_of(example)])
    calls = [runtime.prepare(model, example, target).bind(arrays) for model in (candidate, reference)]
    with device_lock(target):
        return compare(*calls, **options)


_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@contextmanager
def device_lock(target: Target, timeout_seconds: float | None = None) -> Iterator[None]:
    """Holds the target's device alone among all processes of this machine that time on it; may be nested.

    Raises MeasurementError where it is not free within `timeout_seconds` (None waits for ever).
    """
    path = Path(tempfile.gettempdir()) / f"ranksearch-{target.device.replace(':', '-')}.lock"
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


def machine_state() -> dict[str, float]:
    """How busy the machine is: load averages over 1 and 5 minutes, and its cores."""
    one_minute, five_minutes, _ = os.getloadavg()
    return {"load_1min": one_minute, "load_5min": five_minutes, "cores": float(os.cpu_count() or 1)}


class _Timed:
    """A call, warmed up, and the seconds of every timed call so far."""

    def __init__(self, call: Call, run_seconds: float, clock: Clock) -> None:
        self._call = call
        self._clock = clock
        self.seconds: list[float] = []
        for _ in range(N_WARM_UP_CALLS):
            call()
        self.n_calls = 1
        while self.n_calls < MAX_CALLS_PER_RUN and (took := self.run() * self.n_calls) < run_seconds:
            # Grows towards the goal, doubling where the clock is too coarse to tell.
            factor = run_seconds / took if took > 0 else 2.0
            self.n_calls = min(MAX_CALLS_PER_RUN, max(self.n_calls + 1, math.ceil(self.n_calls * min(factor, 8.0))))
        self.seconds.clear()

    def run(self) -> float:
        """Seconds per call, over one run of n_calls."""
        ticks = [self._clock()]
        for _ in range(self.n_calls):
            self._call()
            ticks.append(self._clock())
        self.seconds.extend(after - before for before, after in zip(ticks, ticks[1:], strict=False))
        return (ticks[-1] - ticks[0]) / self.n_calls


def _is_enough(ratios: list[float], n_blocks: int, narrow: float, seconds: float, max_seconds: float) -> bool:
    if len(ratios) < MIN_BLOCKS:
        return False
    if seconds >= max_seconds or len(ratios) >= 4 * n_blocks:
        return True
    if len(ratios) < n_blocks:
        return False
    low, high = median_interval(ratios)
    middle = statistics.median(ratios)
    return high <= middle * (1 + narrow) and low >= middle * (1 - narrow)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
