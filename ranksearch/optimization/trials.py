"""One trial: asked for, given to the executor, and told, whatever becomes of it."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ranksearch.candidates import Profile
from ranksearch.early_stopping import StopRule
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors import AbstractExecutor, Job, Outcome
from ranksearch.ladder import Terms
from ranksearch.optimization.coordination import Coordination
from ranksearch.optimization.history_reader import sampler_attributes
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.records import History, TrialRecord, objective_values, record_of
from ranksearch.optimization.samplers import NextSampler
from ranksearch.optimization.seeds import Seed, requeue
from ranksearch.optimization.space import distributions, settled, to_indices
from ranksearch.plan import Plan
from ranksearch.spec import Objective

INTERRUPTED = "interrupted"
DECIDING = ("accuracy_drop", "drop_low", "drop_high", "latency_ratio", "bytes_ratio")


class Callbacks(Protocol):
    """Who is told of trials; duplicates are not told, they were not run."""

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        """Before the evaluation; gives the id of the tracking run, if any, which the trial keeps."""

    def trial_finished(self, record: TrialRecord) -> None:
        """After a complete or pruned trial was stored."""

    def trial_seen(self, record: TrialRecord) -> None:
        """When another coordinator is seen to have told a trial."""

    def trial_failed(self, record: TrialRecord) -> None:
        """After a failed or interrupted trial was stored, also one that an earlier process left unfinished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What one call of `optimise` works with."""

    study: Study
    coordination: Coordination
    profile: Profile
    executor: AbstractExecutor
    objectives: Sequence[Objective]
    limits: ResolvedLimits
    sampler_name: str
    next_sampler: NextSampler
    seed: int
    n_trials: int
    deadline: float | None
    clock: Callable[[], float]
    seconds_to_end: Callable[[], float]
    callbacks: Callbacks
    stop_rule: Callable[[], StopRule]
    should_stop: Callable[[], bool]
    seeds: Sequence[Seed]
    history: History


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial that was asked for and has no outcome yet, and its plan."""

    trial: Trial
    plan: Plan

    @property
    def control(self) -> bool:
        """Whether it does not count among the study's trials."""
        return bool(self.trial.user_attrs.get("control", False))


def ask_next(search: Search) -> Asked | None:
    """Asks for a trial; None where it had no plan of this table, and was told so."""
    trial = _ask(search)
    search.coordination.took(trial)
    try:
        indices = settled(search.profile, to_indices(search.profile, trial.params))
    except StudyError as error:
        trial.set_user_attr("reason", str(error))
        search.study.tell(trial, state=TrialState.FAIL)
        search.coordination.ended(trial.number)
        return None
    plan = search.profile.plan(indices)
    if "origin" not in trial.user_attrs:
        # Plans may be enqueued by hand, from a notebook or a dashboard.
        by_hand = "fixed_params" in _stored(search, trial).system_attrs
        trial.set_user_attr("origin", "enqueued" if by_hand else search.sampler_name)
    trial.set_user_attr("plan", plan.model_dump_json(by_alias=True))
    return Asked(trial, plan)


def _ask(search: Search) -> Trial:
    """The next trial, its sampler made for it."""
    trials = search.study.get_trials(deepcopy=False)
    seeds = [trial for trial in trials if "seed" in trial.user_attrs and trial.state.is_finished()]
    n_complete = sum(trial.state is TrialState.COMPLETE for trial in seeds)
    all_tried = len({trial.user_attrs["seed"] for trial in seeds}) == len(search.seeds)
    # Until the last seed is in, the first generation must hold them all; then, those that became complete.
    n_seeds = n_complete if all_tried else len(search.seeds)
    search.study.sampler = search.next_sampler(len(trials), n_seeds)
    with warnings.catch_warnings():
        # We renew them ourselves.
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
        return search.study.ask(distributions(search.profile))


def start(search: Search, asked: Asked) -> None:
    """Gives the trial's plan to the executor."""
    trial, plan = asked.trial, asked.plan
    run_id = search.callbacks.trial_started(trial.number, plan, trial.user_attrs["origin"])
    if run_id is not None:
        trial.set_user_attr("run_id", run_id)
    terms = Terms(
        predicted_loss=search.profile.predict(search.profile.indices(plan))[0],
        may_stop=not asked.control,
        rule=StopRule() if asked.control else search.stop_rule(),
    )
    search.executor.submit(Job(number=trial.number, plan=plan, terms=terms))


