"""A convolution as a sum of rank-one terms: 1 x 1, one filter along each axis of the kernel per channel, 1 x 1."""

from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    double_precision,
    n_dense_params,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.bottleneck import folding_of, is_small
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.cp_columns import (
    Columns,
    balanced,
    filtered_axes,
    max_rank,
    module_weights,
    padded,
    patterns_of,
    weight_of,
    with_solved_outputs,
)
from ranksearch.decompositions.cp_fitting import LeastSquares, Terms, exact_terms, leading_terms, no_terms, taps
from ranksearch.decompositions.matrices import square_roots
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.ways import BestOf
from ranksearch.decompositions.weighed import Roots, WeighedWeight
from ranksearch.layers import ConvSpec, LayerSpec

# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
_RIDGE = 1e-4
# The ranks that are fitted: powers of two up to 8, multiples of 8 up to 128, then 8 steps to every doubling.
_FINEST_STEP, _STEPS_PER_DOUBLING = 8, 8


@final
class CPFactorisation(Factorisation):
    """The terms of a weight, fitted rank by rank from the smallest up to what is asked for.

    Each fit starts from the one before it and the leading terms of what that one leaves, and only improves on them;
    a rank between two fits takes the lower fit and the first of those terms. So the error never grows with the rank,
    and what a rank gives does not depend on the ranks that were asked for before. Beyond `most_fitted` terms are only
    added. What is fitted is the weight with `input_roots` (S, S) and `output_roots` (T, T) applied.
    """

    def __init__(
        self, weight: Tensor, most_fitted: int, input_roots: Roots | None = None, output_roots: Roots | None = None
    ) -> None:
        self.shape, self.most_fitted = tuple(weight.shape), most_fitted
        self._kernel = self.shape[2], self.shape[3] if len(self.shape) == 4 else 1
        self._input_roots, self._output_roots = input_roots, output_roots
        self._exact = weight.flatten(2).permute(2, 0, 1).contiguous()
        target = self._exact if input_roots is None else self._exact @ input_roots[0]
        self._target = target if output_roots is None else output_roots[0] @ target
        self._fits = {0: (no_terms(self._target, self._kernel), float(self._target.square().sum()))}
        self._known: dict[int, Columns] = {}

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return module_weights(self.columns(ranks[0]), self.shape)

    def weight(self, ranks: Ranks) -> Tensor:
        return weight_of(self.columns(ranks[0]), self.shape)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        columns = self.columns(ranks[0])
        return columns[-1] @ (patterns_of(columns) @ inputs)

    def columns(self, rank: int) -> Columns:
        """The columns at this rank, float32, balanced."""
        if rank not in self._known:
            self._known[rank] = self._columns(rank)
        return self._known[rank]

    def _columns(self, rank: int) -> Columns:
        if rank == max_rank(self.shape):
            terms = exact_terms(self._exact, self._kernel)
            given, output = terms.input, terms.output
        else:
            terms = self._terms(rank)
            given = terms.input if self._input_roots is None else self._input_roots[1] @ terms.input
            output = terms.output if self._output_roots is None else self._output_roots[1] @ terms.output
        apart = len(filtered_axes(self.shape[2:])) > 1
        filters = (terms.rows, terms.columns) if apart else (taps(terms.rows, terms.columns),)
        return balanced(terms.strengths, given, *filters, output)

    def _terms(self, rank: int) -> Terms:
        lower = fitted_ranks(min(rank, self.most_fitted))[-1]
        terms, _ = self._fit(lower)
        if rank == lower:
            return terms
        following = _next_fitted(lower)
        end = following if following <= self.most_fitted else max_rank(self.shape)
        # All the terms up to the next fit, so that those of a lower rank are among those of a higher.
        more = leading_terms(terms.missing(self._target), self._kernel, end - lower)
        return terms.followed_by(more, rank - lower)

    def _fit(self, rank: int) -> tuple[Terms, float]:
        """The terms of a fitted rank and their squared error; powers of two and the last fit are kept."""
        if rank in self._fits:
            return self._fits[rank]
        start = max(known for known in self._fits if known < rank)
        terms, error = self._fits[start]
        solver = LeastSquares(self._target, self._kernel)
        for fitted in fitted_ranks(rank):
            if fitted <= start:
                continue
            residual = terms.missing(self._target)
            n_more = fitted - len(terms.strengths)
            more = leading_terms(residual, self._kernel, n_more)
            error = max(float(residual.norm().square() - more.strengths.square().sum()), 0.0)
            terms, error = solver.refine(terms.followed_by(more, n_more), error)
            if _is_power(fitted):
                self._fits[fitted] = terms, error
        self._fits = {known: fit for known, fit in self._fits.items() if _is_power(known)}
        self._fits[rank] = terms, error
        return terms, error


