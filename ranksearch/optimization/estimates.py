"""Drops as they are estimated: measured ones moved towards what all trials together say, by how noisy they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ranksearch.candidates import Profile
from ranksearch.optimization.drop_model import DropModel, Observed
from ranksearch.optimization.history_reader import drop_deviation
from ranksearch.optimization.loss_table import LossTable
from ranksearch.optimization.prices import uniform
from ranksearch.optimization.records import TrialRecord, front
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.spec import Objective

Estimates = Mapping[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FurtherDrop:
    """What a plan loses on validation data that its trial did not see, with the 95 % interval."""

    value: float
    low: float
    high: float


# By the hash of a plan.
Further = Mapping[str, FurtherDrop]
NOTHING_FURTHER: Further = {}
# So many standard deviations below its estimate a drop may well lie; and so many plans are worth telling apart.
NEAR, MOST_NEAR_TIES = 1.0, 16


def drop_unit(dense_score: float) -> float:
    """What drop is too much: a tenth of a score that is a share, else of what dense scores."""
    share = REFERENCE_POINT[0]
    return share if 0 <= dense_score <= 1 else share * abs(dense_score)


def estimated_drops(
    profile: Profile, records: Sequence[TrialRecord], unit: float, further: Further = NOTHING_FURTHER
) -> dict[int, float]:
    """By the number of each complete trial, its drop in score units, less noisy than what it measured.

    Of many plans that measure alike the luckiest looks best, and would fill a front with luck.
    """
    return DropEstimator(profile, unit).drops(records, further)


@final
class DropEstimator:
    """Estimates the drops of a study's trials as it grows: plans are looked up once, and no history is fitted twice."""

    def __init__(self, profile: Profile, unit: float) -> None:
        self.profile, self._unit = profile, unit
        self._losses = LossTable.of(profile, uniform(profile), unit)
        self._indices: dict[int, tuple[int, ...]] = {}
        self._asked: tuple[list[int], Further] = ([], {})
        self._fitted: dict[int, tuple[float, float]] = {}

    def drops(self, records: Sequence[TrialRecord], further: Further = NOTHING_FURTHER) -> dict[int, float]:
        """Those of the complete trials among the records, by their numbers; `further` validation data counts too."""
        return {number: drop for number, (drop, _) in self._known(records, further).items()}

    def deviations(self, records: Sequence[TrialRecord], further: Further = NOTHING_FURTHER) -> dict[int, float]:
        """How far off the drops may be, as standard deviations."""
        return {number: deviation for number, (_, deviation) in self._known(records, further).items()}

    def _known(self, records: Sequence[TrialRecord], further: Further) -> dict[int, tuple[float, float]]:
        scored = [record for record in records if record.duplicate_of is None and _drop(record) is not None]
        asked = [record.number for record in scored], further
        if self._asked != asked:
            self._asked, self._fitted = asked, self._estimated(scored, further)
        return self._fitted

    def _estimated(self, scored: Sequence[TrialRecord], further: Further) -> dict[int, tuple[float, float]]:
        if not scored:
            return {}
        for record in scored:
            if record.number not in self._indices:
                self._indices[record.number] = self.profile.indices(record.plan)
        plans = np.array([self._indices[record.number] for record in scored], dtype=np.int64)
        drops = np.array([_drop(record) for record in scored], dtype=np.float64)
        deviations = np.array([drop_deviation(_interval(record), self._unit) for record in scored])
        for row, record in enumerate(scored if further else []):
            if (known := further.get(record.plan_hash)) is not None:
                other = known.value, drop_deviation((known.low, known.high), self._unit)
                drops[row], deviations[row] = _together((drops[row], deviations[row]), other)
        distances = np.array([_distance(record) for record in scored], dtype=np.float64)
        observed = Observed(plans=plans, drops=drops, deviations=deviations, distances=distances)
        estimates, left = DropModel.fit(self._losses, observed).shrunk(plans, drops, deviations)
        pairs = zip(estimates.tolist(), left.tolist(), strict=True)
        return {record.number: pair for record, pair in zip(scored, pairs, strict=True)}


def near_ties(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], estimates: Estimates, deviations: Estimates
) -> list[int]:
    """The trials off the front that would be on it by a drop that they may well have, the nearest first; at most 16."""
    if "drop" not in objectives:
        return []
    members = front(records, objectives, estimates)
    on_front, others = {member.number for member in members}, [name for name in objectives if name != "drop"]
    lacking = {}
    for record in records:
        if record.number not in estimates or record.number in on_front or record.evaluation is None:
            continue
        losses = record.evaluation.losses
        rivals = [m.number for m in members if m.evaluation and _no_worse(m.evaluation.losses, losses, others)]
        if not rivals:
            continue
        best = min(rivals, key=estimates.__getitem__)
        unsure = math.hypot(deviations[record.number], deviations[best])
        lacking[record.number] = (estimates[record.number] - estimates[best]) / max(unsure, 1e-12)
    return sorted((n for n, lack in lacking.items() if lack <= NEAR), key=lacking.__getitem__)[:MOST_NEAR_TIES]


def _no_worse(losses: Mapping[str, float], other: Mapping[str, float], objectives: Sequence[str]) -> bool:
    return all(losses[name] <= other[name] for name in objectives)


def _together(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Two independent figures with their standard deviations as one, each by how sure it is."""
    weights = np.array([1 / max(deviation, 1e-12) ** 2 for _, deviation in (first, second)])
    values = np.array([first[0], second[0]])
    return float((weights * values).sum() / weights.sum()), float(weights.sum() ** -0.5)


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
