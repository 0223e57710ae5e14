"""A k x k convolution as fixed patterns of low frequency on every channel, and a 1 x 1 that mixes them."""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.separable import GroupedFactorisation, LastFactorFit
from ranksearch.decompositions.ways import BestOf
from ranksearch.layers import ConvSpec, LayerSpec


@final
class Harmonic(AbstractDecomposition):
    """Ranks: (patterns,), the lowest frequencies of the kernel's DCT-II that are kept for every input channel.

    The patterns do not train; only the 1 x 1 that mixes them does. They come in the order of the sum of their
    frequencies (u, v), then of the sum of their squares, then of u. With a covariance the mixture is solved for; the
    plain projection is kept where it loses less. From Ulicny et al., Harmonic convolutional networks, 2022.
    """

    name: ClassVar[str] = "harmonic"
    ranks_are_channels: ClassVar[bool] = False

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return (math.prod(spec.weight_shape[2:]),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (n_patterns,) = ranks
        n_filters = spec.in_channels * n_patterns
        depthwise = filtering(spec, spec.in_channels, n_filters, groups=spec.in_channels)
        depthwise.weight.requires_grad_(False)
        return chain(depthwise, pointwise(spec, n_filters, spec.out_channels, bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        n_inputs, *kernel = spec.weight_shape[1:]
        patterns = cosine_patterns(kernel).to(weighed.weight)
        first = patterns.expand(n_inputs, *patterns.shape)
        last = weighed.weight.flatten(2) @ patterns.T
        plain = GroupedFactorisation(first, last, spec.weight_shape, fixed=True)
        if metric is None:
            return plain
        fit = LastFactorFit(weighed, first, last)
        return BestOf(weighed, metric, GroupedFactorisation(first, last, spec.weight_shape, fit=fit, fixed=True), plain)


def cosine_patterns(kernel: Sequence[int]) -> Tensor:
    """The orthonormal DCT-II patterns (taps, taps) of a kernel as rows, lowest frequencies first, float64."""
    axes = [_cosines(size) for size in kernel]
    frequencies = sorted(
        itertools.product(*(range(size) for size in kernel)), key=lambda f: (sum(f), sum(u * u for u in f), f)
    )
    rows = []
    for each in frequencies:
        row = torch.ones(1, dtype=torch.float64)
        for waves, frequency in zip(axes, each, strict=True):
            row = torch.outer(row, waves[frequency]).flatten()
        rows.append(row)
    return torch.stack(rows)


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II of one axis: row u is cos(pi u (2x + 1) / 2 size), scaled to length one."""
    positions = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * positions[:, None] * (2 * positions + 1) / (2 * size))
    return nn.functional.normalize(waves, dim=1)
