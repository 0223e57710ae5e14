"""The candidate table of a trained network, with latencies from a formula and from the runtime."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import INT8
from torch import nn

from ranksearch.bits import OfferedBits
from ranksearch.candidates import Candidate, Profile
from ranksearch.compression import compress, rebuild
from ranksearch.controls import control_plans
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.factorisations import Factorisations
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.layer_timing import LayerTimes
from ranksearch.layers import LayerSpec
from ranksearch.loss_meter import LossMeter
from ranksearch.pareto import non_dominated
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.profiling import MAX_CANDIDATES, ProfileMaker
from ranksearch.scoring import output_distance
from ranksearch.spec import Objective, Space
from ranksearch.statistics import collect
from ranksearch.weights import bytes_in_file
from ranksearch.workbench import Workbench

DENSE_MS = 2.0


def ratio(choice: LayerChoice) -> float:
    """A latency that lies: eight bits halve it, ranks scale it, and one in five choices is slow."""
    rank = sum(choice.ranks) / 40 if choice.ranks else 1.0
    slow = 1.5 if sum(choice.ranks) % 5 == 4 else 1.0
    return rank * slow * (0.5 if choice.weight_bits == 8 else 1.0)


def by_formula(_info: LayerInfo, _layer: nn.Module, choices: Sequence[LayerChoice]) -> LayerTimes:
    # Dense against itself is timed with noise, which must not be told as a figure.
    return {choice: (0.9 if choice == DENSE else ratio(choice), 0.4) for choice in choices}


def offered(*weight_bits: int) -> Callable[[LayerSpec], list[OfferedBits]]:
    """Kernels for floats and for 8 bits; other bits for storage only."""
    kernels = {32: 32, 8: 8}
    bits = [
        OfferedBits(weight_bits=w, activation_bits=kernels.get(w, 32), storage_only=w not in kernels)
        for w in weight_bits
    ]
    return lambda _spec: bits


def make(
    bench: Workbench, factorisations: Factorisations, controls: Sequence[Plan] | None = None, **changes: Any
) -> Profile:
    fields: dict[str, Any] = {
        "model": bench.model,
        "layers": bench.found.layers,
        "factorisations": factorisations,
        "meter": LossMeter(bench.model, bench.calibration, factorisations, bench.spec.loss),
        "space": bench.spec.space,
        "objectives": ("drop", "latency", "bytes"),
        "bits": offered(32, 8),
        "time_layer": by_formula,
        "time_plan": lambda plan: sum(0.2 * ratio(plan.choice(name)) for name in bench.found.layers) + 0.2,
    }
    plans = [plan for _, plan in control_plans(bench)] if controls is None else controls
    # Of a part of the layers, a table takes plans for that part.
    names = (fields | changes)["layers"]
    plans = [Plan(layers={name: plan.choice(name) for name in names}) for plan in plans]
    return ProfileMaker(**(fields | changes)).make(plans, DENSE_MS, bench.dense.model_bytes)


@pytest.fixture(scope="module")
def profile(bench: Workbench, factorisations: Factorisations) -> Profile:
    return make(bench, factorisations)


def kept(bench: Workbench, layer: str) -> set[LayerChoice]:
    return {DENSE, *(plan.choice(layer) for _, plan in control_plans(bench))}


def losses(candidates: Sequence[Candidate], objectives: Sequence[Objective]) -> np.ndarray[Any, Any]:
    columns = {"drop": "loss", "latency": "latency_ms", "bytes": "n_bytes"}
    return np.array([[getattr(candidate, columns[name]) for name in objectives] for candidate in candidates])


def test_every_layer_has_dense_and_the_controls_fastest_first(profile: Profile, bench: Workbench) -> None:
    assert [layer.name for layer in profile.layers] == list(bench.found.layers)
    for layer in profile.layers:
        choices = [candidate.choice for candidate in layer.candidates]
        assert len(set(choices)) == len(choices) <= MAX_CANDIDATES
        assert kept(bench, layer.name) <= set(choices) and INT8 in choices
        times = [candidate.latency_ms for candidate in layer.candidates]
        assert times == sorted(times)
        assert layer.candidates[layer.dense].loss == 0.0


@pytest.mark.parametrize("objectives", [("drop", "latency", "bytes"), ("drop", "latency"), ("drop", "bytes")])
def test_no_other_candidate_is_dominated(
    objectives: tuple[Objective, ...], bench: Workbench, factorisations: Factorisations
) -> None:
    for layer in make(bench, factorisations, objectives=objectives).layers:
        good = non_dominated(losses(layer.candidates, objectives))
        dominated = {c.choice for c, is_good in zip(layer.candidates, good, strict=True) if not is_good}
        assert dominated <= kept(bench, layer.name)


def test_the_same_times_give_the_same_table(profile: Profile, bench: Workbench, factorisations: Factorisations) -> None:
    again = make(bench, factorisations)
    assert again == profile and again.hash() == profile.hash()
    assert Profile.from_json(profile.to_json()) == profile


def test_bytes_are_what_a_layer_adds_to_the_file(profile: Profile, bench: Workbench) -> None:
    for layer in profile.layers:
        module = nn.Sequential(bench.model.get_submodule(layer.name))
        for candidate in layer.candidates:
            assert candidate.n_bytes == bytes_in_file(rebuild(module, Plan(layers={"0": candidate.choice})))


def test_latencies_are_ratios_to_dense(profile: Profile) -> None:
    for layer in profile.layers:
        dense_ms = layer.candidates[layer.dense].latency_ms
        for candidate in layer.candidates:
            assert candidate.latency_ms == pytest.approx(dense_ms * ratio(candidate.choice))
    dense_ms = sum(layer.candidates[layer.dense].latency_ms for layer in profile.layers)
    # Each 0.4 of the model's 2.0 ms, and whole plans say the same, to within the line's reluctance to turn.
    assert dense_ms == pytest.approx(4 * 0.4, rel=0.02)
    assert profile.latency_model.slope == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("wrong", [0.1, 5.0])
def test_whole_plans_set_the_layers_to_scale(wrong: float, bench: Workbench, factorisations: Factorisations) -> None:
    """Layers that are timed too fast or too slow, as may be where the runtime fuses them with their neighbours."""
    table = make(
        bench, factorisations, time_layer=lambda *given: {choice: (ratio(choice), wrong) for choice in given[2]}
    )
    dense_ms = sum(layer.candidates[layer.dense].latency_ms for layer in table.layers)
    assert dense_ms == pytest.approx(4 * 0.4, rel=0.1)
    for indices in ([0] * 4, [layer.dense for layer in table.layers]):
        measured = sum(0.2 * ratio(table.plan(indices).choice(layer.name)) for layer in table.layers) + 0.2
        assert table.predict(indices)[1] == pytest.approx(measured, rel=0.1)


def test_layers_of_one_shape_share_what_is_timed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(8, 16, 3), nn.ReLU(), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))]
        model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
        calibration = [(torch.randn(32, 8, 8, 8), torch.randint(10, (32,))) for _ in range(2)]
    layers = compressible_layers(model, calibration[0][0]).layers
    timed: list[set[LayerChoice]] = []

    def time_layer(info: LayerInfo, layer: nn.Module, choices: Sequence[LayerChoice]) -> LayerTimes:
        if info.name in ("2", "3", "4"):
            timed.append({*choices, DENSE})
        return by_formula(info, layer, choices)

    factorisations = Factorisations(model, collect(model, layers, calibration, F.cross_entropy))
    table = ProfileMaker(
        model=model,
        layers=layers,
        factorisations=factorisations,
        meter=LossMeter(model, calibration, factorisations, F.cross_entropy),
        space=Space(decompositions=("none", "svd", "spatial_svd", "tucker2"), rank_multiple=2),
        objectives=("drop", "latency", "bytes"),
        bits=offered(32, 8),
        time_layer=time_layer,
        time_plan=lambda _plan: 0.9,
    ).make([], DENSE_MS, 100_000)
    assert len(timed) == 3 and timed[0] == timed[1] == timed[2] and 5 <= len(timed[0]) <= MAX_CANDIDATES
    found = {layer.name: {candidate.choice for candidate in layer.candidates} for layer in table.layers}
    assert found["2"] | found["3"] | found["4"] <= timed[0]


def test_losses_are_nats_of_kl_by_measurement(
    profile: Profile, bench: Workbench, factorisations: Factorisations
) -> None:
    """A layer's loss is that of the model with this layer alone changed, to within the closed form's error."""
    inputs = bench.calibration[3][0]
    predicted, measured = [], []
    for layer in profile.layers:
        for candidate in layer.candidates:
            if candidate.choice.decomposition != "none" and candidate.choice.weight_bits == 32:
                plan = Plan(layers={layer.name: candidate.choice})
                changed = compress(
                    bench.model, plan, calibration=bench.calibration[:2], factorisations=factorisations
                ).eval()
                measured.append(
                    output_distance(changed(inputs).detach(), bench.model(inputs).detach(), bench.spec.loss)
                )
                predicted.append(candidate.loss)
    ratios = np.log(np.array(predicted) / np.array(measured))
    assert len(ratios) >= 8
    assert abs(np.median(ratios)) < np.log(2.5) and np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.8


def test_eight_bits_cost_something_more_than_float(profile: Profile) -> None:
    for layer in profile.layers:
        by_choice = {candidate.choice: candidate.loss for candidate in layer.candidates}
        assert by_choice[INT8] > 0.0
        for choice, loss in by_choice.items():
            twin = choice.model_copy(update={"weight_bits": 32, "activation_bits": 32})
            if choice.weight_bits == 8 and twin in by_choice:
                assert loss > by_choice[twin]


@pytest.mark.parametrize(
    ("space", "bits", "decompositions"),
    [
        (Space(weight_bits=(8,), rank_multiple=2), {8}, set(DECOMPOSITIONS)),
        (Space(weight_bits=(32,), rank_multiple=2), {32}, set(DECOMPOSITIONS)),
        (Space(decompositions=("svd",), rank_multiple=2), {32, 8}, {"svd"}),
    ],
)
def test_the_space_bounds_all_but_the_controls(
    space: Space, bits: set[int], decompositions: set[str], bench: Workbench, factorisations: Factorisations
) -> None:
    narrow = replace(bench, spec=replace(bench.spec, space=space))
    plans = [plan for _, plan in control_plans(narrow)]
    table = make(narrow, factorisations, plans, space=space, bits=offered(*space.weight_bits))
    for layer in table.layers:
        wanted = {DENSE, *(plan.choice(layer.name) for plan in plans)}
        found = {candidate.choice for candidate in layer.candidates}
        assert wanted <= found
        assert {choice.weight_bits for choice in found - wanted} <= bits
        assert {choice.decomposition for choice in found - wanted} <= decompositions


def test_a_target_without_int8_gets_none(bench: Workbench, factorisations: Factorisations) -> None:
    table = make(bench, factorisations, [], bits=offered(32))
    assert all(c.choice.weight_bits == 32 for layer in table.layers for c in layer.candidates)


def test_bits_for_storage_only_take_as_long_as_float_and_fewer_bytes(
    bench: Workbench, factorisations: Factorisations
) -> None:
    timed: set[LayerChoice] = set()

    def time_layer(info: LayerInfo, layer: nn.Module, choices: Sequence[LayerChoice]) -> LayerTimes:
        timed.update(choices)
        return by_formula(info, layer, choices)

    table = make(bench, factorisations, bits=offered(32, 16, 8, 4), time_layer=time_layer)
    assert {choice.weight_bits for choice in timed} == {32, 8}
    for layer in table.layers:
        by_choice = {candidate.choice: candidate for candidate in layer.candidates}
        assert len(by_choice) <= MAX_CANDIDATES
        assert {candidate.choice.weight_bits for candidate in layer.candidates if candidate.storage_only} <= {16, 4}
        for choice, candidate in by_choice.items():
            assert candidate.storage_only == (choice.weight_bits in (16, 4))
            assert candidate.label.endswith("(storage only)") == candidate.storage_only
            if candidate.storage_only and choice.in_float in by_choice:
                in_float = by_choice[choice.in_float]
                assert candidate.latency_ms == in_float.latency_ms
                assert candidate.n_bytes < in_float.n_bytes and candidate.loss >= in_float.loss
    assert any(candidate.choice.weight_bits == 4 for layer in table.layers for candidate in layer.candidates)


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_whatever_the_times(data: st.DataObject, bench: Workbench, factorisations: Factorisations) -> None:
    ratios: dict[str, float] = {}

    def time_layer(info: LayerInfo, _layer: nn.Module, choices: Sequence[LayerChoice]) -> LayerTimes:
        for key in (info.name + choice.key() for choice in choices):
            if key not in ratios:
                ratios[key] = data.draw(st.floats(0.05, 3.0))
        return {choice: (ratios[info.name + choice.key()], 0.3) for choice in choices}

    layers = {name: info for name, info in bench.found.layers.items() if name in ("3", "8")}
    table = make(bench, factorisations, layers=layers, time_layer=time_layer)
    for layer in table.layers:
        good = non_dominated(losses(layer.candidates, ("drop", "latency", "bytes")))
        dominated = {c.choice for c, is_good in zip(layer.candidates, good, strict=True) if not is_good}
        assert dominated <= kept(bench, layer.name)
        assert layer.candidates[layer.dense].choice == DENSE and len(layer.candidates) <= MAX_CANDIDATES
