"""Latency: ratios on a clock that the test moves, intervals, and what a bad measurement says."""

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ranksearch import device as device_module
from ranksearch import latency as latency_module
from ranksearch.errors import MeasurementError
from ranksearch.latency import OneThread, compare, compare_all, measure_latency, median_interval, timed_call
from ranksearch.runtimes import DeviceTimed, get_runtime
from ranksearch.spec import Target


class FakeClock:
    """A clock that only calls move: each by its cost, times a load that drifts or comes and goes, times noise."""

    def __init__(self, noise: float = 0.0, drift: float = 0.0, period: float = math.inf, phase: float = 0.0) -> None:
        self.now = 0.0
        self._noise, self._drift = noise, drift
        self._period, self._phase = period, phase
        self._random = random.Random(0)

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            noise = 1 + self._noise * self._random.random()
            wave = 0.3 * math.sin(2 * math.pi * self.now / self._period + self._phase)
            self.now += seconds * noise * (1 + self._drift * self.now + wave)

        return run


def test_twice_as_slow_is_two() -> None:
    clock = FakeClock()
    measured = compare(clock.call(0.002), clock.call(0.001), clock=clock)
    assert measured.ratio == pytest.approx(2.0)
    assert measured.ratio_low == pytest.approx(2.0)
    assert measured.ratio_high == pytest.approx(2.0)
    assert measured.latency_ms == pytest.approx(2.0)
    assert measured.latency_p95_ms == pytest.approx(2.0)
    assert measured.reference_ms == pytest.approx(1.0)
    assert measured.n_blocks == 20


@pytest.mark.parametrize("seed", range(5))
def test_the_same_model_twice_is_one_on_a_noisy_drifting_machine(seed: int) -> None:
    clock = FakeClock(noise=0.3, drift=0.5)
    measured = compare(clock.call(0.001), clock.call(0.001), clock=clock, seed=seed)
    assert measured.ratio_low <= 1 <= measured.ratio_high
    assert measured.ratio_high - measured.ratio_low < 0.1


def test_several_are_measured_beside_each_other_whatever_the_drift() -> None:
    clock = FakeClock(drift=0.5)
    costs = (0.002, 0.001, 0.005)
    measured = compare_all([clock.call(cost) for cost in costs], clock.call(0.001), clock=clock)
    assert [each.ratio for each in measured] == pytest.approx([2.0, 1.0, 5.0], rel=0.02)
    assert len({(each.reference_ms, each.n_blocks) for each in measured}) == 1, "one reference, timed once for all"
    assert compare_all([], clock.call(0.001), clock=clock) == []


def test_no_interval_ends_the_blocks_while_another_is_wide() -> None:
    clock = FakeClock()
    noisy = FakeClock(noise=2.0)

    def unsteady() -> None:
        before = noisy.now
        noisy.call(0.01)()
        clock.now += noisy.now - before

    steady, wide = compare_all([clock.call(0.01), unsteady], clock.call(0.01), clock=clock, n_blocks=10)
    assert steady.ratio_high - steady.ratio_low < 0.01 < wide.ratio_high - wide.ratio_low
    assert steady.n_blocks == wide.n_blocks > 10


def test_the_interval_holds_its_level_where_the_load_comes_and_goes() -> None:
    measured = []
    for seed in range(300):
        clock = FakeClock(noise=0.01, period=0.13, phase=float(seed))
        measured.append(compare(clock.call(0.01), clock.call(0.01), clock=clock, n_blocks=5, seed=seed))
    missed = sum(not each.ratio_low <= 1 <= each.ratio_high for each in measured)
    assert missed <= 0.08 * len(measured), "5 %, and what chance adds in one of a hundred such tests"
    assert {each.n_blocks for each in measured} == {20}, "no interval is narrow enough to stop early"


def test_noise_asks_for_more_blocks_and_time_ends_them() -> None:
    clock = FakeClock(noise=2.0)
    long = compare(clock.call(0.02), clock.call(0.02), clock=clock, n_blocks=10, max_seconds=1e9)
    assert 10 < long.n_blocks <= 40
    assert compare(clock.call(1.0), clock.call(1.0), clock=clock, max_seconds=2.0).n_blocks == 6


def test_short_calls_are_repeated_until_a_run_lasts() -> None:
    clock, calls = FakeClock(), itertools.count()
    tick = clock.call(1e-5)

    def counted() -> None:
        next(calls)
        tick()

    compare(counted, clock.call(1e-5), clock=clock, n_blocks=6, block_seconds=0.01)
    assert next(calls) >= 6 * 2 * 1000


