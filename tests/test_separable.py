"""Weights as filters on single channels, or on few, and mixtures of channels: what all such decompositions promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS, Metric, Options, check_choice, separable
from ranksearch.decompositions.base import n_dense_params
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec, build_layer
from ranksearch.plan import LayerChoice
from ranksearch.testing import convolution

GROUPED = [(name, {"groups": groups}) for name, groups in (("grouped_svd", 2), ("grouped_svd", 4), ("grouped_svd", 8))]
ONE_OPTION: list[tuple[str, Options]] = [("depthwise_separable", {}), ("blueprint_separable", {}), ("harmonic", {})]
METHODS: list[tuple[str, Options]] = [*ONE_OPTION, *GROUPED]


def random_weight(spec: LayerSpec, seed: int = 0) -> Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed))


def random_metric(spec: LayerSpec, seed: int = 0, *, share: float = 2.0, weighed: bool = False) -> Metric:
    """Of correlated inputs, one of them dead, of which there are `share` times as many samples as there are inputs."""
    generator = torch.Generator().manual_seed(seed)
    n_outputs, n_inputs = spec.weight_shape[0], math.prod(spec.weight_shape[1:])
    samples = torch.randn(max(1, int(share * n_inputs)), n_inputs, generator=generator, dtype=torch.float64)
    samples = samples + 0.7 * samples.roll(1, 1) + 0.7 * samples.mean(1, keepdim=True) * n_inputs**0.5
    samples[:, 0] = 0.0
    gradients = torch.randn(3, n_outputs, generator=generator, dtype=torch.float64)
    return Metric(input=samples.T @ samples / len(samples), output=gradients.T @ gradients if weighed else None)


def filled(spec: ConvSpec, name: str, rank: int, options: Options, metric: Metric | None = None) -> nn.Sequential:
    """What `build` gives with the factors of a random weight."""
    decomposition = DECOMPOSITIONS[name]
    built = decomposition.build(spec, (rank,), options)
    assert isinstance(built, nn.Sequential)
    factors = decomposition.factorise(random_weight(spec), spec, options, metric).factors((rank,))
    with torch.no_grad():
        for module, factor in zip(built, factors, strict=True):
            module.get_parameter("weight").copy_(factor)
    return built


def largest_rank(name: str, spec: LayerSpec, options: Options) -> int:
    (rank,) = DECOMPOSITIONS[name].max_ranks(spec, options)
    return rank


def takes(name: str, spec: LayerSpec, options: Options) -> bool:
    decomposition = DECOMPOSITIONS[name]
    return decomposition.refuse(spec) is None and options in decomposition.options_for(spec)


@st.composite
def conv_specs(draw: st.DrawFn) -> ConvSpec:
    """Convolutions over one or two axes, of any kernel, stride, padding and dilation."""
    axes = range(draw(st.integers(1, 2)))

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in axes)

    stride = sizes(1, 3)
    padding = draw(st.sampled_from(["same", "valid"])) if max(stride) == 1 and draw(st.booleans()) else sizes(0, 2)
    return convolution(
        draw(st.sampled_from([1, 2, 3, 4, 8])),
        draw(st.integers(1, 12)),
        sizes(1, 4),
        stride=stride,
        padding=padding,
        dilation=sizes(1, 2),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize(("name", "options"), METHODS)
@settings(max_examples=15, deadline=None)
@given(spec=conv_specs())
def test_the_layer_itself_at_the_largest_rank(name: str, options: Options, with_metric: bool, spec: ConvSpec) -> None:
    if not takes(name, spec, options):
        return
    metric = random_metric(spec, weighed=True) if with_metric else None
    built = filled(spec, name, largest_rank(name, spec, options), options, metric)
    layer = build_layer(spec)
    inputs = torch.randn(2, spec.in_channels, *(13 for _ in spec.kernel_size))
    with torch.no_grad():
        layer.weight.copy_(random_weight(spec))
        if layer.bias is not None:
            layer.bias.zero_()
        expected, output = layer(inputs), built(inputs)
    assert output.shape == expected.shape
    assert float((output - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(("name", "options"), METHODS)
@settings(max_examples=15, deadline=None)
@given(spec=conv_specs(), weighed=st.booleans(), share=st.sampled_from([0.3, 2.0]), seed=st.integers(0, 3))
def test_the_metric_never_makes_it_worse_and_more_rank_makes_it_better(
    name: str, options: Options, spec: ConvSpec, weighed: bool, share: float, seed: int
) -> None:
    if not takes(name, spec, options):
        return
    decomposition, weight = DECOMPOSITIONS[name], random_weight(spec, seed)
    metric = random_metric(spec, seed, share=share, weighed=weighed)
    plain = decomposition.factorise(weight, spec, options, None)
    aware = decomposition.factorise(weight, spec, options, metric)
    errors = []
    for rank in range(1, largest_rank(name, spec, options) + 1):
        noise = 1e-6 * metric.cost(weight)
        assert metric.cost(weight - aware.weight((rank,))) <= metric.cost(weight - plain.weight((rank,))) + noise
        errors.append(float((weight - plain.weight((rank,))).norm()))
        factors = aware.factors((rank,))
        assert all(factor.dtype == torch.float32 and factor.isfinite().all() for factor in factors)
    assert all(more <= less + 1e-5 * float(weight.norm()) for less, more in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_with_a_metric_it_costs_less_than_plain_and_less_at_each_rank(name: str, options: Options) -> None:
    spec = convolution(16, 24)
    weight, metric = random_weight(spec), random_metric(spec)
    plain = DECOMPOSITIONS[name].factorise(weight, spec, options, None)
    aware = DECOMPOSITIONS[name].factorise(weight, spec, options, metric)
    ranks = [(rank,) for rank in range(1, largest_rank(name, spec, options) + 1)]
    costs = [metric.cost(weight - aware.weight(rank)) for rank in ranks]
    assert costs == sorted(costs, reverse=True)
    middle = len(ranks) // 2
    assert costs[middle] < 0.9 * metric.cost(weight - plain.weight(ranks[middle]))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_no_other_last_factor_would_cost_less(name: str, options: Options, weighed: bool) -> None:
    spec = convolution(8, 12)
    weight, metric = random_weight(spec), random_metric(spec, weighed=weighed)
    rank = largest_rank(name, spec, options) // 2
    first, last = (f.double() for f in DECOMPOSITIONS[name].factorise(weight, spec, options, metric).factors((rank,)))

    def cost(last: Tensor) -> float:
        if name == "blueprint_separable":
            made = torch.einsum("tms,tmk->tsk", first.reshape(12, rank, 8), last.reshape(12, rank, 9))
        else:
            per_group = first.reshape(-1, rank, first.shape[1], 9)
            made = torch.einsum("tgm,gmsk->tgsk", last.reshape(12, -1, rank), per_group)
        lost = weight.double().flatten(1) - made.reshape(12, 72)
        return float((lost @ metric.input * lost).sum())

    least = cost(last)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(last.shape, generator=generator, dtype=torch.float64)
        before, after = cost(last - 1e-2 * direction), cost(last + 1e-2 * direction)
        assert min(before, after) > least
        assert abs(after - before) < 1e-3 * (after + before - 2 * least)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_with_more_filters_than_can_be_solved_for_the_metric_still_pays(
    name: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = convolution(16, 24)
    weight, metric = random_weight(spec), random_metric(spec)
    rank = largest_rank(name, spec, options) * 2 // 3
    ways = []
    for limit in (0, 48, 10_000):
        monkeypatch.setattr(separable, "MAX_COMPONENTS", limit)
        monkeypatch.setattr("ranksearch.decompositions.blueprint_separable.MAX_COMPONENTS", limit)
        aware = DECOMPOSITIONS[name].factorise(weight, spec, options, metric)
        ways.append(metric.cost(weight - aware.weight((rank,))))
    plain = DECOMPOSITIONS[name].factorise(weight, spec, options, None)
    assert ways[2] <= ways[1] <= ways[0] <= metric.cost(weight - plain.weight((rank,)))
    assert ways[2] < ways[0]


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize(("name", "options"), [method for method in METHODS if method[0] != "harmonic"])
def test_factors_are_balanced_per_component(name: str, options: Options, with_metric: bool) -> None:
    spec = convolution(16, 12)
    metric = random_metric(spec) if with_metric else None
    for rank in (1, 3):
        first, last = (m.get_parameter("weight").detach() for m in filled(spec, name, rank, options, metric))
        # The last factor of a blueprint has groups of `rank` inputs; the others' mixes all of them.
        inputs = last.flatten(0, 1) if name == "blueprint_separable" else last.transpose(0, 1)
        dead = 1e-3 * float(first.flatten(1).norm(dim=1).max())
        torch.testing.assert_close(first.flatten(1).norm(dim=1), inputs.flatten(1).norm(dim=1), rtol=1e-4, atol=dead)


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("kernel", [(3, 3), (5,)])
def test_two_kernels_run_one_in_groups_and_one_pointwise(name: str, options: Options, kernel: tuple[int, ...]) -> None:
    ones = tuple(1 for _ in kernel)
    spec = convolution(16, 24, kernel, stride=ones, padding=ones, dilation=ones)
    layers = list(DECOMPOSITIONS[name].build(spec, (3,), options))  # type: ignore[call-overload]
    assert sorted(layer.groups > 1 for layer in layers) == [False, True]
    (pointwise,) = (layer for layer in layers if layer.groups == 1)
    (spatial,) = (layer for layer in layers if layer.groups > 1)
    assert pointwise.kernel_size == ones
    assert spatial.kernel_size == kernel
    groups = {"blueprint_separable": 24, "grouped_svd": options.get("groups")}.get(name, 16)
    assert spatial.groups == groups
    assert [layer.bias is not None for layer in layers] == [False, True]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_gradients_reach_what_trains(name: str, options: Options) -> None:
    spec = convolution(8, 12)
    built = filled(spec, name, 2, options)
    built(torch.randn(2, 8, 7, 7)).square().mean().backward()
    for parameter in built.parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
        assert parameter.grad is None or float(parameter.grad.abs().sum()) > 0
    frozen = [not module.get_parameter("weight").requires_grad for module in built]
    assert frozen == [name == "harmonic", False]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_dead_channels_zero_weights_and_singular_covariances_give_finite_factors(name: str, options: Options) -> None:
    spec = convolution(8, 8)
    dead = random_weight(spec)
    dead[:, :3], dead[5:] = 0.0, 0.0
    singular = random_metric(spec, share=0.1, weighed=True)
    half = random_metric(spec).input.clone()
    half[:36], half[:, :36] = 0.0, 0.0
    nothing = Metric(input=torch.zeros(72, 72, dtype=torch.float64), output=torch.zeros(8, 8, dtype=torch.float64))
    faint = Metric(input=random_metric(spec).input * 1e-20)
    most = largest_rank(name, spec, options)
    for weight in (dead, random_weight(spec), torch.zeros(8, 8, 3, 3), random_weight(spec) * 1e-12):
        for metric in (None, nothing, singular, faint, Metric(input=half)):
            factorisation = DECOMPOSITIONS[name].factorise(weight, spec, options, metric)
            for rank in (1, most // 2, most):
                assert all(factor.isfinite().all() for factor in factorisation.factors((rank,)))
                assert factorisation.weight((rank,)).isfinite().all()
            error = float((factorisation.weight((most,)) - weight).norm())
            assert error <= 1e-5 * float(weight.norm())
            first, last = factorisation.factors((most,))
            assert max(float(first.abs().max()), float(last.abs().max())) < 1e3


@pytest.mark.parametrize(("name", "options"), METHODS)
@settings(max_examples=20, deadline=None)
@given(n_inputs=st.sampled_from([8, 16, 64, 200]), n_outputs=st.integers(1, 200))
def test_every_rank_worth_trying_shrinks_the_layer(name: str, options: Options, n_inputs: int, n_outputs: int) -> None:
    decomposition, spec = DECOMPOSITIONS[name], convolution(n_inputs, n_outputs)
    for ranks in decomposition.rank_choices(spec, options, 1):
        check_choice(spec, LayerChoice(decomposition=name, ranks=ranks, options=dict(options)))
        assert decomposition.n_params(spec, ranks, options) < n_dense_params(spec)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("depthwise_separable", LinearSpec(in_features=4, out_features=4, bias=True), "no spatial kernel"),
        ("depthwise_separable", convolution(8, 8, (1, 1)), "no spatial kernel"),
        ("depthwise_separable", convolution(8, 8, groups=8), "depthwise"),
        ("depthwise_separable", convolution(8, 8, groups=2), "2 groups"),
        ("depthwise_separable", convolution(1, 8), "it is svd"),
        ("blueprint_separable", LinearSpec(in_features=4, out_features=4, bias=True), "no spatial kernel"),
        ("blueprint_separable", convolution(8, 8, (1, 1)), "no spatial kernel"),
        ("blueprint_separable", convolution(8, 8, groups=2), "2 groups"),
        ("blueprint_separable", convolution(1, 8), "the layer's own"),
    ],
)
def test_refusals_say_why(name: str, spec: LayerSpec, reason: str) -> None:
    assert reason in (DECOMPOSITIONS[name].refuse(spec) or "")
    with pytest.raises(DecompositionError, match=reason):
        check_choice(spec, LayerChoice(decomposition=name, ranks=(1,)))


@pytest.mark.parametrize(
    ("name", "spec", "largest"),
    [
        ("depthwise_separable", convolution(8, 12), 9),
        ("depthwise_separable", convolution(8, 4), 4),
        ("blueprint_separable", convolution(8, 12, (5, 5)), 8),
        ("blueprint_separable", convolution(64, 12, (3, 1)), 3),
    ],
)
def test_the_largest_rank_is_the_smaller_side_of_what_is_factored(name: str, spec: ConvSpec, largest: int) -> None:
    assert DECOMPOSITIONS[name].max_ranks(spec, {}) == (largest,)


@pytest.mark.parametrize("name", ["depthwise_separable", "blueprint_separable"])
def test_plain_factors_lose_the_tails_of_the_singular_values(name: str) -> None:
    spec = convolution(8, 12)
    weight = random_weight(spec)
    slices = weight.flatten(2) if name == "blueprint_separable" else weight.flatten(2).transpose(0, 1)
    tails = torch.linalg.svdvals(slices.double())[:, 3:].square().sum()
    kept = DECOMPOSITIONS[name].factorise(weight, spec, {}, None).weight((3,))
    assert float((kept - weight).square().sum()) == pytest.approx(float(tails), rel=1e-4)


def test_a_sum_of_separable_convolutions_is_found_again_whatever_the_inputs() -> None:
    spec = convolution(6, 10)
    generator = torch.Generator().manual_seed(0)
    filters, mixture = torch.randn(6, 2, 9, generator=generator), torch.randn(10, 6, 2, generator=generator)
    weight = torch.einsum("tsm,smk->tsk", mixture, filters).reshape(10, 6, 3, 3)
    for metric in (None, random_metric(spec), random_metric(spec, weighed=True)):
        found = DECOMPOSITIONS["depthwise_separable"].factorise(weight, spec, {}, metric).weight((2,))
        torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)


def test_blueprints_are_found_again_whatever_the_inputs() -> None:
    spec = convolution(6, 10)
    generator = torch.Generator().manual_seed(0)
    mixture, filters = torch.randn(10, 2, 6, generator=generator), torch.randn(10, 2, 9, generator=generator)
    weight = torch.einsum("tms,tmk->tsk", mixture, filters).reshape(10, 6, 3, 3)
    for metric in (None, random_metric(spec), random_metric(spec, weighed=True)):
        found = DECOMPOSITIONS["blueprint_separable"].factorise(weight, spec, {}, metric).weight((2,))
        torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-4)
