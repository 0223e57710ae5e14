"""One weight as two factors through a bottleneck, whichever of the kernel's taps either takes."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ranksearch.decompositions.base import Factorisation, double_precision, n_groups
from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.matrices import NestedLeastSquares, balanced_pair
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.ways import BestOf, Latest
from ranksearch.decompositions.weighed import WeighedWeight, Weighing
from ranksearch.layers import LayerSpec

# Up to so many inputs a last factor with taps is solved again at every rank: it takes the cube of the inputs.
MAX_REFIT_INPUTS = 1200


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck(Factorisation):
    """Per group, weight = last (groups, outputs * b, K) @ first (groups, K, inputs * a), most important first."""

    last: Tensor
    first: Tensor
    folding: Folding

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return self.folding.factors(*self._cut(ranks))

    def weight(self, ranks: Ranks) -> Tensor:
        last, first = self._cut(ranks)
        return self.folding.weight(last @ first)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        last, first = self._cut(ranks)
        groups, (n_outputs, _, _, b), n = len(inputs), self.folding.sizes, inputs.shape[-1]
        between = (first @ inputs.reshape(groups, first.shape[2], -1)).reshape(groups, -1, b, n)
        by_tap = last.reshape(groups, n_outputs, -1)
        return by_tap @ between.transpose(1, 2).reshape(groups, -1, n)

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        (rank,) = ranks
        return self.last[..., :rank], self.first[:, :rank]


@final
class LastSolver:
    """Solves the last factor of a bottleneck in the metric of the inputs, given any number of the first's rows.

    With P the map from the layer's inputs to those of the last factor and G the moments of the former, the last
    factor M that loses least is the one with (W - M P) G P^T = 0; how much each output counts makes no difference.
    """

    def __init__(self, weighed: WeighedWeight, last: Tensor, first: Tensor, folding: Folding) -> None:
        assert weighed.inputs is not None
        n_outputs, n_inputs, a, b = folding.sizes
        groups, n_columns, rank = folding.groups, n_inputs * a, first.shape[1]
        seen = (first @ weighed.inputs.reshape(groups, n_columns, -1)).reshape(groups, rank, b, n_columns, b)
        self._normal = torch.einsum("gpbic,gqi->gpbqc", seen, first).reshape(groups, rank * b, rank * b)
        taps = weighed.crossed.reshape(groups, n_outputs, n_columns, b)
        wanted = torch.einsum("gtib,gpi->gtpb", taps, first).flatten(2)
        guess = last.reshape(groups, n_outputs, b, rank).transpose(2, 3).flatten(2)
        self.first, self.folding = first, folding
        self._nested = NestedLeastSquares(self._normal, wanted, guess)

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """The last factor (groups, outputs, rank * b) and the moments (groups, rank * b, rank * b) of its inputs."""
        size = rank * self.folding.sizes[3]
        return self._nested.solve(size), self._normal[:, :size, :size]


@final
class RefittedBottleneck(Factorisation):
    """A bottleneck whose last factor is solved again at every rank below the largest."""

    def __init__(self, weighed: WeighedWeight, pair: tuple[Tensor, Tensor], folding: Folding) -> None:
        self._exact = _single(*pair, folding)
        self._solver = LastSolver(weighed, *pair, folding)
        self._latest = Latest(self._solved)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return self._latest.at(ranks).factors(ranks)

    def weight(self, ranks: Ranks) -> Tensor:
        return self._latest.at(ranks).weight(ranks)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        return self._latest.at(ranks).outputs(ranks, inputs)

    def _solved(self, ranks: Ranks) -> Bottleneck:
        (rank,) = ranks
        folding = self._solver.folding
        if rank == folding.max_rank:
            return self._exact
        n_outputs, _, _, b = folding.sizes
        solved, _ = self._solver.solve(rank)
        last = solved.reshape(folding.groups, n_outputs, rank, b).transpose(2, 3).flatten(1, 2)
        return _single(*balanced_pair(last, self._solver.first[:, :rank]), folding)


def factorise_bottleneck(weight: Tensor, spec: LayerSpec, folding: Folding, metric: Metric | None) -> Factorisation:
    """The factorisation at every rank; with a metric, of several ways at each rank the one that costs least.

    The first factor takes the principal components of what its own taps make of the weight, in the metric of its
    inputs averaged over the last factor's taps; a last factor with taps is then solved in the whole metric, on
    layers of up to 1,200 inputs. Raises DecompositionError where the numbers are not finite or do not fit.
    """
    weighed, metric = double_precision(weight, spec, metric)
    if metric is None:
        return _single(*weighed.pair(folding, Weighing.NOTHING), folding)
    has_taps = math.prod(folding.last_kernel) > 1
    if metric.output is None and not has_taps:
        # Without outputs to weigh and taps to average over, nothing loses less than the principal components.
        return _single(*weighed.pair(folding, Weighing.INPUTS), folding)
    pairs = [weighed.pair(folding, weighing) for weighing in (*weighings(metric), Weighing.NOTHING)]
    if has_taps and is_small(metric):
        return BestOf(weighed, metric, *(RefittedBottleneck(weighed, pair, folding) for pair in pairs))
    return BestOf(weighed, metric, *(_single(*pair, folding) for pair in pairs))


def is_small(metric: Metric) -> bool:
    """Whether the layer has few enough inputs to solve a last factor in the whole metric at every rank."""
    return metric.inputs.shape[-1] <= MAX_REFIT_INPUTS


def weighings(metric: Metric) -> list[Weighing]:
    """What of the metric is worth a way each: all of it and, on small layers, what the outputs count left out."""
    if metric.output is None:
        return [Weighing.INPUTS]
    return [Weighing.OUTPUTS, Weighing.INPUTS] if is_small(metric) else [Weighing.OUTPUTS]


def folding_of(spec: LayerSpec, first_kernel: tuple[int, ...], last_kernel: tuple[int, ...]) -> Folding:
    """The folding of the layer's weight with these kernels."""
    return Folding(shape=spec.weight_shape, groups=n_groups(spec), first_kernel=first_kernel, last_kernel=last_kernel)


def _single(last: Tensor, first: Tensor, folding: Folding) -> Bottleneck:
    return Bottleneck(last=last.float(), first=first.float(), folding=folding)
