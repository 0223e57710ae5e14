"""A convolution through one bottleneck per group of its input channels: k x k in groups, then 1 x 1."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
)
from ranksearch.decompositions.bottleneck import is_small
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.matrices import principal_directions
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.separable import GroupedFactorisation, LastFactorFit, diagonal_blocks
from ranksearch.decompositions.ways import BestOf
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec


@final
class GroupedSVD(AbstractDecomposition):
    """Ranks: (rank,), the filters of each group; option `groups`: 2 (the default), 4 or 8 runs of input channels.

    For each group the truncated SVD of its slice of the weight. With a covariance, the principal components of what
    the group adds to the output, then the 1 x 1 is solved for all groups together; the plain one is kept where it
    loses less. From Liebenwein et al., Compressing neural networks: towards determining the optimal layer-wise
    decomposition (ALDS), 2021.
    """

    name: ClassVar[str] = "grouped_svd"
    options: ClassVar[tuple[Options, ...]] = tuple({"groups": groups} for groups in (2, 4, 8))
    default_options: ClassVar[Options] = {"groups": 2}

    def options_for(self, spec: LayerSpec) -> tuple[Options, ...]:
        """The groups into which the layer's input channels divide evenly."""
        return tuple(options for options in self.options if spec.weight_shape[1] % self._groups(options) == 0)

    def refuse(self, spec: LayerSpec) -> str | None:
        if isinstance(spec, LinearSpec):
            return "runtimes have no kernel for a Linear in groups; svd factors it"
        if not self.options_for(spec):
            return refuse_groups(spec) or f"its {spec.in_channels} input channels do not divide into 2, 4 or 8 groups"
        return refuse_groups(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, *inputs = spec.weight_shape
        return (min(n_outputs, math.prod(inputs) // self._groups(options)),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (rank,) = ranks
        n_groups = self._groups(options)
        first = filtering(spec, spec.in_channels, n_groups * rank, groups=n_groups)
        return chain(first, pointwise(spec, n_groups * rank, spec.out_channels, bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        n_groups = self._groups(options)
        plain = GroupedFactorisation(*_bottlenecks(weighed.rows[0], n_groups, None), spec.weight_shape)
        if metric is None:
            return plain
        first, last = _bottlenecks(weighed.counted[0], n_groups, metric.input)
        if metric.output_roots is not None:
            last = torch.einsum("ot,tgk->ogk", metric.output_roots[1][0], last)
        # On the widest layers it takes seconds and gains little: the groups' own directions are nearly the best.
        fit = LastFactorFit(weighed, first, last) if is_small(metric) else None
        return BestOf(weighed, metric, GroupedFactorisation(first, last, spec.weight_shape, fit=fit), plain)

    def _groups(self, options: Options) -> int:
        groups = self.spell_out(options)["groups"]
        assert isinstance(groups, int), "checked with the choice"
        return groups


def _bottlenecks(matrix: Tensor, n_groups: int, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Filters (g, K, d) and what they add to each row (T, g, K), exactly the matrix (T, g*d)."""
    slices = matrix.reshape(len(matrix), n_groups, -1).transpose(0, 1)
    directions = principal_directions(slices, None if covariance is None else diagonal_blocks(covariance, n_groups))
    return directions.mT @ slices, directions.transpose(0, 1)
