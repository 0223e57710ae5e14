"""Stopping before training: only where the prediction has earned it, and only what is surely beaten."""

import numpy as np
import pytest

from ranksearch.early_stopping import MIN_PAIRS, StopRule, Witnesses, agreements, rank_agreement
from ranksearch.evaluation import Evaluation
from ranksearch.plan import Plan


def trained(predicted: float, drop: float, ratio: float, n_bytes: float = 0.5, width: float = 0.002) -> Evaluation:
    return Evaluation(
        plan=Plan(layers={}),
        rung="fine_tuned",
        accuracy=0.9 - drop,
        accuracy_drop=drop,
        drop_low=drop - width,
        drop_high=drop + width,
        latency_ms=ratio,
        latency_p95_ms=ratio,
        latency_ratio=ratio,
        ratio_low=ratio * 0.99,
        ratio_high=ratio * 1.01,
        model_bytes=int(1000 * n_bytes),
        bytes_ratio=n_bytes,
        n_params=1,
        macs=1,
        predicted_loss=predicted,
        seconds={},
    )


ORDERLY = {i: trained(predicted=0.01 * i, drop=0.005 * i, ratio=0.5 + 0.001 * i) for i in range(1, 12)}
HOPELESS = {"predicted_loss": 0.105, "ratio_low": 0.6, "bytes_ratio": 0.6}


def test_agreement_is_told_inside_bands_of_latency_alone() -> None:
    predicted = np.array([1.0, 2.0, 1.0, 2.0])
    drops = np.array([2.0, 1.0, 20.0, 10.0])
    latencies = np.array([1.00, 1.01, 0.50, 0.505])
    assert rank_agreement(predicted, drops, latencies) == (-1.0, 2)
    assert rank_agreement(predicted, np.array([1.0, 2.0, 10.0, 20.0]), latencies) == (1.0, 2)
    assert rank_agreement(predicted, drops, np.array([1.0, 2.0, 4.0, 8.0])) == (0.0, 0)


def test_a_plan_that_a_front_member_surely_beats_is_stopped() -> None:
    heavy = {20 + i: trained(predicted=0.2 + 0.01 * i, drop=0.08 + 0.01 * i, ratio=0.9 + 0.001 * i) for i in range(6)}
    reason = StopRule.learned({**ORDERLY, **heavy}, [1]).beaten_by(HOPELESS)
    assert reason is not None
    assert "trial 1" in reason


@pytest.mark.parametrize(
    "figures",
    [{**HOPELESS, "ratio_low": 0.4}, {**HOPELESS, "bytes_ratio": 0.4}, {**HOPELESS, "predicted_loss": 0.001}],
    ids=["faster", "smaller", "promising"],
)
def test_what_may_be_better_in_anything_is_trained(figures: dict[str, float]) -> None:
    heavy = {20 + i: trained(predicted=0.2 + 0.01 * i, drop=0.08 + 0.01 * i, ratio=0.9 + 0.001 * i) for i in range(6)}
    assert StopRule.learned({**ORDERLY, **heavy}, [1]).beaten_by(figures) is None


def test_a_prediction_that_orders_plans_wrongly_stops_nothing() -> None:
    rng = np.random.default_rng(0)
    shuffled = {i: trained(0.01 * i, 0.005 * d, 0.5 + 0.001 * i) for i, d in enumerate(rng.permutation(30))}
    assert StopRule.learned(shuffled, [0]).beaten_by({**HOPELESS, "predicted_loss": 0.0}) is None


def test_too_few_witnesses_prove_nothing() -> None:
    assert Witnesses.of("predicted_loss", [trained(0.2, 0.05, 0.5)] * 4).least_drop(0.1) == float("-inf")
    assert Witnesses.of("predicted_loss", [trained(0.2, 0.05, 0.5)] * 5).least_drop(0.1) == pytest.approx(0.048)


def test_each_rung_earns_its_power_by_itself() -> None:
    rng = np.random.default_rng(0)
    evaluations = [
        trained(float(rng.random()), 0.005 * i, 0.5 + 0.001 * i).model_copy(update={"quick_drop": 0.02 * i})
        for i in range(12)
    ]
    predicted, quick = agreements(evaluations)
    assert quick.tau == 1.0 and quick.n_pairs == 66 and quick.may_stop
    assert abs(predicted.tau) < 0.4 and not predicted.may_stop
    assert str(quick) == "drop before training: 1.00 over 66 pairs, may stop plans"
    assert str(predicted).endswith("stops nothing")
    few = agreements(evaluations[:5])[1]
    assert few.n_pairs < MIN_PAIRS and not few.may_stop
    assert "no two plans" in str(agreements([])[0])


def test_what_the_quick_rung_says_stops_a_plan_where_the_prediction_may_not() -> None:
    rng = np.random.default_rng(0)
    known = {
        i: trained(float(rng.random()), 0.005 * i, 0.5 + 0.001 * i).model_copy(update={"quick_drop": 0.02 * i})
        for i in range(1, 25)
    }
    reason = StopRule.learned(known, [1]).beaten_by({**HOPELESS, "quick_drop": 0.3})
    assert reason is not None and "trial 1" in reason and "drop before training" in reason
    assert StopRule.learned(known, [1]).beaten_by(HOPELESS) is None
    assert StopRule.learned(known, [1]).beaten_by({**HOPELESS, "quick_drop": 0.01}) is None
