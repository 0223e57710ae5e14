"""Latency as a ratio to a reference, measured side by side, with an interval that a busy machine does not narrow."""

import gc
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from ranksearch.device import check_cores, device_lock, timed_cores
from ranksearch.errors import MeasurementError, RankSearchError
from ranksearch.runtimes import AbstractSession, DeviceTimed, get_runtime
from ranksearch.runtimes.base import available_threads
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
# Those that compute in this very process: CPU time of a runtime that asks a server would be that of the asking.
IN_THIS_PROCESS = frozenset({"onnxruntime", "openvino", "torch"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """A candidate's latency over the reference's, with its 95 % interval; times are of single calls.

    `latency_ms` and `reference_ms` are medians.
    """

    ratio: float
    ratio_low: float
    ratio_high: float
    latency_ms: float
    latency_p95_ms: float
    reference_ms: float
    reference_p95_ms: float
    n_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TimesAlone:
    """The times of single calls with nothing beside them, in milliseconds; `low_ms` to `high_ms` hold the median."""

    median_ms: float
    low_ms: float
    high_ms: float
    p95_ms: float
    n_calls: int


def compare(candidate: Call, reference: Call, **options: Any) -> Latency:
    """The candidate's latency relative to the reference's, measured side by side; options are those of compare_all."""
    return compare_all([candidate], reference, **options)[0]


def compare_all(
    candidates: Sequence[Call],
    reference: Call,
    *,
    n_blocks: int = 20,
    max_seconds: float = 10.0,
    block_seconds: float = 0.01,
    narrow: float = 0.01,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> list[Latency]:
    """Each candidate's latency relative to the reference's, all measured side by side, so that they compare too.

    A block runs all of them in some order and then in the mirrored one, each run lasting `block_seconds` or one call,
    so that a drifting machine touches all alike. The order is drawn anew for each block: whatever else the machine
    does meanwhile, however long its ups and downs last, errors up and down are then equally likely and independent,
    which is all that the interval of order statistics asks for (Rosenbaum, Observational Studies, 2002, chapter 2; Le
    Boudec, Performance Evaluation, 2010, section 2.2). A ratio is the median over blocks.

    At least 6 blocks; `n_blocks` unless `max_seconds` are over before; then more, up to four times as many, until
    every interval is within `narrow` of its ratio on either side. A DeviceTimed call is timed by its device, any other
    by `clock`. `$RANKSEARCH_MAX_TIMING_SECONDS` caps `max_seconds`: a quick look, paid for with wider intervals.

    Raises MeasurementError where a call fails, takes no time by its clock, or only some of them are DeviceTimed.
    """
    if any(isinstance(candidate, DeviceTimed) != isinstance(reference, DeviceTimed) for candidate in candidates):
        raise MeasurementError("candidate and reference must be timed by one clock; make both calls with timed_call")
    max_seconds = min(max_seconds, _most_seconds())
    start = clock()
    timed = [_Timed("candidate", call, block_seconds, clock) for call in candidates]
    timed.append(_Timed("reference", reference, block_seconds, clock))
    shuffle = random.Random(seed).shuffle
    order, ratios = list(range(len(timed))), [list[float]() for _ in candidates]
    with _no_garbage_collection():
        while not _is_enough(ratios, n_blocks, narrow, clock() - start, max_seconds):
            shuffle(order)
            seconds = [0.0] * len(timed)
            for i in (*order, *reversed(order)):
                seconds[i] += timed[i].run()
            if min(seconds) <= 0.0:
                raise MeasurementError("the clock does not advance while the model runs; use a finer clock")
            for of_candidate, took in zip(ratios, seconds, strict=False):
                of_candidate.append(took / seconds[-1])
    return [_latency(of, call, timed[-1]) for of, call in zip(ratios, timed, strict=False)]


def time_alone(
    call: Call, *, max_seconds: float = 3.0, block_seconds: float = 0.02, clock: Clock = time.perf_counter
) -> TimesAlone:
    """How long the call takes, in blocks of `block_seconds` or one call for `max_seconds`, at least 6 blocks.

    The median is that of the blocks' medians, with its 95 % interval, since calls that follow one another are not
    independent. It holds for these seconds: what the machine does at other times it cannot know, which is why
    latencies are compared side by side. `$RANKSEARCH_MAX_TIMING_SECONDS` caps `max_seconds`. Raises MeasurementError
    where the call fails or takes no time by its clock.
    """
    max_seconds = min(max_seconds, _most_seconds())
    timed, medians = _Timed("model", call, block_seconds, clock), list[float]()
    start = clock()
    with _no_garbage_collection():
        while len(medians) < MIN_BLOCKS or clock() - start < max_seconds:
            n_before = len(timed.seconds)
            timed.run()
            medians.append(1000 * statistics.median(timed.seconds[n_before:]))
            if sum(timed.seconds[n_before:]) <= 0.0:
                raise MeasurementError("the clock does not advance while the model runs; use a finer clock")
    low, high = median_interval(medians)
    return TimesAlone(
        median_ms=statistics.median(medians),
        low_ms=low,
        high_ms=high,
        p95_ms=timed.p95_ms(),
        n_calls=len(timed.seconds),
    )


def _most_seconds() -> float:
    return float(os.environ.get("RANKSEARCH_MAX_TIMING_SECONDS", "inf"))


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

    Takes the device's lock, and keeps to the target's cores; options are those of compare. Raises
    RuntimeUnavailableError where the target cannot be run here, and MeasurementError where the example has another
    batch size than the target, the target more threads than there are cores, a model other floats than float32, or
    one fails while it is timed.
    """
    from ranksearch.layers import other_floats  # whoever opens and times files does without torch

    _check_batch_size(example, target)
    for model in (candidate, reference):
        if (told := other_floats(model)) is not None:
            raise MeasurementError(f"{type(model).__name__}: {told}")
    check_cores(target)
    with timed_cores(target):
        runtime = get_runtime(target.runtime)
        runtime.check(target)
        arrays = structure_of(example).arrange([leaf.detach().cpu().numpy() for leaf in leaves_of(example)])
        calls = [
            timed_call(runtime.prepare(model, example, target), arrays, target) for model in (candidate, reference)
        ]
        with device_lock(target):
            return compare(*calls, **options)


def timed_call(session: AbstractSession, inputs: Any, target: Target) -> Call:
    """What compare times: a run of the session on `inputs`, arrays as AbstractSession.run takes them.

    On one thread of the host's CPU it is OneThread, unless the runtime computes elsewhere.
    """
    call = session.bind(inputs)
    on_host = target.device == "cpu" and target.runtime in IN_THIS_PROCESS and not isinstance(call, DeviceTimed)
    return OneThread(call) if on_host and available_threads(target) == 1 else call


@final
@dataclass(frozen=True, slots=True)
class OneThread:
    """A call that computes on one thread, each timed by the wall or by this process's CPU time, whichever is less.

    The device is one core. CPU time stands still while another process has it (Google Benchmark counts CPU time by
    default for that reason; its user guide, "CPU Timers"), but counts what other threads of this process do
    meanwhile. One thread cannot take longer than either says.
    """

    call: Call
    wall: Clock = time.perf_counter
    cpu: Clock = time.process_time

    def __call__(self) -> None:
        self.call()

    def device_seconds(self, n_calls: int) -> list[float]:
        """The seconds of each of so many calls in a row."""
        ticks = [(self.wall(), self.cpu())]
        for _ in range(n_calls):
            self.call()
            ticks.append((self.wall(), self.cpu()))
        return [
            min(wall - wall_before, cpu - cpu_before)
            for (wall_before, cpu_before), (wall, cpu) in itertools.pairwise(ticks)
        ]


class _Timed:
    """A call, warmed up, and the seconds of every timed call so far."""

    def __init__(self, name: str, call: Call, run_seconds: float, clock: Clock) -> None:
        self._name = name
        self._call = call
        self._clock = clock
        self.seconds: list[float] = []
        self.n_calls = N_WARM_UP_CALLS
        self.run()
        self.n_calls = 1
        while self.n_calls < MAX_CALLS_PER_RUN and (took := self.run() * self.n_calls) < run_seconds:
            # Grows towards the goal, doubling where the clock is too coarse to tell.
            factor = run_seconds / took if took > 0 else 2.0
            self.n_calls = min(MAX_CALLS_PER_RUN, max(self.n_calls + 1, math.ceil(self.n_calls * min(factor, 8.0))))
        self.seconds.clear()

    def run(self) -> float:
        """Seconds per call, over one run of n_calls. Raises MeasurementError where the call fails."""
        try:
            if isinstance(self._call, DeviceTimed):
                seconds = self._call.device_seconds(self.n_calls)
            else:
                seconds = _seconds_of_calls(self._call, self.n_calls, self._clock)
        except RankSearchError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"the {self._name} failed while it was timed, after {len(self.seconds)} calls: "
                f"{type(error).__name__}: {error}; see that the device is still there, has memory left, and takes "
                "inputs of this shape, then time again"
            ) from error
        self.seconds.extend(seconds)
        return math.fsum(seconds) / self.n_calls

    def median_ms(self) -> float:
        """The median call's milliseconds."""
        return 1000 * statistics.median(self.seconds)

    def p95_ms(self) -> float:
        """The milliseconds that 95 % of the calls took at most."""
        return 1000 * sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]


def _latency(ratios: list[float], candidate: _Timed, reference: _Timed) -> Latency:
    low, high = median_interval(ratios)
    return Latency(
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        latency_ms=candidate.median_ms(),
        latency_p95_ms=candidate.p95_ms(),
        reference_ms=reference.median_ms(),
        reference_p95_ms=reference.p95_ms(),
        n_blocks=len(ratios),
    )


def _seconds_of_calls(call: Call, n_calls: int, clock: Clock) -> list[float]:
    ticks = [clock()]
    for _ in range(n_calls):
        call()
        ticks.append(clock())
    return [after - before for before, after in itertools.pairwise(ticks)]


def _is_enough(ratios: Sequence[list[float]], n_blocks: int, narrow: float, seconds: float, max_seconds: float) -> bool:
    n_run = min((len(of_candidate) for of_candidate in ratios), default=4 * n_blocks)
    if n_run < MIN_BLOCKS:
        return False
    if seconds >= max_seconds or n_run >= 4 * n_blocks:
        return True
    return n_run >= n_blocks and all(_is_narrow(of_candidate, narrow) for of_candidate in ratios)


def _is_narrow(ratios: list[float], narrow: float) -> bool:
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


def _check_batch_size(example: Any, target: Target) -> None:
    for name, leaf in zip(structure_of(example).names, leaves_of(example), strict=True):
        shape = tuple(leaf.shape)
        if not shape or shape[0] != target.batch_size:
            raise MeasurementError(
                f"input {name!r} of the example has shape {shape}, but Target.batch_size is {target.batch_size}: "
                f"give an example of {target.batch_size} rows, or the target the batch size of the example"
            )
