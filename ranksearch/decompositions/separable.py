"""The arithmetic of weights that are filters on groups of the input's channels, then a mixture of what they give."""

import itertools
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ranksearch.decompositions.base import Factorisation
from ranksearch.decompositions.matrices import NestedLeastSquares, balanced_pair, mean_diagonal, square_roots
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.ways import Latest
from ranksearch.decompositions.weighed import WeighedWeight

# Solving for more components at once would take seconds on the largest layers.
MAX_COMPONENTS = 1536
# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
WHITENING_RIDGE = 1e-4
SOLVING_RIDGES = (1e-6, 1e-4)


@final
class GroupedFactorisation(Factorisation):
    """For each of g groups of the weight's columns, last (T, K) @ first (K, d), most important filters first.

    `first` is (g, K, d), `last` (T, g, K). With `fit`, `last` is what it solves at each rank. `fixed` filters are not
    scaled, all others balanced with what they meet.
    """

    def __init__(
        self,
        first: Tensor,
        last: Tensor,
        shape: tuple[int, ...],
        *,
        fit: "LastFactorFit | None" = None,
        fixed: bool = False,
    ) -> None:
        self.first, self.last, self.shape, self.fixed = first.float(), last.float(), shape, fixed
        self._solved = None if fit is None else Latest(fit.solve)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        first, last = self._cut(ranks)
        flat_first, flat_last = first.flatten(0, 1), last.flatten(1)
        if not self.fixed:  # the squares of what inputs hardly take leave float32's range
            flat_last, flat_first = balanced_pair(flat_last.double(), flat_first.double())
        n_outputs, n_inputs, *kernel = self.shape
        filters = flat_first.reshape(-1, n_inputs // len(first), *kernel)
        mixture = flat_last.reshape(n_outputs, -1, *(1 for _ in kernel))
        return tuple(each.float().clone(memory_format=torch.contiguous_format) for each in (filters, mixture))

    def weight(self, ranks: Ranks) -> Tensor:
        first, last = self._cut(ranks)
        return (last.transpose(0, 1) @ first).transpose(0, 1).reshape(self.shape)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        first, last = self._cut(ranks)
        filtered = first @ inputs.reshape(len(first), first.shape[2], -1)
        return (last.flatten(1) @ filtered.flatten(0, 1))[None]

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        (rank,) = ranks
        return self.first[:, :rank], self.last[:, :, :rank] if self._solved is None else self._solved.at(ranks)


@final
class LastFactorFit:
    """The last factor that costs least in the input's metric, for the first filters of each group.

    `first` is (g, K, d) and `last` (T, g, K), the weight's exact factors, near which the solution stays where inputs
    do not tell. Of more than 1,536 filters in all, only what the first 1,536 give is solved for, beside the others as
    they are in `last`.
    """

    def __init__(self, weighed: WeighedWeight, first: Tensor, last: Tensor) -> None:
        self.weighed, self.first = weighed, first
        self.last = last.transpose(1, 2)
        self.n_free = min(max(MAX_COMPONENTS // len(first), 1), first.shape[1])

    def solve(self, ranks: Ranks) -> Tensor:
        """The last factor (T, g, rank), float32, for the first `rank` filters of each group."""
        (rank,) = ranks
        last = self.last[:, :rank]
        if rank < self.first.shape[1]:
            nested, fixed = self._equations
            free = min(rank, self.n_free)
            less = fixed[rank - self.n_free - 1] if rank > self.n_free else None
            solved = nested.solve(free * len(self.first), less).reshape(len(last), free, -1)
            last = torch.cat((solved, last[:, free:]), 1)
        return last.transpose(1, 2).float()

    @cached_property
    def _equations(self) -> tuple[NestedLeastSquares, list[Tensor]]:
        """For the filters solved for, all groups' first before all groups' second, and so on.

        With what the next one of each group, the next two and so on make of those (T, n_free * g).
        """
        assert self.weighed.inputs is not None
        free, (n_groups, n_filters, width) = self.n_free, self.first.shape
        seen = self.first[:, :free] @ self.weighed.inputs.reshape(n_groups, width, -1)
        by_input = seen.transpose(0, 1).reshape(-1, n_groups, width).permute(1, 2, 0)
        moments = (self.first @ by_input).transpose(0, 1)
        fixed = [self.last[:, k] @ moments[k] for k in range(free, n_filters - 1)]
        normal, guess = moments[:free].flatten(0, 1), self.last[:, :free].flatten(1)
        outputs = self.weighed.crossed.reshape(-1, n_groups, width)
        wanted = torch.einsum("tgd,gkd->tkg", outputs, self.first[:, :free]).flatten(1)
        return NestedLeastSquares(normal, wanted, guess, SOLVING_RIDGES), list(itertools.accumulate(fixed))


def diagonal_blocks(covariance: Tensor, n_blocks: int) -> Tensor:
    """The covariances (n_blocks, d, d) of equal runs of inputs, each alone."""
    width = len(covariance) // n_blocks
    blocks = covariance.reshape(n_blocks, width, n_blocks, width)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def whitening_roots(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square roots (n, d, d) of covariances, each at a mean diagonal of one, and their inverses.

    A covariance that vanishes beside the others is taken for one of independent inputs.
    """
    scales = mean_diagonal(covariances)
    identity = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    alive = scales > max(float(scales.mean()) * 1e-12, 1e-29)
    return square_roots(torch.where(alive, covariances / scales, identity), WHITENING_RIDGE)
