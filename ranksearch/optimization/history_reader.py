"""What a study's trials teach a sampler, as arrays; each trial is read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.candidates import Profile
from ranksearch.evaluation import Evaluation
from ranksearch.optimization.drop_model import Observed
from ranksearch.optimization.space import distributions, settled
from ranksearch.optimization.table import Floats, Indices
from ranksearch.spec import Objective

# User attributes of a trial: (low, high) of its drop at 95 %, and the distance of its outputs to dense's.
DROP_INTERVAL, OUTPUT_DISTANCE = "drop_interval", "output_distance"
NORMAL_95 = 1.96
# A drop's standard deviation in units where nobody says it.
UNKNOWN_DEVIATION = 0.05


def sampler_attributes(evaluation: Evaluation) -> dict[str, object]:
    """What of an evaluation a trial says to samplers beside its values, as its user attributes."""
    attributes: dict[str, object] = {}
    if evaluation.drop_low is not None and evaluation.drop_high is not None:
        attributes[DROP_INTERVAL] = [evaluation.drop_low, evaluation.drop_high]
    if evaluation.output_distance is not None:
        attributes[OUTPUT_DISTANCE] = evaluation.output_distance
    return attributes


def drop_deviation(interval: Sequence[float] | None, drop_unit: float) -> float:
    """The standard deviation of a drop with this 95 % interval; dense's, which is sure, has one of no width."""
    if interval is None:
        return UNKNOWN_DEVIATION * drop_unit
    return abs(float(interval[1] - interval[0])) / (2 * NORMAL_95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What a study's trials say: every plan tried, those that run or wait, and those that were measured.

    `plans` (n_measured, n_layers) are in the order of `values` (n_measured, n_objectives); `observed` says what drops
    they had, where drop is an objective.
    """

    tried: frozenset[tuple[int, ...]]
    pending: Indices
    plans: Indices
    values: Floats
    observed: Observed


@final
class HistoryReader:
    """Reads the trials of a study over a profile's candidates; `drop_unit` is a drop that would be too much."""

    def __init__(self, profile: Profile, objectives: Sequence[Objective], drop_unit: float) -> None:
        self._profile, self._objectives, self._drop_unit = profile, tuple(objectives), drop_unit
        self._names = distributions(profile).keys()
        # Parameters of a trial never change once it has them.
        self._plans: dict[int, tuple[int, ...]] = {}

    def read(self, study: Study, number: int) -> Known:
        """What the trials of the study say, but for that of this number; of equal plans the first counts."""
        tried: set[tuple[int, ...]] = set()
        measured: dict[tuple[int, ...], FrozenTrial] = {}
        pending = []
        for trial in study.get_trials(deepcopy=False):
            plan = self._plan(trial)
            if plan is None or trial.number == number or trial.user_attrs.get("queued_again", False):
                continue
            tried.add(plan)
            if trial.state is TrialState.COMPLETE:
                measured.setdefault(plan, trial)
            elif not trial.state.is_finished():
                pending.append(plan)
        trials = list(measured.values())
        plans = self._as_array(list(measured))
        values = np.array([trial.values for trial in trials], dtype=np.float64).reshape(-1, len(self._objectives))
        return Known(
            tried=frozenset(tried),
            pending=self._as_array(pending),
            plans=plans,
            values=values,
            observed=self._observed(plans, values, trials),
        )

    def _observed(self, plans: Indices, values: Floats, trials: Sequence[FrozenTrial]) -> Observed:
        if "drop" not in self._objectives:
            plans, trials, drops = plans[:0], [], np.zeros(0)
        else:
            drops = values[:, self._objectives.index("drop")]
        distances = [trial.user_attrs.get(OUTPUT_DISTANCE) for trial in trials]
        return Observed(
            plans=plans,
            drops=drops,
            deviations=np.array([drop_deviation(t.user_attrs.get(DROP_INTERVAL), self._drop_unit) for t in trials]),
            distances=np.array([np.nan if distance is None else distance for distance in distances]),
        )

    def _plan(self, trial: FrozenTrial) -> tuple[int, ...] | None:
        """The trial's plan; None where it has none yet, or not one of this table."""
        if trial.number not in self._plans:
            params = trial.params or trial.system_attrs.get("fixed_params", {})
            if params.keys() != self._names:
                return None
            indices = [int(params.get(layer.name, 0)) for layer in self._profile.layers]
            self._plans[trial.number] = settled(self._profile, indices)
        return self._plans[trial.number]

    def _as_array(self, plans: Sequence[tuple[int, ...]]) -> Indices:
        return np.array(plans, dtype=np.int64).reshape(-1, len(self._profile.layers))
