"""Drops refitted to what trials measured: factors are found again, estimates shrink, nothing is sure without data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import make_profile

from ranksearch.optimization.drop_model import DropModel, Observed
from ranksearch.optimization.loss_table import LossTable
from ranksearch.optimization.prices import uniform

PROFILE = make_profile(20)
TABLE = LossTable.of(PROFILE, uniform(PROFILE), 0.1)


def random_plans(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.array([len(layer.candidates) for layer in PROFILE.layers])
    return (rng.random((n, len(sizes))) * sizes).astype(np.int64)


def losses(plans: np.ndarray, layer_factors: np.ndarray) -> np.ndarray:
    """Losses of plans whose layers lose so many times what the profile says."""
    return np.array([layer_factors @ PROFILE.decomposition_losses(plan) + rounding(plan) for plan in plans])


def rounding(plan: np.ndarray) -> float:
    return sum(candidate.rounding_loss for candidate in PROFILE.chosen(plan))


def observed(plans: np.ndarray, factors: np.ndarray, *, deviation: float = 0.002, seed: int = 1) -> Observed:
    lost = losses(plans, factors)
    noise = np.random.default_rng(seed).normal(0, deviation, len(plans))
    return Observed(plans=plans, drops=0.2 * lost + noise, deviations=np.full(len(plans), deviation), distances=lost)


def nothing() -> Observed:
    return Observed(plans=random_plans(0), drops=np.zeros(0), deviations=np.zeros(0), distances=np.zeros(0))


def test_without_trials_the_profile_has_the_word() -> None:
    model = DropModel.fit(TABLE, nothing())
    plans = random_plans(50)
    predicted, lost = model.predict(plans), losses(plans, np.ones(20))
    assert (np.argsort(predicted) == np.argsort(lost)).mean() > 0.9
    assert (model.deviations(plans) > 0.3 * predicted).all()


def test_layers_that_lose_more_than_predicted_are_found() -> None:
    factors = np.ones(20)
    factors[[2, 5]], factors[[7, 11]] = 5.0, 0.2
    model = DropModel.fit(TABLE, observed(random_plans(60), factors))
    fresh = random_plans(200, seed=7)
    unfitted = DropModel.fit(TABLE, nothing()).predict(fresh)
    truth = 0.2 * losses(fresh, factors)
    error = np.median(np.abs(model.predict(fresh) - truth) / truth)
    assert error < 0.06 < 0.1 < np.median(np.abs(unfitted * truth.mean() / unfitted.mean() - truth) / truth)
    found = model.mean[5:25]
    assert found[[2, 5]].min() > 0.5 and found[[7, 11]].max() < -0.2


def test_distances_teach_where_the_score_is_too_coarse() -> None:
    factors = np.exp(np.random.default_rng(3).normal(0, 0.8, 20))
    plans, fresh = random_plans(40), random_plans(200, seed=7)
    coarse = observed(plans, factors, deviation=0.02)
    blind = Observed(
        plans=plans, drops=coarse.drops, deviations=coarse.deviations, distances=np.full(len(plans), np.nan)
    )
    truth = 0.2 * losses(fresh, factors)
    errors = [np.mean(np.abs(DropModel.fit(TABLE, data).predict(fresh) - truth)) for data in (coarse, blind)]
    assert errors[0] < 0.8 * errors[1]


def test_estimates_lie_between_measured_and_predicted_and_are_surer_than_either() -> None:
    plans, factors = random_plans(60), np.ones(20)
    data = observed(plans, factors, deviation=0.01)
    model = DropModel.fit(TABLE, data)
    estimates, deviations = model.shrunk(plans, data.drops, data.deviations)
    predicted = model.predict(plans)
    low, high = np.minimum(predicted, data.drops), np.maximum(predicted, data.drops)
    assert ((low <= estimates) & (estimates <= high)).all() and (deviations < 0.01).all()
    truth = 0.2 * losses(plans, factors)
    assert np.mean((estimates - truth) ** 2) < 0.7 * np.mean((data.drops - truth) ** 2)


def test_what_is_too_much_stays_as_it_was_measured() -> None:
    data = observed(random_plans(30), np.ones(20), deviation=0.02)
    ruined = Observed(plans=data.plans, drops=data.drops + 0.3, deviations=data.deviations, distances=data.distances)
    estimates, _ = DropModel.fit(TABLE, ruined).shrunk(ruined.plans, ruined.drops, ruined.deviations)
    assert (estimates == ruined.drops).all()


def test_what_was_measured_exactly_stays() -> None:
    data = observed(random_plans(30), np.ones(20))
    model = DropModel.fit(TABLE, data)
    estimates, deviations = model.shrunk(data.plans, data.drops, np.zeros(30))
    assert estimates == pytest.approx(data.drops) and (deviations == 0).all()


def test_draws_scatter_as_widely_as_the_model_is_unsure() -> None:
    few, many = (DropModel.fit(TABLE, observed(random_plans(n), np.ones(20))) for n in (5, 200))
    plans = random_plans(20, seed=9)

    def spread(model: DropModel) -> float:
        draws = [model.drawn(np.random.default_rng(seed)).predict(plans) for seed in range(40)]
        return float(np.mean(np.std(draws, axis=0)))

    assert spread(many) < 0.5 * spread(few)
    assert (few.drawn(np.random.default_rng(1)).mean == few.drawn(np.random.default_rng(1)).mean).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.5, 1.0), min_size=1, max_size=12), st.sampled_from([0.0, 0.003, 0.5]))
def test_whatever_was_measured_predictions_are_finite(drops: list[float], deviation: float) -> None:
    n = len(drops)
    data = Observed(
        plans=random_plans(n), drops=np.array(drops), deviations=np.full(n, deviation), distances=np.full(n, np.nan)
    )
    model = DropModel.fit(TABLE, data)
    plans = random_plans(30, seed=2)
    for figures in (
        model.predict(plans),
        model.deviations(plans),
        *model.shrunk(data.plans, data.drops, data.deviations),
    ):
        assert np.isfinite(figures).all()
    offered = TABLE.offered
    assert np.isfinite(model.losses()[offered]).all() and np.isinf(model.losses()[~offered]).all()
