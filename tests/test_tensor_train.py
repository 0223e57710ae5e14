"""What the tensor train promises beyond the contract of every decomposition."""

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train
from torch import Tensor

from ranksearch.decompositions import DECOMPOSITIONS, Metric, Ranks
from ranksearch.decompositions.tensor_train_cores import balanced_chain
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec
from ranksearch.testing import convolution

TENSOR_TRAIN = DECOMPOSITIONS["tensor_train"]


def random_weight(spec: LayerSpec, seed: int = 0) -> Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed))


def trained_like(spec: ConvSpec) -> Tensor:
    """A weight whose spectra over inputs and outputs decay, with kernels that are strongest at their centre."""
    n_outputs, n_inputs, height, width = spec.weight_shape
    generator = torch.Generator().manual_seed(3)
    mixers = [torch.randn(n, n, generator=generator) * torch.arange(1, n + 1) ** -1.0 for n in (n_outputs, n_inputs)]
    window = [torch.exp(-0.6 * (torch.arange(n) - (n - 1) / 2).abs()) for n in (height, width)]
    return torch.einsum("tshw,ut,vs,h,w->uvhw", random_weight(spec), *mixers, *window)


def some_metric(spec: ConvSpec, *, with_output: bool) -> Metric:
    generator = torch.Generator().manual_seed(1)
    n_inputs = torch.Size(spec.weight_shape[1:]).numel()
    samples = torch.randn(2 * n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    samples = samples * torch.logspace(0, -1.5, n_inputs, dtype=torch.float64)
    gradients = torch.randn(4, spec.out_channels, generator=generator, dtype=torch.float64)
    return Metric(input=samples.T @ samples, output=gradients.T @ gradients if with_output else None)


def relative_error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@st.composite
def kernels_over_two_axes(draw: st.DrawFn) -> ConvSpec:
    return convolution(
        draw(st.integers(1, 10)),
        draw(st.integers(1, 10)),
        (draw(st.integers(2, 4)), draw(st.integers(2, 5))),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@settings(max_examples=8, deadline=None)
@given(spec=kernels_over_two_axes())
def test_any_convolution_over_two_axes_is_exact_at_the_largest_ranks_and_computes_its_weight(spec: ConvSpec) -> None:
    weight = random_weight(spec)
    most = TENSOR_TRAIN.max_ranks(spec, {})
    for metric in (None, some_metric(spec, with_output=True)):
        factorisation = TENSOR_TRAIN.factorise(weight, spec, {}, metric)
        assert relative_error(factorisation.weight(most), weight) < 1e-5
        for ranks in (most, tuple(-(-rank // 2) for rank in most)):
            built = TENSOR_TRAIN.build(spec, ranks, {})
            inputs = torch.randn(2, spec.in_channels, 12, 13, generator=torch.Generator().manual_seed(2))
            dense = torch.nn.Conv2d(
                spec.in_channels,
                spec.out_channels,
                spec.kernel_size,  # type: ignore[arg-type]
                spec.stride,  # type: ignore[arg-type]
                spec.padding,  # type: ignore[arg-type]
                spec.dilation,  # type: ignore[arg-type]
                padding_mode=spec.padding_mode,
                bias=False,
            )
            with torch.no_grad():
                dense.weight.copy_(factorisation.weight(ranks))
                for module, factor in zip(built.children(), factorisation.factors(ranks), strict=True):
                    module.get_parameter("weight").copy_(factor)
                torch.testing.assert_close(built(inputs), dense(inputs), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ranks", [(4, 12, 6), (12, 21, 16), (18, 54, 24), (8, 43, 11)])
@pytest.mark.parametrize("make", [random_weight, trained_like])
def test_it_is_within_five_percent_of_the_sequential_tensor_train(make: object, ranks: Ranks) -> None:
    spec = convolution(24, 32, (3, 5), padding=(1, 2))
    weight = make(spec)  # type: ignore[operator]
    ours = TENSOR_TRAIN.factorise(weight, spec, {}, None).weight(ranks)
    train = tensor_train(weight.permute(1, 2, 3, 0).numpy(), rank=[1, *ranks, 1])
    sequential = torch.from_numpy(tensorly.tt_to_tensor(train)).permute(3, 0, 1, 2)
    assert relative_error(ours, weight) <= 1.05 * relative_error(sequential, weight)


def test_the_error_falls_as_any_one_rank_grows() -> None:
    spec = convolution(10, 12)
    weight = random_weight(spec)
    factorisation = TENSOR_TRAIN.factorise(weight, spec, {}, None)
    for axis, most in enumerate(TENSOR_TRAIN.max_ranks(spec, {})):
        path = [tuple(rank if each == axis else 6 for each in range(3)) for rank in range(1, most + 1)]
        errors = [relative_error(factorisation.weight(ranks), weight) for ranks in path]
        assert all(after <= before + 1e-6 for before, after in zip(errors, errors[1:], strict=False))
        assert errors[0] > errors[5]


@pytest.mark.parametrize("with_output", [False, True])
def test_the_cost_in_the_metric_is_never_above_that_of_the_plain_one_and_mostly_far_below(with_output: bool) -> None:
    spec = convolution(12, 10)
    weight, metric = random_weight(spec), some_metric(spec, with_output=with_output)
    plain = TENSOR_TRAIN.factorise(weight, spec, {}, None)
    aware = TENSOR_TRAIN.factorise(weight, spec, {}, metric)
    ratios = []
    for ranks in [(2, 4, 3), (4, 6, 4), (6, 12, 5), (8, 20, 8), (12, 30, 9)]:
        costs = [metric.cost(weight - each.weight(ranks)) for each in (aware, plain)]
        assert costs[0] <= costs[1] * (1 + 1e-6)
        ratios.append(costs[0] / costs[1])
    assert sorted(ratios)[2] < 0.7


@pytest.mark.parametrize("ranks", [(3, 5, 4), (12, 30, 10)])
@pytest.mark.parametrize("with_data", [False, True])
def test_channels_leave_each_factor_as_strong_as_they_enter_the_next(ranks: Ranks, with_data: bool) -> None:
    spec = convolution(12, 10)
    metric = some_metric(spec, with_output=False) if with_data else None
    factors = TENSOR_TRAIN.factorise(random_weight(spec), spec, {}, metric).factors(ranks)
    for before, after in zip(factors, factors[1:], strict=False):
        leaving, entering = before.flatten(1).norm(dim=1), after.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(leaving, entering, rtol=2e-3, atol=1e-4)


def test_balancing_a_chain_keeps_its_product() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 3), (6, 4), (2, 6), (5, 2)]
    chain = [torch.randn(size, generator=generator) * 10.0**exponent for exponent, size in enumerate(sizes)]
    first, second, third, last = balanced_chain(*chain)
    product = chain[3] @ chain[2] @ chain[1] @ chain[0]
    torch.testing.assert_close(last @ third @ second @ first, product, rtol=1e-4, atol=1e-1)
    assert max(float(each.norm()) for each in (first, second, third, last)) < float(chain[3].norm())


def test_spare_channels_are_silent_and_learn() -> None:
    spec = convolution(6, 8)
    ranks = (1, 12, 2)  # one row of three taps carries three channels at most
    factors = TENSOR_TRAIN.factorise(random_weight(spec), spec, {}, None).factors(ranks)
    assert [tuple(factor.shape) for factor in factors] == [(1, 6, 1, 1), (12, 1, 3, 1), (2, 12, 1, 3), (8, 2, 1, 1)]
    assert bool(factors[1].flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(in_features=4, out_features=4, bias=True), "no spatial kernel"),
        (convolution(8, 8, (1, 1)), "no spatial kernel"),
        (convolution(8, 8, (5,), stride=(1,), padding=(2,), dilation=(1,)), "tucker2 is its tensor train"),
        (convolution(8, 8, (1, 5)), "tucker2 is its tensor train"),
        (convolution(8, 8, groups=2), "2 groups"),
        (convolution(8, 8, groups=8), "depthwise"),
    ],
)
def test_refusals_say_why(spec: LayerSpec, reason: str) -> None:
    assert reason in (TENSOR_TRAIN.refuse(spec) or "")
