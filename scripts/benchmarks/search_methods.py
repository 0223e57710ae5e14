"""The searches that are compared. Each gives the plans that it evaluates, in order, each once."""

import importlib
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from search_evaluations import Evaluations, Indices
from search_subjects import Subject

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.latency_model import LatencyModel
from ranksearch.optimization import DropEstimator, TrialRecord, beaten_by, front, trained_evaluations
from ranksearch.optimization.history_reader import sampler_attributes
from ranksearch.optimization.price_sampler import PriceSampler
from ranksearch.optimization.prices import price_sweep, uniform
from ranksearch.optimization.rule_sampler import RuleSampler
from ranksearch.optimization.rules import NEED_WEIGHT_ERRORS
from ranksearch.optimization.samplers import SeededNSGAII
from ranksearch.optimization.seeds import make_seeds
from ranksearch.optimization.space import distributions, settled, to_indices, to_params
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.spec import OBJECTIVES

# A search that has asked so often for what it knows has converged.
MAX_REPEATS = 200
# So many prices of the sweep are tried before a seeded search has its say.
N_SEEDED = 6
# A uniform plan's share of the undecomposed layer at its best, in any bits: dense in float32 takes four times the
# bytes of that in 8.
UNIFORM_SHARES, N_UNIFORM_TRIED = (4.0, 0.02), 2000

Plans = list[Indices]
# (evaluations, seed, number of trials) -> the distinct plans, each given when it was evaluated; dense is not among
# them. Fewer than there are trials where the method has no more.
Run = Callable[[Evaluations, int, int], Iterable[Indices]]
MakeSampler = Callable[[Evaluations, int], BaseSampler]
# (table, seed) -> the plans to try before the sampler has its say.
FirstPlans = Callable[[Profile, int], Plans]
# The table as an ablation sees it.
See = Callable[[Evaluations], Profile]


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
        trained = trained_evaluations(self.told)
        members = [r.number for r in front(self.told, OBJECTIVES, self.estimator.drops(self.told))]
        if beaten_by(figures, trained, members) is not None:
            return True
        quick = evaluations.quick_drop(indices)
        if beaten_by({**figures, "quick_drop": quick}, trained, members) is not None:
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


def prices(evaluations: Evaluations, seed: int, n_trials: int) -> Plans:
    """The price sweep of as many plans as there are trials, and no search."""
    # Dense is the sweep's first, and known.
    swept = price_sweep(evaluations.profile, n_trials + 1, seed, OBJECTIVES)
    return [indices for indices in swept if indices != evaluations.dense][:n_trials]


def uniform_sweep(evaluations: Evaluations, _seed: int, n_trials: int) -> Plans:
    """Uniform plans of evenly spread shares, as many as there are trials where there are as many."""
    shares = np.geomspace(*UNIFORM_SHARES, N_UNIFORM_TRIED)
    found = dict.fromkeys(uniform(evaluations.profile, share) for share in shares)
    plans = [indices for indices in found if indices != evaluations.dense]
    if len(plans) <= n_trials:
        return plans
    return [plans[round(place)] for place in np.linspace(0, len(plans) - 1, n_trials)]


def seeds(profile: Profile, seed: int) -> Plans:
    """What a study begins with: dense, all layers at 8 bits, a uniform plan, and prices from coarse to fine."""
    return [planned.indices for planned in make_seeds(profile, _controls(profile), N_SEEDED, seed, OBJECTIVES)]


def _controls(profile: Profile) -> Sequence[tuple[str, Plan]]:
    in_8_bits = LayerChoice(weight_bits=8, activation_bits=8)
    offered = {layer.name: [c.choice for c in layer.candidates] for layer in profile.layers}
    int8 = {name: in_8_bits if in_8_bits in choices else DENSE for name, choices in offered.items()}
    return [("control: dense", Plan(layers=dict.fromkeys(offered, DENSE))), ("control: 8 bits", Plan(layers=int8))]


