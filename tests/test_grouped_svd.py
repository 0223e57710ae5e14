"""One bottleneck per group of input channels."""

import pytest
import torch
from torch import nn

from ranksearch.decompositions import DECOMPOSITIONS, Metric, Options, check_choice
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec
from ranksearch.plan import LayerChoice
from ranksearch.testing import check_decomposition, convolution

GROUPED = DECOMPOSITIONS["grouped_svd"]


@pytest.mark.parametrize(
    ("n_inputs", "groups"), [(2, [2]), (4, [2, 4]), (6, [2]), (8, [2, 4, 8]), (12, [2, 4]), (64, [2, 4, 8])]
)
def test_options_are_the_groups_into_which_the_channels_divide(n_inputs: int, groups: list[int]) -> None:
    assert [options["groups"] for options in GROUPED.options_for(convolution(n_inputs, 4))] == groups


def test_groups_that_do_not_divide_the_channels_are_no_choice() -> None:
    check_choice(convolution(6, 8), LayerChoice(decomposition="grouped_svd", ranks=(2,), options={"groups": 2}))
    with pytest.raises(DecompositionError, match="no options {'groups': 4}; allowed are {'groups': 2}"):
        check_choice(convolution(6, 8), LayerChoice(decomposition="grouped_svd", ranks=(2,), options={"groups": 4}))


def test_two_groups_are_what_a_plan_means_that_names_none() -> None:
    spec = convolution(8, 8)
    check_choice(spec, LayerChoice(decomposition="grouped_svd", ranks=(2,)))
    spelt: Options = {"groups": 2}
    assert GROUPED.max_ranks(convolution(2, 64), {}) == GROUPED.max_ranks(convolution(2, 64), spelt) == (9,)
    assert str(GROUPED.build(spec, (3,), {})) == str(GROUPED.build(spec, (3,), spelt))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(in_features=8, out_features=8, bias=True), "Linear in groups"),
        (convolution(3, 32), "3 input channels do not divide"),
        (convolution(1, 8), "1 input channels do not divide"),
        (convolution(8, 8, groups=8), "depthwise"),
        (convolution(8, 8, groups=2), "2 groups"),
    ],
)
def test_refusals_say_why(spec: LayerSpec, reason: str) -> None:
    assert reason in (GROUPED.refuse(spec) or "")
    with pytest.raises(DecompositionError, match=reason):
        check_choice(spec, LayerChoice(decomposition="grouped_svd", ranks=(1,), options={"groups": 2}))


def test_a_pointwise_convolution_is_taken() -> None:
    spec = convolution(16, 12, (1, 1), stride=(2, 2), padding=(0, 0))
    check_decomposition(GROUPED, specs=[spec])
    first, last = GROUPED.build(spec, (3,), {"groups": 4}).children()
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    assert (first.kernel_size, first.stride, first.groups) == ((1, 1), (2, 2), 4)
    assert (last.kernel_size, last.stride, last.groups) == ((1, 1), (1, 1), 1)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_plain_factors_lose_the_tails_of_each_slice(groups: int) -> None:
    spec: ConvSpec = convolution(16, 12)
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    slices = weight.double().reshape(12, groups, -1).transpose(0, 1)
    tails = torch.linalg.svdvals(slices)[:, 4:].square().sum()
    kept = GROUPED.factorise(weight, spec, {"groups": groups}, None).weight((4,))
    assert float((kept - weight).square().sum()) == pytest.approx(float(tails), rel=1e-4)


def test_with_independent_groups_it_loses_the_tails_of_what_each_adds_to_the_output() -> None:
    spec = convolution(8, 12)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(spec.weight_shape, generator=generator)
    samples = torch.randn(2, 100, 36, generator=generator, dtype=torch.float64)
    blocks = samples.mT @ samples / 100
    slices = weight.double().reshape(12, 2, 36).transpose(0, 1)
    tails = torch.linalg.svdvals(slices @ torch.linalg.cholesky(blocks))[:, 4:].square().sum()
    metric = Metric(input=torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
    kept = GROUPED.factorise(weight, spec, {"groups": 2}, metric).weight((4,))
    assert metric.cost(kept - weight) == pytest.approx(float(tails), rel=1e-4)
