"""Two layers through a bottleneck: k x k with `rank` filters, then 1 x 1; for a Linear two of them."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
)
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.matrices import balanced_pair, principal_directions
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SVDFactorisation(Factorisation):
    """weight.flatten(1) = last (T, K) @ first (K, D), most important components first."""

    last: Tensor
    first: Tensor
    shape: tuple[int, ...]

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        (rank,) = ranks
        kernel = self.shape[2:]
        first = self.first[:rank].reshape(rank, *self.shape[1:])
        last = self.last[:, :rank].reshape(-1, rank, *(1 for _ in kernel))
        return first.clone(), last.clone()

    def weight(self, ranks: Ranks) -> Tensor:
        (rank,) = ranks
        return (self.last[:, :rank] @ self.first[:rank]).reshape(self.shape)


@final
class SVD(AbstractDecomposition):
    """Ranks: (rank,), the filters in between. With a covariance, the principal components of the layer's output.

    Q Q^T W, with Q the first eigenvectors of W G W^T, is the best approximation of rank r for inputs of
    covariance G; without G it is the truncated SVD.
    """

    name: ClassVar[str] = "svd"

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, *inputs = spec.weight_shape
        return (min(n_outputs, math.prod(inputs)),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        (rank,) = ranks
        first = (
            filtering(spec, spec.in_channels, rank)
            if isinstance(spec, ConvSpec)
            else pointwise(spec, spec.in_features, rank)
        )
        return chain(first, pointwise(spec, rank, spec.weight_shape[0], bias=True))

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        exact, metric = double_precision(weight, spec, metric)
        covariance = None if metric is None else metric.input
        matrix = exact.flatten(1)
        directions = principal_directions(matrix, covariance)
        last, first = balanced_pair(directions, directions.T @ matrix)
        return SVDFactorisation(last=last.float(), first=first.float(), shape=spec.weight_shape)
