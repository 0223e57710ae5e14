"""Low-rank regularisation: foldings, their shrinkage, and the preparation of a study's dense model."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import make_spec, network, split, trained
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.errors import StudyError
from ranksearch.layers import layer_spec
from ranksearch.plan import LayerChoice
from ranksearch.recovery import prepare_dense
from ranksearch.recovery.nuclear_norm import FOLDINGS, Shrinkage, fold, foldings_of, shrink, subgradient, unfold
from ranksearch.recovery_settings import NuclearNorm, Recovery
from ranksearch.workbench import open_workbench

PARTS = split()
NAMES = ("3", "8")


@given(st.sampled_from(list(FOLDINGS)), st.lists(st.integers(1, 5), min_size=4, max_size=4))
@settings(deadline=None)
def test_folding_gives_the_weight_back(folding: str, shape: list[int]) -> None:
    weight = torch.randn(shape)
    matrix = unfold(weight, folding)
    assert matrix.dim() == 2 and torch.equal(fold(matrix, folding, weight.shape), weight)


@pytest.mark.parametrize(("method", "folding"), [("svd", "outputs"), ("spatial_svd", "rows")])
def test_a_folding_of_low_rank_is_what_the_decomposition_gives_back_exactly(method: str, folding: str) -> None:
    layer = nn.Conv2d(6, 8, 3, bias=False)
    spec = layer_spec(layer)
    assert spec is not None
    left, values, right = torch.linalg.svd(unfold(layer.weight.detach(), folding), full_matrices=False)
    weight = fold((left[:, :3] * values[:3]) @ right[:3], folding, layer.weight.shape)
    options = DECOMPOSITIONS[method].options_for(spec)[0]
    factored = DECOMPOSITIONS[method].factorise(weight, spec, options, None).weight((3,))
    torch.testing.assert_close(factored, weight, rtol=1e-4, atol=1e-5)


@given(st.integers(2, 8), st.integers(2, 8), st.floats(0.01, 3.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_shrinking_takes_the_threshold_off_each_singular_value(m: int, n: int, threshold: float, seed: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    before, after = (torch.linalg.svdvals(t) for t in (matrix, shrink(matrix, threshold)))
    torch.testing.assert_close(after, (before - threshold).clamp_min(0), rtol=1e-4, atol=1e-4)


def test_the_subgradient_is_one() -> None:
    matrix = torch.diag(torch.tensor([10.0, 5.0, 0.1]))
    torch.testing.assert_close(subgradient(matrix), torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    assert bool(subgradient(torch.zeros(3, 2)).isfinite().all())


def test_foldings_are_those_that_the_space_cuts() -> None:
    conv, linear = torch.zeros(4, 3, 3, 3), torch.zeros(4, 3)
    assert foldings_of(["none", "spatial_svd"], conv) == ("rows",)
    assert foldings_of(["tucker2", "spatial_svd", "svd"], conv) == ("outputs", "inputs", "rows")
    assert foldings_of(["spatial_svd"], linear) == foldings_of(["none"], conv) == ("outputs",)
    assert foldings_of(["harmonic"], torch.zeros(4, 3, 1, 1)) == ("outputs",)


@pytest.mark.parametrize("form", ["proximal", "subgradient"])
def test_every_interval_one_folding_shrinks(form: str) -> None:
    model = network()
    norm = NuclearNorm(weight=0.5, steps=4, interval=2, form=form)  # type: ignore[arg-type]
    shrinkage = Shrinkage(model, ["3"], ["svd", "spatial_svd"], norm)
    weights, other = [model[3].weight.detach().clone()], model[0].weight.detach().clone()
    for _ in range(4):
        shrinkage.apply(0.1)
        weights.append(model[3].weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert nuclear(weights[2], "outputs") < nuclear(weights[0], "outputs")
    assert nuclear(weights[4], "inputs") < nuclear(weights[2], "inputs")
    assert torch.equal(model[0].weight, other)


def nuclear(weight: Tensor, folding: str) -> float:
    return float(torch.linalg.svdvals(unfold(weight, folding)).sum())


def share_held(weight: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(unfold(weight, "outputs")).square()
    return float(values[:rank].sum() / values.sum())


def recovery(**norm: object) -> Recovery:
    return Recovery(steps=8, learning_rate=0.02, prepare=NuclearNorm(**{"steps": 60, "interval": 5, **norm}))  # type: ignore[arg-type]


def test_the_prepared_model_is_of_lower_rank_and_still_does_its_task() -> None:
    model = trained(PARTS["train"])
    prepared = prepare_dense(model, PARTS["train"], F.cross_entropy, recovery(weight=0.3), NAMES, ["svd"], seed=0)
    plain = prepare_dense(model, PARTS["train"], F.cross_entropy, recovery(weight=1e-9), NAMES, ["svd"], seed=0)
    for name in NAMES:
        weights = [m.get_submodule(name).weight.detach() for m in (prepared, plain)]
        assert share_held(weights[0], 6) > share_held(weights[1], 6) + 0.02
    images, labels = PARTS["validation"][0]
    with torch.no_grad():
        assert float((prepared(images).argmax(1) == labels).float().mean()) > 0.9
    assert model.training is False and prepared.training is False


def test_a_preparation_that_diverges_says_so() -> None:
    wild = dataclasses.replace(recovery(), learning_rate=1e7)
    with pytest.raises(StudyError, match=r"preparing the dense model diverged; lower Recovery\.learning_rate"):
        prepare_dense(trained(PARTS["train"]), PARTS["train"], F.cross_entropy, wild, NAMES, ["svd"], seed=0)


def test_a_study_cuts_from_the_prepared_model_and_compares_with_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_CACHE", str(tmp_path))
    model = trained(PARTS["train"])
    spec = make_spec(model, PARTS, recovery=recovery(weight=0.3))
    steps: list[float] = []
    bench = open_workbench(spec, lambda step: steps.append(step.share))
    assert len(steps) == 60 and steps[-1] == 1.0
    assert bench.source is not bench.model
    assert all(torch.equal(a, b) for a, b in zip(bench.model.parameters(), model.parameters(), strict=True))
    again = open_workbench(spec, lambda _step: pytest.fail("prepared twice"))
    assert all(torch.equal(a, b) for a, b in zip(again.source.parameters(), bench.source.parameters(), strict=True))
    weight = bench.source.get_submodule("8").weight
    choice = LayerChoice(decomposition="svd", ranks=(32,))
    torch.testing.assert_close(bench.factorisations().of("8", choice).weight((32,)), weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model[8].weight, weight, atol=1e-3)
    plain = open_workbench(make_spec(model, PARTS))
    assert plain.source is plain.model


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"steps": 0}, {"interval": 0}, {"form": "soft"}])
def test_senseless_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(StudyError, match="must be positive, and form one of proximal, subgradient"):
        NuclearNorm(**settings)  # type: ignore[arg-type]
