"""Published rules: one knob each, from the mildest plan to the harshest; as samplers they try every plan once."""

import itertools
import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from synthetic_study import INT8, make_controls, make_profile, search
from synthetic_study import opened as opened_for_search
from torch import nn

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.errors import StudyError
from ranksearch.factorisations import Factorisations
from ranksearch.optimization.prices import coarse_to_fine, price_sweep, uniform
from ranksearch.optimization.rule_sampler import ORDERS, RuleSampler, rule_tables, visiting_order
from ranksearch.optimization.rules import NEED_WEIGHT_ERRORS, RULES, Path, RuleTable
from ranksearch.optimization.samplers import SAMPLERS
from ranksearch.optimization.space import distributions, settled, to_params
from ranksearch.optimization.table import Floats
from ranksearch.optimization.weight_errors import WeightErrors, evbmf_rank, measure_weights
from ranksearch.plan import DENSE, LayerChoice

# What each rule that meets a budget keeps small.
FIGURES = {"energy": "energy_lost", "alds": "spectral_error", "greedy": "loss"}
KNOBS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.77, 1.0)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def svd(rank: int) -> LayerChoice:
    return LayerChoice(decomposition="svd", ranks=(rank,))


def is_plain(candidate: Candidate) -> bool:
    return candidate.choice.decomposition == "none"


def varied(n_layers: int = 6) -> Profile:
    """Layers of four ranks in two kinds of bits, whose losses and costs of a rank differ, and one with dense alone."""
    layers = []
    for row in range(n_layers):
        scale = 1 + 0.1 * ((3 * row) % 7)
        choices = [DENSE, *(svd(rank) for rank in (8, 16, 24, 32))]
        candidates = []
        for choice, bits in itertools.product(choices, (32, 8)):
            share = min(scale * choice.ranks[0] / 64, 0.99) if choice.ranks else 1.0
            rounding = 0.0 if bits == 32 else 0.003 * scale
            figures = {"latency_ms": share * (0.4 if bits == 8 else 1.0), "n_bytes": int(share * 125 * bits)}
            loss = (0.01 * (1 + (5 * row) % 6) * (1 - share) if choice.ranks else 0.0) + rounding
            candidates.append(
                Candidate(choice=choice.with_bits(bits, bits), loss=loss, rounding_loss=rounding, **figures)
            )
        layers.append(LayerProfile(name=f"block.{row}.conv", candidates=tuple(candidates)))
    dense = Candidate(choice=DENSE, loss=0.0, latency_ms=1.0, n_bytes=4000)
    layers.append(LayerProfile(name="head.0", candidates=(dense,)))
    return Profile(layers=tuple(layers), dense_latency_ms=1.5 * n_layers, dense_bytes=6000 * n_layers)


def make_errors(profile: Profile) -> WeightErrors:
    """Errors that fall with the rank and differ from layer to layer and from figure to figure."""

    def figures(power: float) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(
                0.0 if is_plain(c) else (1 + 0.1 * ((3 * row + power) % 7)) / c.choice.ranks[0] ** power
                for c in layer.candidates
            )
            for row, layer in enumerate(profile.layers)
        )

    return WeightErrors(energy_lost=figures(2.0), spectral_error=figures(1.0), weakening=figures(0.5))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Profile, WeightErrors]:
    """Any table of few layers: some without 8 bits, some with dense alone, some tied; and any errors."""
    figure = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5])
    layers = []
    for row in range(draw(st.integers(1, 4))):
        choices = [DENSE, *(svd(rank) for rank in range(1, draw(st.integers(1, 4))))]
        choices += [c.with_bits(8, 8) for c in choices if draw(st.booleans())]
        candidates = [
            Candidate(choice=c, loss=draw(figure), latency_ms=draw(figure), n_bytes=draw(st.integers(0, 9)))
            for c in draw(st.permutations(choices))
        ]
        layers.append(LayerProfile(name=f"l{row}", candidates=tuple(candidates)))
    ties = (tuple(layer.name for layer in layers[:2]),) if len(layers) > 2 and draw(st.booleans()) else ()
    profile = Profile(layers=tuple(layers), dense_latency_ms=8.0, dense_bytes=40, ties=ties)
    drawn = [
        tuple(tuple(0.0 if is_plain(c) else draw(figure) for c in layer.candidates) for layer in layers)
        for _ in range(3)
    ]
    return profile, WeightErrors(energy_lost=drawn[0], spectral_error=drawn[1], weakening=drawn[2])


