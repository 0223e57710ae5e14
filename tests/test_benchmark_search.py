"""What the benchmark of searches computes on its own: hypervolumes on test images, trials to reach one, its records."""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optuna.samplers import BaseSampler, RandomSampler
from synthetic_study import INT8, make_profile

from ranksearch.candidates import Profile
from ranksearch.optimization import ResolvedLimits
from ranksearch.optimization.records import read_records
from ranksearch.optimization.weight_errors import WeightErrors
from ranksearch.pareto import hypervolume

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"
METHODS = (
    "random", "NSGA-II 20", "NSGA-II 50", "TPE", "uniform sweep", "price sweep", "seeded NSGA-II", "seeded TPE",
    "PriceSampler", "no refit", "no swaps", "no power means", "no closed form", "no latency", "no equal shares",
    "with ladder",
)  # fmt: skip
# Those whose every trial is the rule's own; the last three go by the weights.
RULES = ("uniform", "greedy", "energy", "evbmf", "alds")
SAMPLED = [name for name in METHODS if "sweep" not in name]


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import search
        import search_ablations
        import search_asking
        import search_evaluations
        import search_figures
        import search_methods
        import search_published
        import search_recovered
        import search_runs
        import search_subjects
        import search_uniform

        yield {
            "asking": search_asking,
            "search": search,
            "evaluations": search_evaluations,
            "figures": search_figures,
            "methods": search_methods,
            "published": search_published,
            "runs": search_runs,
            "ablations": search_ablations,
            "recovered": search_recovered,
            "subjects": search_subjects,
            "uniform": search_uniform,
        }
    finally:
        sys.path.remove(str(BENCHMARKS))


