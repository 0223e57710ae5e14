"""A k x k convolution as a sum of depthwise ones, each mixed by a 1 x 1."""

import math
from typing import ClassVar, final

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
from ranksearch.decompositions.matrices import principal_directions
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.separable import (
    GroupedFactorisation,
    LastFactorFit,
    diagonal_blocks,
    whitening_roots,
)
from ranksearch.decompositions.ways import BestOf
from ranksearch.layers import ConvSpec, LayerSpec


@final
class DepthwiseSeparable(AbstractDecomposition):
    """Ranks: (terms,), the k x k filters per input channel; all terms are one depthwise and one 1 x 1 convolution.

    For each input channel the truncated SVD of its outputs x taps. With a covariance, each channel's taps are
    whitened by theirs, and the 1 x 1 is solved for all channels together; the plain one is kept where it loses less.
    From Guo et al., Network decoupling, 2018.
    """

    name: ClassVar[str] = "depthwise_separable"
    ranks_are_channels: ClassVar[bool] = False

    def refuse(self, spec: LayerSpec) -> str | None:
        reason = refuse_groups(spec) or refuse_pointwise(spec)
        if reason is None and spec.weight_shape[1] == 1:
            return "with one input channel it is svd"
        return reason

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, _, *kernel = spec.weight_shape
        return (min(math.prod(kernel), n_outputs),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (terms,) = ranks
        n_filters = spec.in_channels * terms
        depthwise = filtering(spec, spec.in_channels, n_filters, groups=spec.in_channels)
        return chain(depthwise, pointwise(spec, n_filters, spec.out_channels, bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        by_channel = weighed.weight.flatten(2)
        plain = GroupedFactorisation(*_filters_and_mixture(by_channel, None), spec.weight_shape)
        if metric is None:
            return plain
        first, last = _filters_and_mixture(by_channel, metric)
        fit = LastFactorFit(weighed, first, last)
        return BestOf(weighed, metric, GroupedFactorisation(first, last, spec.weight_shape, fit=fit), plain)


def _filters_and_mixture(weight: Tensor, metric: Metric | None) -> tuple[Tensor, Tensor]:
    """Filters (S, K, taps) and what they add to each output (T, S, K), exactly the weight (T, S, taps)."""
    n_inputs = weight.shape[1]
    by_input = weight.permute(1, 2, 0)
    if metric is None:
        project = unproject = principal_directions(by_input, None)
    else:
        root, inverse_root = whitening_roots(diagonal_blocks(metric.input, n_inputs))
        weighed = by_input if metric.output_roots is None else by_input @ metric.output_roots[0][0].mT
        directions = principal_directions(root @ weighed, None)
        project, unproject = root @ directions, inverse_root @ directions
    mixture = weight.transpose(0, 1) @ project
    return unproject.mT, mixture.transpose(0, 1)
