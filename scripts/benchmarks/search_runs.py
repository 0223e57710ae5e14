"""How a search is run: a sampler is asked and told as the product's loop does, with or without its ladder."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import TrialState
from search_evaluations import Evaluations, Indices
from search_subjects import Subject

from ranksearch.candidates import Profile
from ranksearch.early_stopping import StopRule
from ranksearch.optimization import DropEstimator, TrialRecord, front, trained_evaluations
from ranksearch.optimization.history_reader import sampler_attributes
from ranksearch.optimization.space import distributions, settled, to_indices, to_params
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.spec import OBJECTIVES

# A search that has asked so often for what it knows has converged.
MAX_REPEATS = 200

Plans = list[Indices]
# (evaluations, seed, number of trials) -> the distinct plans, each given when it was evaluated; dense is not among
# them. Fewer than there are trials where the method has no more.
Run = Callable[[Evaluations, int, int], Iterable[Indices]]
MakeSampler = Callable[[Evaluations, int], BaseSampler]
# (table, seed) -> the plans to try before the sampler has its say.
FirstPlans = Callable[[Profile, int], Plans]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A search by its way to run; `nested` where the first trials of a long run are those of a short one."""

    run: Run
    nested: bool = True


def sampled(
    make: MakeSampler,
    evaluations: Evaluations,
    seed: int,
    n_trials: int,
    *,
    first: FirstPlans | None = None,
    ladder: bool = False,
) -> Iterator[Indices]:
    """The plans that an Optuna sampler asks for, told to it as the product's loop does.

    Dense is no trial that counts, nor is a plan that was tried before; the sampler is told what that measured. With a
    `ladder`, plans are stopped where the product stops them, and those that were do not count.
    """
    profile = evaluations.profile
    study = _study(make(evaluations, seed))
    stopped_by = Ladder(evaluations) if ladder else None
    for indices in first(profile, seed) if first else []:
        study.enqueue_trial(to_params(profile, indices))
    numbers: dict[Indices, int] = {}
    n_given = n_repeats = 0
    while n_given < n_trials and n_repeats < MAX_REPEATS:
        trial = study.ask(distributions(profile))
        indices = settled(profile, to_indices(profile, trial.params))
        known = numbers.setdefault(indices, trial.number)
        new = known == trial.number and indices != evaluations.dense
        if new and stopped_by is not None and stopped_by.stops(indices, trial.number):
            study.tell(trial, state=TrialState.PRUNED)
            n_repeats += 1
            continue
        _tell(study, trial, evaluations, indices, known)
        n_repeats = n_repeats + 1 if known != trial.number else 0
        if new:
            n_given += 1
            yield indices


class Ladder:
    """Stops plans as the product does: by what of lower rungs agrees with training, on the trials so far."""

    def __init__(self, evaluations: Evaluations) -> None:
        self.evaluations = evaluations
        self.estimator = DropEstimator(evaluations.profile, REFERENCE_POINT[0])
        self.told = [record(evaluations, 0, evaluations.dense)]

    def stops(self, indices: Indices, number: int) -> bool:
        """Whether the plan of this trial is not trained; it is remembered where it is."""
        evaluations, profile = self.evaluations, self.evaluations.profile
        loss, latency, n_bytes = profile.predict(indices)
        figures = {"predicted_loss": loss, "ratio_low": latency, "bytes_ratio": n_bytes}
        members = [r.number for r in front(self.told, OBJECTIVES, self.estimator.drops(self.told))]
        rule = StopRule.learned(trained_evaluations(self.told), members)
        if rule.beaten_by(figures) is not None:
            return True
        quick = evaluations.quick_drop(indices)
        if rule.beaten_by({**figures, "quick_drop": quick}) is not None:
            return True
        self.told.append(record(evaluations, number, indices))
        return False


def record(evaluations: Evaluations, number: int, indices: Indices) -> TrialRecord:
    """The plan's trial in the product's words."""
    evaluation = evaluations.evaluation(indices)
    return TrialRecord(number=number, state="complete", origin="", plan=evaluation.plan, evaluation=evaluation)


def subject_of(evaluations: Evaluations) -> Subject:
    """The network itself, for what the table does not tell of it."""
    if evaluations.subject is None:
        raise ValueError("evaluations without a network tell neither its weights nor its multiply-adds")
    return evaluations.subject


def _study(sampler: BaseSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * len(OBJECTIVES), sampler=sampler)


def _tell(study: optuna.Study, trial: optuna.Trial, evaluations: Evaluations, indices: Indices, known: int) -> None:
    """Tells what the plan measured, with the attributes from which samplers and records read a study's history."""
    evaluation = evaluations.evaluation(indices)
    trial.set_user_attr("origin", "benchmark")
    trial.set_user_attr("plan", evaluation.plan.model_dump_json(by_alias=True))
    trial.set_user_attr("evaluation", evaluation.model_dump_json(by_alias=True))
    for name, value in sampler_attributes(evaluation).items():
        trial.set_user_attr(name, value)
    if known != trial.number:
        trial.set_user_attr("duplicate_of", known)
    study.tell(trial, list(evaluations.figures(indices).losses))
