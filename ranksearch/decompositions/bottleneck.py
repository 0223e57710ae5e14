"""One weight as two factors through a bottleneck, whichever of the kernel's taps either takes."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ranksearch.decompositions.base import BestOf, Factorisation, double_precision, n_groups
from ranksearch.decompositions.matrices import balanced_pair, least_squares_step, principal_directions
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import LayerSpec

Roots = tuple[Tensor, Tensor]

# Up to so many inputs a last factor with taps is solved again at every rank: it takes the cube of the inputs.
MAX_REFIT_INPUTS = 1200


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """Which taps of a weight (T, S / groups, *kernel) the first of two factors takes, and which the last.

    A kernel is read as (a, b) taps, row by row: `first_kernel` has a of them and `last_kernel` b.
    """

    shape: tuple[int, ...]
    groups: int
    first_kernel: tuple[int, ...]
    last_kernel: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Outputs and inputs per group, and the taps a and b."""
        n_outputs, n_inputs = self.shape[0] // self.groups, self.shape[1]
        return n_outputs, n_inputs, math.prod(self.first_kernel), math.prod(self.last_kernel)

    @property
    def max_rank(self) -> int:
        """The components per group at which two factors give back any weight."""
        n_outputs, n_inputs, a, b = self.sizes
        return min(n_outputs * b, n_inputs * a)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, outputs * b, inputs * a), the product of the last factor and the first."""
        n_outputs, n_inputs, a, b = self.sizes
        taps = weight.reshape(self.groups, n_outputs, n_inputs, a, b).permute(0, 1, 4, 2, 3)
        return taps.reshape(self.groups, n_outputs * b, n_inputs * a)

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight of such a matrix."""
        n_outputs, n_inputs, a, b = self.sizes
        taps = matrix.reshape(self.groups, n_outputs, b, n_inputs, a).permute(0, 1, 3, 4, 2)
        return taps.reshape(self.shape)

    def factors(self, last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The modules' weights, first and last, of last (groups, outputs * b, r) and first (groups, r, inputs * a)."""
        _, n_inputs, _, b = self.sizes
        rank = first.shape[1]
        taps = last.reshape(self.shape[0], b, rank).transpose(1, 2)
        return (
            first.reshape(self.groups * rank, n_inputs, *self.first_kernel).clone(),
            taps.reshape(self.shape[0], rank, *self.last_kernel).clone(memory_format=torch.contiguous_format),
        )

    def seen(self, moments: Tensor) -> Tensor:
        """The moments (groups, inputs * a, inputs * a) of what the first factor sees, averaged over the last's taps."""
        _, n_inputs, a, b = self.sizes
        if b == 1:
            return moments
        taps = moments.reshape(self.groups, n_inputs * a, b, n_inputs * a, b)
        return taps.diagonal(dim1=2, dim2=4).mean(-1)


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

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        (rank,) = ranks
        return self.last[..., :rank], self.first[:, :rank]


@final
class LastSolver:
    """Solves the last factor of a bottleneck in the metric of the inputs, given any number of the first's rows.

    With P the map from the layer's inputs to those of the last factor and G the moments of the former, the last
    factor M that loses least is the one with (W - M P) G P^T = 0; how much each output counts makes no difference.
    """

    def __init__(self, weight: Tensor, last: Tensor, first: Tensor, folding: Folding, moments: Tensor) -> None:
        _, n_inputs, a, b = folding.sizes
        groups, n_columns, rank = folding.groups, n_inputs * a, first.shape[1]
        self.matrix, self.last, self.first, self.folding = folding.matrix(weight), last, first, folding
        seen = first @ moments.reshape(groups, n_columns, -1)
        self.crossed = seen.reshape(groups, rank * b, n_columns * b)
        taps = seen.reshape(groups, rank, b, n_columns, b)
        self.normal = torch.einsum("gpbic,gqi->gpbqc", taps, first).reshape(groups, rank * b, rank * b)

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """The last factor (groups, outputs, rank * b) and the moments (groups, rank * b, rank * b) of its inputs."""
        n_outputs, _, _, b = self.folding.sizes
        last, first = self.last[..., :rank], self.first[:, :rank]
        # Correcting what is there, rather than solving from nothing, leaves exact what was exact.
        missing = self.folding.weight(self.matrix - last @ first).reshape(self.folding.groups, n_outputs, -1)
        normal = self.normal[:, : rank * b, : rank * b]
        step = least_squares_step(normal, missing @ self.crossed[:, : rank * b].mT)
        start = last.reshape(self.folding.groups, n_outputs, b, rank).transpose(2, 3).flatten(2)
        return start + step, normal


@final
class RefittedBottleneck(Factorisation):
    """A bottleneck whose last factor is solved again at every rank."""

    def __init__(self, solver: LastSolver) -> None:
        self._solver = solver
        self._solved: dict[Ranks, Bottleneck] = {}

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return self._at(ranks).factors(ranks)

    def weight(self, ranks: Ranks) -> Tensor:
        return self._at(ranks).weight(ranks)

    def _at(self, ranks: Ranks) -> Bottleneck:
        if ranks not in self._solved:
            (rank,) = ranks
            folding = self._solver.folding
            n_outputs, _, _, b = folding.sizes
            solved, _ = self._solver.solve(rank)
            last = solved.reshape(folding.groups, n_outputs, rank, b).transpose(2, 3).flatten(1, 2)
            last, first = balanced_pair(last, self._solver.first[:, :rank])
            self._solved[ranks] = Bottleneck(last=last.float(), first=first.float(), folding=folding)
        return self._solved[ranks]


def factorise_bottleneck(weight: Tensor, spec: LayerSpec, folding: Folding, metric: Metric | None) -> Factorisation:
    """The factorisation at every rank; with a metric, of several ways at each rank the one that costs least.

    The first factor takes the principal components of what its own taps make of the weight, in the metric of its
    inputs averaged over the last factor's taps; a last factor with taps is then solved in the whole metric, on
    layers of up to 1,200 inputs. Raises DecompositionError where the numbers are not finite or do not fit.
    """
    exact, metric = double_precision(weight, spec, metric)
    if metric is None:
        return _single(*principal_pair(exact, folding, None, None), folding)
    seen, has_taps = folding.seen(metric.inputs), math.prod(folding.last_kernel) > 1
    pairs = [principal_pair(exact, folding, seen, roots) for roots in weighings(metric)]
    if metric.output is None and not has_taps:
        # Without outputs to weigh and taps to average over, nothing loses less than the principal components.
        return _single(*pairs[0], folding)
    pairs.append(principal_pair(exact, folding, None, None))
    if has_taps and is_small(metric):
        solvers = [LastSolver(exact, *pair, folding, metric.inputs) for pair in pairs]
        return BestOf(exact, metric, *(RefittedBottleneck(solver) for solver in solvers))
    return BestOf(exact, metric, *(_single(*pair, folding) for pair in pairs))


def is_small(metric: Metric) -> bool:
    """Whether the layer has few enough inputs to solve a last factor in the whole metric at every rank."""
    return metric.inputs.shape[-1] <= MAX_REFIT_INPUTS


def weighings(metric: Metric) -> list[Roots | None]:
    """The weights of the outputs that are worth a way each: the metric's own and, on small layers, none."""
    if metric.output_roots is None:
        return [None]
    return [metric.output_roots, None] if is_small(metric) else [metric.output_roots]


def principal_pair(
    weight: Tensor, folding: Folding, seen: Tensor | None, output_roots: Roots | None
) -> tuple[Tensor, Tensor]:
    """last (groups, outputs * b, K) and first (groups, K, inputs * a) of a float64 weight, balanced.

    `seen` are the moments of what the first factor sees, `output_roots` those of what the outputs count, with their
    inverses; without either, the singular value decomposition.
    """
    matrix = folding.matrix(weight)
    project, directions = weighed_directions(matrix, seen, output_roots)
    return balanced_pair(directions, project.mT @ matrix)


def weighed_directions(matrix: Tensor, seen: Tensor | None, output_roots: Roots | None) -> tuple[Tensor, Tensor]:
    """Columns P and Q (groups, outputs * b, K), first to matter first: Q P^T matrix is the best of its rank.

    `matrix` (groups, outputs * b, m) meets inputs of moments `seen` (groups, m, m). P and Q are the same and
    orthonormal where every output counts alike.
    """
    if output_roots is None:
        directions = principal_directions(matrix, seen)
        return directions, directions
    root, inverse_root = output_roots
    directions = principal_directions(_mix_outputs(root, matrix), seen)
    return _mix_outputs(root, directions), _mix_outputs(inverse_root, directions)


def folding_of(spec: LayerSpec, first_kernel: tuple[int, ...], last_kernel: tuple[int, ...]) -> Folding:
    """The folding of the layer's weight with these kernels."""
    return Folding(shape=spec.weight_shape, groups=n_groups(spec), first_kernel=first_kernel, last_kernel=last_kernel)


def _mix_outputs(mixing: Tensor, matrix: Tensor) -> Tensor:
    """`mixing` (groups, outputs, outputs) applied to the outputs of a matrix (groups, outputs * b, n)."""
    groups, n_outputs, _ = mixing.shape
    return (mixing @ matrix.reshape(groups, n_outputs, -1)).reshape(matrix.shape)


def _single(last: Tensor, first: Tensor, folding: Folding) -> Bottleneck:
    return Bottleneck(last=last.float(), first=first.float(), folding=folding)
