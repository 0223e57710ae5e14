"""Two layers through a bottleneck: k x k with `rank` filters, then 1 x 1; for a Linear two of them."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    chain,
    double_precision,
    refuse_groups,
)
from ranksearch.decompositions.matrices import balanced_pair, principal_directions
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
        if not isinstance(spec, ConvSpec):
            return chain(nn.Linear(spec.in_features, rank, bias=False), nn.Linear(rank, spec.out_features))
        filters = nn.Conv2d(
            spec.in_channels,
            rank,
            spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            bias=False,
            padding_mode=spec.padding_mode,
        )
        return chain(filters, nn.Conv2d(rank, spec.out_channels, 1))

    def factorise(
        self, weight: Tensor, spec: LayerSpec, options: Options, input_covariance: Tensor | None
    ) -> Factorisation:
        exact, covariance = double_precision(weight, spec, input_covariance)
        matrix = exact.flatten(1)
        directions = principal_directions(matrix, covariance)
        last, first = balanced_pair(directions, directions.T @ matrix)
        return SVDFactorisation(last=last.float(), first=first.float(), shape=spec.weight_shape)