def size(name: str, table: RuleTable, plan: tuple[int, ...]) -> float:
    """What never grows along a rule's knob."""
    figures = table.share if name == "uniform" else table.cost
    return float(sum(figures[row, index] for row, index in enumerate(plan)))


# Every rule


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(drawn=tables())
def test_along_the_knob_plans_get_smaller_and_fit_the_table(name: str, drawn: tuple[Profile, WeightErrors]) -> None:
    profile, errors = drawn
    for table in rule_tables(profile, errors):
        path = RULES[name](table)
        assert path.knobs[0] == 0 and path.knobs[-1] <= 1 and (np.diff(path.knobs) >= 0).all()
        assert len(np.unique(path.plans, axis=0)) == len(path.plans) >= 1
        plans = [path.at(knob) for knob in np.linspace(0, 1, 40)]
        assert plans[-1] == tuple(path.plans[-1])
        sizes = [size(name, table, plan) for plan in plans]
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(sizes))
        for plan in path.plans.tolist():
            assert all(0 <= i < len(layer.candidates) for i, layer in zip(plan, profile.layers, strict=True))
            assert settled(profile, plan) == tuple(plan)


@pytest.mark.parametrize("name", RULES)
def test_the_mildest_plan_leaves_every_layer_undecomposed_and_the_harshest_none(name: str) -> None:
    profile = varied()
    dense, int8 = (profile.indices(plan) for _, plan in make_controls(profile))
    paths = [RULES[name](table) for table in rule_tables(profile, make_errors(profile))]
    assert [path.at(0) for path in paths] == [dense, int8]
    for path in paths:
        harshest = profile.chosen(path.at(1))
        assert not any(is_plain(candidate) for candidate in harshest[:-1]), "the last has no choice"
        predicted = [profile.predict(path.at(knob)) for knob in KNOBS]
        assert max(latency + size for _, latency, size in predicted) == pytest.approx(sum(predicted[0][1:]))
        assert len(path.plans) > 2


@pytest.mark.parametrize("name", FIGURES)
@settings(max_examples=60, deadline=None)
@given(drawn=tables(), knob=st.sampled_from([i / 37 for i in range(38)]))
def test_a_budget_is_met_at_the_least_threshold(name: str, drawn: tuple[Profile, WeightErrors], knob: float) -> None:
    for table in rule_tables(*drawn):
        figures = getattr(table, FIGURES[name])
        thresholds = sorted({float(f) for f in figures.flat if math.isfinite(f)})
        costs = [sum(cheapest_within(table, figures, threshold)) for threshold in thresholds]
        meeting = [cost for cost in costs if costs[0] - cost >= knob * (costs[0] - costs[-1]) - 1e-9]
        chosen = size(name, table, RULES[name](table).at(knob))
        assert any(chosen == pytest.approx(cost, abs=1e-9) for cost in costs), "the plan of some threshold"
        assert chosen == pytest.approx(meeting[0], abs=1e-6)


def cheapest_within(table: RuleTable, figures: Floats, threshold: float) -> list[float]:
    """The cost of each layer's cheapest candidate within the threshold, else of the one of the least figure."""
    costs = []
    for row, figure in enumerate(figures):
        limit = max(threshold, figure.min())
        costs.append(min(table.cost[row, i] for i in np.flatnonzero(figure <= limit)))
    return costs


@pytest.mark.parametrize("knob", KNOBS)
def test_weakened_ranks_are_kept_at_the_least_cost(knob: float) -> None:
    profile = varied()
    for table in rule_tables(profile, make_errors(profile)):
        plan = RULES["evbmf"](table).at(knob)
        for row, index in enumerate(plan):
            allowed = np.flatnonzero(table.weakening[row] <= knob)
            assert index in allowed
            assert table.cost[row, index] == table.cost[row, allowed].min()


