"""The rank multiple that a target's kernels compute in."""

from pathlib import Path

import pytest

from ranksearch.cache import Cache
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target
from ranksearch.staircase import MULTIPLES, RANKS, Staircase, measure_staircase


def climbing(step: int, fixed: float = 0.2) -> tuple[float, ...]:
    """Latencies of a kernel that computes blocks of `step` channels, beside what does not depend on the rank."""
    times = [fixed + -(-rank // step) * step / RANKS[-1] for rank in RANKS]
    return tuple(time / times[-1] for time in times)


@pytest.mark.parametrize("step", MULTIPLES)
def test_the_multiple_is_the_width_of_the_steps(step: int) -> None:
    assert Staircase(ratios=(climbing(step), climbing(step, fixed=0.1))).multiple == step


def test_where_layers_differ_the_finest_decides() -> None:
    assert Staircase(ratios=(climbing(32), climbing(8))).multiple == 8


def test_a_rank_between_steps_may_even_be_slower_than_the_next_step() -> None:
    """Seen with OpenVINO on AVX2: rank 36 took 1.06 times what rank 40 did, and rank 40 0.9 times what 48 did."""
    assert Staircase(ratios=((0.75, 0.71, 0.83, 1.0),)).multiple == 8


def test_a_staircase_is_measured_once(tmp_path: Path) -> None:
    runtime, target, cache = get_runtime("openvino"), Target(threads=1), Cache(directory=tmp_path)
    first = measure_staircase(runtime, target, cache)
    assert all(len(row) == len(RANKS) and row[-1] == 1.0 and min(row) > 0 for row in first.ratios)
    assert first.multiple in MULTIPLES
    assert measure_staircase(runtime, target, cache) == first and len(list(tmp_path.iterdir())) == 1
    assert Staircase.from_json(first.to_json()) == first
