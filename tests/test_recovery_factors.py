"""Chains of factors: their product's norm, and balance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.layers import layer_spec
from ranksearch.quantization import quantize_module
from ranksearch.recovery.factors import balance, chain_norm, factor_chains

LAYERS = {
    "conv": (nn.Conv2d(8, 12, 3, padding=1, bias=False), (2, 8, 6, 6)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2, padding=1, bias=False), (2, 8, 6, 6)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "linear": (nn.Linear(10, 8), (3, 10)),
}
METHODS = [name for name in DECOMPOSITIONS if name != "none"]


def built(name: str, layer: nn.Module, seed: int) -> nn.Sequential | None:
    """The modules of a decomposition with random weights; None where it does not take the layer."""
    method, spec = DECOMPOSITIONS[name], layer_spec(layer)
    assert spec is not None
    if method.refuse(spec) is not None:
        return None
    torch.manual_seed(seed)
    options = method.options_for(spec)[seed % len(method.options_for(spec))]
    ranks = tuple(max(1, rank // 2) for rank in method.max_ranks(spec, options))
    module = method.build(spec, ranks, options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module if isinstance(module, nn.Sequential) else None


def effective_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    """The norm of the weight, read off the responses at the middle of single pulses: linear, so that all taps show."""
    bias = module(torch.zeros(shape))
    total = 0.0
    size = shape[2:]
    middle = tuple(extent // 2 for extent in size)
    for channel in range(shape[1]):
        pulse = torch.zeros(1, *shape[1:])
        pulse[(0, channel, *middle)] = 1.0
        total += float((module(pulse) - bias[:1]).square().sum())
    return total


@given(st.sampled_from(METHODS), st.sampled_from(list(LAYERS)), st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
@torch.no_grad()
def test_the_norm_is_that_of_the_product(name: str, layer_name: str, seed: int) -> None:
    layer, shape = LAYERS[layer_name]
    module = built(name, layer, seed)
    if module is None:
        return
    (chain,) = factor_chains(nn.Sequential(module, nn.ReLU()))
    assert float(chain_norm(chain)) == pytest.approx(effective_norm(module, shape), rel=1e-4)


@given(st.sampled_from(METHODS), st.sampled_from(list(LAYERS)), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_balancing_changes_the_factors_and_not_the_outputs(name: str, layer_name: str, seed: int) -> None:
    layer, shape = LAYERS[layer_name]
    module = built(name, layer, seed)
    if module is None:
        return
    inputs = torch.randn(shape)
    before = module(inputs)
    with torch.no_grad():
        module[0].weight.mul_(37.0)
        module[-1].weight.div_(37.0)
    balance(tuple(module))
    torch.testing.assert_close(module(inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    norms = [float(factor.weight.norm()) for factor in module]
    assert max(norms) / min(norms) < 10


def test_only_layers_in_a_row_are_chains() -> None:
    factors = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 4, 3))
    rounded = nn.Sequential(quantize_module(nn.Linear(4, 2)), nn.Linear(2, 3))
    model = nn.Sequential(factors, nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4)), rounded)
    model.add_module("again", factors)
    assert factor_chains(model) == [tuple(factors), tuple(rounded)]


def test_channels_without_weight_and_rounded_factors_are_left_alone() -> None:
    factors = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5))
    with torch.no_grad():
        factors[0].weight[1] = 0.0
        factors[1].weight[:, 2] = 0.0
    inputs = torch.randn(2, 4)
    before = factors(inputs)
    balance(tuple(factors))
    assert all(bool(parameter.isfinite().all()) for parameter in factors.parameters())
    torch.testing.assert_close(factors(inputs), before)
    rounded = nn.Sequential(quantize_module(factors[0]), factors[1])
    weights = [factor.weight.clone() for factor in rounded]
    balance(tuple(rounded))
    assert all(torch.equal(factor.weight, weight) for factor, weight in zip(rounded, weights, strict=True))
