"""The samplers by name: their random numbers come from the seed and the trial's number."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.price_sampler import N_SEED_PRICES, PriceSampler
from ranksearch.optimization.rule_sampler import ORDERS, RuleSampler
from ranksearch.optimization.rules import NEED_WEIGHT_ERRORS
from ranksearch.optimization.weight_errors import WeightErrors
from ranksearch.spec import Objective

# With fewer parents than the first, crossover has nothing to mix; with more than the second, a study of a hundred
# trials would see two generations.
POPULATION_SIZES = (12, 50)


@final
class SeededNSGAII(BaseSampler):
    """NSGA-II to which enqueued trials belong.

    Optuna's own writes a trial's generation only when it samples, which it never does for a trial whose parameters
    are all given, so enqueued plans would never become parents. Here every trial gets its generation at its start.
    """

    def __init__(self, seed: int, population_size: int) -> None:
        self.nsga2 = NSGAIISampler(seed=seed, population_size=population_size)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Writes the trial's generation into the study."""
        self.nsga2.before_trial(study, trial)
        self.nsga2.get_trial_generation(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What NSGA-II samples jointly."""
        return self.nsga2.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A child of the parents."""
        return self.nsga2.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value: mutation, or the first generation."""
        return self.nsga2.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """NSGA-II's own book-keeping."""
        self.nsga2.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """New random numbers."""
        self.nsga2.reseed_rng()


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSetting:
    """What a sampler may know of a study: its table, what it is to minimise and within which limits, and its seed.

    `drop_unit` is a drop that would be too much; `weight_errors` measures the weights, for rules that go by them.
    """

    profile: Profile
    objectives: Sequence[Objective]
    limits: ResolvedLimits
    seed: int
    drop_unit: float
    weight_errors: Callable[[], WeightErrors]


# The sampler for the next trial: given how many trials there are, and how many plans the study begins with.
NextSampler = Callable[[int, int], BaseSampler]


def _price(setting: SamplerSetting) -> NextSampler:
    sampler = PriceSampler(
        setting.profile, setting.limits, setting.objectives, setting.seed, drop_unit=setting.drop_unit
    )
    return lambda _n_trials, _n_seeds: sampler


def _tpe(setting: SamplerSetting) -> NextSampler:
    # With several objectives multivariate is not the default; with one process there are no running trials to avoid.
    return lambda n_trials, _n_seeds: TPESampler(
        seed=derived_seed(setting.seed, n_trials), multivariate=True, constant_liar=False
    )


def _nsga2(setting: SamplerSetting) -> NextSampler:
    low, high = POPULATION_SIZES
    return lambda n_trials, n_seeds: SeededNSGAII(
        derived_seed(setting.seed, n_trials), population_size=min(max(n_seeds, low), high)
    )


def _random(setting: SamplerSetting) -> NextSampler:
    return lambda n_trials, _n_seeds: RandomSampler(seed=derived_seed(setting.seed, n_trials))


def _rule(rule: str, setting: SamplerSetting) -> NextSampler:
    errors = setting.weight_errors() if rule in NEED_WEIGHT_ERRORS else None
    sampler = RuleSampler(setting.profile, rule, errors, objectives=setting.objectives, seed=setting.seed)
    return lambda _n_trials, _n_seeds: sampler


SAMPLERS: dict[str, Callable[[SamplerSetting], NextSampler]] = {
    "price": _price,
    "tpe": _tpe,
    "nsga2": _nsga2,
    "random": _random,
    **{rule: partial(_rule, rule) for rule in ORDERS},
}
DEFAULT_SAMPLER = "price"


def find_sampler(name: str) -> Callable[[SamplerSetting], NextSampler]:
    """The sampler of that name, or the class that `module:Class` names, made with a seed for every trial.

    Raises StudyError where there is none.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise StudyError(
            f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}, or name one of your own as module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"sampler {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise StudyError(f"sampler {name!r} is no class of optuna.samplers.BaseSampler")
    return partial(_of_class, found)


def _of_class(found: Callable[..., BaseSampler], setting: SamplerSetting) -> NextSampler:
    return lambda n_trials, _n_seeds: found(seed=derived_seed(setting.seed, n_trials))


def make_sampler(name: str, setting: SamplerSetting) -> NextSampler:
    """The sampler of each trial: the same for the same study, its random numbers others for every trial.

    The plans that a study begins with make up NSGA-II's first generation, within bounds. Raises StudyError for a name
    that is none.
    """
    return find_sampler(name)(setting)


def default_n_prices(name: str) -> int:
    """How many prices are tried before the sampler; a published rule has nothing beside the controls."""
    return 0 if name in ORDERS else N_SEED_PRICES


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed for one purpose: equal for equal arguments, unrelated otherwise."""
    return int(np.random.SeedSequence([seed % 2**63, *numbers]).generate_state(1)[0])
