"""What each of the closed-form decompositions promises beyond the contract of all."""

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import ranksearch.decompositions.bottleneck as bottleneck
from ranksearch.decompositions import (
    DECOMPOSITIONS,
    Metric,
    Options,
    Ranks,
    check_choice,
)
from ranksearch.decompositions.base import n_dense_params
from ranksearch.decompositions.matrices import NestedLeastSquares, eigenvectors, warn_of_the_second_solver
from ranksearch.decompositions.metric import MAX_EXACT_INPUTS
from ranksearch.decompositions.ranks import equal_share_path, geometric_spread
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec
from ranksearch.plan import LayerChoice
from ranksearch.testing import convolution

FACTORING = ("svd", "spatial_svd", "tucker2")
KERNEL_LAST: Options = {"folding": "kernel_last"}
METHODS: tuple[tuple[str, Options], ...] = (("svd", {}), ("svd", KERNEL_LAST), ("spatial_svd", {}), ("tucker2", {}))


def smooth_covariance(spec: LayerSpec, seed: int) -> Tensor:
    """The covariance (D, D) of patches of smooth images with mixed channels of very different strength."""
    assert isinstance(spec, ConvSpec)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, spec.in_channels, 20, 20, generator=generator, dtype=torch.float64)
    smooth = nn.functional.avg_pool2d(noise, 3, stride=1)
    mixing = torch.randn(spec.in_channels, spec.in_channels, generator=generator, dtype=torch.float64)
    strength = torch.logspace(0, -2, spec.in_channels, dtype=torch.float64)
    images = torch.einsum("cd,ndhw->nchw", mixing * strength, smooth)
    patches = nn.functional.unfold(images, spec.kernel_size).transpose(1, 2).flatten(0, 1)
    centred = patches - patches.mean(0)
    return centred.T @ centred / 8


def random_weight(spec: LayerSpec, seed: int = 0) -> Tensor:
    return torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(seed))


