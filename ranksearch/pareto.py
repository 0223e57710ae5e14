"""Pareto arithmetic on arrays of losses: every column is minimised, every row is a point."""

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


def hypervolume(losses: Losses, reference: tuple[float, ...] = REFERENCE_POINT) -> float:
    """The volume that the points dominate below `reference`; 0.0 where no point lies below it.

    `losses` is (n_points, n_objectives). Slices along the last objective and recurses, which is quick
    for the three objectives and few hundred points of a study.
    """
    corner = np.asarray(reference, dtype=np.float64)
    points = np.asarray(losses, dtype=np.float64).reshape(-1, len(corner))
    points = points[(points < corner).all(axis=1)]
    points = points[non_dominated(points)]
    if len(points) == 0:
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - points.min())
    if len(corner) == 2:
        return _area(points, corner)
    points = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.diff(np.append(points[:, -1], corner[-1]))
    return float(
        sum(
            depth * hypervolume(points[: i + 1, :-1], tuple(corner[:-1])) for i, depth in enumerate(depths) if depth > 0
        )
    )


def _area(front: Losses, corner: NDArray[np.float64]) -> float:
    """The area that a front of two objectives dominates below the corner."""
    steps = front[np.argsort(front[:, 0])]
    heights = np.append(corner[1], steps[:-1, 1]) - steps[:, 1]
    return float(((corner[0] - steps[:, 0]) * heights).sum())


def knee(losses: Losses) -> int:
    """The row nearest to the ideal point, each objective scaled to the range that the front spans.

    `losses` is (n_points, n_objectives), not empty.
    """
    points = np.asarray(losses, dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    return int(np.argmin(np.linalg.norm((points - low) / span, axis=1)))