class Measure:
    """Measures what the table predicts; on test images a tenth more is lost. Counts what it was asked for."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.asked: list[tuple[tuple[int, ...], str]] = []

    def __call__(self, indices: tuple[int, ...], split: str) -> dict[str, Any]:
        self.asked.append((indices, split))
        loss, _, size = self.profile.predict(indices)
        drop = {"validation": loss, "test": 1.1 * loss, "fine_tuned": 0.2 * loss}[split]
        row = {"drop": drop, "low": drop - 0.01, "high": drop + 0.01, "seconds": {"all": 0.5}}
        if split == "test":
            return row
        return row | {"distance": loss, "bytes_ratio": size} | ({} if split == "validation" else {"test": 0.25 * loss})


class Network:
    """What the table does not tell of a network: multiply-adds that fall as bytes do, errors as losses do."""

    profile_seconds = 10.0

    def __init__(self, profile: Profile) -> None:
        self.macs = [[float(c.n_bytes) for c in layer.candidates] for layer in profile.layers]
        losses = tuple(tuple(c.loss for c in layer.candidates) for layer in profile.layers)
        self.weight_errors = WeightErrors(energy_lost=losses, spectral_error=losses, weakening=losses)


def opened(rooms: dict[str, Any], folder: Path, profile: Profile, rung: str = "quick") -> tuple[Any, Measure]:
    """Evaluations on record in the folder, and what measures the others."""
    measure = Measure(profile)
    recorded = rooms["evaluations"].Recorded(folder / "evaluations.jsonl")
    return rooms["evaluations"].Evaluations(profile, recorded, measure, rung, Network(profile)), measure


def uniformly(evaluations: Any, *choices: int) -> list[tuple[int, ...]]:
    """Plans that take the same candidate for every layer that has a choice."""
    n_free = sum(len(layer.candidates) > 1 for layer in evaluations.profile.layers)
    return [(choice,) * n_free + evaluations.dense[n_free:] for choice in choices]


def test_a_plan_is_evaluated_once_whoever_asks_and_whenever(rooms: dict[str, Any], tmp_path: Path) -> None:
    profile = make_profile()
    evaluations, measure = opened(rooms, tmp_path, profile)
    plans = uniformly(evaluations, 0, 3)
    first = [evaluations.figures(plan) for plan in [*plans, *plans]]
    drops = [evaluations.test_drop(plan) for plan in plans]
    assert len(measure.asked) == 4 == evaluations.n_new
    again, untouched = opened(rooms, tmp_path, profile)
    assert [again.figures(plan) for plan in [*plans, *plans]] == first
    assert [again.test_drop(plan) for plan in plans] == drops
    assert not untouched.asked


def test_dense_is_known_without_an_evaluation(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile())
    assert evaluations.figures(evaluations.dense).losses == (0.0, 1.0, 1.0)
    assert evaluations.test_drop(evaluations.dense) == 0.0
    assert not measure.asked


@pytest.mark.parametrize("n_lost", [1, 30])
def test_a_torn_last_line_costs_its_own_plan_alone(rooms: dict[str, Any], tmp_path: Path, n_lost: int) -> None:
    profile = make_profile()
    evaluations, _ = opened(rooms, tmp_path, profile)
    plans = uniformly(evaluations, 0, 3)
    figures = [evaluations.figures(plan) for plan in plans]
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-n_lost])
    again, measure = opened(rooms, tmp_path, profile)
    assert [again.figures(plan) for plan in plans] == figures
    whole = n_lost == 1  # the line's end was lost, and nothing of the line
    assert measure.asked == ([] if whole else [(plans[1], "validation")])
    last, untouched = opened(rooms, tmp_path, profile)
    assert [last.figures(plan) for plan in plans] == figures and not untouched.asked


def test_records_say_where_the_time_went(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    assert rooms["evaluations"].mean_seconds(evaluations.recorded) == {}
    for plan in uniformly(evaluations, 0, 3):
        evaluations.figures(plan)
    assert rooms["evaluations"].mean_seconds(evaluations.recorded) == {"all": 0.5, "median": 0.5}


def test_hypervolumes_are_of_test_drops_of_the_front_that_validation_chose(
    rooms: dict[str, Any], tmp_path: Path
) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile())
    plans = uniformly(evaluations, 3, 0, 4)
    # Nobody's front holds what another beats on validation, whatever it does on test images.
    tested = {plans[0]: (0.02, 0.5, 0.5), plans[1]: (0.03, 0.6, 0.6), plans[2]: (0.01, 0.9, 0.9)}
    for plan, losses in tested.items():
        figures = rooms["evaluations"].Figures(
            drop=losses[0], low=0.0, high=0.1, distance=0.0, latency_ratio=losses[1], bytes_ratio=losses[2]
        )
        evaluations._figures[plan] = figures
        evaluations._test[plan] = {plans[0]: 0.04, plans[2]: 0.0}.get(plan, -1.0)
    volumes = rooms["figures"].volumes(evaluations, plans, range(100), "measured")
    alone = 0.06 * 0.55 * 0.5
    assert volumes == {
        1: pytest.approx(alone),
        2: pytest.approx(alone),
        3: pytest.approx(hypervolume(np.array([(0.04, 0.5, 0.5), (0.0, 0.9, 0.9)]))),
    }
    assert not measure.asked


def test_only_plans_of_some_front_are_tested(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile())
    rooms["figures"].trace(rooms["methods"].METHODS["random"], evaluations, 0, [30], (10,), "measured")
    tested = [plan for plan, split in measure.asked if split == "test"]
    assert 0 < len(tested) < 30
    assert len(set(tested)) == len(tested)


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_distinct_plans_and_the_same_again(rooms: dict[str, Any], tmp_path: Path, name: str) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile())
    method = rooms["methods"].METHODS[name]
    plans = list(method.run(evaluations, 3, 24))
    assert len(set(plans)) == len(plans) <= 24
    assert len(plans) == 24 or name == "uniform sweep"
    assert evaluations.dense not in plans
    assert list(method.run(evaluations, 3, 24)) == plans
    assert {plan for plan, _ in measure.asked} <= set(plans)
    if method.nested:
        assert list(method.run(evaluations, 3, 9)) == plans[:9]


@pytest.mark.parametrize("rule", RULES)
def test_published_rules_have_their_own_plans_alone(rooms: dict[str, Any], tmp_path: Path, rule: str) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    plans = list(rooms["methods"].METHODS[rule].run(evaluations, 0, 15))
    assert len(set(plans)) == len(plans) and 5 <= len(plans) <= 15
    assert list(rooms["methods"].METHODS[rule].run(evaluations, 1, 15)) == plans


def test_the_fine_tuned_rung_tells_of_fine_tuned_plans_alone(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile(), rung="fine_tuned")
    plan = next(iter(rooms["methods"].METHODS["random"].run(evaluations, 0, 1)))
    loss, latency, size = evaluations.profile.predict(plan)
    assert evaluations.figures(plan).losses == (0.2 * loss, latency, size)
    assert evaluations.test_drop(plan) == 0.25 * loss
    assert measure.asked == [(plan, "fine_tuned")]
    assert evaluations.seconds() == [0.5]


def test_the_ladder_spares_trainings_and_loses_little(rooms: dict[str, Any], tmp_path: Path) -> None:
    """In this world lower rungs order plans without fault, so that they earn the power to stop them."""
    volumes = {}
    for name in ("PriceSampler", "with ladder"):
        evaluations, measure = opened(rooms, tmp_path / name, make_profile(n_layers=20), rung="fine_tuned")
        (tmp_path / name).mkdir()
        found = rooms["figures"].trace(rooms["methods"].METHODS[name], evaluations, 0, [60], range(61), "measured")
        volumes[name] = found[max(found)]
        quick = {plan for plan, split in measure.asked if split == "validation"}
        trained = {plan for plan, split in measure.asked if split == "fine_tuned"}
        assert bool(quick - trained) == (name == "with ladder")
    assert volumes["with ladder"] >= 0.98 * volumes["PriceSampler"]


def test_without_latency_a_sampler_sees_multiply_adds_and_is_told_latency(
    rooms: dict[str, Any], tmp_path: Path
) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    seen = rooms["ablations"].by_macs(evaluations)
    dense = evaluations.dense
    assert seen.predict(dense)[1] == pytest.approx(1.0)
    row, layer = next((i, layer) for i, layer in enumerate(seen.layers) if len(layer.candidates) > 2)
    other = evaluations.profile.layers[row]
    shares = [c.latency_ms / layer.candidates[layer.dense].latency_ms for c in layer.candidates]
    assert shares == pytest.approx([c.n_bytes / other.candidates[other.dense].n_bytes for c in other.candidates])
    plan = next(iter(rooms["methods"].METHODS["no latency"].run(evaluations, 0, 5)))
    assert evaluations.figures(plan).latency_ratio == evaluations.profile.predict(plan)[1]


def test_times_to_reach_count_the_table(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    share = rooms["figures"].share_of_time
    assert share(evaluations, 10, 200) is None  # nothing was timed yet
    list(rooms["methods"].METHODS["random"].run(evaluations, 0, 3))
    assert share(evaluations, 10, 200) == pytest.approx((10 + 10 * 0.5) / (200 * 0.5))
    assert share(evaluations, None, 200) is None


@pytest.mark.parametrize("name", [name for name in METHODS if name != "uniform sweep"])
def test_another_seed_gives_other_plans(rooms: dict[str, Any], tmp_path: Path, name: str) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    run = rooms["methods"].METHODS[name].run
    assert set(run(evaluations, 0, 12)) != set(run(evaluations, 1, 12))


def test_the_price_sweep_beats_random_plans(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile(n_layers=20))
    methods, trace = rooms["methods"].METHODS, rooms["figures"].trace
    swept, random = (trace(methods[name], evaluations, 0, [20], (3,), "measured") for name in ("price sweep", "random"))
    assert list(swept) == [20] and list(random) == [3, 20]
    assert swept[20] > 1.2 * random[20]


def test_seeded_searches_begin_as_a_study_does(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    begun = rooms["methods"].seeds(evaluations.profile, 0)
    assert begun[0] == evaluations.dense
    chosen = evaluations.profile.chosen(begun[1])
    assert [c.choice for c in chosen] == [INT8] * 7 + [chosen[-1].choice]
    assert len(begun) == len(set(begun)) >= 2 + rooms["methods"].N_SEEDED - 1
    for name in ("seeded NSGA-II", "seeded TPE"):
        assert list(rooms["methods"].METHODS[name].run(evaluations, 0, 12))[: len(begun) - 1] == begun[1:]


def test_searches_of_what_is_all_known_end(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile(n_layers=2))
    for name in METHODS:
        plans = list(rooms["methods"].METHODS[name].run(evaluations, 0, 50))
        assert len(set(plans)) == len(plans) <= 5  # one layer has six candidates, dense among them
    assert len(measure.asked) <= 5


def test_trials_carry_what_the_products_samplers_read(rooms: dict[str, Any], tmp_path: Path) -> None:
    seen: list[Any] = []

    class Reading(RandomSampler):
        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            seen.append(study)
            super().after_trial(study, trial, state, values)

    def make(_evaluations: Any, seed: int) -> BaseSampler:
        return Reading(seed=seed)

    evaluations, _ = opened(rooms, tmp_path, make_profile(n_layers=3))
    plans = list(rooms["runs"].sampled(make, evaluations, 0, 20))
    records = read_records(seen[0])
    tried = [evaluations.profile.indices(record.plan) for record in records if record.duplicate_of is None]
    assert [indices for indices in tried if indices != evaluations.dense] == plans
    assert any(record.duplicate_of is not None for record in records)
    for record in records:
        figures = evaluations.figures(evaluations.profile.indices(record.plan))
        assert record.evaluation is not None
        assert tuple(record.evaluation.losses.values()) == figures.losses
        told = seen[0].trials[record.number].user_attrs
        assert (told["drop_interval"], told["output_distance"]) == ([figures.low, figures.high], figures.distance)


def test_the_volume_at_a_number_of_trials_is_the_last_one_before(rooms: dict[str, Any]) -> None:
    volume_at = rooms["figures"].volume_at
    assert [volume_at({10: 0.3, 33: 0.4}, n) for n in (9, 10, 20, 50)] == [0.0, 0.3, 0.3, 0.4]


def test_trials_to_reach_a_volume_are_those_of_the_first_time(rooms: dict[str, Any]) -> None:
    figures = rooms["figures"]
    trace = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.4}
    assert [figures.trials_to_reach(trace, volume) for volume in (0.1, 0.25, 0.4, 0.5)] == [1, 2, 4, None]
    other = [{1: 0.25}, {1: 0.4}, {1: 0.5}]
    assert figures.reach([trace] * 3, other, 1) == {"median": 4, "reached": 2, "of": 3}
    assert figures.reach([trace] * 3, [{1: 0.5}] * 3, 1) == {"median": None, "reached": 0, "of": 3}


def test_pairs_are_seed_by_seed(rooms: dict[str, Any]) -> None:
    assert rooms["figures"].pairs([2.0, 1.0, 3.0], [1.0, 2.0, 2.0]) == {"wins": 2, "of": 3, "median_ratio": 1.5}
    assert rooms["figures"].quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.parametrize(("by", "met"), [("median", True), ("every seed", False)])
def test_targets_are_judged_by_the_median_or_every_seed(rooms: dict[str, Any], by: str, met: bool) -> None:
    target = rooms["figures"].Target(ours="a", ours_trials=5, other="b", other_trials=10, by=by)
    traces = {"a": [{5: 0.3}, {5: 0.1}, {5: 0.4}], "b": [{10: 0.2}, {10: 0.2}, {10: 0.2}]}
    assert target.judge(traces) is met
    assert target.judge({"a": traces["a"]}) is None


def test_targets_name_methods_that_there_are(rooms: dict[str, Any]) -> None:
    search = rooms["search"]
    for target in [*search.TARGETS, search.QUICK_TARGET]:
        assert {target.ours, target.other} <= set(rooms["methods"].METHODS)
        assert target.ours_trials > 0 and target.other_trials > 0
    assert set(search.BARS) | {search.BASELINE} <= set(rooms["methods"].METHODS)
    assert set(METHODS) <= set(rooms["methods"].METHODS)
    assert set(search.SEEDS) == set(rooms["subjects"].STUDIES)


def test_figures_of_a_network_are_printed_and_json(rooms: dict[str, Any], tmp_path: Path) -> None:
    search = rooms["search"]
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    methods = {name: rooms["methods"].METHODS[name] for name in METHODS}
    traces = search._traces("synthetic", evaluations, methods, 2, [5, 10], (5, 10), "estimated")
    figures = search._figures(evaluations, traces, [5, 10], search.TARGETS)
    lines = search._lines("synthetic", figures)
    assert all(any(line.strip().startswith(name) for line in lines) for name in METHODS)
    assert json.loads(json.dumps(figures))["seeds"] == 2
    assert figures["hypervolume"]["price sweep"][10]["median"] > figures["hypervolume"]["random"][10]["median"]


def test_drawn_batches_are_those_of_the_seed_and_leave_the_random_numbers_alone(rooms: dict[str, Any]) -> None:
    class Shuffled:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for rows in torch.randperm(10).split(4):
                yield rows.float(), rows

    drawn = rooms["subjects"].drawn
    state = torch.random.get_rng_state()
    first, second = (torch.cat([targets for _, targets in drawn(Shuffled(), 5, 0)]) for _ in range(2))
    assert torch.equal(first, second) and len(first) == 8
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_linear_network_is_eight_linear_layers(rooms: dict[str, Any]) -> None:
    network = rooms["subjects"].ResidualMLP()
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == 8


def test_bands_hold_ten_plans_of_like_latency_each(rooms: dict[str, Any]) -> None:
    profile = make_profile(n_layers=16)
    recovered = rooms["recovered"]
    bands = recovered.banded_plans(profile)
    assert bands == recovered.banded_plans(profile)
    assert [len(set(band)) for band in bands] == [10] * recovered.N_BANDS
    for band in bands:
        latencies = [profile.predict(plan)[1] for plan in band]
        assert max(latencies) <= 1.06 * min(latencies)


def test_agreement_with_training_is_told_inside_bands(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile(n_layers=16))
    figures = rooms["recovered"].agreement(evaluations)
    assert all(value > 0.99 for value in figures["correlation"]["predicted"] + figures["test"])
    assert sum(split == "fine_tuned" for _, split in measure.asked) == 30
    assert len(rooms["recovered"].agreement_lines("synthetic", json.loads(json.dumps(figures)))) == 8


def test_rank_correlation_is_spearmans(rooms: dict[str, Any]) -> None:
    correlation = rooms["recovered"].rank_correlation
    assert correlation([1, 2, 3, 4], [10, 20, 30, 900]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert correlation([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(0.8944, abs=1e-3)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_asking_is_timed_on_a_table_of_many_layers(rooms: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asking = rooms["asking"]
    profile = asking.deep_profile()
    assert len(profile.layers) == 200 and all(len(layer.candidates) == 12 for layer in profile.layers)
    monkeypatch.setattr(asking, "N_TRIALS", 20)
    monkeypatch.setattr(asking, "N_ASKED", 3)
    found = asking.asking_ms()
    assert found["median_ms"] > 0 and found["first_ms"] > 0 and found["trials"] == 20


def test_published_evaluations_are_those_on_record(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    found = rooms["figures"].trace(rooms["methods"].METHODS["random"], evaluations, 0, [12], (), "measured")
    plans = list(rooms["methods"].METHODS["random"].run(evaluations, 0, 12))
    for plan in plans:
        evaluations.test_drop(plan)
    published = rooms["published"]
    assert not published.is_published("Tiny", tmp_path)
    assert published.publish("Tiny", evaluations.profile, evaluations.recorded, tmp_path) == 12
    file = tmp_path / "tiny" / "evaluations.csv.gz"
    before = file.read_bytes()
    assert published.publish("Tiny", evaluations.profile, evaluations.recorded, tmp_path) == 12
    assert file.read_bytes() == before

    again = published.open_published("Tiny", tmp_path)
    assert again.profile == evaluations.profile
    assert [again.figures(plan) for plan in plans] == [evaluations.figures(plan) for plan in plans]
    assert [again.test_drop(plan) for plan in plans] == [evaluations.test_drop(plan) for plan in plans]
    assert rooms["figures"].trace(rooms["methods"].METHODS["random"], again, 0, [12], (), "measured") == found
    unknown = next(plan for plan in uniformly(again, 0, 1) if plan not in plans)
    with pytest.raises(LookupError, match=f"no validation row for plan {'-'.join(map(str, unknown))}"):
        again.figures(unknown)
    with pytest.raises(LookupError, match="nothing is published of other; there is tiny"):
        published.open_published("other", tmp_path)


def test_samplers_of_ones_own_are_compared_by_name(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    find = rooms["methods"].find_method
    name, method = find("optuna.samplers:RandomSampler")
    assert name == "optuna.samplers:RandomSampler"
    assert list(method.run(evaluations, 3, 5)) == list(find("random")[1].run(evaluations, 3, 5))
    for wrong in ("dice", "optuna.samplers:Dice", "no_such_module:Dice"):
        with pytest.raises(ArgumentTypeError, match=wrong):
            find(wrong)


def test_methods_that_need_the_network_are_left_out_without_it(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, _ = opened(rooms, tmp_path, make_profile())
    suiting = rooms["methods"].suiting
    assert set(rooms["methods"].METHODS) - set(suiting(evaluations)) == {"with ladder"}
    evaluations.subject = None
    missing = set(rooms["methods"].METHODS) - set(suiting(evaluations))
    assert missing == {"with ladder", "no latency", "energy", "evbmf", "alds"}


def test_plans_of_few_multiply_adds_are_found_within_a_latency(rooms: dict[str, Any], tmp_path: Path) -> None:
    evaluations, measure = opened(rooms, tmp_path, make_profile())
    by_macs = rooms["uniform"].ByMacs(evaluations)
    assert by_macs.profile.predict(by_macs.dense)[1:] == (1.0, 1.0)
    limits = ResolvedLimits(max_latency_ratio=0.6, max_bytes_ratio=0.5)
    plan = rooms["uniform"].best_plan(by_macs, limits, 20)
    assert plan == rooms["uniform"].best_plan(by_macs, limits, 20)
    loss, latency, macs = by_macs.profile.predict(by_macs.profile.indices(plan))
    assert latency <= 0.6 and macs <= 0.5
    within = [by_macs.profile.predict(by_macs.profile.indices(evaluations.profile.plan(p))) for p, _ in measure.asked]
    assert loss <= min(found[0] for found in within if found[1] <= 0.6 and found[2] <= 0.5) + 1e-9
    with pytest.raises(LookupError, match="none of 5 plans is within"):
        rooms["uniform"].best_plan(by_macs, ResolvedLimits(max_latency_ratio=1e-6, max_bytes_ratio=0.5), 5)


def test_a_plan_as_fast_as_another_is_found_where_predictions_are_off(
    rooms: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uniform, (evaluations, _) = rooms["uniform"], opened(rooms, tmp_path, make_profile())
    by_macs, asked = uniform.ByMacs(evaluations), []
    wanted = by_macs.profile.plan(by_macs.dense)

    def latencies(_bench: Any, plans: list[Any]) -> list[float]:
        """Plans take two thirds of what is predicted; the one that is wanted takes 0.6."""
        asked.extend(plans)
        predicted = [by_macs.profile.predict(by_macs.profile.indices(plan))[1] for plan in plans]
        return [0.6 if plan is wanted else value / 1.5 for plan, value in zip(plans, predicted, strict=True)]

    monkeypatch.setattr(uniform, "_latencies", latencies)
    plan = uniform.as_fast_as(wanted, by_macs, None, 0.7, 8)
    (taken,) = latencies(None, [plan])
    tried = [p for p in asked if p is not wanted]
    assert max(t for t in latencies(None, tried) if t <= 0.6) == taken
    first = by_macs.profile.predict(by_macs.profile.indices(tried[0]))[1]
    assert first <= 0.6 < 1.5 * taken, "the first limit is what is measured, later ones what is predicted of it"


def test_layers_that_are_left_alone_leave_less_to_the_others(rooms: dict[str, Any]) -> None:
    profile = make_profile()
    layers = {layer.name: SimpleNamespace(macs=90 // len(profile.layers)) for layer in profile.layers}
    factored = sum(info.macs for info in layers.values())
    network = SimpleNamespace(layers={"stem": SimpleNamespace(macs=10), **layers})
    kept = rooms["uniform"].most_macs(network, profile)
    assert (10 + kept * factored) / (10 + factored) == pytest.approx(1 - rooms["uniform"].CUT)


def test_a_network_in_float_has_a_table_of_its_own(rooms: dict[str, Any], tmp_path: Path) -> None:
    subjects = rooms["subjects"]
    whole = subjects.open_subject("digits", tmp_path)
    alone = subjects.in_float(whole)
    assert alone.folder.is_dir() and alone.folder != whole.folder
    assert alone.study(alone.folder).space == replace(whole.study(whole.folder).space, weight_bits=(32,))