@pytest.mark.parametrize("share", [0.9, 0.7, 0.45, 0.3, 0.2, 0.1])
def test_uniform_is_the_uniform_plan_of_one_kind_of_bits(share: float) -> None:
    profile = varied()
    for table, bits in zip(rule_tables(profile), ("32/32", "8/8"), strict=True):
        layers = [
            layer.model_copy(update={"candidates": tuple(c for c in layer.candidates if c.choice.bits == bits)})
            for layer in profile.layers[:-1]
        ]
        alone = profile.model_copy(update={"layers": tuple(layers)})
        expected = [candidate.choice for candidate in alone.chosen(uniform(alone, share))]
        found = profile.chosen(RULES["uniform"](table).at(1 - share))
        assert [candidate.choice for candidate in found[:-1]] == expected


@pytest.mark.parametrize("knob", [-0.01, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("name", RULES)
def test_a_knob_out_of_range_is_refused(name: str, knob: float) -> None:
    profile = make_profile()
    path = RULES[name](rule_tables(profile, make_errors(profile))[0])
    with pytest.raises(StudyError, match=rf"knob {knob} is not between 0, .* and 1"):
        path.at(knob)


# The tables that rules see


def test_layers_without_other_bits_and_those_tied_to_them_stay_at_denses() -> None:
    whole = make_profile(4)
    only_float = tuple(c for c in whole.layers[0].candidates if c.choice.weight_bits == 32)
    first = whole.layers[0].model_copy(update={"candidates": only_float})
    profile = whole.model_copy(update={"layers": (first, *whole.layers[1:])})
    tied = profile.model_copy(update={"ties": ((first.name, profile.layers[1].name),)})
    for table, expected in ((profile, ["32/32", "8/8", "8/8"]), (tied, ["32/32", "32/32", "8/8"])):
        in_float, in_int8 = (RULES["greedy"](t) for t in rule_tables(table))
        assert {c.choice.bits for plan in in_float.plans for c in table.chosen(plan)} == {"32/32"}
        for plan in in_int8.plans.tolist():
            assert [c.choice.bits for c in table.chosen(plan)][:3] == expected
            assert settled(table, plan) == tuple(plan)


def test_bits_that_layers_offer_only_decomposed_or_not_all_of_them_are_left_out() -> None:
    whole = make_profile(4, n_single=0)
    first, second, *others = whole.layers
    decomposed = first.model_copy(update={"candidates": tuple(c for c in first.candidates if c.choice != INT8)})
    at_4_bits = INT8.model_copy(update={"weight_bits": 4})
    also = Candidate(choice=at_4_bits, loss=0.1, latency_ms=0.3, n_bytes=500)
    wider = second.model_copy(update={"candidates": (*second.candidates, also)})

    def offered(*layers: LayerProfile) -> list[set[str]]:
        profile = whole.model_copy(update={"layers": layers})
        paths = [RULES["greedy"](table) for table in rule_tables(profile)]
        return [{c.choice.bits for plan in path.plans for c in profile.chosen(plan)} for path in paths]

    assert offered(first, wider, *others) == [{"32/32"}, {"8/8"}]
    # A layer that is whole in dense's bits alone stays there.
    assert offered(decomposed, second, *others) == [{"32/32"}, {"32/32", "8/8"}]
    assert offered(wider) == [{"32/32"}, {"8/8"}, {"4/8"}]
    assert offered(decomposed) == [{"32/32"}]


def test_the_objectives_say_what_costs() -> None:
    profile = make_profile()
    by_bytes, by_latency = (rule_tables(profile, None, ("drop", what))[0].cost for what in ("bytes", "latency"))
    row, layer = 2, profile.layers[2]
    dense, int8 = layer.dense, layer.index(INT8)
    shares = [(c.n_bytes / profile.dense_bytes, c.latency_ms / profile.dense_latency_ms) for c in layer.candidates]
    assert by_bytes[row, dense] - by_bytes[row, int8] == pytest.approx(
        0.95 * (shares[dense][0] - shares[int8][0]) + 0.05 * (shares[dense][1] - shares[int8][1])
    )
    assert by_latency[row, int8] == pytest.approx(0.95 * shares[int8][1] + 0.05 * shares[int8][0])


def test_errors_of_another_table_are_refused() -> None:
    with pytest.raises(StudyError, match="not those of this candidate table"):
        rule_tables(make_profile(8), make_errors(make_profile(7)))


# EVBMF and what the weights say


@pytest.mark.parametrize(
    ("shape", "rank", "noise"),
    [((64, 576), 5, 0.1), ((64, 576), 20, 0.3), ((576, 64), 20, 0.3), ((96, 96), 10, 0.2), ((16, 144), 3, 0.05),
     ((32, 27), 6, 0.02), ((16, 144), 3, 0.0), ((64, 128), 0, 1.0)],
)  # fmt: skip
def test_evbmf_finds_the_rank_under_the_noise(shape: tuple[int, int], rank: int, noise: float) -> None:
    random = np.random.default_rng(rank)
    signal = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
    matrix = signal + noise * random.standard_normal(shape)
    assert evbmf_rank(matrix) == rank
    assert evbmf_rank(1e-3 * matrix.T) == rank, "neither scale nor orientation matter"


def test_evbmf_gives_up_components_that_the_noise_hides() -> None:
    random = np.random.default_rng(0)
    signal = np.zeros((40, 80))
    noise = random.standard_normal(signal.shape)
    # Noise of variance 1 has singular values up to some sqrt(40) + sqrt(80) = 15.3.
    np.fill_diagonal(signal[:3], [60.0, 40.0, 5.0])
    assert evbmf_rank(signal + noise) == 2


@pytest.mark.parametrize("matrix", [np.zeros((3, 5)), np.ones((1, 1)), np.ones((1, 9))])
def test_evbmf_of_next_to_nothing_is_zero(matrix: Floats) -> None:
    assert evbmf_rank(matrix) == 0


def test_evbmf_takes_singular_values_no_smaller_than_the_bound_of_the_paper() -> None:
    """For square matrices a component stays from x = (1 + t)(1 + 1 / t), t = 2.5129: 4.9052."""
    random = np.random.default_rng(1)
    n = 400
    left, right = (np.linalg.qr(random.standard_normal((n, n)))[0] for _ in range(2))
    noise = np.linalg.svd(random.standard_normal((n, n)), compute_uv=False)
    for factor, rank in ((1.1, 1), (0.9, 0)):
        values = np.append(math.sqrt(factor * 4.9052 * n), noise[:-1])
        assert evbmf_rank((left * values) @ right) == rank


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, (3, 1), groups=2), nn.Flatten(), nn.Linear(30, 12)
    )