def _random(_evaluations: Evaluations, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _nsga2(population_size: int, _evaluations: Evaluations, seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=population_size)


def _tpe(_evaluations: Evaluations, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True)


def _seeded_nsga2(_evaluations: Evaluations, seed: int) -> BaseSampler:
    return SeededNSGAII(seed, population_size=20)


def _rule(rule: str, evaluations: Evaluations, seed: int) -> BaseSampler:
    """A published rule, which has no other plans than its own."""
    errors = subject_of(evaluations).weight_errors if rule in NEED_WEIGHT_ERRORS else None
    return RuleSampler(evaluations.profile, rule, errors, objectives=OBJECTIVES, seed=seed)


def _price(changes: Mapping[str, object], see: See, evaluations: Evaluations, seed: int) -> BaseSampler:
    """PriceSampler, its constants changed, on a table as it is made to see it."""
    profile = evaluations.profile
    controls = [profile.indices(plan) for _, plan in _controls(profile)]
    return Changed(PriceSampler(see(evaluations), objectives=OBJECTIVES, seed=seed, controls=controls), changes)


def _unseeded(evaluations: Evaluations, seed: int) -> BaseSampler:
    """PriceSampler without the uniform plan among its first."""
    profile = evaluations.profile
    sampler = PriceSampler(profile, objectives=OBJECTIVES, seed=seed)
    shares = settled(profile, uniform(profile))
    sampler._seeds = [profile.indices(plan) for _, plan in _controls(profile)] + [
        plan for plan in sampler._seeds if plan != shares
    ]
    return sampler


class Changed(BaseSampler):
    """A sampler that samples with other constants than its own."""

    def __init__(self, sampler: PriceSampler, changes: Mapping[str, object]) -> None:
        self.sampler, self.changes = sampler, changes

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with ExitStack() as stack:
            for target, value in self.changes.items():
                stack.enter_context(mock.patch(f"ranksearch.optimization.{target}", value))
            return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def _as_it_is(evaluations: Evaluations) -> Profile:
    return evaluations.profile


def _by_macs(evaluations: Evaluations) -> Profile:
    """A table whose latencies are multiply-adds, for which dense takes as long as it does."""
    profile, macs = evaluations.profile, subject_of(evaluations).macs
    each = profile.dense_latency_ms / sum(of[layer.dense] for layer, of in zip(profile.layers, macs, strict=True))

    def counted(layer: LayerProfile, of: Sequence[float]) -> LayerProfile:
        pairs = zip(layer.candidates, of, strict=True)
        return layer.model_copy(
            update={"candidates": tuple(c.model_copy(update={"latency_ms": each * n}) for c, n in pairs)}
        )

    layers = tuple(counted(layer, of) for layer, of in zip(profile.layers, macs, strict=True))
    return profile.model_copy(update={"layers": layers, "latency_model": LatencyModel()})


def _by_size_alone(evaluations: Evaluations) -> Profile:
    """A table without predictions: what a candidate loses is the share of the layer's bytes that it saves."""
    profile = evaluations.profile

    def blind(layer: LayerProfile) -> LayerProfile:
        most = max(c.n_bytes for c in layer.candidates)
        losses = [1 - c.n_bytes / most for c in layer.candidates]
        return layer.model_copy(
            update={
                "candidates": tuple(
                    c.model_copy(update={"loss": loss, "rounding_loss": 0.0})
                    for c, loss in zip(layer.candidates, losses, strict=True)
                )
            }
        )

    return profile.model_copy(update={"layers": tuple(blind(layer) for layer in profile.layers)})


# What PriceSampler is without a part of it.
ABLATIONS: Mapping[str, tuple[Mapping[str, object], See]] = {
    "PriceSampler": ({}, _as_it_is),
    "no refit": ({"drop_model.LAYER_SPREAD": 1e-3, "drop_model.METHOD_SPREAD": 1e-3}, _as_it_is),
    "no swaps": ({"price_sampler.SWAP_TURN": 1 << 62}, _as_it_is),
    "no power means": ({"drop_model.POWERS": (1.0,)}, _as_it_is),
    "no closed form": ({}, _by_size_alone),
    "no latency": ({}, _by_macs),
}
LADDER = "with ladder"
PUBLISHED = ("uniform", "energy", "evbmf", "alds", "greedy")

METHODS: Mapping[str, Method] = {
    "random": Method(run=partial(sampled, _random)),
    "NSGA-II 20": Method(run=partial(sampled, partial(_nsga2, 20))),
    "NSGA-II 50": Method(run=partial(sampled, partial(_nsga2, 50))),
    "TPE": Method(run=partial(sampled, _tpe)),
    "uniform sweep": Method(run=uniform_sweep, nested=False),
    **{rule: Method(run=partial(sampled, partial(_rule, rule))) for rule in PUBLISHED},
    "price sweep": Method(run=prices, nested=False),
    "seeded NSGA-II": Method(run=partial(sampled, _seeded_nsga2, first=seeds)),
    "seeded TPE": Method(run=partial(sampled, _tpe, first=seeds)),
    **{name: Method(run=partial(sampled, partial(_price, *parts))) for name, parts in ABLATIONS.items()},
    "no equal shares": Method(run=partial(sampled, _unseeded)),
    LADDER: Method(run=partial(sampled, partial(_price, {}, _as_it_is), ladder=True)),
}


def find_method(name: str) -> tuple[str, Method]:
    """The method of that name, or an Optuna sampler that `module:Class` names.

    Raises ArgumentTypeError for neither, so that a parser can tell.
    """
    if name in METHODS:
        return name, METHODS[name]
    if ":" not in name:
        raise ArgumentTypeError(
            f"method {name!r} is none of {', '.join(METHODS)}; a sampler of your own is module:Class"
        )
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentTypeError(f"method {name!r} cannot be imported: {error}") from None
    return name, Method(run=partial(sampled, lambda _evaluations, seed: found(seed=seed)))


def suiting(evaluations: Evaluations) -> Mapping[str, Method]:
    """The methods that these evaluations allow."""
    apart = {LADDER} if evaluations.rung == "quick" else set()
    if evaluations.subject is None:
        apart |= {"no latency", *(rule for rule in PUBLISHED if rule in NEED_WEIGHT_ERRORS)}
    return {name: method for name, method in METHODS.items() if name not in apart}
