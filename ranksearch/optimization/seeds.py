"""What is asked before and beside the sampler: the controls, a uniform plan, the price sweep, retries, neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.candidates import Profile
from ranksearch.optimization.price_sampler import N_SEED_PRICES
from ranksearch.optimization.prices import coarse_to_fine, price_sweep, refine, uniform
from ranksearch.optimization.records import History, front
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """What is tried before the sampler has its say: plans fixed at the start, then `n_refined` that fill gaps."""

    fixed: Sequence[Seed]
    n_refined: int

    def __len__(self) -> int:
        return len(self.fixed) + self.n_refined


def make_seeds(
    profile: Profile,
    controls: Sequence[tuple[str, Plan]],
    n_prices: int,
    seed: int,
    objectives: Sequence[Objective],
) -> Seeds:
    """The controls in order, a uniform plan, six of the price sweep from coarse to fine, each plan once; the other
    prices are left to gaps in the front.

    With `n_prices` 0 the controls alone. Raises StudyError for a control that is not in the table.
    """
    seeds = [
        Seed(origin=origin, control=True, indices=settled(profile, profile.indices(plan))) for origin, plan in controls
    ]
    # So many span the predicted front; the others go where the measured one has its gaps.
    n_coarse = min(n_prices, N_SEED_PRICES)
    if n_prices > 0:
        swept = coarse_to_fine(price_sweep(profile, n_coarse, seed, objectives))
        seeds.append(Seed(origin="uniform", control=False, indices=uniform(profile)))
        seeds += [Seed(origin="prices", control=False, indices=indices) for indices in swept]
    firsts: dict[tuple[int, ...], Seed] = {}
    for planned in seeds:
        firsts.setdefault(planned.indices, planned)
    return Seeds(fixed=list(firsts.values()), n_refined=n_prices - n_coarse)


def fix_seeds(study: Study, seeds: Seeds) -> Seeds:
    """The study's own seeds: those it was begun with, else these, which it is begun with from now on."""
    if SEEDS not in study.user_attrs:
        stored = [[seed.origin, seed.control, list(seed.indices)] for seed in seeds.fixed]
        study.set_user_attr(SEEDS, {"fixed": stored, "n_refined": seeds.n_refined})
    begun = study.user_attrs[SEEDS]
    fixed = [
        Seed(origin=origin, control=control, indices=tuple(indices)) for origin, control, indices in begun["fixed"]
    ]
    return Seeds(fixed=fixed, n_refined=begun["n_refined"])


def next_seed(
    seeds: Seeds, asked: set[int], profile: Profile, history: History, objectives: Sequence[Objective]
) -> tuple[int, Seed] | None:
    """The first seed whose number was not `asked` for, with that number; None where the sampler has its turn.

    A gap is filled as the history stands, which is why these plans are not known before.
    """
    left = [number for number in range(len(seeds)) if number not in asked]
    if not left:
        return None
    if left[0] < len(seeds.fixed):
        return left[0], seeds.fixed[left[0]]
    tried = [profile.indices(record.plan) for record in history.records]
    best = [profile.indices(record.plan) for record in front(history.records, objectives)]
    indices = refine(_corrected(profile, history), tried, best, left[0] - len(seeds.fixed), objectives)
    return None if indices is None else (left[0], Seed(origin="prices", control=False, indices=indices))


def _corrected(profile: Profile, history: History) -> Profile:
    """The profile, its latency model fitted to what the study's own trials measured as well."""
    measured = [(r.plan, r.evaluation.latency_ratio) for r in history.records if r.evaluation is not None]
    return profile.corrected([profile.indices(plan) for plan, _ in measured], [ratio for _, ratio in measured])


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
    profile: Profile, indices: Sequence[int], history: History, seed: int, number: int
) -> dict[str, int] | None:
    """The parameters of a random plan near `indices` that was not tried yet; None where every plan was."""
    rng = np.random.default_rng(derived_seed(seed, number, 1))
    sizes = np.array([len(layer.candidates) for layer in profile.layers])
    for attempt in range(N_NEIGHBOURS):
        near = settled(profile, _moved(np.array(indices), sizes, n_moves=1 + attempt // 16, rng=rng))
        if history.find(profile.plan(near)) is None:
            return to_params(profile, near)
    return _first_unseen(profile, history)


def _moved(indices: Any, sizes: Any, n_moves: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The plan with up to `n_moves` of its layers given a random candidate."""
    free = np.flatnonzero(sizes > 1)
    rows = rng.permutation(free)[:n_moves]
    indices[rows] = rng.integers(sizes[rows])
    return tuple(int(i) for i in indices)


def _first_unseen(profile: Profile, history: History) -> dict[str, int] | None:
    """The first plan in lexical order that was not tried; there is one within as many steps as there were trials.

    Ties make one plan of several, so that all may have to be looked through.
    """
    shape = tuple(len(layer.candidates) for layer in profile.layers)
    for flat in range(n_plans(profile) if profile.ties else min(n_plans(profile), history.n_distinct + 1)):
        plan = settled(profile, _unravel(flat, shape))
        if history.find(profile.plan(plan)) is None:
            return to_params(profile, plan)
    return None


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The plan of that number; numpy's own overflows at a few dozen layers."""
    digits = []
    for size in reversed(shape):
        flat, digit = divmod(flat, size)
        digits.append(digit)
    return tuple(reversed(digits))