CHOICES = {
    "0": [
        svd(3), LayerChoice(decomposition="svd", ranks=(4,), options={"folding": "kernel_last"}),
        LayerChoice(decomposition="spatial_svd", ranks=(5,)), LayerChoice(decomposition="tucker2", ranks=(4, 3)),
        LayerChoice(decomposition="cp", ranks=(6,)), LayerChoice(decomposition="tucker2", ranks=(8, 6)),
    ],
    "1": [svd(2)],
    "3": [svd(1), svd(5), svd(12)],
}  # fmt: skip


def network_profile() -> Profile:
    """Every choice in 32 and in 8 bits."""
    layers = []
    for name, choices in CHOICES.items():
        listed = [choice.with_bits(bits, bits) for choice in (DENSE, *choices) for bits in (32, 8)]
        candidates = tuple(Candidate(choice=choice, loss=0.0, latency_ms=1.0, n_bytes=1) for choice in listed)
        layers.append(LayerProfile(name=name, candidates=candidates))
    return Profile(layers=tuple(layers), dense_latency_ms=3.0, dense_bytes=3)


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Sequential, Profile, WeightErrors]:
    model, profile = network(), network_profile()
    # The first layer's weight has a few strong components, as trained weights do.
    with torch.no_grad():
        model[0].weight += 4 * torch.einsum("tr,rsij->tsij", torch.randn(8, 2), torch.randn(2, 6, 3, 3))
        model[3].weight += 3 * torch.randn(12, 3) @ torch.randn(3, 30)
    return model, profile, measure_weights(model, Factorisations(model, {}), profile)


