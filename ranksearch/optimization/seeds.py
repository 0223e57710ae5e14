"""What is asked before and beside the sampler: the controls, a uniform plan, the price sweep, retries, neighbours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.candidates import Profile
from ranksearch.optimization.prices import coarse_to_fine, price_sweep, uniform
from ranksearch.optimization.samplers import derived_seed
from ranksearch.optimization.space import n_plans, settled, to_params
from ranksearch.plan import Plan
from ranksearch.spec import Objective

SEEDS = "seeds"
# A plan during which the process ended this often is not tried again: it may be what kills it.
MAX_ATTEMPTS = 3
N_NEIGHBOURS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """A plan to try before the sampler has its say, as candidates' indices."""

    origin: str
    control: bool
    indices: tuple[int, ...]


def make_seeds(
    profile: Profile,
    controls: Sequence[tuple[str, Plan]],
    n_prices: int,
    seed: int,
    objectives: Sequence[Objective],
) -> list[Seed]:
    """The controls in order, a uniform plan, and a price sweep of so many from coarse to fine; each plan once.

    With `n_prices` 0 the controls alone. Raises StudyError for a control that is not in the table.
    """
    seeds = [
        Seed(origin=origin, control=True, indices=settled(profile, profile.indices(plan))) for origin, plan in controls
    ]
    if n_prices > 0:
        swept = coarse_to_fine(price_sweep(profile, n_prices, seed, objectives))
        seeds.append(Seed(origin="uniform", control=False, indices=uniform(profile)))
        seeds += [Seed(origin="prices", control=False, indices=indices) for indices in swept]
    firsts: dict[tuple[int, ...], Seed] = {}
    for planned in seeds:
        firsts.setdefault(planned.indices, planned)
    return list(firsts.values())


def fix_seeds(study: Study, seeds: Sequence[Seed]) -> list[Seed]:
    """The study's own seeds: those it was begun with, else these, which it is begun with from now on."""
    if SEEDS not in study.user_attrs:
        study.set_user_attr(SEEDS, [[seed.origin, seed.control, list(seed.indices)] for seed in seeds])
    return [
        Seed(origin=origin, control=control, indices=tuple(indices))
        for origin, control, indices in study.user_attrs[SEEDS]
    ]


def next_seed(seeds: Sequence[Seed], asked: set[int]) -> tuple[int, Seed] | None:
    """The first seed whose number was not `asked` for, with that number; None where the sampler has its turn."""
    return next(((number, seed) for number, seed in enumerate(seeds) if number not in asked), None)


def enqueue(study: Study, params: dict[str, int], **attributes: Any) -> None:
    """Queues a trial with these parameters, kept among its attributes as well."""
    study.enqueue_trial(params, user_attrs={"params": params, **attributes})


def requeue(study: Study, trial: FrozenTrial, n_attempts: int) -> None:
    """Queues the trial's plan again, once, as the same kind of trial."""
    if any(other.user_attrs.get("retry_of") == trial.number for other in study.get_trials(deepcopy=False)):
        return
    kept = {key: trial.user_attrs[key] for key in ("origin", "control", "seed") if key in trial.user_attrs}
    params = trial.user_attrs.get("params", trial.params)
    enqueue(study, params, retry_of=trial.number, attempt=n_attempts, **kept)


def fail_stale(study: Study) -> list[int]:
    """Fails the trials that a killed process left running, queues their plans again, and gives their numbers.

    The retry is queued before the trial is failed, so that a second kill in between loses nothing. What had no plan
    yet was not begun and is not queued; what was tried too often is not either.
    """
    stale = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in stale:
        n_attempts = trial.user_attrs.get("attempt", 1)
        begun = "plan" in trial.user_attrs or "params" in trial.user_attrs
        if begun and n_attempts < MAX_ATTEMPTS:
            requeue(study, trial, n_attempts + 1)
        study.tell(trial.number, state=TrialState.FAIL)
    return [trial.number for trial in stale]


def neighbour(
    profile: Profile,
    indices: Sequence[int],
    is_tried: Callable[[Plan], bool],
    n_tried: int,
    seed: int,
    number: int,
) -> dict[str, int] | None:
    """The parameters of a random plan near `indices` that was not tried yet; None where every plan was."""
    rng = np.random.default_rng(derived_seed(seed, number, 1))
    sizes = np.array([len(layer.candidates) for layer in profile.layers])
    for attempt in range(N_NEIGHBOURS):
        near = settled(profile, _moved(np.array(indices), sizes, n_moves=1 + attempt // 16, rng=rng))
        if not is_tried(profile.plan(near)):
            return to_params(profile, near)
    return _first_unseen(profile, is_tried, n_tried)


def _moved(indices: Any, sizes: Any, n_moves: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The plan with up to `n_moves` of its layers given a random candidate."""
    free = np.flatnonzero(sizes > 1)
    rows = rng.permutation(free)[:n_moves]
    indices[rows] = rng.integers(sizes[rows])
    return tuple(int(i) for i in indices)


def _first_unseen(profile: Profile, is_tried: Callable[[Plan], bool], n_tried: int) -> dict[str, int] | None:
    """The first plan in lexical order that was not tried; there is one within as many steps as there were trials.

    Ties make one plan of several, so that all may have to be looked through.
    """
    shape = tuple(len(layer.candidates) for layer in profile.layers)
    for flat in range(n_plans(profile) if profile.ties else min(n_plans(profile), n_tried + 1)):
        plan = settled(profile, _unravel(flat, shape))
        if not is_tried(profile.plan(plan)):
            return to_params(profile, plan)
    return None


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The plan of that number; numpy's own overflows at a few dozen layers."""
    digits = []
    for size in reversed(shape):
        flat, digit = divmod(flat, size)
        digits.append(digit)
    return tuple(reversed(digits))