def output_moment(n_outputs: int, seed: int) -> Tensor:
    """The second moment (T, T) of few gradients at outputs that count very unlike: nearly singular."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(2 * n_outputs, n_outputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(n_outputs, n_outputs, generator=generator, dtype=torch.float64)
    seen = gradients * torch.logspace(0, -2, n_outputs, dtype=torch.float64) @ torch.linalg.qr(mixing).Q
    return seen.T @ seen / len(seen)


def lost_energy(difference: Tensor, covariance: Tensor) -> float:
    rows = difference.flatten(1).double()
    return float((rows @ covariance * rows).sum())


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_data_aware_loses_less_output_than_plain(name: str, options: Options, seed: int) -> None:
    spec = convolution(16, 24)
    decomposition, weight, covariance = DECOMPOSITIONS[name], random_weight(spec, seed), smooth_covariance(spec, seed)
    plain = decomposition.factorise(weight, spec, options, None)
    aware = decomposition.factorise(weight, spec, options, Metric(input=covariance))
    for share in (0.3, 0.5, 0.7):
        ranks = decomposition.uniform_ranks(spec, options, share, 1)
        assert ranks is not None
        lost = [lost_energy(kept.weight(ranks) - weight, covariance) for kept in (aware, plain)]
        assert lost[0] < 0.7 * lost[1], (ranks, lost)


@pytest.mark.parametrize(("name", "options"), [METHODS[0], METHODS[2], METHODS[3]])
def test_weighing_outputs_loses_less_of_those_that_count(name: str, options: Options) -> None:
    spec = convolution(12, 24)
    weight, covariance, moment = random_weight(spec), smooth_covariance(spec, 0), output_moment(24, 0)
    metric = Metric(input=covariance, output=moment)
    decomposition = DECOMPOSITIONS[name]
    weighed = decomposition.factorise(weight, spec, options, metric)
    alike = decomposition.factorise(weight, spec, options, Metric(input=covariance))
    ranks = decomposition.uniform_ranks(spec, options, 0.3, 1)
    assert ranks is not None
    lost = [metric.cost(found.weight(ranks) - weight) for found in (weighed, alike)]
    assert lost[0] < 0.95 * lost[1]


def test_the_kept_subspace_is_that_of_the_outputs_that_count() -> None:
    spec = convolution(8, 6)
    weight, moment = random_weight(spec), torch.zeros(6, 6, dtype=torch.float64)
    moment[2, 2] = 1.0
    metric = Metric(input=torch.eye(72, dtype=torch.float64), output=moment)
    first, _ = DECOMPOSITIONS["svd"].factorise(weight, spec, {}, metric).factors((1,))
    alignment = nn.functional.cosine_similarity(first.flatten(), weight[2].flatten(), dim=0)
    assert abs(float(alignment)) > 0.95


def test_of_a_grouped_convolution_each_groups_own_outputs_count() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.stack([smooth_covariance(convolution(2, 3), seed) for seed in range(2)])
    moment, change = output_moment(6, 0), torch.randn(6, 2, 3, 3, generator=generator)
    halves = [Metric(input=inputs[g], output=moment[3 * g : 3 * g + 3, 3 * g : 3 * g + 3]) for g in range(2)]
    expected = sum(half.cost(change[3 * g : 3 * g + 3]) for g, half in enumerate(halves))
    assert Metric(input=inputs, output=moment).cost(change) == pytest.approx(expected)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize(("name", "options"), METHODS[:3])
def test_each_group_is_factored_as_a_layer_of_its_own(name: str, options: Options, with_data: bool) -> None:
    spec, one = convolution(12, 8, groups=2), convolution(6, 4)
    weight, decomposition = random_weight(spec), DECOMPOSITIONS[name]
    inputs = torch.stack([smooth_covariance(one, seed) for seed in range(2)])
    metrics = [Metric(input=inputs), *(Metric(input=moment) for moment in inputs)] if with_data else [None] * 3
    whole = decomposition.factorise(weight, spec, options, metrics[0])
    for ranks in ((1,), (3,)):
        parts = [
            decomposition.factorise(half, one, options, metric).weight(ranks)
            for half, metric in zip(weight.chunk(2), metrics[1:], strict=True)
        ]
        torch.testing.assert_close(whole.weight(ranks), torch.cat(parts), atol=1e-4, rtol=1e-4)


def test_a_depthwise_convolution_sums_separable_branches() -> None:
    spec = convolution(5, 5, (5, 3), groups=5)
    factorisation = DECOMPOSITIONS["spatial_svd"].factorise(random_weight(spec), spec, {}, None)
    assert DECOMPOSITIONS["spatial_svd"].max_ranks(spec, {}) == (3,)
    assert [int(torch.linalg.matrix_rank(filter_)) for filter_ in factorisation.weight((2,))[:, 0]] == [2] * 5
    built = DECOMPOSITIONS["spatial_svd"].build(spec, (2,), {})
    shapes = [(layer.in_channels, layer.out_channels, layer.groups) for layer in built.children()]  # type: ignore
    assert shapes == [(5, 10, 5), (10, 5, 5)]


@pytest.mark.parametrize(("name", "options"), [METHODS[0], METHODS[1], METHODS[3]])
def test_a_conv1d_is_factored_as_a_conv2d_of_one_column(name: str, options: Options) -> None:
    line, plane = convolution(10, 12, (5,)), convolution(10, 12, (5, 1), padding=(1, 0))
    weight, metric = random_weight(line), Metric(input=smooth_covariance(plane, 0), output=output_moment(12, 0))
    decomposition = DECOMPOSITIONS[name]
    most = decomposition.max_ranks(line, options)
    assert most == decomposition.max_ranks(plane, options)
    ranks = tuple(rank // 2 for rank in most)
    found = decomposition.factorise(weight, line, options, metric).weight(ranks)
    expected = decomposition.factorise(weight[..., None], plane, options, metric).weight(ranks)
    torch.testing.assert_close(found, expected[..., 0], atol=1e-5, rtol=1e-5)


def test_kernel_last_loses_exactly_the_tail_of_the_spectrum_by_input_channels() -> None:
    spec = convolution(8, 12)
    weight = random_weight(spec)
    channels = torch.cov(torch.randn(8, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    covariance = torch.kron(channels, torch.eye(9, dtype=torch.float64))
    unfolded = weight.double().transpose(0, 1).flatten(1)
    spectrum = torch.linalg.svdvals(torch.linalg.cholesky(channels).T @ unfolded)
    factorisation = DECOMPOSITIONS["svd"].factorise(weight, spec, KERNEL_LAST, Metric(input=covariance))
    for rank in (1, 4, 7):
        lost = lost_energy(factorisation.weight((rank,)) - weight, covariance)
        assert lost == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), [METHODS[1], METHODS[2]])
def test_last_factors_with_taps_are_solved_for_the_first(name: str, options: Options) -> None:
    spec = convolution(6, 8)
    weight, covariance = random_weight(spec), smooth_covariance(spec, 0)
    decomposition = DECOMPOSITIONS[name]
    first, last = decomposition.factorise(weight, spec, options, Metric(input=covariance)).factors((3,))
    # What the last factor sees of each input to the layer, one unit pixel at a time.
    passed = nn.functional.conv2d(torch.eye(54).reshape(54, 6, 3, 3), first)
    seen = nn.functional.unfold(passed, last.shape[2:]).squeeze(-1).double()
    rows = weight.flatten(1).double()
    residual = rows - last.flatten(1).double() @ seen.T
    assert float((residual @ covariance @ seen).norm()) < 1e-5 * float((rows @ covariance @ seen).norm())


@pytest.mark.parametrize("weighed", [False, True])
def test_tucker2_of_a_wide_layer_is_exact_and_never_worse_than_plain(
    weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottleneck, "MAX_REFIT_INPUTS", 0)
    spec, tucker2 = convolution(10, 12), DECOMPOSITIONS["tucker2"]
    weight = random_weight(spec)
    metric = Metric(input=smooth_covariance(spec, 0), output=output_moment(12, 0) if weighed else None)
    plain, aware = tucker2.factorise(weight, spec, {}, None), tucker2.factorise(weight, spec, {}, metric)
    costs = [[metric.cost(weight - way.weight((n, n))) for way in (plain, aware)] for n in range(1, 11)]
    assert all(found <= given * (1 + 1e-5) for given, found in costs)
    assert costs[4][1] < 0.5 * costs[4][0]
    assert float((aware.weight((12, 10)) - weight).norm() / weight.norm()) < 1e-5


def test_the_cost_of_a_wide_layer_is_estimated_and_the_same_at_every_call() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(600, MAX_EXACT_INPUTS + 60, generator=generator, dtype=torch.float64)
    samples *= torch.logspace(0, -2, samples.shape[1], dtype=torch.float64)
    covariance, change = samples.T @ samples / 600, torch.randn(20, samples.shape[1], generator=generator)
    exact = lost_energy(change, covariance)
    costs = [Metric(input=covariance).cost(change) for _ in range(2)]
    assert costs[0] == costs[1] == pytest.approx(exact, rel=0.1)
    assert costs[0] != pytest.approx(exact, rel=1e-6)


def test_svd_loses_exactly_the_tail_of_the_whitened_spectrum() -> None:
    spec = convolution(8, 12)
    weight, covariance = random_weight(spec), smooth_covariance(spec, 0)
    root = torch.linalg.cholesky(covariance + 1e-12 * covariance.trace() * torch.eye(len(covariance)))
    spectrum = torch.linalg.svdvals(weight.flatten(1).double() @ root)
    factorisation = DECOMPOSITIONS["svd"].factorise(weight, spec, {}, Metric(input=covariance))
    for rank in (1, 4, 8):
        lost = lost_energy(factorisation.weight((rank,)) - weight, covariance)
        assert lost == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-4)


def test_svd_without_data_is_the_truncated_svd() -> None:
    spec = LinearSpec(in_features=30, out_features=20, bias=True)
    weight = random_weight(spec)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    truncated = (left[:, :7] * values[:7] @ right[:7]).float()
    found = DECOMPOSITIONS["svd"].factorise(weight, spec, {}, None).weight((7,))
    torch.testing.assert_close(found, truncated, atol=1e-4, rtol=1e-4)


def test_tucker2_is_about_as_good_as_the_iterated_one() -> None:
    spec = convolution(12, 10)
    weight = random_weight(spec)
    ours = DECOMPOSITIONS["tucker2"].factorise(weight, spec, {}, None).weight((5, 6))
    (core, factors), _ = partial_tucker(weight.numpy(), rank=(5, 6), modes=[0, 1], init="svd")
    iterated = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    assert float((ours - weight).norm()) <= 1.05 * float((torch.from_numpy(iterated) - weight).norm())


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("ranks", [(3,), (12,)])
@pytest.mark.parametrize(("name", "options"), METHODS[:3])
def test_two_factors_are_balanced_per_component(name: str, options: Options, ranks: Ranks, with_data: bool) -> None:
    spec = convolution(16, 12)
    metric = Metric(input=smooth_covariance(spec, 0)) if with_data else None
    first, last = DECOMPOSITIONS[name].factorise(random_weight(spec), spec, options, metric).factors(ranks)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), last.transpose(0, 1).flatten(1).norm(dim=1))


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("ranks", [(3, 5), (12, 16)])
def test_tucker2_is_balanced_at_both_joints(ranks: Ranks, with_data: bool) -> None:
    spec = convolution(16, 12)
    metric = Metric(input=smooth_covariance(spec, 0)) if with_data else None
    first, core, last = DECOMPOSITIONS["tucker2"].factorise(random_weight(spec), spec, {}, metric).factors(ranks)
    into_core, out_of_core = core.transpose(0, 1).flatten(1).norm(dim=1), core.flatten(1).norm(dim=1)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), into_core, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.transpose(0, 1).flatten(1).norm(dim=1), out_of_core, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FACTORING)
def test_dead_channels_and_zero_weights_give_finite_factors(name: str) -> None:
    spec = convolution(8, 8)
    weight = random_weight(spec)
    weight[:, :3], weight[5:] = 0.0, 0.0
    unseen = Metric(input=torch.zeros(72, 72, dtype=torch.float64))
    for dead, metric in ((weight, unseen), (torch.zeros(8, 8, 3, 3), None)):
        factorisation = DECOMPOSITIONS[name].factorise(dead, spec, {}, metric)
        most = DECOMPOSITIONS[name].max_ranks(spec, {})
        assert all(torch.isfinite(factor).all() for factor in factorisation.factors(most))
        torch.testing.assert_close(factorisation.weight(most), dead, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FACTORING)
@settings(max_examples=20, deadline=None)
@given(
    n_inputs=st.integers(1, 200),
    n_outputs=st.integers(1, 200),
    multiple=st.sampled_from([1, 4, 8, 16]),
    share=st.floats(0.05, 1.0),
)
def test_ranks_worth_trying(name: str, n_inputs: int, n_outputs: int, multiple: int, share: float) -> None:
    decomposition, spec = DECOMPOSITIONS[name], convolution(n_inputs, n_outputs)
    most, dense = decomposition.max_ranks(spec, {}), n_dense_params(spec)
    choices = decomposition.rank_choices(spec, {}, multiple)
    assert len(choices) == len(set(choices)) <= 12
    sizes = [decomposition.n_params(spec, ranks, {}) for ranks in choices]
    assert sizes == sorted(sizes)
    assert all(size < dense for size in sizes)
    for ranks in choices:
        check_choice(spec, LayerChoice(decomposition=name, ranks=ranks))
        assert all(r % multiple == 0 or r == top < multiple for r, top in zip(ranks, most, strict=True))
    uniform = decomposition.uniform_ranks(spec, {}, share, multiple)
    smallest = decomposition.n_params(spec, equal_share_path(most, multiple)[0], {})
    if uniform is None:
        assert smallest > share * dense
    else:
        assert decomposition.n_params(spec, uniform, {}) <= share * dense


def test_choices_spread_geometrically_up_to_break_even() -> None:
    choices = [rank for (rank,) in DECOMPOSITIONS["svd"].rank_choices(convolution(512, 512), {}, 8)]
    assert choices[0] == 8
    assert choices[-1] == 456  # 0.9 of 512 is 460.8
    ratios = [after / before for before, after in zip(choices, choices[1:], strict=False)]
    assert max(ratios[2:]) < 1.7


def test_tucker2_choices_follow_equal_shares_with_neighbours() -> None:
    choices = DECOMPOSITIONS["tucker2"].rank_choices(convolution(256, 256), {}, 8)
    assert any(out == given for out, given in choices)
    assert any(out > given for out, given in choices)
    assert any(out < given for out, given in choices)


def test_uniform_ranks_come_as_near_to_the_share_as_multiples_allow() -> None:
    assert DECOMPOSITIONS["svd"].uniform_ranks(convolution(64, 64), {}, 0.5, 8) == (24,)
    assert DECOMPOSITIONS["svd"].uniform_ranks(convolution(64, 64), {}, 0.5, 1) == (28,)
    assert DECOMPOSITIONS["tucker2"].uniform_ranks(convolution(64, 128), {}, 0.5, 8) == (72, 32)
    assert DECOMPOSITIONS["none"].uniform_ranks(convolution(64, 64), {}, 0.5, 8) is None
    assert DECOMPOSITIONS["none"].rank_choices(convolution(64, 64), {}, 8) == [()]


def test_path_and_spread() -> None:
    assert equal_share_path((64, 3), 8)[:2] == [(8, 3), (16, 3)]
    assert equal_share_path((16, 32), 8) == [(8, 8), (8, 16), (8, 24), (16, 32)]
    assert equal_share_path((), 8) == [()]
    assert geometric_spread([(n,) for n in range(1, 101)], 5) == [(1,), (3,), (10,), (31,), (100,)]
    assert geometric_spread([], 5) == []


def test_counting_parameters_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    DECOMPOSITIONS["svd"].rank_choices(convolution(64, 64), {}, 8)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("svd", convolution(8, 8, groups=8), "depthwise"),
        ("spatial_svd", convolution(8, 16, (3,)), "one axis"),
        ("tucker2", convolution(8, 16, groups=2), "2 groups"),
        ("tucker2", convolution(8, 16, (1, 1)), "no spatial kernel"),
        ("spatial_svd", LinearSpec(in_features=4, out_features=4, bias=True), "no spatial kernel"),
    ],
)
def test_refusals_say_why(name: str, spec: LayerSpec, reason: str) -> None:
    assert reason in (DECOMPOSITIONS[name].refuse(spec) or "")
    with pytest.raises(DecompositionError, match=reason):
        check_choice(spec, LayerChoice(decomposition=name, ranks=(1, 1)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (LayerChoice(decomposition="svdd", ranks=(4,)), "known are none, svd, spatial_svd, tucker2"),
        (LayerChoice(decomposition="svd", ranks=(4, 4)), "takes 1 ranks, not 2"),
        (LayerChoice(decomposition="svd", ranks=(0,)), "not all between 1 and"),
        (LayerChoice(decomposition="tucker2", ranks=(16, 9)), r"between 1 and \(16, 8\)"),
        (
            LayerChoice(decomposition="svd", ranks=(4,), options={"folding": "x"}),
            "no options {'folding': 'x'}; allowed are {'folding': 'kernel_first'} or {'folding': 'kernel_last'}",
        ),
        (LayerChoice(decomposition="svd", ranks=(9,), options={"folding": "kernel_last"}), r"between 1 and \(8,\)"),
        (LayerChoice(ranks=(4,)), "takes 0 ranks"),
    ],
)
def test_choices_that_do_not_fit_name_the_layer(choice: LayerChoice, message: str) -> None:
    with pytest.raises(DecompositionError, match=message) as caught:
        check_choice(convolution(8, 16), choice, layer="stem.conv")
    assert "layer 'stem.conv', Conv2d(8 -> 16, 3x3)" in str(caught.value)


def test_numbers_that_do_not_fit_are_refused() -> None:
    spec = convolution(4, 4)
    weight, svd = random_weight(spec), DECOMPOSITIONS["svd"]
    with pytest.raises(DecompositionError, match=r"must be \(36, 36\)"):
        svd.factorise(weight, spec, {}, Metric(input=torch.eye(4)))
    with pytest.raises(DecompositionError, match=r"must be \(4, 4, 3, 3\)"):
        svd.factorise(weight[:2], spec, {}, None)
    with pytest.raises(DecompositionError, match="NaN"):
        svd.factorise(weight * math.nan, spec, {}, None)


def test_an_eigensolver_that_fails_is_tried_with_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, calls = torch.linalg.eigh, []

    def fails(matrix: Tensor) -> object:
        calls.append(matrix)
        if len(calls) != 2:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, _ = eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 1.0]))


def test_an_eigensolver_that_always_fails_gives_way_to_numpys_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = samples @ samples.mT  # singular: of rank four
    expected, _ = eigenvectors(matrices)

    def fails(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    warn_of_the_second_solver.cache_clear()
    for _ in range(2):
        values, vectors = eigenvectors(matrices)
    torch.testing.assert_close(values, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices)
    assert ["numpy's SVD" in record.message for record in caplog.records] == [True]

    def fails_too(*_: object) -> None:
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails_too)
    with pytest.raises(DecompositionError, match="5x5 matrix does not converge"):
        eigenvectors(matrices)
    with pytest.raises(DecompositionError, match="NaN"):
        eigenvectors(matrices * math.nan)


def test_a_plan_may_leave_out_the_default_folding_or_spell_it_out() -> None:
    for spec in (convolution(8, 16), LinearSpec(in_features=4, out_features=4, bias=True)):
        for options in ({}, {"folding": "kernel_first"}):
            check_choice(spec, LayerChoice(decomposition="svd", ranks=(2,), options=options))
    spec, weight = convolution(8, 16), random_weight(convolution(8, 16))
    found = [
        DECOMPOSITIONS["svd"].factorise(weight, spec, options, None).weight((3,))
        for options in ({}, {"folding": "kernel_first"}, KERNEL_LAST)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.1)


@pytest.mark.parametrize(
    "spec", [LinearSpec(in_features=4, out_features=4, bias=True), convolution(8, 8, (1, 1)), convolution(8, 8, (1,))]
)
def test_without_a_kernel_there_is_one_folding(spec: LayerSpec) -> None:
    assert DECOMPOSITIONS["svd"].options_for(spec) == ({},)
    with pytest.raises(DecompositionError, match="no options {'folding': 'kernel_last'}"):
        check_choice(spec, LayerChoice(decomposition="svd", ranks=(2,), options=dict(KERNEL_LAST)))


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("spec", [convolution(64, 64), convolution(32, 96, (5, 3)), convolution(8, 8, bias=False)])
def test_break_even_is_the_last_rank_that_saves_parameters(name: str, options: Options, spec: ConvSpec) -> None:
    decomposition, dense = DECOMPOSITIONS[name], n_dense_params(spec)
    ranks = decomposition.break_even(spec, options)
    assert ranks is not None
    assert decomposition.n_params(spec, ranks, options) < dense
    path = equal_share_path(decomposition.max_ranks(spec, options), 1)
    following = path[path.index(ranks) + 1 :][:1]
    assert all(decomposition.n_params(spec, above, options) >= dense for above in following)


def test_break_even_by_hand() -> None:
    assert DECOMPOSITIONS["svd"].break_even(convolution(512, 512), {}) == (460,)  # 0.9 of 512 is 460.8
    assert DECOMPOSITIONS["svd"].break_even(convolution(1, 1, (1, 1)), {}) is None
    assert DECOMPOSITIONS["none"].break_even(convolution(8, 8), {}) is None


def test_multiply_adds_by_hand() -> None:
    spec = convolution(8, 16, stride=(2, 2))
    shape = (5, 8, 10, 10)  # 5 x 5 outputs
    assert DECOMPOSITIONS["none"].macs(spec, (), {}, shape) == 25 * 16 * 72
    assert DECOMPOSITIONS["svd"].macs(spec, (4,), {}, shape) == 25 * (4 * 72 + 16 * 4)
    assert DECOMPOSITIONS["svd"].macs(spec, (4,), KERNEL_LAST, shape) == 100 * 4 * 8 + 25 * 16 * 36
    assert DECOMPOSITIONS["spatial_svd"].macs(spec, (4,), {}, shape) == 50 * 4 * 24 + 25 * 16 * 12
    linear = LinearSpec(in_features=6, out_features=10, bias=True)
    assert DECOMPOSITIONS["svd"].macs(linear, (2,), {}, (3, 7, 6)) == 7 * 32


@pytest.mark.parametrize("name", [name for name in DECOMPOSITIONS if name != "none"])
def test_a_metric_that_other_methods_have_used_gives_the_same_factors(name: str) -> None:
    spec = convolution(8, 12)
    decomposition, ranks = DECOMPOSITIONS[name], DECOMPOSITIONS[name].rank_choices(spec, {}, 1)[-1]
    weight, covariance, moment = random_weight(spec), smooth_covariance(spec, 0), output_moment(12, 0)
    used = Metric(input=covariance, output=moment)
    for other in DECOMPOSITIONS.values():
        other.factorise(weight, spec, other.options[0], used).weight(other.rank_choices(spec, other.options[0], 1)[-1])
    shared = decomposition.factorise(weight, spec, {}, used)
    alone = decomposition.factorise(weight, spec, {}, Metric(input=covariance, output=moment))
    assert torch.equal(shared.weight(ranks), alone.weight(ranks))


def test_a_metric_forgets_a_weight_that_has_changed() -> None:
    spec, svd = convolution(8, 12), DECOMPOSITIONS["svd"]
    weight, metric = random_weight(spec).double(), Metric(input=smooth_covariance(spec, 0))
    svd.factorise(weight, spec, {}, metric)
    weight[3:] *= -2.0
    found = svd.factorise(weight, spec, {}, metric).weight((12,))
    torch.testing.assert_close(found, weight.float(), rtol=1e-4, atol=1e-5)


@given(size=st.integers(1, 12), rank=st.integers(0, 12), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_one_factorisation_solves_for_every_leading_block(size: int, rank: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(size, max(rank, 1), generator=generator, dtype=torch.float64) * min(rank, 1)
    wanted_x, guess = (torch.randn(3, size, generator=generator, dtype=torch.float64) for _ in range(2))
    normal, n = samples @ samples.T, min(n, size)
    block = normal[:n, :n]
    wanted = wanted_x[:, :n] @ block
    right = torch.cat((wanted, torch.zeros(3, size - n, dtype=torch.float64)), 1)
    found = NestedLeastSquares(normal, right, guess).solve(n)
    assert found.shape == (3, n)
    assert found.isfinite().all()
    torch.testing.assert_close(found @ block, wanted, rtol=1e-4, atol=1e-4)
