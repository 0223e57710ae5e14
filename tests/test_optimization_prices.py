"""Prices decode exactly; sweeps span the front; the space is a bijection."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import make_profile

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.errors import StudyError
from ranksearch.optimization import ResolvedLimits, out_of_reach
from ranksearch.optimization.prices import (
    coarse_to_fine,
    price_path,
    price_sweep,
    uniform,
)
from ranksearch.optimization.space import distributions, n_plans, settled, to_indices, to_params
from ranksearch.optimization.table import Table, decode
from ranksearch.plan import DENSE, LayerChoice

figures = st.floats(0, 10, allow_nan=False)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    layers = []
    n_layers = draw(st.integers(1, 3))
    for i in range(n_layers):
        ranks = range(1, draw(st.integers(1, 4)))
        choices = [DENSE, *(LayerChoice(decomposition="svd", ranks=(r,)) for r in ranks)]
        choices += [choice.with_bits(8, 8) for choice in choices if draw(st.booleans())]
        candidates = [
            Candidate(choice=c, loss=draw(figures), latency_ms=draw(figures), n_bytes=draw(st.integers(0, 9)))
            for c in choices
        ]
        layers.append(LayerProfile(name=f"l{i}", candidates=tuple(candidates)))
    ties = [tuple(f"l{i}" for i in range(n_layers - 1))] if n_layers > 2 and draw(st.booleans()) else []
    return Profile(layers=tuple(layers), dense_latency_ms=draw(st.floats(1, 20)), dense_bytes=10, ties=tuple(ties))


def cost(profile: Profile, plan: tuple[int, ...], latency_price: float, bytes_price: float) -> float:
    loss, latency, size = profile.predict(plan)
    return loss + latency_price * latency + bytes_price * size


def every_plan(profile: Profile) -> list[tuple[int, ...]]:
    plans = itertools.product(*(range(len(layer.candidates)) for layer in profile.layers))
    return [plan for plan in plans if settled(profile, plan) == plan]


@settings(max_examples=60, deadline=None)
@given(profiles(), st.floats(0, 50), st.floats(0, 50))
def test_decoding_gives_the_best_of_all_plans(profile: Profile, latency_price: float, bytes_price: float) -> None:
    best = min(cost(profile, plan, latency_price, bytes_price) for plan in every_plan(profile))
    decoded = decode(profile, latency_price, bytes_price)
    assert cost(profile, decoded, latency_price, bytes_price) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(profiles(), st.floats(0, 50))
def test_the_path_misses_no_plan_that_a_price_decodes_to(profile: Profile, price: float) -> None:
    path = price_path(Table.of(profile), 0.5, 0.5)
    best = min(cost(profile, plan, price / 2, price / 2) for plan in path)
    decoded = decode(profile, price / 2, price / 2)
    assert best == pytest.approx(cost(profile, decoded, price / 2, price / 2), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(profiles(), st.integers(0, 9), st.integers(-3, 3))
def test_a_sweep_of_any_table_is_of_different_plans_of_that_table(profile: Profile, n: int, seed: int) -> None:
    swept = price_sweep(profile, n, abs(seed))
    assert len(set(swept)) == len(swept) <= n
    assert set(swept) <= set(every_plan(profile))


def test_given_losses_take_the_place_of_the_predicted_ones() -> None:
    profile = make_profile()
    worst = [[0.0 if i == 3 else 9.0 for i in range(len(layer.candidates))] for layer in profile.layers[:-1]]
    assert decode(profile, 0.0, 0.0, losses=[*worst, [0.0]]) == (3,) * 7 + (0,)


def test_a_sweep_goes_from_dense_to_the_most_compressed_plan() -> None:
    profile = make_profile()
    swept = price_sweep(profile, 16, seed=0)
    smallest = decode(profile, 1e9, 1e9)
    assert len(set(swept)) == 16
    assert swept[0] == tuple(layer.dense for layer in profile.layers)
    assert swept[-1] == smallest
    assert price_sweep(profile, 2, seed=5) == [swept[0], swept[-1]]


def test_a_sweep_is_spread_and_holds_byte_heavy_plans() -> None:
    profile = make_profile(20)
    predicted = [profile.predict(plan) for plan in price_sweep(profile, 16, seed=0)]
    ratios = sorted(latency for _, latency, _ in predicted)
    assert max(b - a for a, b in itertools.pairwise(ratios)) < 0.35 * (ratios[-1] - ratios[0])
    assert any(size < latency - 0.1 for _, latency, size in predicted)


def test_a_sweep_depends_on_its_seed_alone() -> None:
    profile = make_profile(20)
    assert price_sweep(profile, 12, seed=3) == price_sweep(profile, 12, seed=3)
    assert price_sweep(profile, 12, seed=3) != price_sweep(profile, 12, seed=4)


def test_a_sweep_prices_the_studys_own_objectives() -> None:
    profile = make_profile()
    by_latency = price_sweep(profile, 6, 0, ("drop", "latency"))[-1]
    by_bytes = price_sweep(profile, 6, 0, ("drop", "bytes"))[-1]
    assert profile.predict(by_latency)[1] < profile.predict(by_bytes)[1]
    assert profile.predict(by_bytes)[2] < profile.predict(by_latency)[2]


def test_a_uniform_plan_gives_every_layer_its_share_of_the_best_undecomposed_one() -> None:
    profile = make_profile()
    chosen = [layer.candidates[i] for layer, i in zip(profile.layers, uniform(profile), strict=True)]
    assert all(c.latency_ms <= 0.2 and c.n_bytes <= 500 for c in chosen[:2])
    assert all(c.choice.decomposition == "svd" for c in chosen[:-1])
    assert chosen[-1].choice == DENSE


def test_coarse_to_fine_keeps_every_plan_ends_first() -> None:
    plans = [(i,) for i in range(9)]
    assert coarse_to_fine(plans)[:3] == [(0,), (8,), (4,)]
    assert sorted(coarse_to_fine(plans)) == plans


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=7, max_size=7))
def test_params_and_indices_are_one_to_one(indices: list[int]) -> None:
    profile = make_profile()
    params = to_params(profile, [*indices, 0])
    assert set(params) == set(distributions(profile)) == {f"block.{i}.conv" for i in range(7)}
    assert to_indices(profile, params) == (*indices, 0)


def test_params_that_do_not_fit_are_refused_by_name() -> None:
    profile = make_profile()
    params = to_params(profile, [0] * 8)
    with pytest.raises(StudyError, match=r"missing \['block.3.conv'\]"):
        to_indices(profile, {k: v for k, v in params.items() if k != "block.3.conv"})
    with pytest.raises(StudyError, match=r"layer 'block.2.conv': candidate 6 is not an index from 0 to 5"):
        to_indices(profile, {**params, "block.2.conv": 6})
    assert n_plans(profile) == 6**7


def test_goals_that_no_plan_comes_near_are_told() -> None:
    profile = make_profile(4)
    assert out_of_reach(profile, ResolvedLimits(max_drop=0.0, max_latency_ratio=0.9, max_bytes_ratio=0.9)) == []
    latency, size = out_of_reach(profile, ResolvedLimits(max_latency_ratio=0.1, max_bytes_ratio=0.1))
    assert "0.1x latency is out of reach" in latency and "0.1x size is out of reach" in size
    fastest = min(profile.predict(plan)[1] for plan in every_plan(profile))
    assert f"below {fastest:.3g}x" in latency
    assert out_of_reach(profile, ResolvedLimits(max_latency_ratio=0.95 * fastest)) == [], "predictions are off at times"
