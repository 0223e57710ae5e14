"""The arithmetic of weights that are filters on groups of the input's channels, then a mixture of what they give."""

from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ranksearch.decompositions.base import Factorisation
from ranksearch.decompositions.matrices import balanced_pair, least_squares_step, mean_diagonal, square_roots
from ranksearch.decompositions.ranks import Ranks

# Solving for more components at once would take seconds on the largest layers.
MAX_COMPONENTS = 1536
# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
WHITENING_RIDGE = 1e-4
_SOLVING_RIDGE = 1e-6


@final
class GroupedFactorisation(Factorisation):
    """For each of g groups of the weight's columns, last (T, K) @ first (K, d), most important filters first.

    `first` is (g, K, d), `last` (T, g, K), both float64. With `fit`, `last` is what it solves at each rank. `fixed`
    filters are not scaled, all others balanced with what they meet.
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
        self.first, self.last, self.shape, self.fit, self.fixed = first, last, shape, fit, fixed

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        first, last = self._cut(ranks)
        flat_first, flat_last = first.flatten(0, 1), last.flatten(1)
        if not self.fixed:
            flat_last, flat_first = balanced_pair(flat_last, flat_first)
        n_outputs, n_inputs, *kernel = self.shape
        filters = flat_first.reshape(-1, n_inputs // len(first), *kernel)
        return filters.float(), flat_last.reshape(n_outputs, -1, *(1 for _ in kernel)).float()

    def weight(self, ranks: Ranks) -> Tensor:
        first, last = self._cut(ranks)
        slices = last.transpose(0, 1).float() @ first.float()
        return slices.transpose(0, 1).reshape(self.shape)

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        (rank,) = ranks
        last = self.last[:, :, :rank] if self.fit is None else self.fit.solve(rank)
        return self.first[:, :rank], last


@final
class LastFactorFit:
    """The last factor that costs least in the input's metric, for the first filters of each group.

    `matrix` is the weight (T, D), `covariance` (D, D), `first` (g, K, d) and `last` (T, g, K) its exact factors, near
    which the solution stays where inputs do not tell. Of more than 1,536 filters in all, only what the first 1,536
    give is solved for, beside the others as they are in `last`.
    """

    def __init__(self, matrix: Tensor, covariance: Tensor, first: Tensor, last: Tensor) -> None:
        self.matrix, self.covariance, self.first, self.last = matrix, covariance, first, last
        self.n_free = min(max(MAX_COMPONENTS // len(first), 1), first.shape[1])
        self._solved: dict[int, Tensor] = {}

    def solve(self, rank: int) -> Tensor:
        """The last factor (T, g, rank) for the first `rank` filters of each group."""
        if rank == self.first.shape[1]:
            return self.last
        if rank not in self._solved:
            self._solved[rank] = self._solve(rank)
        return self._solved[rank]

    def _solve(self, rank: int) -> Tensor:
        free = min(rank, self.n_free)
        moments, wanted = self._free_equations
        seen = moments[:, :rank, :, :free] if rank == free else self._moments(self._responses(), rank)
        size = len(self.first) * free
        guess = self.last[:, :, :rank]
        missing = wanted[:, :, :free].flatten(1) - guess.flatten(1) @ seen.reshape(-1, size)
        step = ridge_step(seen[:, :free].reshape(size, size), missing)
        solved = guess.clone()
        solved[:, :, :free] += step.reshape(len(step), -1, free)
        return solved

    @cached_property
    def _free_equations(self) -> tuple[Tensor, Tensor]:
        """The moments (g, n_free, g, n_free) of what is solved for, and (T, g, n_free) with the layer's output."""
        responses = self._responses()
        wanted = self.matrix @ responses.flatten(0, 1).T
        return self._moments(responses, self.n_free), wanted.reshape(len(wanted), *responses.shape[:2])

    def _responses(self) -> Tensor:
        """The moments (g, n_free, D) of the outputs of the filters solved for with the inputs."""
        n_groups, _, width = self.first.shape
        return self.first[:, : self.n_free] @ self.covariance.reshape(n_groups, width, -1)

    def _moments(self, responses: Tensor, rank: int) -> Tensor:
        """The moments (g, rank, g, n_free) of the outputs of the first filters with those of the ones solved for."""
        n_groups, _, width = self.first.shape
        by_input = responses.reshape(-1, n_groups, width).permute(1, 2, 0)
        return (self.first[:, :rank] @ by_input).reshape(n_groups, rank, n_groups, -1)


def ridge_step(moments: Tensor, missing: Tensor) -> Tensor:
    """X (.., n, k) with X moments = missing, but for a ridge on the moments (.., k, k) that keeps X small."""
    raised = moments.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(_SOLVING_RIDGE * mean_diagonal(moments)[..., 0])
    return least_squares_step(raised, missing)


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
