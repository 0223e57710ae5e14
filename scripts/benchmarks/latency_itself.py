"""One model against itself, opened twice, while another process loads a core: what is measured should be 1.00.

ResNet-20 for CIFAR-10, 32 images, on one thread of OpenVINO. Targets over 100 comparisons: at most 10 intervals of 95 %
leave out 1.00, the median interval reaches 2 % to either side at most, and the median ratio lies within 1 % of 1.00.
The baseline, told and not judged, is the usual way: so many calls of the one, then of the other, by the wall clock.
`--quick` asks for 20 comparisons of 1.5 s at 4 images, of which 4 may leave out 1.00, within 4 %, and within 2 %.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import study_script
from torch import nn

from ranksearch.device import device_lock
from ranksearch.latency import Latency, compare, timed_call
from ranksearch.machine import machine_state
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target

# By turns it works and sleeps, each for 0.1 s in the mean, so that the load changes while a comparison runs.
LOAD = """
import os, random, sys, time
times, parent = random.Random(int(sys.argv[1])), os.getppid()
while os.getppid() == parent:
    until = time.perf_counter() + times.expovariate(10)
    while time.perf_counter() < until:
        pass
    time.sleep(times.expovariate(10))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """How often to compare, at what batch size, for how long at most, and what must hold of so many comparisons."""

    batch_size: int
    n_comparisons: int
    max_seconds: float
    max_excluding: int
    max_half_width: float
    max_bias: float


FULL = Question(
    batch_size=32, n_comparisons=100, max_seconds=10.0, max_excluding=10, max_half_width=0.02, max_bias=0.01
)
QUICK = Question(batch_size=4, n_comparisons=20, max_seconds=1.5, max_excluding=4, max_half_width=0.04, max_bias=0.02)
N_SEQUENTIAL_CALLS = 10


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The figures, and the lines that tell them."""
    question = QUICK if arguments.quick else FULL
    target = Target(runtime="openvino", batch_size=question.batch_size, threads=1)
    model, weights = _network()
    example = torch.randn(target.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measured: list[Latency] = []
    sequential: list[float] = []
    before = machine_state(target)
    started = time.perf_counter()
    with _openings(model, example, target) as open_model, _load(seed=0):
        first, second = open_model(), open_model()
        for seed in range(question.n_comparisons):
            with device_lock(target):
                measured.append(compare(first, second, narrow=0.02, max_seconds=question.max_seconds, seed=seed))
                if not arguments.quick:
                    sequential.append(_one_after_the_other(first, second))
    figures = {
        **_summary(measured),
        "seconds_per_comparison": (time.perf_counter() - started) / question.n_comparisons,
        "sequential_ratios": _spread(sequential),
        "machine_before": before,
        "machine_after": machine_state(target),
    }
    holds = (
        figures["n_excluding_1"] <= question.max_excluding
        and figures["median_half_width"] <= question.max_half_width
        and abs(figures["ratios"]["median"] - 1) <= question.max_bias
    )
    scope = (
        f"ResNet-20 with {weights} weights against itself, opened twice in OpenVINO, batch "
        f"{target.batch_size}, one thread, {question.n_comparisons} times, while another process loads a core at random"
    )
    return {**figures, "target": asdict(question), "holds": holds, "scope": scope}, _lines(figures, question)


def _lines(figures: dict[str, Any], question: Question) -> list[str]:
    ratios, usual = figures["ratios"], figures["sequential_ratios"]
    lines = [
        f"  {figures['n_excluding_1']} of {question.n_comparisons} intervals leave out 1.00, at most "
        f"{question.max_excluding} may",
        f"  median half width {figures['median_half_width']:.2%}, at most {question.max_half_width:.0%}",
        f"  ratios: median {ratios['median']:.4f}, 9 in 10 between {ratios['p5']:.3f} and {ratios['p95']:.3f}",
        f"  {figures['median_blocks']:.0f} blocks in the median, {figures['seconds_per_comparison']:.1f} s each in all",
    ]
    if usual:
        told = f"median {usual['median']:.4f}, 9 in 10 between {usual['p5']:.3f} and {usual['p95']:.3f}"
        lines.append(f"  one after the other by the wall clock, {N_SEQUENTIAL_CALLS} calls each: {told}")
    return lines


def _summary(measured: list[Latency]) -> dict[str, Any]:
    return {
        "n_excluding_1": sum(not latency.ratio_low <= 1 <= latency.ratio_high for latency in measured),
        "median_half_width": statistics.median((each.ratio_high - each.ratio_low) / 2 for each in measured),
        "ratios": _spread([latency.ratio for latency in measured]),
        "median_blocks": statistics.median(latency.n_blocks for latency in measured),
        "latency_ms": statistics.median(latency.latency_ms for latency in measured),
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return {"median": float(middle), "p5": float(low), "p95": float(high)}


def _one_after_the_other(first: Callable[[], None], second: Callable[[], None]) -> float:
    """The ratio of the medians of some calls of `first` and then of `second`, by the wall clock."""
    medians = []
    for call in (first, second):
        seconds = []
        for _ in range(N_SEQUENTIAL_CALLS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return medians[0] / medians[1]


@contextmanager
def _openings(model: nn.Module, example: torch.Tensor, target: Target) -> Iterator[Callable[[], Callable[[], None]]]:
    """Opens the model each time it is called."""
    runtime = get_runtime(target.runtime)
    with tempfile.TemporaryDirectory() as directory:
        path = runtime.serialise(model, example, target, Path(directory))
        yield lambda: timed_call(runtime.open(path, target), example.numpy(), target)


@contextmanager
def _load(seed: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(seed)])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _network() -> tuple[nn.Module, str]:
    """The study's network: trained where RANKSEARCH_DATA names its weights, else with random ones."""
    study = study_script("resnet20_cifar10")
    if os.environ.get("RANKSEARCH_DATA"):
        model: nn.Module = study["load_model"]()
        return model.eval(), "trained"
    torch.manual_seed(0)
    random: nn.Module = study["ResNet20"]()
    return random.eval(), "random"
