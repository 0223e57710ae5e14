"""What the benchmark of recovery computes on its own: plans of a cut and of equal bytes, factors out of balance."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import split, trained

from ranksearch.compression import compress, rebuild
from ranksearch.finding import compressible_layers
from ranksearch.layers import count_macs
from ranksearch.plan import LayerChoice, Plan
from ranksearch.recovery.factors import balance, factor_chains
from ranksearch.weights import packed_bytes

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"
PARTS = split()


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import decompositions_networks
        import recovery_digits
        import recovery_joint
        import recovery_plans
        import recovery_rows

        yield {
            "networks": decompositions_networks,
            "plans": recovery_plans,
            "rows": recovery_rows,
            "joint": recovery_joint,
            "digits": recovery_digits,
        }
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def subject(rooms: dict[str, Any]) -> Any:
    model = trained(PARTS["train"])
    return rooms["networks"].Subject(
        name="tiny",
        model=model,
        layers=compressible_layers(model, PARTS["train"][0][0]).layers,
        calibration=PARTS["train"],
        training=PARTS["train"],
        validation=PARTS["validation"],
        test=PARTS["test"],
    )


@pytest.mark.parametrize("rule", ["uniform", "one-shot loss", "one-shot loss, spatial", "tempered loss"])
def test_plans_cut_what_is_asked_for_and_little_more(rooms: dict[str, Any], subject: Any, rule: str) -> None:
    plan = rooms["plans"].RULES[rule](subject, 0.4)
    example = PARTS["train"][0][0][:1]
    left = count_macs(rebuild(subject.model, plan), example) / count_macs(subject.model, example)
    assert 0.4 < left <= 0.605  # a cut is of the layers' multiply-adds


def test_a_row_tells_what_came_back(rooms: dict[str, Any], subject: Any) -> None:
    rows = rooms["rows"]
    judge = rows.judge_of(subject)
    plan = Plan(layers={"3": LayerChoice(decomposition="svd", ranks=(3,)), "8": LayerChoice().with_bits(8, 8)})
    recipe = rows.Recipe(name="short", epochs=3.0, learning_rate=0.02)
    row = rows.train_plan(subject, judge, plan, recipe)
    assert row["test"]["drop"] < row["before"] and row["test"]["low"] <= row["test"]["drop"] <= row["test"]["high"]
    assert row["bytes_ratio"] == packed_bytes(rebuild(subject.model, plan)) / packed_bytes(subject.model)
    assert "short" in rows.line(row, ("test", "all"))
    assert rows.train_dense(subject, judge, 1.0, 0.02)["cut"] == 0.0


def test_plans_of_equal_bytes_are(rooms: dict[str, Any], subject: Any) -> None:
    joint = rooms["joint"]
    sizes = {name: packed_bytes(rebuild(subject.model, plan)) for name, plan in joint.plans(subject)}
    assert tuple(sizes) == joint.NAMES and sizes[joint.BOTH_AS_FOUR] <= sizes[joint.FOUR]
    as_small = "its linear layers have no spatial rank: as small as it gets"
    assert sizes[joint.LOW_AS_EIGHT] == sizes[joint.LOW_AS_FOUR], as_small
    ((wanted, _),) = joint.plans(subject, [joint.EIGHT])
    assert wanted == joint.EIGHT


def test_factors_out_of_balance_give_the_same_outputs(rooms: dict[str, Any], subject: Any) -> None:
    plan = Plan(layers={"3": LayerChoice(decomposition="spatial_svd", ranks=(6,))})
    model = compress(subject.model, plan, calibration=PARTS["train"]).eval()
    images = PARTS["test"][0][0]
    with torch.no_grad():
        before = model(images)
        other = copy.deepcopy(model)
        rooms["rows"]._unbalance(other)
        torch.testing.assert_close(other(images), before, rtol=1e-4, atol=1e-4)
        norms = [float(factor.weight.norm()) for factor in other[3]]
        assert max(norms) > 1.3 * min(norms)
        for chain in factor_chains(other):
            balance(chain)
        torch.testing.assert_close(other(images), before, rtol=1e-4, atol=1e-4)


def test_gains_are_of_the_best_plans_within_a_drop(rooms: dict[str, Any]) -> None:
    rows = [
        {"accuracy_drop": drop, "latency_ratio": latency, "bytes_ratio": size}
        for drop, latency, size in ((0.0, 1.0, 1.0), (0.004, 0.5, 0.2), (0.02, 0.1, 0.1))
    ]
    best = rooms["digits"]._best(rows, 0.005)
    assert best == {"faster": 2.0, "smaller": 5.0}
    assert rooms["digits"]._gain(best, rooms["digits"]._best(rows, 0.0)) == {"faster": 2.0, "smaller": 5.0}
