"""How much a plan would add to the hypervolume of a front, by counting sampled points that it alone would dominate."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ranksearch.pareto import Losses

N_POINTS = 4096
# Compared at once: as many points as the processor's cache holds figures of.
CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Undominated:
    """Points below a corner that no member of a front dominates; each stands for the same volume."""

    points: Losses

    @classmethod
    def sample(cls, front: Losses, low: Losses, corner: Losses, rng: np.random.Generator) -> Self:
        """Out of the box from `low` to `corner`, both (n_objectives,); `front` is (n_members, n_objectives)."""
        # By coordinate, and fewer with every member, the farthest from the corner first.
        columns = np.ascontiguousarray((low + (corner - low) * _spread(N_POINTS, len(corner), rng)).T)
        for member in front[np.argsort(-np.prod(np.maximum(corner - front, 0.0), axis=1), kind="stable")]:
            columns = columns[:, (columns < member[:, None]).any(axis=0)]
        return cls(points=np.ascontiguousarray(columns.T))

    def gains(self, losses: Losses) -> NDArray[np.float64]:
        """How many of the points each of `losses` (n_plans, n_objectives) dominates, as a share of the box sampled."""
        counts = np.zeros(len(losses))
        for start in range(0, len(losses), CHUNK):
            part = losses[start : start + CHUNK, None, :]
            counts[start : start + CHUNK] = (part <= self.points[None]).all(axis=2).sum(axis=1)
        return counts / N_POINTS


def _spread(n: int, n_dimensions: int, rng: np.random.Generator) -> Losses:
    """Points of the unit box, evenly spread: an additive recurrence (Roberts, 2018) from a random start."""
    ratio = 2.0
    for _ in range(32):  # the root of x^(d+1) = x + 1
        ratio = (1 + ratio) ** (1 / (n_dimensions + 1))
    steps = ratio ** -np.arange(1.0, n_dimensions + 1)
    points: Losses = (rng.random(n_dimensions) + np.arange(n)[:, None] * steps) % 1.0
    return points
