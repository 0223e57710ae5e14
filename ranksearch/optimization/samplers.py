"""The samplers by name, made anew for every trial: their random numbers come from the seed and the trial's number."""

from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.errors import StudyError

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


def _tpe(seed: int, population_size: int) -> BaseSampler:
    # With several objectives multivariate is not the default; with one process there are no running trials to avoid.
    return TPESampler(seed=seed, multivariate=True, constant_liar=False)


def _random(seed: int, population_size: int) -> BaseSampler:
    return RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {"tpe": _tpe, "nsga2": SeededNSGAII, "random": _random}


def make_sampler(name: str, seed: int, n_trials_so_far: int, n_seeds: int) -> BaseSampler:
    """The sampler for the next trial: the same for the same study, another for every trial.

    `n_seeds` trials make up the first generation of NSGA-II, within bounds. Raises StudyError for an unknown name.
    """
    if name not in SAMPLERS:
        raise StudyError(f"sampler {name!r} is unknown; choose one of {sorted(SAMPLERS)}")
    low, high = POPULATION_SIZES
    return SAMPLERS[name](derived_seed(seed, n_trials_so_far), min(max(n_seeds, low), high))


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed for one purpose: equal for equal arguments, unrelated otherwise."""
    return int(np.random.SeedSequence([seed % 2**63, *numbers]).generate_state(1)[0])
