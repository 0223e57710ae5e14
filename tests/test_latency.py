"""Latency: ratios on a clock that the test moves, intervals, and the lock between processes."""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ranksearch import latency as latency_module
from ranksearch.errors import MeasurementError
from ranksearch.latency import compare, device_lock, machine_state, measure_latency, median_interval, noise_floor
from ranksearch.spec import Target


class FakeClock:
    """A clock that only calls move: each by its cost, times a load that drifts, times noise."""

    def __init__(self, noise: float = 0.0, drift: float = 0.0) -> None:
        self.now = 0.0
        self._noise, self._drift = noise, drift
        self._random = random.Random(0)

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            noise = 1 + self._noise * self._random.random()
            self.now += seconds * noise * (1 + self._drift * self.now)

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


def test_noise_floor_is_how_far_the_interval_reaches() -> None:
    clock = FakeClock(noise=0.5)
    floor = noise_floor(clock.call(0.004), clock.call(0.004), clock=clock)
    assert 0 < floor < 0.2
    steady = FakeClock()
    assert noise_floor(steady.call(0.0022), steady.call(0.002), clock=steady) == pytest.approx(0.1)


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


TRY_LOCK = """
from ranksearch.errors import MeasurementError
from ranksearch.latency import device_lock
from ranksearch.spec import Target
try:
    with device_lock(Target(), timeout_seconds=0.2):
        print("got it")
except MeasurementError as error:
    print(error)
"""


def _ask_other_process(directory: Path) -> str:
    root = Path(latency_module.__file__).resolve().parents[1]
    environment = {**os.environ, "TMPDIR": str(directory)}
    command = [sys.executable, "-c", TRY_LOCK]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True).stdout


def test_the_lock_excludes_a_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module.tempfile, "tempdir", str(tmp_path))
    with device_lock(Target()), device_lock(Target()):  # the holder may ask again
        assert "another process has been timing" in _ask_other_process(tmp_path)
        with device_lock(Target(device="gpu"), timeout_seconds=0):
            pass
    assert _ask_other_process(tmp_path) == "got it\n"


def test_machine_state_holds_load_and_cores() -> None:
    state = machine_state()
    assert set(state) == {"load_1min", "load_5min", "cores"}
    assert state["cores"] >= 1


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_a_larger_model_is_slower(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module.tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    small, large = nn.Linear(256, 16), nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 16))
    target = Target(runtime=runtime, threads=1, batch_size=64)
    measured = measure_latency(large, small, target, torch.randn(64, 256), n_blocks=6, max_seconds=1.0)
    assert measured.ratio > 1.5
    assert measured.n_blocks >= 6
