"""What the benchmark of bits computes on its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ranksearch.compression import rebuild
from ranksearch.plan import DENSE, Plan

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import bits_joint
        import bits_size

        yield {"size": bits_size, "joint": bits_joint}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("predicted", "measured", "is_right"),
    [(0.8, 0.9, True), (0.8, 1.1, False), (1.2, 1.1, True), (1.2, 0.9, False), (1.01, 0.99, True), (1.01, 1.2, False)],
)
def test_signs_are_right_beyond_the_noise(
    rooms: dict[str, Any], predicted: float, measured: float, is_right: bool
) -> None:
    assert rooms["joint"]._is_right(predicted, measured, 0.02) == is_right


def test_expected_bytes_are_bits_scales_and_all_else(rooms: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3, bias=False)).eval()
    plan = Plan(layers={"0": DENSE.with_bits(4, 32), "2": DENSE.with_bits(8, 8)})
    with torch.no_grad():
        rounded = rebuild(model, plan)
    # Weights, two steps and zero points an output, bias; weights, a step an output, the range's scale and zero point.
    expected = (64 * 10 // 2 + 10 * 2 * 2 + 10 * 2 // 2 + 10 * 4) + (10 * 3 + 3 * 4 + 4 + 1)
    assert rooms["size"]._bits_and_all_else(rounded) == expected
