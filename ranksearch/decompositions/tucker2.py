"""A k x k convolution as 1 x 1 to fewer channels, k x k between them, 1 x 1 to the outputs."""

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
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.matrices import floored, principal_directions, square_roots
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec

# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
_RIDGE = 1e-4
_BALANCING_STEPS = 60


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Tucker2Factorisation(Factorisation):
    """weight = core (K_out, K_in, kh, kw), times output (T, K_out) in mode 0 and input (S, K_in) in mode 1."""

    output: Tensor
    core: Tensor
    input: Tensor

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        output, core, given = self._cut(ranks)
        scale_in, scale_out = _balancing_scales(given, core, output)
        core = core * scale_out[:, None, None, None] * scale_in[None, :, None, None]
        first = (given / scale_in).T.contiguous()
        last = output / scale_out
        return first[:, :, None, None].clone(), core, last[:, :, None, None].clone()

    def weight(self, ranks: Ranks) -> Tensor:
        return _expand(*self._cut(ranks))

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        rank_out, rank_in = ranks
        return self.output[:, :rank_out], self.core[:rank_out, :rank_in], self.input[:, :rank_in]


@final
class Tucker2(AbstractDecomposition):
    """Ranks: (rank_out, rank_in), the channels after and before the k x k convolution.

    The truncated higher-order SVD: one eigendecomposition per mode, the core once, cut for every rank. With a
    covariance, the output mode takes the principal components of the output, the input mode is whitened by the
    channels' covariance; the plain one is kept where it loses less.
    """

    name: ClassVar[str] = "tucker2"

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, n_inputs, height, width = spec.weight_shape
        n_taps = height * width
        return min(n_outputs, n_inputs * n_taps), min(n_inputs, n_outputs * n_taps)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        rank_out, rank_in = ranks
        return chain(
            pointwise(spec, spec.in_channels, rank_in),
            filtering(spec, rank_in, rank_out),
            pointwise(spec, rank_out, spec.out_channels, bias=True),
        )

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        exact, metric = double_precision(weight, spec, metric)
        plain = _hosvd(exact, None)
        if metric is None:
            return plain
        return BestOf(exact, metric, _hosvd(exact, metric.input), plain)


def _hosvd(weight: Tensor, covariance: Tensor | None) -> Tucker2Factorisation:
    """The full factors of a float64 weight (T, S, kh, kw), whitened where there is a covariance (D, D)."""
    n_inputs = weight.shape[1]
    output = principal_directions(weight.flatten(1), covariance)
    by_input = weight.transpose(0, 1).flatten(1)
    if covariance is None:
        project = unproject = principal_directions(by_input, None)
    else:
        root, inverse_root = square_roots(_channel_covariance(covariance, n_inputs), _RIDGE)
        directions = principal_directions(root @ by_input, None)
        project, unproject = root @ directions, inverse_root @ directions
    core = torch.einsum("tshw,to,si->oihw", weight, output, project)
    return Tucker2Factorisation(output=output.float(), core=core.float(), input=unproject.float())


def _channel_covariance(covariance: Tensor, n_inputs: int) -> Tensor:
    """The covariance (S, S) of the channels, averaged over the taps of the patch."""
    n_taps = len(covariance) // n_inputs
    taps = covariance.reshape(n_inputs, n_taps, n_inputs, n_taps)
    return torch.diagonal(taps, dim1=1, dim2=3).mean(-1)


def _expand(output: Tensor, core: Tensor, given: Tensor) -> Tensor:
    """The weight (T, S, kh, kw) of its Tucker-2 factors."""
    narrow = torch.einsum("oihw,si->oshw", core, given)
    return torch.einsum("to,oshw->tshw", output, narrow)


def _balancing_scales(given: Tensor, core: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the core's inputs (K_in,) and outputs (K_out,) that make each as long as the factor it meets.

    They are the scales at which the factors' summed squares are least; alternating finds them, since the sum is
    convex in their logarithms.
    """
    slices = core.double().pow(2).sum((2, 3))
    energy = slices.clamp_min(max(float(slices.max()) * 1e-12, 1e-30))
    inputs = floored(given.double().norm(dim=0))
    outputs = floored(output.double().norm(dim=0))
    squared_out = torch.ones_like(outputs)
    for _ in range(_BALANCING_STEPS):
        squared_in = inputs / (squared_out @ energy).sqrt()
        squared_out = outputs / (energy @ squared_in).sqrt()
    return squared_in.sqrt().float(), squared_out.sqrt().float()