@final
class BestInMetric(Factorisation):
    """Of several ways to fit a layer's terms, the one that costs least once the outputs are solved in the metric.

    A rank may take the terms of a lower one and leave the rest silent. Between two fits terms are only added, so the
    cost falls there; with the last rank before each fit among the candidates it never grows with the rank.
    """

    def __init__(self, weighed: WeighedWeight, metric: Metric, *ways: CPFactorisation) -> None:
        self.shape = tuple(weighed.weight.shape)
        self._weighed, self._metric, self._ways = weighed, metric, ways
        self._solved: dict[int, tuple[float, Columns]] = {}
        self._known: dict[int, Columns] = {}

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return module_weights(self._columns(ranks[0]), self.shape)

    def weight(self, ranks: Ranks) -> Tensor:
        return weight_of(self._columns(ranks[0]), self.shape)

    def _columns(self, rank: int) -> Columns:
        if rank == max_rank(self.shape):
            return self._ways[0].columns(rank)
        if rank not in self._known:
            before_fits = [each - 1 for each in fitted_ranks(min(rank, self._ways[0].most_fitted)) if each > 1]
            # In rising order, in which each fit starts from the one before.
            candidates = [self._best(each) for each in (*before_fits, rank)]
            _, chosen = min(reversed(candidates), key=lambda candidate: candidate[0])
            self._known[rank] = padded(chosen, rank)
        return self._known[rank]

    def _best(self, rank: int) -> tuple[float, Columns]:
        """The least cost of the ways at this rank, with its columns."""
        if rank not in self._solved:
            solved = [with_solved_outputs(way.columns(rank), self._weighed.weight, self._metric) for way in self._ways]
            costs = [self._metric.cost(self._weighed.single - weight_of(columns, self.shape)) for columns in solved]
            self._solved[rank] = min(costs), solved[costs.index(min(costs))]
        return self._solved[rank]


@final
class CP(AbstractDecomposition):
    """Ranks: (rank,), the channels of the filters, which along each axis of the kernel filter each channel alone.

    Canonical polyadic decomposition (Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned
    CP-decomposition", 2015), by alternating least squares under a penalty that keeps terms from diverging. With a
    metric, inputs are whitened by the channels' covariance, averaged over the taps, and outputs by the shrunk moment
    of their gradients; on layers of up to 1,200 inputs the last factor is then solved in the whole metric. The plain
    one is kept where it loses less.
    """

    name: ClassVar[str] = "cp"
    max_share: ClassVar[float] = 0.1

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return (max_rank(spec.weight_shape),)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        (rank,) = ranks
        filters = [filtering(spec, rank, rank, axes=axes, groups=rank) for axes in filtered_axes(spec.kernel_size)]
        last = pointwise(spec, rank, spec.out_channels, bias=True)
        return chain(pointwise(spec, spec.in_channels, rank), *filters, last)

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        n_outputs, n_inputs, *kernel = spec.weight_shape
        # From there on the factors have more parameters than the layer.
        most_fitted = (n_dense_params(spec) - 1) // (n_outputs + n_inputs + sum(kernel))
        plain = CPFactorisation(weighed.weight, most_fitted)
        if metric is None:
            return plain
        channels = weighed.seen(folding_of(spec, tuple(1 for _ in kernel), tuple(kernel)))[0]
        outputs = None if metric.output_roots is None else (metric.output_roots[0][0], metric.output_roots[1][0])
        aware = CPFactorisation(weighed.weight, most_fitted, square_roots(channels, _RIDGE), outputs)
        best = BestInMetric if is_small(metric) else BestOf
        return best(weighed, metric, aware, plain)


def fitted_ranks(most: int) -> list[int]:
    """The ranks up to `most` at which all terms are fitted; 0 comes first."""
    ranks = [0]
    while _next_fitted(ranks[-1]) <= most:
        ranks.append(_next_fitted(ranks[-1]))
    return ranks


def _next_fitted(rank: int) -> int:
    if rank < _FINEST_STEP:
        return max(2 * rank, 1)
    power = 1 << (rank.bit_length() - 1)
    return rank + max(_FINEST_STEP, power // _STEPS_PER_DOUBLING)


def _is_power(rank: int) -> bool:
    """Whether it is a power of two, or 0."""
    return rank & (rank - 1) == 0
