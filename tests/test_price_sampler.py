"""PriceSampler in plain Optuna: seeds first, no plan twice, the same for the same history, goals and bad input."""

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from synthetic_study import NO_LIMITS, make_profile

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.errors import StudyError
from ranksearch.optimization import PriceSampler, ResolvedLimits, price_sweep, uniform
from ranksearch.optimization.improvement import Undominated
from ranksearch.optimization.price_sampler import N_SEED_PRICES
from ranksearch.optimization.prices import coarse_to_fine
from ranksearch.optimization.proposals import moved, priced, swapped
from ranksearch.optimization.space import distributions, settled, to_indices, to_params
from ranksearch.optimization.table import Table
from ranksearch.pareto import hypervolume
from ranksearch.plan import DENSE
from ranksearch.spec import OBJECTIVES, Objective

PROFILE = make_profile(12)
FACTORS = np.exp(np.random.default_rng(0).normal(0, 0.8, 12))
optuna.logging.set_verbosity(optuna.logging.WARNING)


def measure(indices: tuple[int, ...], profile: Profile = PROFILE) -> dict[Objective, float]:
    """A plan's figures where layers lose more or less than the profile says."""
    _, latency, size = profile.predict(indices)
    lost = sum(f * c.loss for f, c in zip(FACTORS, profile.chosen(indices), strict=True))
    return {"drop": 0.3 * lost, "latency": latency, "bytes": size}


def created(objectives: tuple[Objective, ...] = OBJECTIVES, limits: ResolvedLimits = NO_LIMITS, seed: int = 0):  # type: ignore[no-untyped-def]
    sampler = PriceSampler(PROFILE, limits, objectives, seed)
    return optuna.create_study(directions=["minimize"] * len(objectives), sampler=sampler)


def run(study: optuna.Study, n: int, objectives: tuple[Objective, ...] = OBJECTIVES) -> list[tuple[int, ...]]:
    """`n` trials, asked for and told; their plans."""
    plans = []
    for _ in range(n):
        trial = study.ask(distributions(PROFILE))
        plans.append(to_indices(PROFILE, trial.params))
        figures = measure(plans[-1])
        study.tell(trial, [figures[name] for name in objectives])
    return plans


def test_it_begins_with_a_uniform_plan_and_a_few_prices() -> None:
    plans = run(created(), 8)
    seeds = list(dict.fromkeys([uniform(PROFILE), *coarse_to_fine(price_sweep(PROFILE, N_SEED_PRICES, 0))]))
    assert plans[: len(seeds)] == seeds


def test_controls_come_before_them() -> None:
    control = tuple(len(layer.candidates) - 1 for layer in PROFILE.layers)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=PriceSampler(PROFILE, controls=[control]))
    assert run(study, 2) == [control, uniform(PROFILE)]


def test_no_plan_comes_twice_and_define_by_run_works_as_well() -> None:
    study = created()
    seen = []

    def objective(trial: optuna.Trial) -> list[float]:
        params = {name: trial.suggest_int(name, 0, d.high) for name, d in distributions(PROFILE).items()}  # type: ignore[attr-defined]
        seen.append(to_indices(PROFILE, params))
        return list(measure(seen[-1]).values())

    study.optimize(objective, n_trials=60)
    assert len(set(seen)) == 60


def test_two_studies_of_one_seed_are_alike_and_a_new_sampler_goes_on_as_the_old_would() -> None:
    whole, cut = created(), created()
    plans = run(whole, 24)
    begun = run(cut, 14)
    cut.sampler = PriceSampler(PROFILE, NO_LIMITS, OBJECTIVES, 0)
    assert begun + run(cut, 10) == plans
    assert run(created(seed=1), 24) != plans


def test_workers_that_ask_at_once_get_different_plans() -> None:
    study = created()
    run(study, 12)
    asked = [study.ask(distributions(PROFILE)) for _ in range(8)]
    plans = [to_indices(PROFILE, trial.params) for trial in asked]
    assert len(set(plans)) == 8
    costs = np.array([sum(PROFILE.predict(plan)[1:]) for plan in plans])
    assert np.ptp(costs) > 0.1, "they go to different places of the front"


def test_it_beats_the_price_sweep_where_the_profile_is_wrong() -> None:
    def volume(plans: list[tuple[int, ...]]) -> float:
        return hypervolume(np.array([list(measure(plan).values()) for plan in plans]))

    found = [volume(run(created(seed=seed), 40)) for seed in range(3)]
    swept = [volume(price_sweep(PROFILE, 40, seed)) for seed in range(3)]
    assert min(found) > max(swept)


@pytest.mark.parametrize(
    "objectives", [("drop", "latency"), ("drop", "bytes"), ("latency", "bytes"), ("bytes", "drop")]
)
def test_two_objectives_in_any_order(objectives: tuple[Objective, ...]) -> None:
    assert len(set(run(created(objectives), 30, objectives))) == 30


def test_trials_go_where_the_goals_are() -> None:
    limits = ResolvedLimits(max_drop=0.02, max_latency_ratio=0.75)

    def n_feasible(plans: list[tuple[int, ...]]) -> int:
        figures = [measure(plan) for plan in plans]
        return sum(f["drop"] <= 0.02 and f["latency"] <= 0.75 for f in figures)

    free, bound = run(created(), 40)[10:], run(created(limits=limits), 40)[10:]
    assert n_feasible(bound) > 2 * n_feasible(free) and n_feasible(bound) > 15