def test_a_clock_that_stands_still_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "MAX_CALLS_PER_RUN", 8)
    with pytest.raises(MeasurementError, match="clock does not advance"):
        compare(lambda: None, lambda: None, clock=lambda: 0.0)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_median_interval_holds_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= sorted(values)[len(values) // 2] <= high or low <= sorted(values)[(len(values) - 1) // 2] <= high
    assert {low, high} <= set(values)


@pytest.mark.parametrize(("n", "below"), [(5, 0), (6, 0), (9, 1), (20, 5), (40, 13)])
def test_median_interval_has_the_textbook_ranks(n: int, below: int) -> None:
    values = [float(i) for i in range(n)]
    assert median_interval(values) == (below, n - 1 - below)


@dataclass
class OnDevice:
    """A call that returns at once, while a device works on, which alone knows for how long."""

    seconds: float
    n_timed: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        pass

    def device_seconds(self, n_calls: int) -> list[float]:
        self.n_timed.append(n_calls)
        return [self.seconds] * n_calls


def test_a_device_that_works_on_is_timed_by_its_own_clock() -> None:
    measured = compare(OnDevice(0.003), OnDevice(0.001), n_blocks=6)
    assert measured.ratio == pytest.approx(3.0)
    assert (measured.latency_ms, measured.reference_p95_ms) == pytest.approx((3.0, 1.0))


def test_p95_is_that_of_single_calls_of_either() -> None:
    clock, n_calls = FakeClock(), itertools.count()

    def sometimes_slow() -> None:
        clock.now += 0.05 if next(n_calls) % 10 == 0 else 0.01

    measured = compare(clock.call(0.02), sometimes_slow, clock=clock, n_blocks=20)
    assert (measured.latency_ms, measured.latency_p95_ms) == pytest.approx((20, 20))
    assert (measured.reference_ms, measured.reference_p95_ms) == pytest.approx((10, 50))


def test_on_one_thread_waiting_for_the_core_takes_no_time() -> None:
    def work() -> None:
        until = time.process_time() + 0.002
        while time.process_time() < until:
            pass

    def work_and_wait() -> None:
        work()
        time.sleep(0.01)

    def ratio(call: Callable[[], None], reference: Callable[[], None]) -> float:
        return compare(call, reference, n_blocks=6, max_seconds=1.0, block_seconds=0.001).ratio

    assert ratio(OneThread(work_and_wait), OneThread(work)) < 1.5
    assert ratio(work_and_wait, work) > 1.5


def test_on_one_thread_a_call_takes_the_less_of_wall_and_cpu_time() -> None:
    ticks = iter([(0.0, 0.0), (1.0, 2.0), (4.0, 3.0), (4.5, 3.5)])
    wall, cpu = itertools.tee(ticks)
    call = OneThread(lambda: None, wall=lambda: next(wall)[0], cpu=lambda: next(cpu)[1])
    assert call.device_seconds(3) == [1.0, 1.0, 0.5], "beside a thread that spins, waiting for the core, and alone"


def test_only_one_thread_of_the_hosts_cpu_is_timed_by_its_cpu_time() -> None:
    model, example = nn.Linear(4, 2), torch.zeros(1, 4)
    for n_threads, kind in ((1, True), (2, False)):
        target = Target(runtime="torch", threads=n_threads)
        session = get_runtime("torch").prepare(model, example, target)
        assert isinstance(timed_call(session, example.numpy(), target), OneThread) is kind
    call = timed_call(session, example.numpy(), Target(runtime="their_own", threads=1))
    assert not isinstance(call, DeviceTimed), "it may compute elsewhere, and this process only wait"


@pytest.mark.parametrize("device_timed", [False, True])
def test_a_device_that_goes_away_is_told(device_timed: bool) -> None:
    n_calls = itertools.count()

    def gone_soon() -> None:
        if next(n_calls) > 20:
            raise RuntimeError("CUDA error: device lost")

    wrap: Callable[[Callable[[], None]], Callable[[], None]] = OneThread if device_timed else lambda call: call
    with pytest.raises(
        MeasurementError, match=r"the candidate failed while it was timed, after \d+ calls: Runtime.*lost"
    ):
        compare(wrap(gone_soon), wrap(lambda: None), n_blocks=6)
    n_calls = itertools.count()
    with pytest.raises(MeasurementError, match="the reference failed"):
        compare(wrap(lambda: None), wrap(gone_soon), n_blocks=6)


def test_two_clocks_are_refused() -> None:
    with pytest.raises(MeasurementError, match="must be timed by one clock"):
        compare(OnDevice(0.003), lambda: None)


def test_another_batch_size_than_the_targets_is_refused() -> None:
    target = Target(runtime="torch", batch_size=8, threads=1)
    with pytest.raises(MeasurementError, match=r"input '0' .* shape \(4, 3\), but Target.batch_size is 8: give"):
        measure_latency(nn.Linear(3, 2), nn.Linear(3, 2), target, torch.zeros(4, 3))


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_a_larger_model_is_slower(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    small, large = nn.Linear(256, 16), nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 16))
    target = Target(runtime=runtime, threads=1, batch_size=64)
    measured = measure_latency(large, small, target, torch.randn(64, 256), n_blocks=6, max_seconds=1.0)
    assert measured.ratio > 1.5
    assert measured.n_blocks >= 6
