"""A k x k convolution as k x 1, then 1 x k."""

from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import AbstractDecomposition, Factorisation, Options, refuse_pointwise
from ranksearch.decompositions.bottleneck import factorise_bottleneck, folding_of
from ranksearch.decompositions.building import chain, filtering
from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec


@final
class SpatialSVD(AbstractDecomposition):
    """Ranks: (rank,), the channels between the k x 1 and the 1 x k convolution, per group.

    Of a depthwise convolution they are branches per channel, which the 1 x k convolution sums. After Jaderberg et
    al., "Speeding up convolutional neural networks with low rank expansions", 2014. With a metric, the k x 1 filters
    are principal components of what columns of input make of the weight, and the 1 x k filters are solved for them;
    they ignore how neighbouring columns go together, so the plain ones are kept where they lose less.
    """

    name: ClassVar[str] = "spatial_svd"

    def refuse(self, spec: LayerSpec) -> str | None:
        if isinstance(spec, ConvSpec) and len(spec.kernel_size) == 1:
            return "a Conv1d has one axis: there is nothing to part; svd factors it"
        return refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return (_folding(spec).max_rank,)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (rank,) = ranks
        middle, groups = spec.groups * rank, spec.groups
        return chain(
            filtering(spec, spec.in_channels, middle, axes=(0,), groups=groups),
            filtering(spec, middle, spec.out_channels, axes=(1,), groups=groups, bias=True),
        )

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        return factorise_bottleneck(weight, spec, _folding(spec), metric)


def _folding(spec: LayerSpec) -> Folding:
    assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
    height, width = spec.kernel_size
    return folding_of(spec, (height, 1), (1, width))