def test_with_a_drop_goal_no_trials_go_where_drops_are_below_the_noise() -> None:
    def n_mild(limits: ResolvedLimits) -> int:
        study = created(limits=limits)
        n = 0
        for number in range(40):
            trial = study.ask(distributions(PROFILE))
            figures = measure(to_indices(PROFILE, trial.params))
            n += number >= 10 and figures["drop"] < 0.003
            trial.set_user_attr("drop_interval", [figures["drop"] - 0.01, figures["drop"] + 0.01])
            study.tell(trial, list(figures.values()))
        return n

    assert n_mild(ResolvedLimits(max_drop=0.03)) == 0


def test_goals_that_nothing_meets_draw_trials_nearer() -> None:
    plans = run(created(limits=ResolvedLimits(max_drop=0.0001, max_latency_ratio=0.3)), 30)
    assert len(set(plans)) == 30


def test_constant_objectives_and_ruined_plans_end_sensibly() -> None:
    for value in (0.0, 1.0, 5.0):
        study = created()
        plans = []
        for _ in range(25):
            trial = study.ask(distributions(PROFILE))
            plans.append(to_indices(PROFILE, trial.params))
            study.tell(trial, [value, 1.0, 1.0])
        assert len(set(plans)) == 25


def test_failed_and_pruned_plans_are_not_proposed_again() -> None:
    study = created()
    plans = []
    for i in range(20):
        trial = study.ask(distributions(PROFILE))
        plans.append(to_indices(PROFILE, trial.params))
        study.tell(trial, state=TrialState.FAIL if i % 2 else TrialState.PRUNED)
    assert len(set(plans)) == 20


def test_every_plan_of_a_small_table_is_tried_once() -> None:
    layers = tuple(layer.model_copy(update={"candidates": layer.candidates[:3]}) for layer in PROFILE.layers[:2])
    dense = [Candidate(choice=DENSE, loss=0.0, latency_ms=1.0, n_bytes=4000)]
    layers = tuple(
        LayerProfile(
            name=layer.name,
            candidates=tuple(sorted([*dense, *layer.candidates[:2]], key=lambda c: c.latency_ms)),
        )
        for layer in layers
    )
    profile = Profile(layers=layers, dense_latency_ms=3.0, dense_bytes=9000)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=PriceSampler(profile))
    plans = []
    for _ in range(9):
        trial = study.ask(distributions(profile))
        plans.append(to_indices(profile, trial.params))
        study.tell(trial, [sum(plans[-1]) / 100, *profile.predict(plans[-1])[1:]])
    assert len(set(plans)) == 9
    assert to_indices(profile, study.ask(distributions(profile)).params) in plans


def test_other_directions_and_parameters_are_refused() -> None:
    sampler = PriceSampler(PROFILE)
    with pytest.raises(StudyError, match="drop, latency, bytes"):
        optuna.create_study(directions=["minimize"] * 2, sampler=sampler).ask(distributions(PROFILE))
    with pytest.raises(StudyError, match="drop, latency, bytes"):
        optuna.create_study(directions=["maximize"] * 3, sampler=sampler).ask(distributions(PROFILE))
    study = created()
    with pytest.raises(StudyError, match=r"parameter 'learning_rate' .* does not fit the profile"):
        study.ask(distributions(PROFILE)).suggest_float("learning_rate", 0, 1)


def test_swaps_keep_the_costs_and_differ_in_two_layers() -> None:
    table = Table.of(PROFILE)
    start = np.array([price_sweep(PROFILE, 6, 0)[2]])
    found = swapped(table, start, np.random.default_rng(0))
    assert len(found) > 3
    assert ((found != start).sum(axis=1) <= 2).all()
    for figures in (table.latency_ratios, table.bytes_ratios):
        assert np.abs(figures(found) - figures(start)).max() <= 0.0101
    assert ((moved(table, start, np.random.default_rng(0)) != start).sum(axis=1) <= 1).all()


def test_prices_span_the_table_from_mildest_to_cheapest() -> None:
    table = Table.of(PROFILE)
    plans = {tuple(plan) for plan in priced(table, table.loss, OBJECTIVES, np.random.default_rng(0)).tolist()}
    mildest = tuple(int(i) for i in table.loss.argmin(axis=1))
    fastest = min(table.latency_ratios(np.array([plan]))[0] for plan in plans)
    least = np.where(np.isfinite(table.loss), table.latency, np.inf).min(axis=1).sum()
    assert fastest == pytest.approx(table.latency_rest + least, abs=0.02)
    assert mildest in plans and len(plans) > 20


def test_ties_hold_in_every_proposal() -> None:
    tied = PROFILE.model_copy(update={"ties": (("block.0.conv", "block.1.conv", "block.2.conv"),)})
    study = optuna.create_study(directions=["minimize"] * 3, sampler=PriceSampler(tied))
    for _ in range(30):
        trial = study.ask(distributions(tied))
        plan = to_indices(tied, trial.params)
        assert settled(tied, plan) == plan
        study.tell(trial, list(measure(plan, tied).values()))


def test_gains_are_shares_of_the_volume_that_is_added() -> None:
    rng = np.random.default_rng(0)
    front, corner = np.array([[0.2, 0.6, 0.5], [0.6, 0.2, 0.5]]), np.ones(3)
    plans = rng.random((20, 3))
    gains = Undominated.sample(front, np.zeros(3), corner, rng).gains(plans)
    before = hypervolume(front, (1.0, 1.0, 1.0))
    exact = [hypervolume(np.vstack([front, plan]), (1.0, 1.0, 1.0)) - before for plan in plans]
    assert gains == pytest.approx(exact, abs=0.005)


def test_params_and_plans_of_enqueued_trials_count_as_tried() -> None:
    study = created()
    second = list(dict.fromkeys([uniform(PROFILE), *coarse_to_fine(price_sweep(PROFILE, N_SEED_PRICES, 0))]))[1]
    study.enqueue_trial(to_params(PROFILE, second))
    assert run(study, 3).count(second) == 1
