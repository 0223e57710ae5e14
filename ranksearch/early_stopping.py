"""Whether a plan may be stopped before it is trained, because a front member surely beats it.

What a lower rung of the ladder says of a plan is given that power only where it has earned it: where, on the study's
own trials, it orders plans of like latency as their fine-tuned drops do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ranksearch.evaluation import Evaluation

# What lower rungs say, by the column of an evaluation, the cheapest first.
SIGNALS = {"predicted_loss": "predicted loss", "quick_drop": "drop before training"}
# Plans whose latencies differ by no more than this are alike: over a whole front any two figures agree in order.
LATENCY_BAND = 0.05
MIN_PAIRS = 20
# As pairs these are half a million.
MOST_JUDGED = 1000
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
    """Each rung's agreement with the fine-tuned drops of these evaluations, the latest thousand."""
    trained = trained[-MOST_JUDGED:]
    return [_agreement(signal, _judged(signal, trained)) for signal in SIGNALS]


class Witnesses(BaseModel):
    """What the trained plans say of one signal: how small a drop came of no smaller a figure.

    `figures` fall, and `least_drops` are the smallest lower ends of drops among the plans down to each of them; the
    first figure is that of the fifth plan, since fewer bear no witness.
    """

    model_config = ConfigDict(frozen=True)

    tau: float
    figures: tuple[float, ...]
    least_drops: tuple[float, ...]

    @classmethod
    def of(cls, signal: str, judged: Sequence[Evaluation], tau: float = 1.0) -> Self:
        """Those of these evaluations."""
        known = sorted(((getattr(e, signal), e.drop_low) for e in judged if e.drop_low is not None), reverse=True)
        least = list(accumulate((low for _, low in known), min))[MIN_WITNESSES - 1 :]
        figures = [figure for figure, _ in known[MIN_WITNESSES - 1 :]]
        # Only where the least drop falls does a figure tell more than the one before.
        steps = [i for i, drop in enumerate(least) if i == 0 or drop < least[i - 1]]
        return cls(tau=tau, figures=tuple(figures[i] for i in steps), least_drops=tuple(least[i] for i in steps))

    def least_drop(self, figure: float) -> float:
        """The smallest drop that came of no smaller a figure; minus infinity where too few plans bear witness."""
        reached = [drop for known, drop in zip(self.figures, self.least_drops, strict=True) if known >= figure]
        return reached[-1] if reached else float("-inf")


class Member(BaseModel):
    """A plan on the front: the worse ends of its figures."""

    model_config = ConfigDict(frozen=True)

    trial: int
    ratio_high: float
    bytes_ratio: float
    drop_high: float


class StopRule(BaseModel):
    """Which plans are not worth training, by the trials so far; a value that workers can be sent.

    `witnesses` are those of the signals that have earned the power to stop plans, `members` the front.
    """

    model_config = ConfigDict(frozen=True)

    witnesses: dict[str, Witnesses] = Field(default_factory=dict)
    members: tuple[Member, ...] = ()

    @classmethod
    def learned(cls, trained: Mapping[int, Evaluation], front: Sequence[int]) -> Self:
        """The rule out of the study's complete evaluations by trial, and the trials on the front."""
        evaluations = list(trained.values())
        members = [number for number in front if trained[number].drop_high is not None]
        earned = [agreement for agreement in agreements(evaluations) if agreement.may_stop]
        return cls(
            witnesses={a.signal: Witnesses.of(a.signal, _judged(a.signal, evaluations), a.tau) for a in earned},
            members=tuple(_member(number, trained[number]) for number in members),
        )

    def beaten_by(self, figures: Mapping[str, Any]) -> str | None:
        """Why a plan of these figures is not worth training, naming the trial that beats it; None where it may be.

        The front member must be no slower and no larger beyond noise, and its drop must lie below the least that can
        come of this plan.
        """
        for signal, witnesses in self.witnesses.items():
            if figures.get(signal) is None:
                continue
            least = witnesses.least_drop(figures[signal])
            winner = next((member.trial for member in self.members if _beats(member, figures, least)), None)
            if winner is not None:
                return (
                    f"trial {winner} is faster, smaller and more accurate than its {SIGNALS[signal]} allows "
                    f"(rank agreement {witnesses.tau:.2f})"
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


def _member(number: int, evaluation: Evaluation) -> Member:
    assert evaluation.drop_high is not None, "only those with a drop are asked for"
    return Member(
        trial=number,
        ratio_high=evaluation.ratio_high,
        bytes_ratio=evaluation.bytes_ratio,
        drop_high=evaluation.drop_high,
    )


def _beats(member: Member, figures: Mapping[str, Any], least: float) -> bool:
    """Whether a front member is no slower and no larger, and surely more accurate than this."""
    no_slower = member.ratio_high <= figures["ratio_low"]
    no_larger = member.bytes_ratio <= figures["bytes_ratio"]
    return no_slower and no_larger and member.drop_high < least