def figure(measured: Any, what: str, layer: str, choice: LayerChoice) -> float:
    _, profile, errors = measured
    row = list(CHOICES).index(layer)
    value: float = getattr(errors, what)[row][profile.layers[row].index(choice)]
    return value


def test_undecomposed_layers_lose_nothing_and_bits_make_no_difference(measured: Any) -> None:
    for what in ("energy_lost", "spectral_error", "weakening"):
        for layer, choices in CHOICES.items():
            assert figure(measured, what, layer, DENSE) == figure(measured, what, layer, INT8) == 0
            for choice in choices:
                assert figure(measured, what, layer, choice) == figure(measured, what, layer, choice.with_bits(8, 8))


@pytest.mark.parametrize(("layer", "rank"), [("0", 3), ("3", 1), ("3", 5)])
def test_a_truncated_svd_loses_the_singular_values_that_it_leaves_out(measured: Any, layer: str, rank: int) -> None:
    weight = measured[0].get_submodule(layer).weight.detach().double().flatten(1)
    values = torch.linalg.svdvals(weight)
    lost = float(values[rank:].square().sum() / values.square().sum())
    assert figure(measured, "energy_lost", layer, svd(rank)) == pytest.approx(lost, rel=1e-4)
    assert figure(measured, "spectral_error", layer, svd(rank)) == pytest.approx(
        float(values[rank] / values[0]), rel=1e-4
    )


@pytest.mark.parametrize("choice", CHOICES["0"], ids=lambda choice: choice.label)
def test_errors_are_those_of_the_factorisations_own_weight(measured: Any, choice: LayerChoice) -> None:
    model = measured[0]
    weight = model[0].weight.detach().double()
    change = weight - Factorisations(model, {}).of("0", choice).weight(choice.ranks).double()
    lost = float(change.square().sum() / weight.square().sum())
    norm = float(torch.linalg.matrix_norm(change.flatten(1), 2) / torch.linalg.matrix_norm(weight.flatten(1), 2))
    assert figure(measured, "energy_lost", "0", choice) == pytest.approx(lost, rel=1e-6, abs=1e-10)
    assert figure(measured, "spectral_error", "0", choice) == pytest.approx(norm, rel=1e-6, abs=1e-6)


def test_of_groups_the_largest_operator_norm_counts(measured: Any) -> None:
    model = measured[0]
    weight = model[1].weight.detach().double()
    change = weight - Factorisations(model, {}).of("1", svd(2)).weight((2,)).double()
    norms = [max(torch.linalg.matrix_norm(part.flatten(1), 2) for part in w.chunk(2)) for w in (change, weight)]
    assert figure(measured, "spectral_error", "1", svd(2)) == pytest.approx(float(norms[0] / norms[1]), rel=1e-6)


def test_weakening_is_the_way_from_full_ranks_to_those_of_evbmf(measured: Any) -> None:
    weight = measured[0][0].weight.detach().double()
    by_output = evbmf_rank(weight.flatten(1).numpy())
    by_input = evbmf_rank(weight.transpose(0, 1).flatten(1).numpy())
    by_column = evbmf_rank(weight.permute(0, 3, 1, 2).reshape(24, 18).numpy())
    assert 0 < by_output < 8 and 0 < by_input < 6 and 0 < by_column < 18
    out, given = (8 - 4) / (8 - by_output), (6 - 3) / (6 - by_input)
    expected = [(8 - 3) / (8 - by_output), (6 - 4) / (6 - by_input), (18 - 5) / (18 - by_column), max(out, given)]
    found = [figure(measured, "weakening", "0", choice) for choice in CHOICES["0"]]
    assert found == [*map(pytest.approx, expected), math.inf, 0.0], "cp's ranks are those of no matrix"
    assert figure(measured, "weakening", "3", svd(12)) == 0


def test_ranks_in_which_evbmf_finds_nothing_are_kept() -> None:
    model, profile = nn.Sequential(nn.Linear(40, 20)), network_profile()
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(0))
    profile = profile.model_copy(update={"layers": (profile.layers[2].model_copy(update={"name": "0"}),)})
    errors = measure_weights(model, Factorisations(model, {}), profile)
    assert errors.weakening == ((0.0, 0.0, *6 * (math.inf,)),)


# Samplers


