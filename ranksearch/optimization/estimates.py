"""Drops as they are estimated: measured ones moved towards what all trials together say, by how noisy they are."""

from collections.abc import Mapping, Sequence
from typing import final

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
    return DropEstimator(profile, unit).drops(records)


@final
class DropEstimator:
    """Estimates the drops of a study's trials as it grows: plans are looked up once, and no history is fitted twice."""

    def __init__(self, profile: Profile, unit: float) -> None:
        self._profile, self._unit = profile, unit
        self._losses = LossTable.of(profile, uniform(profile), unit)
        self._indices: dict[int, tuple[int, ...]] = {}
        self._fitted: tuple[list[int], dict[int, float]] = ([], {})

    def drops(self, records: Sequence[TrialRecord]) -> dict[int, float]:
        """Those of the complete trials among the records, by their numbers."""
        scored = [record for record in records if record.duplicate_of is None and _drop(record) is not None]
        numbers = [record.number for record in scored]
        if self._fitted[0] != numbers:
            self._fitted = (numbers, self._estimated(scored))
        return self._fitted[1]

    def _estimated(self, scored: Sequence[TrialRecord]) -> dict[int, float]:
        if not scored:
            return {}
        for record in scored:
            if record.number not in self._indices:
                self._indices[record.number] = self._profile.indices(record.plan)
        plans = np.array([self._indices[record.number] for record in scored], dtype=np.int64)
        drops = np.array([_drop(record) for record in scored], dtype=np.float64)
        deviations = np.array([drop_deviation(_interval(record), self._unit) for record in scored])
        distances = np.array([_distance(record) for record in scored], dtype=np.float64)
        observed = Observed(plans=plans, drops=drops, deviations=deviations, distances=distances)
        estimates, _ = DropModel.fit(self._losses, observed).shrunk(plans, drops, deviations)
        return {record.number: float(drop) for record, drop in zip(scored, estimates, strict=True)}


def _drop(record: TrialRecord) -> float | None:
    """What a complete trial measured."""
    complete = record.state == "complete" and record.evaluation is not None
    return record.evaluation.accuracy_drop if complete and record.evaluation is not None else None


def _interval(record: TrialRecord) -> tuple[float, float] | None:
    evaluation = record.evaluation
    if evaluation is None or evaluation.drop_low is None or evaluation.drop_high is None:
        return None
    return evaluation.drop_low, evaluation.drop_high


def _distance(record: TrialRecord) -> float:
    distance = None if record.evaluation is None else record.evaluation.output_distance
    return np.nan if distance is None else distance
