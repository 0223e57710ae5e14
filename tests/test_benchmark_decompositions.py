"""What the benchmark of the decompositions computes on its own: random plans, rank correlation, plans by price."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.compression import count_params
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.plan import DENSE, LayerChoice
from ranksearch.testing import convolution

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import decompositions_candidates
        import decompositions_prediction
        import decompositions_quality

        yield {
            "candidates": decompositions_candidates,
            "prediction": decompositions_prediction,
            "quality": decompositions_quality,
        }
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def table(rooms: dict[str, Any]) -> dict[str, list[Any]]:
    """Six layers with a dense choice and nine cheaper ones, whose loss grows with the square of what they cut."""
    candidate = rooms["candidates"].Candidate
    layers = {}
    for number in range(6):
        cut = [
            candidate(
                choice=LayerChoice(decomposition="svd", ranks=(share,)),
                loss=(number + 1) * (10 - share) ** 2,
                n_params=10 * share,
                macs=(number + 1) * share,
            )
            for share in range(1, 10)
        ]
        dense = candidate(choice=DENSE, loss=0.0, n_params=100, macs=10 * (number + 1))
        layers[f"layer{number}"] = [dense, *cut]
    return layers


def test_random_plans_have_the_multiply_adds_that_were_asked_for(
    rooms: dict[str, Any], table: dict[str, list[Any]]
) -> None:
    random = np.random.default_rng(0)
    dense = sum(layer[0].macs for layer in table.values())
    for ratio in np.linspace(0.15, 1.0, 12):
        chosen = rooms["prediction"].random_choices(table, float(ratio), random)
        assert all(candidate in layer for candidate, layer in zip(chosen, table.values(), strict=True))
        assert sum(candidate.macs for candidate in chosen) / dense == pytest.approx(ratio, abs=0.0051)


def test_random_plans_of_one_size_differ(rooms: dict[str, Any], table: dict[str, list[Any]]) -> None:
    random = np.random.default_rng(0)
    plans = [rooms["prediction"].random_choices(table, 0.5, random) for _ in range(8)]
    assert len({tuple(candidate.choice.label for candidate in plan) for plan in plans}) == 8


def test_rank_correlation_sees_order_alone(rooms: dict[str, Any]) -> None:
    spearman = rooms["prediction"].spearman
    values = np.array([0.1, 3.0, 0.7, 12.0, 5.0])
    assert spearman(values, np.exp(values)) == pytest.approx(1.0)
    assert spearman(values, -(values**3)) == pytest.approx(-1.0)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)


def test_a_price_on_parameters_cuts_what_was_asked_for_where_it_costs_least(
    rooms: dict[str, Any], table: dict[str, list[Any]]
) -> None:
    class Subject:
        name, model = "six layers", nn.Linear(60, 10, bias=False)

    assert count_params(Subject.model) == 600
    plan = rooms["quality"].cheapest_plan(Subject, table, 0.36)
    ranks = [(plan.choice(name).ranks or (10,))[0] for name in table]
    assert 0.64 * 600 - 10 < sum(ranks) * 10 <= 0.64 * 600, "what is left over is too little for any layer"
    assert ranks == sorted(ranks), "layers whose loss grows faster are cut less"
    assert rooms["quality"].cheapest_plan(Subject, table, 0.95) is None


@pytest.mark.parametrize("name", ["svd", "tucker2"])
def test_fine_ranks_are_smaller_than_the_layer_and_few_enough(rooms: dict[str, Any], name: str) -> None:
    method, spec = DECOMPOSITIONS[name], convolution(64, 64)
    ranks = rooms["candidates"].fine_ranks(method, spec, {}, 2)
    sizes = [method.n_params(spec, each, {}) for each in ranks]
    assert 16 <= len(ranks) <= rooms["candidates"].MAX_RANKS
    assert max(sizes) < torch.Size(spec.weight_shape).numel() + 64


def test_fine_ranks_try_every_one_of_a_small_number(rooms: dict[str, Any]) -> None:
    ranks = rooms["candidates"].fine_ranks(DECOMPOSITIONS["svd"], convolution(8, 8), {}, 2)
    assert ranks == [(rank,) for rank in range(1, len(ranks) + 1)]
