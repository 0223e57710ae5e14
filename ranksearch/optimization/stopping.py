"""Whether a plan may be stopped before it is trained, because a front member surely beats it.

The predicted loss is given that power only where it has earned it: where, on the study's own trials, it orders plans
of like latency as their fine-tuned drops do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranksearch.evaluation import Evaluation

# Plans whose latencies differ by no more than this are alike: over a whole front any two figures agree in order.
LATENCY_BAND = 0.05
MIN_PAIRS = 20
MIN_AGREEMENT = 0.5
# So many trials of no smaller predicted loss must show how small a drop can come of it.
MIN_WITNESSES = 5

Floats = NDArray[np.float64]


def rank_agreement(
    predicted: Floats, drops: Floats, latencies: Floats, band: float = LATENCY_BAND
) -> tuple[float, int]:
    """Kendall's tau of predictions and drops over the pairs of like latency, and how many pairs there were.

    All are (n_trials,). Pairs that tie in either count as neither agreeing nor disagreeing.
    """
    first, second = np.triu_indices(len(predicted), k=1)
    alike = np.abs(latencies[first] - latencies[second]) <= band * np.maximum(latencies[first], latencies[second])
    first, second = first[alike], second[alike]
    if len(first) == 0:
        return 0.0, 0
    signs = np.sign(predicted[first] - predicted[second]) * np.sign(drops[first] - drops[second])
    return float(signs.mean()), len(first)


def least_drop(predicted_loss: float, trained: Sequence[Evaluation]) -> float:
    """The smallest drop, by the lower ends of intervals, that came of no smaller a predicted loss.

    Minus infinity where too few trials bear witness.
    """
    lows = [e.drop_low for e in trained if e.predicted_loss is not None and e.predicted_loss >= predicted_loss]
    known = [low for low in lows if low is not None]
    return min(known) if len(known) >= MIN_WITNESSES else float("-inf")


def beaten_by(figures: Mapping[str, Any], trained: Mapping[int, Evaluation], front: Sequence[int]) -> str | None:
    """Why a plan of these figures is not worth training, naming the trial that beats it; None where it may be.

    `trained` are the study's complete evaluations by trial, `front` the trials on the front. The front member must
    be no slower and no larger beyond noise, and its drop must lie below the least that can come of this plan.
    """
    predicted_loss = figures.get("predicted_loss")
    judged = [e for e in trained.values() if e.predicted_loss is not None and e.drop_low is not None]
    if predicted_loss is None or len(judged) < MIN_WITNESSES:
        return None
    agreement, n_pairs = rank_agreement(
        np.array([e.predicted_loss for e in judged], dtype=np.float64),
        np.array([e.accuracy_drop for e in judged], dtype=np.float64),
        np.array([e.latency_ratio for e in judged], dtype=np.float64),
    )
    if n_pairs < MIN_PAIRS or agreement < MIN_AGREEMENT:
        return None
    least = least_drop(predicted_loss, judged)
    for number in front:
        member = trained[number]
        no_slower = member.ratio_high <= figures["ratio_low"]
        no_larger = member.bytes_ratio <= figures["bytes_ratio"]
        if no_slower and no_larger and member.drop_high is not None and member.drop_high < least:
            return f"trial {number} is faster, smaller and more accurate (rank agreement {agreement:.2f})"
    return None
