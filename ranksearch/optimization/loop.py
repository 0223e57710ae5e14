"""The loop: ask for a plan, evaluate it, tell what came of it; the Optuna study is its only state."""

from collections.abc import Callable, Sequence

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.records import History, read_records
from ranksearch.optimization.samplers import SamplerSetting, default_n_prices, make_sampler
from ranksearch.optimization.seeds import (
    enqueue,
    fail_stale,
    fix_seeds,
    make_seeds,
    neighbour,
    next_seed,
)
from ranksearch.optimization.space import n_plans, to_params
from ranksearch.optimization.trials import Callbacks, Search, try_next
from ranksearch.optimization.weight_errors import WeightErrors, no_weight_errors
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.plan import Plan
from ranksearch.spec import Objective

# After this many duplicates in a row the sampler has converged, and a neighbour is tried instead.
MAX_REPEATS = 3
# When this many trials fail one after the other, it is not the plans.
MAX_FAILURES = 10


def optimise(
    optuna_study: Study,
    profile: Profile,
    evaluate: Callable[[Plan], Evaluation],
    *,
    objectives: Sequence[Objective],
    limits: ResolvedLimits,
    controls: Sequence[tuple[str, Plan]],
    sampler_name: str,
    seed: int,
    n_trials: int,
    deadline: float | None,
    clock: Callable[[], float],
    callbacks: Callbacks,
    should_stop: Callable[[], bool],
    n_prices: int | None = None,
    drop_unit: float = REFERENCE_POINT[0],
    weight_errors: Callable[[], WeightErrors] = no_weight_errors,
    seconds_to_end: Callable[[], float] = lambda: 0.0,
) -> None:
    """Tries plans until the study has `n_trials`, time is up, it shall stop, or every plan was tried.

    First the controls, then a uniform plan and `n_prices` prices (0: neither), then the sampler, which may ask for the
    `weight_errors`, and to which a drop of `drop_unit` is too much. Trials that an earlier process left unfinished come
    before all else. No plan runs twice. A trial after which what ends the study, `seconds_to_end` by the trials so far,
    would not be done before `deadline`, on `clock`, is not started. `n_trials` is the study's total of complete and
    pruned trials; controls and duplicates do not count.

    Raises StudyError for an unknown sampler, a control that is not in the table, or when ten trials in a row fail;
    KeyboardInterrupt, with the running plan queued again, where it comes without `should_stop`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    setting = SamplerSetting(
        profile=profile, objectives=objectives, limits=limits, seed=seed, drop_unit=drop_unit,
        weight_errors=weight_errors,
    )  # fmt: skip
    next_sampler = make_sampler(sampler_name, setting)
    n_swept = default_n_prices(sampler_name) if n_prices is None else n_prices
    seeds = fix_seeds(optuna_study, make_seeds(profile, controls, n_swept, seed, objectives))
    stale = set(fail_stale(optuna_study))
    known = read_records(optuna_study)
    search = Search(
        study=optuna_study, profile=profile, evaluate=evaluate, objectives=objectives, limits=limits,
        sampler_name=sampler_name, next_sampler=next_sampler, seed=seed, n_trials=n_trials, deadline=deadline,
        clock=clock, seconds_to_end=seconds_to_end, callbacks=callbacks, should_stop=should_stop, seeds=seeds,
        history=History(known),
    )  # fmt: skip
    for record in known:
        if record.number in stale:
            callbacks.trial_failed(record)
    _run(search)


def _run(search: Search) -> None:
    """One trial after the other."""
    n_failures = 0
    while not _finished(search) and _enqueue_next(search):
        record = try_next(search)
        if record is None or record.duplicate_of is not None or record.queued_again:
            continue
        n_failures = n_failures + 1 if record.state == "failed" else 0
        if n_failures >= MAX_FAILURES:
            raise StudyError(f"the last {n_failures} trials failed, so the study stops; the last one: {record.reason}")


def _finished(search: Search) -> bool:
    """Whether no further trial is to be started."""
    if search.should_stop() or search.history.n_distinct >= n_plans(search.profile):
        return True
    if search.deadline is not None:
        ahead_s = search.history.mean_seconds + search.seconds_to_end()
        if search.clock() + ahead_s >= search.deadline:
            return True
    if search.history.n_counted < search.n_trials:
        return False
    tried = {record.plan_hash for record in search.history.records if not record.queued_again}
    controls = [search.profile.plan(seed.indices).hash() for seed in search.seeds if seed.control]
    return all(control in tried for control in controls)


def _enqueue_next(search: Search) -> bool:
    """Queues what comes before the sampler's turn; False where no plan is left to try.

    What is queued already, such as a retry, comes first; then the seeds in order; then, where the sampler only
    repeats itself, a neighbour of what it asked for last.
    """
    trials = search.study.get_trials(deepcopy=False)
    if any(trial.state is TrialState.WAITING for trial in trials):
        return True
    asked = {trial.user_attrs["seed"] for trial in trials if "seed" in trial.user_attrs}
    planned = next_seed(search.seeds, asked)
    if planned is not None:
        number, seed = planned
        params = to_params(search.profile, seed.indices)
        enqueue(search.study, params, origin=seed.origin, control=seed.control, seed=number)
        return True
    if search.history.n_repeats < MAX_REPEATS:
        return True
    last = search.profile.indices(search.history.records[-1].plan)
    params_near = neighbour(search.profile, last, search.history, search.seed, len(trials))
    if params_near is not None:
        enqueue(search.study, params_near, origin="neighbour")
    return params_near is not None
