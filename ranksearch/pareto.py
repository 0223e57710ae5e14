"""Pareto arithmetic on arrays of losses: every column is minimised, every row is a point."""

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

# (drop, latency ratio, bytes ratio): the corner against which every hypervolume of this package is taken.
REFERENCE_POINT = (0.10, 1.05, 1.0)


def non_dominated(losses: Losses) -> NDArray[np.bool_]:
    """A mask of the rows that no other row dominates; of equal rows the first stays.

    `losses` is (n_points, n_objectives). A row dominates another if it is nowhere worse and somewhere better.
    """
    losses = np.asarray(losses, dtype=np.float64)
    keep = np.zeros(len(losses), dtype=np.bool_)
    kept = np.empty_like(losses)
    n_kept = 0
    # In lexical order what dominates a row comes before it, and of what came before only kept rows need be asked.
    for row in np.lexsort((np.arange(len(losses)), *losses.T[::-1])):
        if not (kept[:n_kept] <= losses[row]).all(axis=1).any():
            keep[row] = True
            kept[n_kept] = losses[row]
            n_kept += 1
    return keep


def hypervolume(losses: Losses, reference: tuple[float, float, float] = REFERENCE_POINT) -> float:
    """The volume that the points dominate below `reference`; 0.0 where no point lies below it.

    `losses` is (n_points, 3). A plane sweeps along the third objective, over the steps of the points that it has
    passed (Beume et al., "On the complexity of computing the hypervolume indicator", 2009).
    """
    corner = np.asarray(reference, dtype=np.float64)
    points = np.asarray(losses, dtype=np.float64).reshape(-1, len(corner))
    points = points[(points < corner).all(axis=1)]
    points = points[non_dominated(points)]
    points = points[np.argsort(points[:, 2], kind="stable")]
    depths = np.diff(np.append(points[:, 2], corner[2]))
    steps = _Steps(float(corner[0]), float(corner[1]))
    volume = 0.0
    for (x, y, _), depth in zip(points.tolist(), depths.tolist(), strict=True):
        steps.add(x, y)
        volume += depth * steps.area
    return volume


class _Steps:
    """The area below a corner that points of two objectives dominate; by x, their y fall."""

    def __init__(self, corner_x: float, corner_y: float) -> None:
        self._corner_x, self._corner_y = corner_x, corner_y
        self._xs: list[float] = []
        self._ys: list[float] = []
        self.area = 0.0

    def add(self, x: float, y: float) -> None:
        """Adds a point that no other dominates, in place of those that it dominates."""
        first = last = bisect_left(self._xs, x)
        left, above = x, self._ys[first - 1] if first else self._corner_y
        while last < len(self._xs) and self._ys[last] >= y:
            self.area += (self._xs[last] - left) * (above - y)
            left, above = self._xs[last], self._ys[last]
            last += 1
        right = self._xs[last] if last < len(self._xs) else self._corner_x
        self.area += (right - left) * (above - y)
        self._xs[first:last], self._ys[first:last] = [x], [y]


def knee(losses: Losses) -> int:
    """The row nearest to the ideal point, each objective scaled to the range that the front spans.

    `losses` is (n_points, n_objectives), not empty.
    """
    points = np.asarray(losses, dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    return int(np.argmin(np.linalg.norm((points - low) / span, axis=1)))
