"""What plans are expected to measure, how likely they meet the goals, and how much they would add to a front."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ranksearch.optimization.drop_model import DropModel
from ranksearch.optimization.improvement import Undominated
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.table import Floats, Indices, Table
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.spec import Objective

# How far off predicted latencies and bytes are, relative to themselves.
LATENCY_DEVIATION, BYTES_DEVIATION = 0.02, 0.005
# Beyond so many times its limit latency or size is worth nothing, however accurate the plan.
BEYOND = 1.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What is expected of plans, in the order of the `objectives`.

    `drawn` are drops as they may be, `fitted` as they are most likely; `table` predicts latency and bytes. Below
    `resolution` drops are all alike: nobody can tell them apart.
    """

    fitted: DropModel
    drawn: DropModel
    table: Table
    objectives: tuple[Objective, ...]
    limits: ResolvedLimits
    resolution: float = 0.0

    def expected(self, plans: Indices) -> Floats:
        """What the plans (n_plans, n_layers) may measure, (n_plans, n_objectives)."""
        columns: dict[Objective, Callable[[Indices], Floats]] = {
            "drop": self.drawn.predict,
            "latency": self.table.latency_ratios,
            "bytes": self.table.bytes_ratios,
        }
        return np.stack([columns[name](plans) for name in self.objectives], axis=1)

    def best(self, plans: Indices, front: Floats, rng: np.random.Generator) -> tuple[int, ...] | None:
        """The plan of the largest expected gain in hypervolume over `front` (n_members, n_objectives); None if none.

        A gain counts by the chance that the plan meets the limits.
        """
        expected, front = self._resolved(self.expected(plans)), self._resolved(front)
        low = np.minimum(expected.min(axis=0), front.min(axis=0, initial=np.inf))
        undominated = Undominated.sample(front, low, np.maximum(self._corner(), low + 1e-9), rng)
        gains = undominated.gains(expected) * np.exp(self.log_chances(plans))
        return _plan(plans, int(gains.argmax())) if gains.max() > 0 else None

    def nearest(self, plans: Indices, rng: np.random.Generator) -> tuple[int, ...]:
        """The plan that most likely meets the limits; any, where all surely do."""
        chances = self.log_chances(plans)
        return _plan(plans, int(rng.integers(len(plans)) if chances.max() == 0 else chances.argmax()))

    def log_chances(self, plans: Indices) -> Floats:
        """The logarithm of each plan's chance to meet every limit."""
        limits, chances = self.limits, np.zeros(len(plans))
        if limits.max_drop is not None and "drop" in self.objectives:
            chances += _log_chance((limits.max_drop - self.fitted.predict(plans)) / self.fitted.deviations(plans))
        for limit, ratios, deviation in (
            (limits.max_latency_ratio, self.table.latency_ratios(plans), LATENCY_DEVIATION),
            (limits.max_bytes_ratio, self.table.bytes_ratios(plans), BYTES_DEVIATION),
        ):
            if limit is not None:
                chances += _log_chance((limit / np.maximum(ratios, 1e-9) - 1) / deviation)
        return chances

    def _resolved(self, losses: Floats) -> Floats:
        """The losses, drops no less than what can be told from none."""
        least = [self.resolution if name == "drop" else -np.inf for name in self.objectives]
        return np.maximum(losses, least)

    def _corner(self) -> Floats:
        """What is worth nothing: little beyond the limits, where there are any."""
        _, latency, n_bytes = REFERENCE_POINT
        most_latency, most_bytes = self.limits.max_latency_ratio, self.limits.max_bytes_ratio
        corner: dict[Objective, float] = {
            "drop": self.fitted.table.unit,
            "latency": latency if most_latency is None else min(latency, BEYOND * most_latency),
            "bytes": n_bytes if most_bytes is None else min(n_bytes, BEYOND * most_bytes),
        }
        return np.array([corner[name] for name in self.objectives])


def _plan(plans: Indices, row: int) -> tuple[int, ...]:
    return tuple(int(index) for index in plans[row])


def _log_chance(deviations: Floats) -> Floats:
    """The logarithm of the normal distribution function, by its tail's leading term where it is tiny."""
    chance = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in deviations.tolist()])
    tail = -0.5 * deviations**2 - np.log(np.maximum(-deviations, 1.0) * math.sqrt(2 * math.pi))
    return np.where(deviations < -8, tail, np.log(np.maximum(chance, 1e-300)))
