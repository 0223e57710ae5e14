"""Estimated drops: luck is taken back, what is sure stays, and a front of estimates holds on fresh images."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic_study import evaluate_as_predicted, make_profile, opened, search

from ranksearch.evaluation import Evaluation
from ranksearch.optimization import (
    DropEstimator,
    FurtherDrop,
    TrialRecord,
    drop_unit,
    estimated_drops,
    front,
    near_ties,
    read_records,
)
from ranksearch.optimization.drop_model import DropModel
from ranksearch.plan import Plan
from ranksearch.spec import OBJECTIVES

PROFILE = make_profile(12)
DEVIATION = 0.01


def noisy_study(seed: int) -> list[TrialRecord]:
    """A study whose drops are measured with noise, by some hundred images."""
    rng, measured = np.random.default_rng(seed), evaluate_as_predicted(PROFILE)

    def evaluate(plan: Plan) -> Evaluation:
        evaluation = measured(plan)
        if not plan.changes():
            return evaluation.model_copy(update={"accuracy_drop": 0.0, "drop_low": 0.0, "drop_high": 0.0})
        drop = 0.3 * (evaluation.accuracy_drop or 0.0) + rng.normal(0, DEVIATION)
        interval = {"drop_low": drop - 1.96 * DEVIATION, "drop_high": drop + 1.96 * DEVIATION}
        return evaluation.model_copy(update={"accuracy_drop": drop, **interval})

    with opened() as study:
        search(study, PROFILE, evaluate, sampler_name="price", n_trials=40)
        return read_records(study)


def true_drop(record: TrialRecord) -> float:
    return 0.3 * PROFILE.predict(PROFILE.indices(record.plan))[0]


def test_estimates_are_nearer_to_the_truth_than_measurements() -> None:
    records = noisy_study(0)
    estimates = estimated_drops(PROFILE, records, 0.1)
    errors = {True: [], False: []}  # type: dict[bool, list[float]]
    for record in records:
        assert record.evaluation is not None and record.evaluation.accuracy_drop is not None
        errors[True].append(estimates[record.number] - true_drop(record))
        errors[False].append(record.evaluation.accuracy_drop - true_drop(record))
    assert np.std(errors[True]) < 0.7 * np.std(errors[False])


def test_the_best_of_a_front_is_no_longer_the_luckiest() -> None:
    optimism = {"measured": [], "estimated": []}  # type: dict[str, list[float]]
    for seed in range(3):
        records = noisy_study(seed)
        estimates = estimated_drops(PROFILE, records, 0.1)
        for record in front(records, OBJECTIVES):
            assert record.evaluation is not None and record.evaluation.accuracy_drop is not None
            optimism["measured"].append(true_drop(record) - record.evaluation.accuracy_drop)
        optimism["estimated"] += [true_drop(r) - estimates[r.number] for r in front(records, OBJECTIVES, estimates)]
    assert abs(np.mean(optimism["estimated"])) < 0.5 * np.mean(optimism["measured"])


def test_further_data_brings_estimates_nearer_to_the_truth() -> None:
    records = noisy_study(0)
    rng = np.random.default_rng(1)
    further = {}
    for record in records:
        drop = true_drop(record) + rng.normal(0, DEVIATION / 10)
        half_width = 0.196 * DEVIATION
        further[record.plan.hash()] = FurtherDrop(value=drop, low=drop - half_width, high=drop + half_width)
    estimator = DropEstimator(PROFILE, 0.1)
    errors = {}
    for name, known in (("trials alone", {}), ("both", further)):
        estimates = estimator.drops(records, known)
        assert estimates == estimated_drops(PROFILE, records, 0.1, known)
        errors[name] = np.std([estimates[r.number] - true_drop(r) for r in records])
        assert all(0 <= deviation <= DEVIATION for deviation in estimator.deviations(records, known).values())
    assert errors["both"] < 0.5 * errors["trials alone"]


def test_a_lucky_plan_leaves_the_front_when_more_images_say_so() -> None:
    records = noisy_study(0)
    members = front(records, OBJECTIVES, estimated_drops(PROFILE, records, 0.1))
    lucky = next(r for r in members if r.evaluation is not None and 0.01 < (r.evaluation.accuracy_drop or 0) < 0.05)
    worse = FurtherDrop(value=0.09, low=0.0899, high=0.0901)
    estimates = estimated_drops(PROFILE, records, 0.1, {lucky.plan.hash(): worse})
    assert estimates[lucky.number] == pytest.approx(0.09, abs=0.002)
    assert lucky.number not in {record.number for record in front(records, OBJECTIVES, estimates)}


def test_near_ties_are_those_that_their_doubt_could_bring_to_the_front() -> None:
    measured = evaluate_as_predicted(PROFILE)
    dense = [layer.dense for layer in PROFILE.layers]
    fast, slow = PROFILE.plan([0] * 12), PROFILE.plan([0] * 6 + dense[6:])

    def record(number: int, plan: Plan) -> TrialRecord:
        return TrialRecord(number=number, state="complete", origin="", plan=plan, evaluation=measured(plan))

    # The same latency and bytes, and so rivals; another is slower, and loses more than it may err.
    records = [record(0, fast), record(1, fast), record(2, fast), record(3, slow), record(4, PROFILE.plan(dense))]
    evaluations = [r.evaluation.losses for r in records if r.evaluation is not None]
    assert evaluations[3]["latency"] > evaluations[0]["latency"]
    estimates = {0: 0.010, 1: 0.0105, 2: 0.0102, 3: 0.05, 4: 0.002}
    deviations = dict.fromkeys(estimates, 0.001)
    assert near_ties(records[:4], OBJECTIVES, estimates, deviations) == [2, 1]
    assert near_ties(records[:4], OBJECTIVES, estimates, dict.fromkeys(estimates, 0.0001)) == []
    assert near_ties(records[:4], ("latency", "bytes"), estimates, deviations) == []
    many = [record(n, fast) for n in range(40)]
    all_alike = {n: 0.01 + n * 1e-6 for n in range(40)}
    assert near_ties(many, OBJECTIVES, all_alike, dict.fromkeys(all_alike, 0.01)) == list(range(1, 17))


def test_dense_is_sure_and_stays() -> None:
    records = noisy_study(0)
    dense = next(record for record in records if not record.plan.changes())
    assert estimated_drops(PROFILE, records, 0.1)[dense.number] == pytest.approx(0.0, abs=1e-9)


def test_what_measured_nothing_is_left_out() -> None:
    records = noisy_study(0)
    failed = replace(records[3], number=100, state="failed", evaluation=None)
    twice = replace(records[4], number=101, duplicate_of=4)
    estimates = estimated_drops(PROFILE, [*records, failed, twice], 0.1)
    assert estimates == estimated_drops(PROFILE, records, 0.1)
    assert estimated_drops(PROFILE, [failed], 0.1) == {} == estimated_drops(PROFILE, [], 0.1)


def test_scores_that_are_no_shares_have_a_unit_of_their_own() -> None:
    assert drop_unit(0.9) == drop_unit(0.2) == 0.1
    assert drop_unit(23.0) == pytest.approx(2.3) and drop_unit(-40.0) == pytest.approx(4.0)


def test_a_history_that_grows_is_looked_up_once_and_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    records = noisy_study(0)
    looked_up, fitted = list[Plan](), list[int]()
    indices, fit = type(PROFILE).indices, DropModel.fit
    monkeypatch.setattr(type(PROFILE), "indices", lambda self, plan: looked_up.append(plan) or indices(self, plan))
    monkeypatch.setattr(DropModel, "fit", lambda table, seen: fitted.append(len(seen.drops)) or fit(table, seen))
    estimator = DropEstimator(PROFILE, 0.1)
    for n in (10, 10, 20, 20):
        grown = estimator.drops(records[:n])
    assert len(looked_up) == 20 and fitted == [10, 20]
    monkeypatch.undo()
    assert grown == estimated_drops(PROFILE, records[:20], 0.1)
