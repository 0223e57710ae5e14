"""Trials as values: what each was, and what became of it; read from the Optuna study, which is the only state."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.pareto import non_dominated
from ranksearch.plan import LayerChoice, Plan
from ranksearch.reading import shown
from ranksearch.spec import Objective

State = Literal["complete", "pruned", "failed", "running"]

STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
DIED = "the process ended during this trial"

_Figure = Annotated[float, Field(ge=-1e30, le=1e30)]
_Positive = Annotated[float, Field(gt=0, le=1e30)]
_Count = Annotated[int, Field(ge=0, le=2**62)]

# The one of each kind that plans share.
_CHOICES: dict[LayerChoice, LayerChoice] = {}


class _Attributes(BaseModel):
    """What is read of a trial's user attributes."""

    model_config = ConfigDict(frozen=True, strict=True)

    plan: str
    origin: str = "enqueued"
    control: bool = False
    evaluation: str | None = None
    reason: str | None = None
    run_id: str | None = None
    duplicate_of: int | None = None
    queued_again: bool = False
    seconds: float | None = None


class _Deciding(BaseModel):
    """The figures of an evaluation that are computed with."""

    accuracy: _Figure | None
    accuracy_drop: _Figure | None
    drop_low: _Figure | None
    drop_high: _Figure | None
    latency_ms: _Positive
    latency_p95_ms: _Positive
    latency_ratio: _Positive
    ratio_low: _Figure
    ratio_high: _Figure
    model_bytes: _Count
    bytes_ratio: _Positive
    n_params: _Count
    macs: _Count


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial that was started.

    `origin` is the control's, `uniform`, `prices`, `neighbour` or the sampler's name. A failed trial has a `reason`;
    `queued_again` says that its plan is to be tried once more. A duplicate was not run: it has no evaluation of its
    own and names the trial that has. `seconds` is what the evaluation took.
    """

    number: int
    state: State
    origin: str
    plan: Plan
    control: bool = False
    evaluation: Evaluation | None = None
    reason: str | None = None
    run_id: str | None = None
    duplicate_of: int | None = None
    queued_again: bool = False
    seconds: float | None = None

    @cached_property
    def plan_hash(self) -> str:
        """The plan's hash: of hundreds of layers it takes milliseconds, and is asked for after every trial."""
        return self.plan.hash()

    @cached_property
    def plan_summary(self) -> str:
        """The plan's summary, for the same reason."""
        return self.plan.summary()

    @property
    def counted(self) -> bool:
        """Whether it counts among a study's trials: finished, run, and no control."""
        return self.state in ("complete", "pruned") and self.duplicate_of is None and not self.control


def read_records(optuna_study: Study, without: Collection[int] = ()) -> list[TrialRecord]:
    """Every trial that was started, in order, but for these numbers. Raises StudyError for one that cannot be read."""
    trials = optuna_study.get_trials(deepcopy=False)
    # A list: of a damaged trial it may be anything.
    retried = [trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs]
    started = [trial for trial in trials if trial.state in STATES and "plan" in trial.user_attrs]
    started = [trial for trial in started if trial.number not in without]
    return [record_of(trial, queued_again=trial.number in retried) for trial in started]


def record_of(trial: FrozenTrial, queued_again: bool = False) -> TrialRecord:
    """The trial as a value. Raises StudyError where its attributes cannot be read."""
    try:
        attributes = _Attributes.model_validate(trial.user_attrs)
        plan = _light(Plan.from_json(attributes.plan, source=f"trial {trial.number}"))
        evaluation = None if attributes.evaluation is None else _sound(attributes.evaluation)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise StudyError(f"trial {trial.number} is damaged: {shown(place)}: {problem['msg']}") from None
    if evaluation is not None and evaluation.plan == plan:
        evaluation = evaluation.model_copy(update={"plan": plan})
    return TrialRecord(
        number=trial.number,
        state=STATES[trial.state],
        origin=attributes.origin,
        plan=plan,
        control=attributes.control,
        evaluation=evaluation,
        reason=attributes.reason or (DIED if trial.state is TrialState.FAIL else None),
        run_id=attributes.run_id,
        duplicate_of=attributes.duplicate_of,
        queued_again=queued_again or attributes.queued_again,
        seconds=attributes.seconds,
    )


