"""A k x k convolution as k x 1, then 1 x k."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    chain,
    double_precision,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.matrices import balanced_pair, principal_directions, weighted_error
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
        down, across = _split_padding(spec.padding)
        vertical = nn.Conv2d(
            spec.in_channels,
            rank,
            (spec.kernel_size[0], 1),
            stride=(spec.stride[0], 1),
            padding=down,
            dilation=(spec.dilation[0], 1),
            bias=False,
            padding_mode=spec.padding_mode,
        )
        horizontal = nn.Conv2d(
            rank,
            spec.out_channels,
            (1, spec.kernel_size[1]),
            stride=(1, spec.stride[1]),
            padding=across,
            dilation=(1, spec.dilation[1]),
            padding_mode=spec.padding_mode,
        )
        return chain(vertical, horizontal)

    def factorise(
        self, weight: Tensor, spec: LayerSpec, options: Options, input_covariance: Tensor | None
    ) -> Factorisation:
        exact, covariance = double_precision(weight, spec, input_covariance)
        plain = _factorise(exact, None)
        if covariance is None:
            return plain
        aware = _factorise(exact, _column_covariance(covariance, spec.weight_shape))
        (most,) = self.max_ranks(spec, options)
        middle = self.uniform_ranks(spec, options, 0.5, 1) or (-(-most // 2),)
        errors = [weighted_error(exact - kept.weight(middle), covariance) for kept in (aware, plain)]
        return aware if errors[0] <= errors[1] else plain


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


def _split_padding(padding: tuple[int, int] | str) -> tuple[tuple[int, int] | str, tuple[int, int] | str]:
    """The padding of the k x 1 and of the 1 x k convolution; torch's words hold for either."""
    if isinstance(padding, str):
        return padding, padding
    return (padding[0], 0), (0, padding[1])