def settle(search: Search, trial: Trial, outcome: Outcome) -> TrialRecord:
    """Tells what came of the trial's evaluation, unless its lease expired and another queued its plan again."""
    try:
        return _settled(search, trial, outcome)
    except UpdateFinishedTrialError:
        search.coordination.ended(trial.number)
        record = record_of(_stored(search, trial), queued_again=True)
        search.callbacks.trial_failed(record)
        return record


def _settled(search: Search, trial: Trial, outcome: Outcome) -> TrialRecord:
    # What fails once a run shall stop may fail because of that.
    if outcome.interrupted or (outcome.reason is not None and search.should_stop()):
        return interrupt(search, trial, outcome.reason if outcome.interrupted else None)
    if outcome.evaluation is None:
        return _fail(search, trial, outcome.reason or "no evaluation came of it")
    trial.set_user_attr("seconds", outcome.seconds)
    wrong = _not_finite(outcome.evaluation)
    return _fail(search, trial, wrong) if wrong else _finish(search, trial, outcome.evaluation)


def _finish(search: Search, trial: Trial, evaluation: Evaluation) -> TrialRecord:
    """Tells what was measured: COMPLETE, or PRUNED where the plan was stopped on the ladder."""
    for name, value in sampler_attributes(evaluation).items():
        trial.set_user_attr(name, value)
    trial.set_user_attr("evaluation", evaluation.model_dump_json(by_alias=True))
    stopped = evaluation.stopped is not None or evaluation.rung == "latency" or evaluation.accuracy_drop is None
    record = _tell(search, trial, evaluation, TrialState.PRUNED if stopped else TrialState.COMPLETE)
    search.callbacks.trial_finished(record)
    return record


def _fail(search: Search, trial: Trial, reason: str) -> TrialRecord:
    """Tells that the plan failed, and why."""
    trial.set_user_attr("reason", reason)
    record = _tell(search, trial, None, TrialState.FAIL)
    search.callbacks.trial_failed(record)
    return record


def interrupt(search: Search, trial: Trial, reason: str | None = None) -> TrialRecord:
    """Fails the trial and queues its plan again; as it was no fault of the plan, it is not held against it."""
    stored = _stored(search, trial)
    requeue(search.study, stored, stored.user_attrs.get("attempt", 1))
    trial.set_user_attr("queued_again", True)
    return _fail(search, trial, reason or INTERRUPTED)


def tell_duplicate(search: Search, trial: Trial, known: TrialRecord) -> TrialRecord:
    """Tells the stored values of the trial that ran this plan."""
    trial.set_user_attr("duplicate_of", known.number)
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(known.state, TrialState.FAIL)
    if state is TrialState.FAIL:
        trial.set_user_attr("reason", f"duplicate of trial {known.number}, which failed")
    return _tell(search, trial, known.evaluation, state)


def _tell(search: Search, trial: Trial, evaluation: Evaluation | None, state: TrialState) -> TrialRecord:
    """Tells state, values and constraints; the trial as it is stored."""
    violations = {} if evaluation is None else search.limits.violations(evaluation)
    for name, value in violations.items():
        trial.set_constraint(name, value)
    complete = evaluation is not None and state is TrialState.COMPLETE
    values = objective_values(evaluation, search.objectives) if evaluation is not None and complete else None
    told = search.study.tell(trial, values, state=state)
    search.coordination.ended(trial.number)
    return record_of(told)


def _stored(search: Search, trial: Trial) -> FrozenTrial:
    """The running trial as it is in storage."""
    return search.study.get_trials(deepcopy=False)[trial.number]


def _not_finite(evaluation: Evaluation) -> str | None:
    """Which deciding figure is no number, as the reason of a failure."""
    figures = {name: getattr(evaluation, name) for name in DECIDING}
    wrong = [f"{name} is {value}" for name, value in figures.items() if value is not None and not math.isfinite(value)]
    return "the evaluation is not finite: " + ", ".join(wrong) if wrong else None
