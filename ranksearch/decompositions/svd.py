"""Two layers through a bottleneck: k x k with `rank` filters, then 1 x 1, or the other way round."""

import math
from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    n_groups,
    refuse_depthwise,
)
from ranksearch.decompositions.bottleneck import factorise_bottleneck, folding_of
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec


@final
class SVD(AbstractDecomposition):
    """Ranks: (rank,), the channels in between, per group. With a metric, the principal components of the output.

    Option `folding`: `kernel_first`, which an empty dict means too, filters first and then mixes the channels
    (Zhang et al., "Accelerating very deep convolutional networks", 2016): with Q the first eigenvectors of W G W^T,
    Q Q^T W is the best approximation for inputs of covariance G; without G it is the truncated SVD. `kernel_last`
    cuts the channels first and takes G averaged over the taps. Without a kernel there is one folding alone.
    """

    name: ClassVar[str] = "svd"
    options: ClassVar[tuple[Options, ...]] = ({}, {"folding": "kernel_last"})
    default_options: ClassVar[Options] = {"folding": "kernel_first"}

    def options_for(self, spec: LayerSpec) -> tuple[Options, ...]:
        has_kernel = isinstance(spec, ConvSpec) and math.prod(spec.kernel_size) > 1
        return self.options if has_kernel else self.options[:1]

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_depthwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return (_folding(spec, self.spell_out(options)).max_rank,)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        (rank,) = ranks
        groups, n_outputs = n_groups(spec), spec.weight_shape[0]
        if not isinstance(spec, ConvSpec):
            return chain(pointwise(spec, spec.in_features, rank), pointwise(spec, rank, n_outputs, bias=True))
        middle = groups * rank
        if self.spell_out(options)["folding"] == "kernel_last":
            return chain(
                pointwise(spec, spec.in_channels, middle, groups=groups),
                filtering(spec, middle, n_outputs, groups=groups, bias=True),
            )
        return chain(
            filtering(spec, spec.in_channels, middle, groups=groups),
            pointwise(spec, middle, n_outputs, groups=groups, bias=True),
        )

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        return factorise_bottleneck(weight, spec, _folding(spec, self.spell_out(options)), metric)


def _folding(spec: LayerSpec, options: Options) -> Folding:
    kernel = spec.kernel_size if isinstance(spec, ConvSpec) else ()
    pixel = tuple(1 for _ in kernel)
    return folding_of(spec, pixel, kernel) if options["folding"] == "kernel_last" else folding_of(spec, kernel, pixel)
