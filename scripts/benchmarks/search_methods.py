"""The searches that are compared. Each gives the plans that it evaluates, in order, each once."""

import importlib
import warnings
from argparse import ArgumentTypeError
from collections.abc import Mapping
from functools import partial

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from search_ablations import ABLATIONS, controls
from search_evaluations import Evaluations
from search_runs import Method, Plans, sampled, subject_of

from ranksearch.candidates import Profile
from ranksearch.optimization.prices import price_sweep, uniform
from ranksearch.optimization.rule_sampler import RuleSampler
from ranksearch.optimization.rules import NEED_WEIGHT_ERRORS
from ranksearch.optimization.samplers import SeededNSGAII
from ranksearch.optimization.seeds import make_seeds
from ranksearch.spec import OBJECTIVES

# So many prices of the sweep are tried before a seeded search has its say.
N_SEEDED = 6
# A uniform plan's share of the undecomposed layer at its best, in any bits: dense in float32 takes four times the
# bytes of that in 8.
UNIFORM_SHARES, N_UNIFORM_TRIED = (4.0, 0.02), 2000


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
    return [planned.indices for planned in make_seeds(profile, controls(profile), N_SEEDED, seed, OBJECTIVES)]


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
    **{name: Method(run=partial(sampled, make)) for name, make in ABLATIONS.items()},
    LADDER: Method(run=partial(sampled, ABLATIONS["PriceSampler"], ladder=True)),
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