def make_sampler(name: str, profile: Profile, **changes: Any) -> RuleSampler:
    return RuleSampler(profile, name, make_errors(profile), **changes)


def opened(sampler: RuleSampler) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * 3, sampler=sampler)


def asked(study: optuna.Study, profile: Profile, n: int) -> list[dict[str, Any]]:
    """The plans of `n` trials, each told before the next is asked for."""
    plans = []
    for _ in range(n):
        trial = study.ask(distributions(profile))
        plans.append(trial.params)
        study.tell(trial, [0.0, 0.0, 0.0])
    return plans


@pytest.mark.parametrize("name", ORDERS)
def test_every_trial_gets_another_plan_the_same_in_every_study(name: str) -> None:
    profile = varied()
    plans = asked(opened(make_sampler(name, profile)), profile, 14)
    assert all(plan != other for plan, other in itertools.combinations(plans, 2))
    assert asked(opened(make_sampler(name, profile)), profile, 14) == plans
    dense = to_params(profile, [layer.dense for layer in profile.layers])
    assert plans[0] == dense, "the mildest comes first"


@pytest.mark.parametrize("name", ORDERS)
def test_a_study_goes_on_where_it_stopped(name: str) -> None:
    profile = varied()
    plans = asked(opened(make_sampler(name, profile)), profile, 10)
    study = opened(make_sampler(name, profile))
    resumed = asked(study, profile, 4)
    study.sampler = make_sampler(name, profile)
    assert resumed + asked(study, profile, 6) == plans


@pytest.mark.parametrize("name", ORDERS)
def test_workers_that_ask_at_once_get_different_plans(name: str) -> None:
    profile = varied()
    expected = asked(opened(make_sampler(name, profile)), profile, 6)
    study = opened(make_sampler(name, profile))
    together = [study.ask(distributions(profile)).params for _ in range(2)]
    # Asked for, but neither has said which plan it got.
    undecided = [study.ask() for _ in range(2)]
    late = study.ask(distributions(profile)).params
    for trial in undecided:
        for layer in profile.layers[:-1]:
            trial.suggest_int(layer.name, 0, len(layer.candidates) - 1)
    plans = [*together, *(trial.params for trial in undecided), late]
    assert plans == expected[:5]
    assert study.ask(distributions(profile)).params == expected[5]


@pytest.mark.parametrize("name", ORDERS)
def test_what_any_trial_has_is_passed_over(name: str) -> None:
    profile = varied()
    expected = asked(opened(make_sampler(name, profile)), profile, 8)
    study = opened(make_sampler(name, profile))
    for plan, state in (
        (expected[1], TrialState.COMPLETE),
        (expected[2], TrialState.PRUNED),
        (expected[4], TrialState.FAIL),
    ):
        values = [0.0, 0.0, 0.0] if state is TrialState.COMPLETE else None
        study.add_trial(
            optuna.trial.create_trial(state=state, params=plan, distributions=distributions(profile), values=values)
        )
    study.enqueue_trial(expected[0])
    running = study.ask()
    study.enqueue_trial(expected[3])
    # The queue comes first; a worker beside it passes over what is queued.
    frozen = optuna.trial.create_trial(state=TrialState.RUNNING)
    frozen.number = len(study.trials)
    beside = study.sampler.sample_relative(study, frozen, distributions(profile))
    assert running.number == 3 and beside == expected[5]
    assert study.ask(distributions(profile)).params == expected[3]
    assert study.ask(distributions(profile)).params == expected[5]


@pytest.mark.parametrize("name", RULES)
def test_bits_take_turns_and_the_ends_and_the_middle_come_first(name: str) -> None:
    profile = varied()
    plans = asked(opened(make_sampler(name, profile)), profile, 10)
    for turn, table in enumerate(rule_tables(profile, make_errors(profile))):
        path = RULES[name](table)
        first = list(dict.fromkeys(path.at(knob) for knob in (0, 1, 0.5, 0.25, 0.75)))
        assert len(first) >= 3
        assert plans[turn::2][: len(first)] == [to_params(profile, plan) for plan in first]


