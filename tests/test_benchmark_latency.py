"""What the benchmark of latency computes on its own: which questions it asks, and what it makes of comparisons."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranksearch.latency import Latency

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import latency
        import latency_itself

        yield {"latency": latency, "itself": latency_itself}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_question_that_is_not_there_does_not_hold_and_breaks_no_other(rooms: dict[str, Any]) -> None:
    answer, lines = rooms["latency"].answer("nowhere", argparse.Namespace(quick=True))
    assert not answer["holds"] and answer["scope"] == "not asked: there is no latency_nowhere.py" and not lines


def test_a_question_that_does_not_import_says_why(rooms: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "latency_broken.py").write_text("import no_such_library\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            rooms["latency"].answer("broken", argparse.Namespace(quick=True))
    finally:
        sys.path.remove(str(tmp_path))


def test_intervals_that_leave_out_1_are_counted_on_either_side(rooms: dict[str, Any]) -> None:
    ends = [(0.98, 1.01), (0.9, 0.99), (1.0, 1.1), (1.01, 1.03)]
    measured = [
        Latency(
            ratio=(low + high) / 2,
            ratio_low=low,
            ratio_high=high,
            latency_ms=1.0,
            latency_p95_ms=1.0,
            reference_ms=1.0,
            reference_p95_ms=1.0,
            n_blocks=20,
        )
        for low, high in ends
    ]
    summary = rooms["itself"]._summary(measured)
    assert summary["n_excluding_1"] == 2
    assert summary["median_half_width"] == pytest.approx((0.015 + 0.045) / 2)
