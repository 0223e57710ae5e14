"""A k x k convolution as k x 1, then 1 x k."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    BestOf,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.building import chain, filtering
from ranksearch.decompositions.matrices import balanced_pair, principal_directions
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SpatialSVDFactorisation(Factorisation):
    """The weight, its rows (output, column) and columns (input, row), = last (T*kw, K) @ first (K, S*kh)."""

    last: Tensor
    first: Tensor
    shape: tuple[int, ...]

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        (rank,) = ranks
        n_outputs, n_inputs, height, width = self.shape
        first = self.first[:rank].reshape(rank, n_inputs, height, 1)
        last = self.last[:, :rank].reshape(n_outputs, width, rank).transpose(1, 2).unsqueeze(2)
        return first.clone(), last.contiguous().clone()

    def weight(self, ranks: Ranks) -> Tensor:
        (rank,) = ranks
        n_outputs, n_inputs, height, width = self.shape
        product = self.last[:, :rank] @ self.first[:rank]
        return product.reshape(n_outputs, width, n_inputs, height).permute(0, 2, 3, 1).contiguous()


@final
class SpatialSVD(AbstractDecomposition):
    """Ranks: (rank,), the channels between the k x 1 and the 1 x k convolution.

    With a covariance, the 1 x k filters are principal directions of what columns of input make of the weight;
    that ignores how neighbouring columns go together, so the plain SVD is kept where it loses less.
    """

    name: ClassVar[str] = "spatial_svd"

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, n_inputs, height, width = spec.weight_shape
        return (min(n_inputs * height, n_outputs * width),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (rank,) = ranks
        vertical = filtering(spec, spec.in_channels, rank, axes=(0,))
        return chain(vertical, filtering(spec, rank, spec.out_channels, axes=(1,), bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        exact, metric = double_precision(weight, spec, metric)
        plain = _factorise(exact, None)
        if metric is None:
            return plain
        return BestOf(exact, metric, _factorise(exact, _column_covariance(metric.input, spec.weight_shape)), plain)


def _factorise(weight: Tensor, column_covariance: Tensor | None) -> SpatialSVDFactorisation:
    """The factors of a float64 weight (T, S, kh, kw) in the metric of its columns of input (S*kh, S*kh)."""
    n_outputs, n_inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(n_outputs * width, n_inputs * height)
    directions = principal_directions(matrix, column_covariance)
    last, first = balanced_pair(directions, directions.T @ matrix)
    return SpatialSVDFactorisation(last=last.float(), first=first.float(), shape=tuple(weight.shape))


def _column_covariance(covariance: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The covariance (S*kh, S*kh) of one column of the input patch, averaged over the kw columns."""
    _, n_inputs, height, width = shape
    taps = covariance.reshape(n_inputs, height, width, n_inputs, height, width)
    columns = torch.diagonal(taps, dim1=2, dim2=5).mean(-1)
    return columns.reshape(n_inputs * height, n_inputs * height)
