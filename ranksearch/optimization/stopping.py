"""Whether a plan may be stopped before it is trained, because a front member surely beats it.

What a lower rung of the ladder says of a plan is given that power only where it has earned it: where, on the study's
own trials, it orders plans of like latency as their fine-tuned drops do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranksearch.evaluation import Evaluation

# What lower rungs say, by the column of an evaluation, the cheapest first.
SIGNALS = {"predicted_loss": "predicted loss", "quick_drop": "drop before training"}
# Plans whose latencies differ by no more than this are alike: over a whole front any two figures agree in order.
LATENCY_BAND = 0.05
MIN_PAIRS = 20
MIN_AGREEMENT = 0.5
# So many trials of no smaller a figure must show how small a drop can come of it.
MIN_WITNESSES = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a figure of a lower rung orders plans of like latency as training does: Kendall's tau over the pairs."""

    signal: str
    tau: float
    n_pairs: int

    @property
    def may_stop(self) -> bool:
        """Whether it has earned the power to stop plans."""
        return self.n_pairs >= MIN_PAIRS and self.tau >= MIN_AGREEMENT

    def __str__(self) -> str:
        if self.n_pairs == 0:
            return f"{SIGNALS[self.signal]}: no two plans of like latency yet"
        power = "may stop plans" if self.may_stop else "stops nothing"
        return f"{SIGNALS[self.signal]}: {self.tau:.2f} over {self.n_pairs} pairs, {power}"


def rank_agreement(signals: Floats, drops: Floats, latencies: Floats, band: float = LATENCY_BAND) -> tuple[float, int]:
    """Kendall's tau of signals and drops over the pairs of like latency, and how many pairs there were.

    All are (n_trials,). Pairs that tie in either count as neither agreeing nor disagreeing.
    """
    first, second = np.triu_indices(len(signals), k=1)
    alike = np.abs(latencies[first] - latencies[second]) <= band * np.maximum(latencies[first], latencies[second])
    first, second = first[alike], second[alike]
    if len(first) == 0:
        return 0.0, 0
    signs = np.sign(signals[first] - signals[second]) * np.sign(drops[first] - drops[second])
    return float(signs.mean()), len(first)


def agreements(trained: Sequence[Evaluation]) -> list[Agreement]:
    """Each rung's agreement with the fine-tuned drops of these evaluations."""
    return [_agreement(signal, _judged(signal, trained)) for signal in SIGNALS]


def least_drop(signal: str, value: float, trained: Sequence[Evaluation]) -> float:
    """The smallest drop, by the lower ends of intervals, that came of no smaller a figure.

    Minus infinity where too few trials bear witness.
    """
    lows = [e.drop_low for e in _judged(signal, trained) if getattr(e, signal) >= value]
    known = [low for low in lows if low is not None]
    return min(known) if len(known) >= MIN_WITNESSES else float("-inf")


def beaten_by(figures: Mapping[str, Any], trained: Mapping[int, Evaluation], front: Sequence[int]) -> str | None:
    """Why a plan of these figures is not worth training, naming the trial that beats it; None where it may be.

    `trained` are the study's complete evaluations by trial, `front` the trials on the front. The front member must
    be no slower and no larger beyond noise, and its drop must lie below the least that can come of this plan.
    """
    evaluations = list(trained.values())
    for signal in SIGNALS:
        value = figures.get(signal)
        if value is None:
            continue
        agreement = _agreement(signal, _judged(signal, evaluations))
        if not agreement.may_stop:
            continue
        least = least_drop(signal, value, evaluations)
        winner = next((number for number in front if _beats(trained[number], figures, least)), None)
        if winner is not None:
            return (
                f"trial {winner} is faster, smaller and more accurate than its {SIGNALS[signal]} allows "
                f"(rank agreement {agreement.tau:.2f})"
            )
    return None


def _judged(signal: str, trained: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations that bear witness for a signal."""
    return [e for e in trained if getattr(e, signal) is not None and e.drop_low is not None]


def _agreement(signal: str, judged: Sequence[Evaluation]) -> Agreement:
    def column(name: str) -> Floats:
        return np.array([getattr(evaluation, name) for evaluation in judged], dtype=np.float64)

    tau, n_pairs = rank_agreement(column(signal), column("accuracy_drop"), column("latency_ratio"))
    return Agreement(signal=signal, tau=tau, n_pairs=n_pairs)


def _beats(member: Evaluation, figures: Mapping[str, Any], least: float) -> bool:
    """Whether a front member is no slower and no larger, and surely more accurate than this."""
    no_slower = member.ratio_high <= figures["ratio_low"]
    no_larger = member.bytes_ratio <= figures["bytes_ratio"]
    return no_slower and no_larger and member.drop_high is not None and member.drop_high < least
