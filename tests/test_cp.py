"""What CP promises beyond the contract of every decomposition."""

import logging

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS, Metric, cp_fitting
from ranksearch.decompositions.cp import fitted_ranks
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec
from ranksearch.testing import convolution

CP = DECOMPOSITIONS["cp"]


def random_weight(spec: LayerSpec, seed: int = 0) -> Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed))


def some_metric(spec: ConvSpec, *, with_output: bool) -> Metric:
    generator = torch.Generator().manual_seed(1)
    n_inputs = torch.Size(spec.weight_shape[1:]).numel()
    samples = torch.randn(2 * n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    samples = samples * torch.logspace(0, -1.5, n_inputs, dtype=torch.float64)
    gradients = torch.randn(4, spec.out_channels, generator=generator, dtype=torch.float64)
    return Metric(input=samples.T @ samples, output=gradients.T @ gradients if with_output else None)


def relative_error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def degenerate_weight(spec: ConvSpec) -> Tensor:
    """A tensor of rank 3 that terms of rank 2 come as near to as they like, by diverging while they cancel."""
    generator = torch.Generator().manual_seed(0)
    n_outputs, n_inputs, n_taps = spec.weight_shape
    pairs = [torch.linalg.qr(torch.randn(n, 2, generator=generator))[0] for n in (n_outputs, n_inputs, n_taps)]
    outer = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    return sum(
        (torch.einsum("t,s,k->tsk", *(pair[:, i] for pair, i in zip(pairs, which, strict=True))) for which in outer),
        torch.zeros(spec.weight_shape),
    )


def term_norms(factors: tuple[Tensor, ...]) -> Tensor:
    *others, last = factors
    norms = [each.flatten(1).norm(dim=1) for each in others] + [last.transpose(0, 1).flatten(1).norm(dim=1)]
    return torch.stack(norms)


@st.composite
def spatial_kernels(draw: st.DrawFn) -> ConvSpec:
    n_axes = draw(st.integers(1, 2))
    along = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n_axes))  # noqa: E731
    return convolution(
        draw(st.integers(1, 8)),
        draw(st.integers(1, 8)),
        (draw(st.integers(2, 4)), *along(1, 4)[1:]),
        stride=along(1, 3),
        padding=along(0, 2),
        dilation=along(1, 2),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@settings(max_examples=8, deadline=None)
@given(spec=spatial_kernels(), rank=st.integers(1, 20))
def test_any_convolution_is_exact_at_the_largest_rank_and_computes_its_weight(spec: ConvSpec, rank: int) -> None:
    weight = random_weight(spec)
    (most,) = CP.max_ranks(spec, {})
    for metric in (None, some_metric(spec, with_output=True)):
        factorisation = CP.factorise(weight, spec, {}, metric)
        assert relative_error(factorisation.weight((most,)), weight) < 1e-5
        for ranks in ((most,), (min(rank, most),)):
            built = CP.build(spec, ranks, {})
            kind = nn.Conv2d if len(spec.kernel_size) == 2 else nn.Conv1d
            dense = kind(
                spec.in_channels,
                spec.out_channels,
                spec.kernel_size,  # type: ignore[arg-type]
                spec.stride,  # type: ignore[arg-type]
                spec.padding,  # type: ignore[arg-type]
                spec.dilation,  # type: ignore[arg-type]
                padding_mode=spec.padding_mode,
                bias=False,
            )
            size = (12, 13)[: len(spec.kernel_size)]
            inputs = torch.randn(2, spec.in_channels, *size, generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                dense.weight.copy_(factorisation.weight(ranks))
                for module, factor in zip(built.children(), factorisation.factors(ranks), strict=True):
                    module.get_parameter("weight").copy_(factor)
                torch.testing.assert_close(built(inputs), dense(inputs), atol=1e-3, rtol=1e-3)


@settings(max_examples=6, deadline=None)
@given(spec=spatial_kernels(), seed=st.integers(0, 99))
def test_the_error_never_grows_with_the_rank(spec: ConvSpec, seed: int) -> None:
    weight = random_weight(spec, seed)
    (most,) = CP.max_ranks(spec, {})
    factorisation = CP.factorise(weight, spec, {}, None)
    errors = [relative_error(factorisation.weight((rank,)), weight) for rank in range(1, most + 1)]
    assert all(after <= before + 1e-5 for before, after in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("with_output", [False, True])
def test_the_cost_in_the_metric_is_never_above_that_of_the_plain_one_and_mostly_far_below(with_output: bool) -> None:
    spec = convolution(10, 12)
    weight, metric = random_weight(spec), some_metric(spec, with_output=with_output)
    plain, aware = (CP.factorise(weight, spec, {}, each) for each in (None, metric))
    ratios, costs_before = [], float("inf")
    for rank in range(1, 60, 3):
        cost, other = (metric.cost(weight - each.weight((rank,))) for each in (aware, plain))
        assert cost <= other * (1 + 1e-6)
        assert cost <= costs_before * (1 + 1e-4)
        ratios.append(cost / other)
        costs_before = cost
    assert sorted(ratios)[len(ratios) // 2] < 0.7


@pytest.mark.parametrize("rank", [6, 24, 70])
def test_it_is_about_as_good_as_a_hundred_sweeps_of_plain_least_squares(rank: int) -> None:
    spec = convolution(16, 20)
    weight = random_weight(spec)
    found = CP.factorise(weight, spec, {}, None).weight((rank,))
    swept = tensorly.cp_to_tensor(parafac(weight.numpy(), rank, n_iter_max=100, init="random", random_state=0))
    assert relative_error(found, weight) <= 1.05 * relative_error(torch.from_numpy(swept), weight)


def test_terms_do_not_diverge_where_plain_least_squares_lets_them() -> None:
    spec = convolution(6, 5, (4,), stride=(1,), padding=(1,), dilation=(1,))
    weight = degenerate_weight(spec)
    strengths, _ = parafac(
        weight.double().numpy(), 2, n_iter_max=2000, init="random", random_state=0, tol=1e-12, normalize_factors=True
    )
    assert float((strengths**2).sum()) > 30 * float(weight.square().sum())
    factorisation = CP.factorise(weight, spec, {}, None)
    for rank in (2, 3, 4):
        squared = term_norms(factorisation.factors((rank,))).prod(0).square().sum()
        assert float(squared) < 10 * float(weight.square().sum())
    assert relative_error(factorisation.weight((2,)), weight) < 0.5


def test_error_preservation_costs_little_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = convolution(24, 16)
    weight = random_weight(spec)
    ranks = (8, 32, 56)
    kept = [CP.factorise(weight, spec, {}, None).weight((rank,)) for rank in ranks]
    monkeypatch.setattr(cp_fitting, "PENALTY", 1e-9)
    free = [CP.factorise(weight, spec, {}, None).weight((rank,)) for rank in ranks]
    for ours, theirs in zip(kept, free, strict=True):
        assert relative_error(ours, weight) <= 1.05 * relative_error(theirs, weight)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("spec", [convolution(12, 10), convolution(9, 7, (1, 5))])
def test_each_terms_norm_is_spread_evenly_over_its_factors(spec: ConvSpec, with_data: bool) -> None:
    metric = some_metric(spec, with_output=False) if with_data else None
    norms = term_norms(CP.factorise(random_weight(spec), spec, {}, metric).factors((17,)))
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-4, atol=1e-5)


def test_a_rank_gives_the_same_whichever_ranks_were_asked_for_before() -> None:
    spec = convolution(12, 14)
    weight = random_weight(spec)
    rising, falling = (CP.factorise(weight, spec, {}, None) for _ in range(2))
    ranks = [(3,), (8,), (20,), (32,), (43,)]
    first = [rising.weight(each) for each in ranks]
    second = [falling.weight(each) for each in reversed(ranks)][::-1]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert fitted_ranks(40) == [0, 1, 2, 4, 8, 16, 24, 32, 40]


def test_where_least_squares_fail_the_terms_before_are_kept_and_a_warning_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = convolution(6, 6)
    weight = random_weight(spec)

    def fails(wanted: Tensor, products: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        return torch.full_like(wanted, torch.nan), torch.full_like(wanted[0], torch.nan)

    monkeypatch.setattr(cp_fitting, "_solve", fails)
    with caplog.at_level(logging.WARNING):
        found = CP.factorise(weight, spec, {}, None).weight((16,))
    assert relative_error(found, weight) < 0.9
    assert "the terms before are kept" in caplog.text


def test_a_kernel_along_one_axis_takes_one_filter() -> None:
    assert [tuple(each.weight.shape) for each in CP.build(convolution(4, 6, (1, 5)), (7,), {}).children()] == [
        (7, 4, 1, 1),
        (7, 1, 1, 5),
        (6, 7, 1, 1),
    ]
    assert len(list(CP.build(convolution(4, 6), (7,), {}).children())) == 4


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(in_features=4, out_features=4, bias=True), "svd factors it"),
        (convolution(8, 8, (1, 1)), "no spatial kernel"),
        (convolution(8, 8, groups=2), "2 groups"),
        (convolution(8, 8, groups=8), "depthwise"),
    ],
)
def test_refusals_say_why(spec: LayerSpec, reason: str) -> None:
    assert reason in (CP.refuse(spec) or "")
