"""What the benchmark of architectures computes on its own: networks with signals, mixed plans, and its rows."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.layers import call_model
from ranksearch.plan import DENSE, LayerChoice
from ranksearch.trees import tensors

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"
SVD = LayerChoice(decomposition="svd", ranks=(2,))


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import models_architectures
        import models_networks

        yield {"architectures": models_architectures, "networks": models_networks}
    finally:
        sys.path.remove(str(BENCHMARKS))


def table(n_layers: int, *choices: LayerChoice) -> Profile:
    """Layers of these candidates and dense, each costlier than the one before it."""
    candidates = tuple(
        Candidate(choice=choice, loss=float(i), latency_ms=1.0, n_bytes=8) for i, choice in enumerate((*choices, DENSE))
    )
    layers = tuple(LayerProfile(name=f"layer{i}", candidates=candidates) for i in range(n_layers))
    return Profile(layers=layers, dense_latency_ms=float(n_layers), dense_bytes=100)


def test_a_mixed_plan_takes_the_mildest_of_each_kind_in_turn(rooms: dict[str, Any]) -> None:
    mild, harsh = SVD.with_bits(8, 8), SVD.model_copy(update={"ranks": (1,)}).with_bits(8, 8)
    plan = rooms["architectures"].mixed_plan(table(5, SVD, mild, harsh, DENSE.with_bits(8, 8), DENSE.with_bits(4, 32)))
    assert [plan.choice(f"layer{i}") for i in range(5)] == [
        SVD, DENSE.with_bits(8, 8), mild, DENSE.with_bits(4, 32), SVD,
    ]  # fmt: skip
    assert rooms["architectures"]._unmixed(plan) is None


def test_what_a_plan_lacks_is_told(rooms: dict[str, Any]) -> None:
    plan = rooms["architectures"].mixed_plan(table(3, SVD))
    assert rooms["architectures"]._unmixed(plan) == "no layer has 8/8, 4 bits"


@pytest.mark.parametrize("name", ["mobilenet_v3", "unet", "audio"])
def test_networks_are_the_same_again_and_their_signals_do_not_die_away(rooms: dict[str, Any], name: str) -> None:
    networks = rooms["networks"]
    inputs = networks.NETWORKS[name].inputs(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, again = (tensors(call_model(networks.network(name), inputs))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert 0.05 < float(first.std()) < 5.0
    assert float(first.var(0).mean()) > 1e-4, "examples differ in what comes of them"


def test_a_row_that_breaks_says_where_and_breaks_no_other(
    rooms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures = rooms["architectures"]

    def broken(_name: str) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(architectures, "study_of", broken)
    row = architectures._row("vit")
    assert row["failed"] == {"it ends": "ValueError in test_benchmark_models.py: no such layer"}
    assert any("FAILS" in line for line in architectures._lines(row))
