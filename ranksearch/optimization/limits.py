"""The goals as numbers: how far an evaluation is beyond them, whether it meets them, and whether any plan can."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from ranksearch.candidates import Profile
from ranksearch.evaluation import Evaluation
from ranksearch.optimization.table import Floats, Table
from ranksearch.spec import Objective

# Predictions are this far off at times: a goal that they miss by less may be met.
SLACK = 0.9
LARGEST = 1e30


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedLimits:
    """The largest drop (in score units), latency ratio and bytes ratio (plan over dense); None where none is set."""

    max_drop: float | None = None
    max_latency_ratio: float | None = None
    max_bytes_ratio: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The limits as a JSON object, by the objective that they bound."""
        return {"drop": self.max_drop, "latency": self.max_latency_ratio, "bytes": self.max_bytes_ratio}

    def bounds(self) -> dict[Objective, float]:
        """The limits that are set, by the objective that they bound."""
        known: dict[Objective, float | None] = {
            "drop": self.max_drop,
            "latency": self.max_latency_ratio,
            "bytes": self.max_bytes_ratio,
        }
        return {name: limit for name, limit in known.items() if limit is not None}

    @classmethod
    def from_json(cls, limits: object) -> Self:
        """What to_json gave. Raises ValueError for anything else."""
        names = ("drop", "latency", "bytes")
        if not isinstance(limits, dict) or any(not _is_limit(limits.get(name, "missing")) for name in names):
            raise ValueError("limits are numbers, or null, of drop, latency and bytes")
        return cls(max_drop=limits["drop"], max_latency_ratio=limits["latency"], max_bytes_ratio=limits["bytes"])

    def violations(self, evaluation: Evaluation) -> dict[str, float]:
        """By objective, how far the estimate lies beyond its limit (negative: within); only where both are known."""
        return self._excess(
            {
                "drop": evaluation.accuracy_drop,
                "latency": evaluation.latency_ratio,
                "bytes": evaluation.bytes_ratio,
            }
        )

    def feasible(self, evaluation: Evaluation, surely: bool = False) -> bool:
        """Whether every limit is met: by the estimates, or `surely`, by the worse ends of their intervals.

        What was not measured meets no limit, and a drop without an interval meets none surely.
        """
        worst = {"drop": evaluation.drop_high, "latency": evaluation.ratio_high, "bytes": evaluation.bytes_ratio}
        excess = self._excess(worst) if surely else self.violations(evaluation)
        n_limits = sum(limit is not None for limit in self.to_json().values())
        return len(excess) == n_limits and all(value <= 0 for value in excess.values())

    def _excess(self, figures: dict[str, float | None]) -> dict[str, float]:
        """Each known figure minus its limit, where there is one."""
        return {
            name: figure - limit
            for name, limit in self.to_json().items()
            if limit is not None and (figure := figures[name]) is not None
        }


def _is_limit(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(float(value)) <= LARGEST)  # type: ignore[arg-type]


def out_of_reach(profile: Profile, limits: ResolvedLimits) -> list[str]:
    """In a sentence each, the goals that no plan of the table is predicted to come near."""
    table = Table.of(profile)
    found = []
    for name, limit, rest, shares in (
        ("latency", limits.max_latency_ratio, table.latency_rest, table.latency),
        ("size", limits.max_bytes_ratio, table.bytes_rest, table.bytes),
    ):
        least = rest + _least(table, shares)
        if limit is not None and limit < SLACK * least:
            found.append(f"the goal of {limit:.3g}x {name} is out of reach: no plan is predicted below {least:.3g}x")
    return found


def _least(table: Table, shares: Floats) -> float:
    """The sum over layers of the least on offer."""
    return float(np.where(np.isfinite(table.loss), shares, np.inf).min(axis=1).sum())
