"""Which of a kernel's taps either of two factors takes, and a weight read as their product."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


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
