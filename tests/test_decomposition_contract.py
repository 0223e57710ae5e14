"""One contract suite over all decompositions, and that it catches what breaks the contract."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ranksearch.decompositions.bottleneck as bottleneck
from ranksearch.decompositions import (
    DECOMPOSITIONS,
    AbstractDecomposition,
    Factorisation,
    Metric,
    Options,
    Ranks,
    check_choice,
    get_decomposition,
    register_decomposition,
)
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec, build_layer
from ranksearch.plan import LayerChoice
from ranksearch.testing import check_decomposition, check_serialisation, convolution

CONTRACTED = tuple(DECOMPOSITIONS)


@st.composite
def conv_specs(draw: st.DrawFn) -> ConvSpec:
    """Convolutions over one or two axes, in groups of any width down to one channel."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    n_axes = draw(st.integers(1, 2))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n_axes))

    return convolution(
        groups * draw(st.integers(1, 12 // groups)),
        groups * draw(st.integers(1, 12 // groups)),
        per_axis(1, 4),
        stride=per_axis(1, 3),
        padding=per_axis(0, 2),
        dilation=per_axis(1, 2),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", CONTRACTED)
def test_contract(name: str) -> None:
    check_decomposition(DECOMPOSITIONS[name])


@pytest.mark.parametrize("name", CONTRACTED)
@settings(max_examples=10, deadline=None)
@given(spec=conv_specs(), seed=st.integers(0, 3))
def test_contract_on_any_convolution(name: str, spec: ConvSpec, seed: int) -> None:
    if DECOMPOSITIONS[name].refuse(spec) is None:
        check_decomposition(DECOMPOSITIONS[name], specs=[spec], seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACTED)
def test_every_format_takes_what_is_built(name: str) -> None:
    check_serialisation(DECOMPOSITIONS[name])


@settings(max_examples=10, deadline=None)
@given(n_inputs=st.integers(1, 20), n_outputs=st.integers(1, 20), bias=st.booleans())
def test_svd_contract_on_any_linear(n_inputs: int, n_outputs: int, bias: bool) -> None:
    spec = LinearSpec(in_features=n_inputs, out_features=n_outputs, bias=bias)
    check_decomposition(DECOMPOSITIONS["svd"], specs=[spec])


@pytest.mark.parametrize("name", ["svd", "spatial_svd"])
def test_layers_too_wide_to_solve_last_factors_keep_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "MAX_REFIT_INPUTS", 0)
    check_decomposition(DECOMPOSITIONS[name])


class Forged(Factorisation):
    """A factorisation with its factors and its weight tampered with."""

    def __init__(self, true: Factorisation, tamper: Callable[[Tensor], Tensor], forged: str) -> None:
        self.true, self.tamper, self.forged = true, tamper, forged

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        found = self.true.factors(ranks)
        return tuple(map(self.tamper, found)) if "factors" in self.forged else found

    def weight(self, ranks: Ranks) -> Tensor:
        found = self.true.weight(ranks)
        return self.tamper(found) if "weight" in self.forged else found


class BreaksItsContract(AbstractDecomposition):
    """The singular value decomposition with one fault."""

    name = "breaks_its_contract"

    def __init__(self, fault: str) -> None:
        self.fault, self.true = fault, DECOMPOSITIONS["svd"]

    def refuse(self, spec: LayerSpec) -> str | None:
        return self.true.refuse(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return self.true.max_ranks(spec, options)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        built = self.true.build(spec, ranks, options)
        if self.fault == "activation":
            return nn.Sequential(*built.children(), nn.ReLU())
        if self.fault == "bias":
            nn.init.ones_(built.get_parameter("1.bias"))
        return built

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        true = self.true.factorise(weight, spec, options, metric)
        if self.fault == "double":
            return Forged(true, lambda values: values * 2, "weight")
        if self.fault == "nan" and not weight.any():
            return Forged(true, lambda values: values * math.nan, "factors and weight")
        if self.fault == "float64":
            return Forged(true, Tensor.double, "factors")
        if self.fault == "wrong metric" and metric is not None:
            return self.true.factorise(weight, spec, options, Metric(input=torch.linalg.pinv(metric.input)))
        return true


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("activation", r"build\(\) gives \['ReLU'\]"),
        ("bias", "the last bias is not zero"),
        ("double", "not exact at its largest ranks"),
        ("nan", "NaN or infinity"),
        ("float64", "factors are not float32"),
        ("wrong metric", "ranks .* costs .*, without the metric"),
    ],
)
def test_the_suite_catches_what_breaks_the_contract(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_decomposition(BreaksItsContract(fault))


class LosesEverything(AbstractDecomposition):
    """A decomposition that breaks its contract: its weight is never exact."""

    name = "loses_everything"

    def refuse(self, spec: LayerSpec) -> str | None:
        return None

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return ()

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        return build_layer(spec)

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        return DECOMPOSITIONS["none"].factorise(weight * 0, spec, options, metric)


def test_a_decomposition_of_ones_own_joins_the_table_and_the_suite_catches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DECOMPOSITIONS, "loses_everything", raising=False)
    register_decomposition(LosesEverything())
    try:
        check_choice(convolution(4, 4), LayerChoice(decomposition="loses_everything"))
        with pytest.raises(AssertionError, match="not exact"):
            check_decomposition(get_decomposition("loses_everything"))
    finally:
        del DECOMPOSITIONS["loses_everything"]
    with pytest.raises(DecompositionError, match="give yours another name"):
        register_decomposition(DECOMPOSITIONS["svd"])
