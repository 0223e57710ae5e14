"""Drops as they are estimated: measured ones moved towards what all trials together say, by how noisy they are."""

from collections.abc import Mapping, Sequence

import numpy as np

from ranksearch.candidates import Profile
from ranksearch.optimization.drop_model import DropModel, Observed
from ranksearch.optimization.history_reader import drop_deviation
from ranksearch.optimization.loss_table import LossTable
from ranksearch.optimization.prices import uniform
from ranksearch.optimization.records import TrialRecord
from ranksearch.pareto import REFERENCE_POINT

Estimates = Mapping[int, float]


def drop_unit(dense_score: float) -> float:
    """What drop is too much: a tenth of a score that is a share, else of what dense scores."""
    share = REFERENCE_POINT[0]
    return share if 0 <= dense_score <= 1 else share * abs(dense_score)


def estimated_drops(profile: Profile, records: Sequence[TrialRecord], unit: float) -> dict[int, float]:
    """By the number of each complete trial, its drop in score units, less noisy than what it measured.

    Of many plans that measure alike the luckiest looks best, and would fill a front with luck.
    """
    measured = [r for r in records if r.state == "complete" and r.duplicate_of is None and r.evaluation is not None]
    scored = [(r.number, r.plan, e) for r in measured if (e := r.evaluation) and e.accuracy_drop is not None]
    if not scored:
        return {}
    plans = np.array([profile.indices(plan) for _, plan, _ in scored], dtype=np.int64)
    drops = np.array([evaluation.accuracy_drop for _, _, evaluation in scored], dtype=np.float64)
    intervals = [None if e.drop_low is None or e.drop_high is None else (e.drop_low, e.drop_high) for _, _, e in scored]
    distances = [np.nan if e.output_distance is None else e.output_distance for _, _, e in scored]
    deviations = np.array([drop_deviation(interval, unit) for interval in intervals])
    observed = Observed(plans=plans, drops=drops, deviations=deviations, distances=np.array(distances))
    model = DropModel.fit(LossTable.of(profile, uniform(profile), unit), observed)
    estimates, _ = model.shrunk(plans, drops, deviations)
    return {number: float(drop) for (number, _, _), drop in zip(scored, estimates, strict=True)}
