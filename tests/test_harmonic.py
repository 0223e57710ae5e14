"""Fixed patterns of low frequency, mixed."""

import math

import pytest
import torch
from torch import nn

from ranksearch.decompositions import DECOMPOSITIONS, Metric, check_choice
from ranksearch.decompositions.harmonic import cosine_patterns
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec
from ranksearch.plan import LayerChoice
from ranksearch.testing import convolution

HARMONIC = DECOMPOSITIONS["harmonic"]


@pytest.mark.parametrize("kernel", [(3, 3), (5,), (1, 7), (2, 4)])
def test_patterns_are_orthonormal_and_begin_with_the_mean(kernel: tuple[int, ...]) -> None:
    patterns = cosine_patterns(kernel)
    n_taps = math.prod(kernel)
    torch.testing.assert_close(patterns @ patterns.T, torch.eye(n_taps, dtype=torch.float64))
    torch.testing.assert_close(patterns[0], torch.full((n_taps,), n_taps**-0.5, dtype=torch.float64))


def test_patterns_rise_in_frequency_along_both_axes_together() -> None:
    flat, slope, valley = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    order = [(flat, flat), (flat, slope), (slope, flat), (slope, slope), (flat, valley), (valley, flat)]
    for row, (down, across) in zip(cosine_patterns((3, 3)), order, strict=False):
        expected = torch.outer(down, across).flatten()
        torch.testing.assert_close(row, expected / expected.norm())


@pytest.mark.parametrize("with_metric", [False, True])
def test_every_channel_has_the_same_fixed_patterns(with_metric: bool) -> None:
    spec = convolution(4, 6)
    metric = Metric(input=torch.diag(torch.linspace(0.1, 3.0, 36, dtype=torch.float64))) if with_metric else None
    weight = torch.randn(spec.weight_shape, generator=torch.Generator().manual_seed(0))
    first, last = HARMONIC.factorise(weight, spec, {}, metric).factors((3,))
    assert first.shape == (12, 1, 3, 3)
    assert last.shape == (6, 12, 1, 1)
    torch.testing.assert_close(first.reshape(4, 3, 9), cosine_patterns((3, 3))[:3].float().expand(4, 3, 9))


def test_patterns_stay_as_they_are_while_the_mixture_trains() -> None:
    spec = convolution(4, 6)
    built = HARMONIC.build(spec, (3,), {})
    before = [parameter.clone() for parameter in built.parameters()]
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.1)
    built(torch.randn(2, 4, 7, 7)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, built.parameters(), strict=True)]
    assert changed == [False, True, True]


def test_fixed_patterns_count_as_parameters_since_the_file_holds_them() -> None:
    assert HARMONIC.n_params(convolution(4, 6), (3,), {}) == 4 * 3 * 9 + 6 * 4 * 3 + 6


def test_smooth_filters_need_few_patterns() -> None:
    spec = convolution(4, 6, (5, 5))
    ramp = torch.linspace(-1, 1, 5)
    smooth = 1 + 0.3 * ramp[:, None] + 0.2 * ramp[None, :]
    weight = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0)) * smooth
    kept = HARMONIC.factorise(weight, spec, {}, None).weight((3,))
    assert float((kept - weight).norm()) < 0.03 * float(weight.norm())


def test_one_input_channel_is_taken_where_it_shrinks() -> None:
    spec = convolution(1, 16)
    assert HARMONIC.refuse(spec) is None
    ranks = HARMONIC.rank_choices(spec, {}, 1)
    assert ranks
    assert isinstance(HARMONIC.build(spec, ranks[0], {}), nn.Sequential)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LinearSpec(in_features=4, out_features=4, bias=True), "no spatial kernel"),
        (convolution(8, 8, (1, 1)), "no spatial kernel"),
        (convolution(8, 8, groups=8), "depthwise"),
        (convolution(8, 8, groups=2), "2 groups"),
    ],
)
def test_refusals_say_why(spec: LayerSpec, reason: str) -> None:
    assert reason in (HARMONIC.refuse(spec) or "")
    with pytest.raises(DecompositionError, match=reason):
        check_choice(spec, LayerChoice(decomposition="harmonic", ranks=(1,)))


@pytest.mark.parametrize(("kernel", "largest"), [((3, 3), 9), ((7,), 7), ((1, 5), 5)])
def test_the_largest_rank_is_the_number_of_taps(kernel: tuple[int, ...], largest: int) -> None:
    spec: ConvSpec = convolution(8, 2, kernel)
    assert HARMONIC.max_ranks(spec, {}) == (largest,)
