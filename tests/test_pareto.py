"""Pareto arithmetic against its definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.pareto import REFERENCE_POINT, hypervolume, knee, non_dominated

# Few levels, so that ties and repeated rows are common.
LEVELS = st.integers(0, 5)


def points(n_objectives: int) -> st.SearchStrategy[np.ndarray]:
    rows = st.lists(st.tuples(*[LEVELS] * n_objectives), max_size=12)
    return rows.map(lambda drawn: np.array(drawn, dtype=float).reshape(-1, n_objectives))


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def counted_volume(losses: np.ndarray, corner: int) -> int:
    """How many unit cells of the grid below the corner some point dominates."""
    cells = itertools.product(range(corner), repeat=losses.shape[1])
    return sum(any((row <= np.array(cell)).all() for row in losses) for cell in cells)


@given(points(3))
def test_non_dominated_is_its_definition(losses: np.ndarray) -> None:
    keep = non_dominated(losses)
    for i, row in enumerate(losses):
        beaten = any(dominates(other, row) for other in losses)
        repeated = any((losses[j] == row).all() for j in range(i))
        assert keep[i] == (not beaten and not repeated)


@given(points(3))
def test_hypervolume_counts_cells(losses: np.ndarray) -> None:
    assert hypervolume(losses, (4.0, 4.0, 4.0)) == pytest.approx(counted_volume(losses, 4))


def test_hypervolume_of_known_fronts() -> None:
    assert hypervolume(np.empty((0, 3))) == 0.0
    assert hypervolume(np.array([[0.0, 0.05, 0.0]])) == pytest.approx(0.1)
    assert hypervolume(np.array([REFERENCE_POINT])) == 0.0
    assert hypervolume(np.array([[np.inf, 0.5, 0.5], [np.nan, 0.5, 0.5]])) == 0.0
    two = np.array([[0.0, 0.55, 0.5], [0.05, 0.05, 0.5]])
    assert hypervolume(two) == pytest.approx((0.1 * 0.5 + 0.05 * 0.5) * 0.5)


def test_no_points_no_front() -> None:
    assert non_dominated(np.empty((0, 3))).tolist() == []


@given(points(3))
def test_adding_a_point_never_takes_volume_away(losses: np.ndarray) -> None:
    corner = (4.0, 4.0, 4.0)
    assert hypervolume(losses, corner) >= hypervolume(losses[:-1], corner) - 1e-9


def test_knee_is_the_bend() -> None:
    assert knee(np.array([[0.0, 1.0], [0.1, 0.2], [1.0, 0.0]])) == 1
    assert knee(np.array([[0.0, 5.0, 1.0]])) == 0
    # Objectives count by the range that they span, not by their units.
    assert knee(np.array([[0.0, 1000.0], [0.1, 200.0], [1.0, 0.0]])) == 1
