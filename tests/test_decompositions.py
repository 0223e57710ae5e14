"""One contract suite over all decompositions, and what each promises beyond it."""

import math

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

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
from ranksearch.decompositions.base import n_dense_params
from ranksearch.decompositions.matrices import eigenvectors
from ranksearch.decompositions.ranks import equal_share_path, geometric_spread
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec, build_layer
from ranksearch.plan import LayerChoice
from ranksearch.testing import check_decomposition, convolution

FACTORING = ("svd", "spatial_svd", "tucker2")


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


def lost_energy(difference: Tensor, covariance: Tensor) -> float:
    rows = difference.flatten(1).double()
    return float((rows @ covariance * rows).sum())


@st.composite
def conv_specs(draw: st.DrawFn) -> ConvSpec:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return convolution(
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_contract(name: str) -> None:
    check_decomposition(DECOMPOSITIONS[name])


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@settings(max_examples=5, deadline=None)
@given(spec=conv_specs())
def test_contract_on_any_convolution(name: str, spec: ConvSpec) -> None:
    if DECOMPOSITIONS[name].refuse(spec) is None:
        check_decomposition(DECOMPOSITIONS[name], specs=[spec])


@settings(max_examples=5, deadline=None)
@given(n_inputs=st.integers(1, 20), n_outputs=st.integers(1, 20), bias=st.booleans())
def test_svd_contract_on_any_linear(n_inputs: int, n_outputs: int, bias: bool) -> None:
    spec = LinearSpec(in_features=n_inputs, out_features=n_outputs, bias=bias)
    check_decomposition(DECOMPOSITIONS["svd"], specs=[spec])


@pytest.mark.parametrize("name", FACTORING)
@pytest.mark.parametrize("seed", range(3))
def test_data_aware_loses_less_output_than_plain(name: str, seed: int) -> None:
    spec = convolution(16, 24)
    decomposition, weight, covariance = DECOMPOSITIONS[name], random_weight(spec, seed), smooth_covariance(spec, seed)
    plain = decomposition.factorise(weight, spec, {}, None)
    aware = decomposition.factorise(weight, spec, {}, Metric(input=covariance))
    for share in (0.3, 0.5, 0.7):
        ranks = decomposition.uniform_ranks(spec, {}, share, 1)
        assert ranks is not None
        lost = [lost_energy(kept.weight(ranks) - weight, covariance) for kept in (aware, plain)]
        assert lost[0] < 0.7 * lost[1], (ranks, lost)


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
@pytest.mark.parametrize("name", ["svd", "spatial_svd"])
def test_two_factors_are_balanced_per_component(name: str, ranks: Ranks, with_data: bool) -> None:
    spec = convolution(16, 12)
    metric = Metric(input=smooth_covariance(spec, 0)) if with_data else None
    first, last = DECOMPOSITIONS[name].factorise(random_weight(spec), spec, {}, metric).factors(ranks)
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
        ("spatial_svd", convolution(8, 16, groups=4), "4 groups"),
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
        (LayerChoice(decomposition="svd", ranks=(4,), options={"folding": "x"}), "no options {'folding': 'x'}"),
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
    with pytest.raises(DecompositionError, match="does not converge"):
        eigenvectors(torch.eye(2))


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
