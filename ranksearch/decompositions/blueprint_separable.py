"""A k x k convolution as a 1 x 1 and a k x k one in which each output filters its own channels."""

import math
from functools import cached_property
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
from ranksearch.decompositions.bottleneck import is_small
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.matrices import NestedLeastSquares, balanced_pair, principal_directions, square_roots
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.separable import MAX_COMPONENTS, SOLVING_RIDGES, WHITENING_RIDGE
from ranksearch.decompositions.ways import BestOf, Latest
from ranksearch.decompositions.weighed import WeighedWeight
from ranksearch.layers import ConvSpec, LayerSpec


@final
class BlueprintFactorisation(Factorisation):
    """For each output, its weight (S, taps) = first (K, S)^T @ last (K, taps), most important blueprints first.

    `first` is (T, K, S), `last` (T, K, taps). With `fit`, `last` is what it solves at each rank.
    """

    def __init__(
        self, first: Tensor, last: Tensor, shape: tuple[int, ...], *, fit: "BlueprintFit | None" = None
    ) -> None:
        self.first, self.last, self.shape = first.float(), last.float(), shape
        self._solved = None if fit is None else Latest(fit.solve)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        first, last = self._cut(ranks)
        # In double precision, since the squares of what inputs hardly take leave float32's range.
        by_tap, by_input = balanced_pair(last.flatten(0, 1).T.double(), first.flatten(0, 1).double())
        n_outputs, n_inputs, *kernel = self.shape
        mixture = by_input.reshape(-1, n_inputs, *(1 for _ in kernel))
        filters = by_tap.T.reshape(n_outputs, -1, *kernel)
        return mixture.float(), filters.float()

    def weight(self, ranks: Ranks) -> Tensor:
        first, last = self._cut(ranks)
        return (first.mT @ last).reshape(self.shape)

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        (rank,) = ranks
        return self.first[:, :rank], self.last[:, :rank] if self._solved is None else self._solved.at(ranks)


@final
class BlueprintFit:
    """The spatial filters that cost least in the input's metric, for the first blueprints of each output.

    `first` is (T, K, S) and `last` (T, K, taps), the weight's exact factors, near which the solution stays where
    inputs do not tell, and which it is beyond 1,536 blueprints in all.
    """

    def __init__(self, weighed: WeighedWeight, first: Tensor, last: Tensor) -> None:
        self.weighed, self.first, self.last = weighed, first, last
        self.n_solved = min(MAX_COMPONENTS // len(first), first.shape[1] - 1)

    def solve(self, ranks: Ranks) -> Tensor:
        """The spatial filters (T, rank, taps), float32, for the first `rank` blueprints of each output."""
        (rank,) = ranks
        last = self.last[:, :rank]
        if rank <= self.n_solved:
            last = self._equations.solve(last[0].numel()).reshape(last.shape)
        return last.float()

    @cached_property
    def _equations(self) -> NestedLeastSquares:
        """For each output's filters, the taps of its first blueprint before those of the second, and so on."""
        assert self.weighed.inputs is not None
        (n_outputs, _, n_inputs), n_taps = self.first.shape, self.last.shape[2]
        first = self.first[:, : self.n_solved].contiguous()
        seen = self.weighed.crossed.reshape(n_outputs, n_inputs, n_taps)
        by_taps = self.weighed.inputs.reshape(n_inputs, n_taps, n_inputs, n_taps).permute(1, 3, 0, 2).contiguous()
        moments = first.new_empty(n_outputs, self.n_solved, n_taps, self.n_solved, n_taps)
        for one in range(n_taps):
            for other in range(one, n_taps):
                between = (first @ by_taps[one, other]) @ first.mT
                moments[:, :, one, :, other] = between
                moments[:, :, other, :, one] = between.mT
        normal = moments.flatten(3).flatten(1, 2)
        wanted, guess = (first @ seen).flatten(1), self.last[:, : self.n_solved].flatten(1)
        return NestedLeastSquares(normal, wanted[:, None], guess[:, None], SOLVING_RIDGES)


@final
class BlueprintSeparable(AbstractDecomposition):
    """Ranks: (blueprints,), the k x k filters per output, each of its own mixture of the channels; one 1 x 1 and one
    k x k convolution in as many groups as outputs.

    For each output the truncated SVD of its inputs x taps. With a covariance, taps and channels are whitened by
    theirs, each averaged over the other, and each output's filters are solved for; the plain one is kept where it
    loses less. How outputs count changes nothing, since they share no factor.
    From Haase & Amthor, Rethinking depthwise separable convolutions, 2020.
    """

    name: ClassVar[str] = "blueprint_separable"
    ranks_are_channels: ClassVar[bool] = False

    def refuse(self, spec: LayerSpec) -> str | None:
        reason = refuse_groups(spec) or refuse_pointwise(spec)
        if reason is None and spec.weight_shape[1] == 1:
            return "with one input channel its filters are the layer's own"
        return reason

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        _, n_inputs, *kernel = spec.weight_shape
        return (min(math.prod(kernel), n_inputs),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (blueprints,) = ranks
        n_filters, n_outputs = spec.out_channels * blueprints, spec.out_channels
        spatial = filtering(spec, n_filters, n_outputs, groups=n_outputs, bias=True)
        return chain(pointwise(spec, spec.in_channels, n_filters), spatial)

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        by_output = weighed.weight.flatten(2)
        plain = BlueprintFactorisation(*_blueprints(by_output, None), spec.weight_shape)
        if metric is None:
            return plain
        first, last = _blueprints(by_output, metric.input)
        # On the widest layers it takes seconds and gains little.
        fit = BlueprintFit(weighed, first, last) if is_small(metric) else None
        return BestOf(weighed, metric, BlueprintFactorisation(first, last, spec.weight_shape, fit=fit), plain)


def _blueprints(weight: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mixtures of channels (T, K, S) and spatial filters (T, K, taps), exactly the weight (T, S, taps)."""
    if covariance is None:
        project = unproject = principal_directions(weight.mT, None)
    else:
        n_inputs, n_taps = weight.shape[1:]
        by_taps = covariance.reshape(n_inputs, n_taps, n_inputs, n_taps)
        channels = by_taps.diagonal(dim1=1, dim2=3).mean(-1)
        root, inverse_root = square_roots(by_taps.diagonal(dim1=0, dim2=2).mean(-1), WHITENING_RIDGE)
        directions = principal_directions(root @ weight.mT, channels)
        project, unproject = root @ directions, inverse_root @ directions
    return (weight @ project).mT, unproject.mT