def trained_evaluations(records: Sequence[TrialRecord]) -> dict[int, Evaluation]:
    """What complete trials measured, by their numbers."""
    return {r.number: r.evaluation for r in records if r.state == "complete" and r.evaluation is not None}


def front(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], drops: Mapping[int, float] | None = None
) -> list[TrialRecord]:
    """The complete trials that no other complete trial beats in the objectives, in order; of equals the first.

    `drops`, by trial, take the place of those that were measured.
    """
    complete = [r for r in records if r.state == "complete" and r.evaluation is not None and r.duplicate_of is None]
    if not complete:
        return []
    losses = np.array([_losses(record, objectives, drops or {}) for record in complete])
    return [record for record, keep in zip(complete, non_dominated(losses), strict=True) if keep]


def objective_values(evaluation: Evaluation, objectives: Sequence[Objective]) -> list[float]:
    """The evaluation's losses in the order of the objectives, all to be minimised."""
    return [evaluation.losses[name] for name in objectives]


def _losses(record: TrialRecord, objectives: Sequence[Objective], drops: Mapping[int, float]) -> list[float]:
    assert record.evaluation is not None, "a complete trial has an evaluation"
    losses = dict(zip(objectives, objective_values(record.evaluation, objectives), strict=True))
    if "drop" in losses:
        losses["drop"] = drops.get(record.number, losses["drop"])
    return list(losses.values())


class History:
    """What a run knows of the study's trials; grows as they finish, so that storage is read once."""

    def __init__(self, known: Sequence[TrialRecord]) -> None:
        self.records: list[TrialRecord] = []
        self._by_hash: dict[str, TrialRecord] = {}
        for record in known:
            self.add(record)

    def add(self, record: TrialRecord) -> None:
        """Appends one trial."""
        self.records.append(record)
        if record.duplicate_of is None and not record.queued_again:
            self._by_hash.setdefault(record.plan_hash, record)

    def find(self, plan: Plan) -> TrialRecord | None:
        """The trial that already ran this plan, failed ones included, those queued again not."""
        return self._by_hash.get(plan.hash())

    @property
    def n_distinct(self) -> int:
        """How many different plans were tried."""
        return len(self._by_hash)

    @property
    def n_counted(self) -> int:
        """How many trials count towards the study's total."""
        return sum(record.counted for record in self.records)

    @property
    def n_repeats(self) -> int:
        """How many duplicates came last, one after the other."""
        newest_first = enumerate(reversed(self.records))
        return next((i for i, r in newest_first if r.duplicate_of is None), len(self.records))

    @property
    def mean_seconds(self) -> float:
        """The mean time of a complete trial, else of any that ran, else 0."""
        ran = [r for r in self.records if r.seconds is not None and not r.queued_again]
        timed = [r.seconds for r in ran if r.state == "complete"] or [r.seconds for r in ran]
        return float(np.mean([s for s in timed if s is not None])) if timed else 0.0


def _light(plan: Plan) -> Plan:
    """The plan, its choices those of other trials' plans: a study of many trials has but few different ones."""
    return plan.model_copy(update={"layers": {name: _CHOICES.setdefault(c, c) for name, c in plan.layers.items()}})


def _sound(text: str) -> Evaluation:
    """The evaluation. Raises ValidationError where it is damaged, or its figures are such as no plan can have."""
    evaluation = Evaluation.model_validate_json(text)
    _Deciding.model_validate(evaluation.model_dump(include=set(_Deciding.model_fields)))
    return evaluation