def test_knobs_halve_the_stretches_and_lose_no_plan() -> None:
    plans = np.arange(9)[:, None]
    even = Path(knobs=np.linspace(0, 1, 9), plans=plans)
    assert visiting_order(even)[:, 0].tolist() == [0, 8, 4, 2, 6, 1, 5, 3, 7]
    crowded = Path(knobs=np.array([0.0, 1e-9, 2e-9, *np.linspace(0.5, 1, 6)]), plans=plans)
    assert sorted(visiting_order(crowded)[:, 0].tolist()) == list(range(9))


@settings(max_examples=30, deadline=None)
@given(drawn=tables(), name=st.sampled_from(sorted(ORDERS)))
def test_a_rule_tries_all_its_plans_and_then_repeats_the_last(drawn: tuple[Profile, WeightErrors], name: str) -> None:
    profile, errors = drawn
    study = opened(RuleSampler(profile, name, errors, n_prices=5))
    n_plans = (
        len(price_sweep(profile, 5, 0))
        if name == "price_sweep"
        else len({tuple(p) for table in rule_tables(profile, errors) for p in RULES[name](table).plans.tolist()})
    )
    plans = [tuple(plan.items()) for plan in asked(study, profile, n_plans + 2)]
    assert len(set(plans)) == n_plans
    assert plans[-3:] == [plans[-1]] * 3


def test_the_price_sweep_comes_from_coarse_to_fine() -> None:
    profile = varied()
    study = opened(RuleSampler(profile, "price_sweep", n_prices=9, seed=3, objectives=("drop", "bytes")))
    swept = coarse_to_fine(price_sweep(profile, 9, 3, ("drop", "bytes")))
    assert asked(study, profile, 9) == [to_params(profile, plan) for plan in swept]


@pytest.mark.parametrize("name", ORDERS)
def test_layers_without_a_choice_have_one_plan(name: str) -> None:
    profile = make_profile(3, n_single=3)
    study = opened(make_sampler(name, profile))
    assert asked(study, profile, 3) == [{}, {}, {}]
    with pytest.raises(StudyError, match="'head.0' is asked for .* no layer of the table with a choice"):
        study.ask().suggest_int("head.0", 0, 1)


@pytest.mark.parametrize("name", sorted(NEED_WEIGHT_ERRORS))
def test_rules_that_go_by_the_weights_need_their_errors(name: str) -> None:
    with pytest.raises(StudyError, match=f"rule '{name}' goes by the weights' errors"):
        RuleSampler(varied(), name)


def test_other_rules_need_no_weights_and_unknown_ones_are_refused() -> None:
    profile = varied()
    for name in ORDERS.keys() - NEED_WEIGHT_ERRORS:
        assert asked(opened(RuleSampler(profile, name)), profile, 5) == asked(
            opened(make_sampler(name, profile)), profile, 5
        )
    with pytest.raises(StudyError, match=r"rule 'vbmf' is unknown; choose one of \['alds', 'energy', 'evbmf'"):
        RuleSampler(profile, "vbmf")


def test_define_by_run_objectives_get_whole_plans() -> None:
    profile = varied()

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        free = [layer for layer in profile.layers if len(layer.candidates) > 1]
        chosen = [trial.suggest_int(layer.name, 0, len(layer.candidates) - 1) for layer in free]
        return profile.predict([*chosen, 0])

    study = opened(make_sampler("greedy", profile))
    study.optimize(objective, n_trials=6)
    assert [trial.params for trial in study.trials] == asked(opened(make_sampler("greedy", profile)), profile, 6)


@pytest.mark.parametrize("name", ORDERS)
def test_the_search_goes_on_with_neighbours_where_a_rule_has_no_plan_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = varied(1)
    sampler = make_sampler(name, profile)
    monkeypatch.setitem(SAMPLERS, "rule", lambda setting: lambda n_trials, n_seeds: sampler)
    with opened_for_search() as study:
        told = search(study, profile, sampler_name="rule", n_prices=0, n_trials=50)
    origins = [origin for _, origin in told.started]
    assert len(told.finished) == len(profile.layers[0].candidates) == 10, "every plan, once"
    assert origins[:2] == ["dense", "int8"] and "rule" in origins
    assert origins == sorted(origins, key=["dense", "int8", "rule", "neighbour"].index)
