"""What it costs to change a layer's weight, and the choice between factorisations by it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ranksearch.decompositions.matrices import square_roots

# Beyond so many inputs a cost is estimated on as many probes: exactly, it takes the square of the inputs.
MAX_EXACT_INPUTS, N_PROBES = 1024, 128
_RIDGES = (1e-10, 1e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """What it costs to change a layer's weight by D (T, inputs): tr(output D input D^T).

    `input` (inputs, inputs), float64: the centred second moment of what the weight multiplies, its rows in the order
    of `weight.flatten(1)`; for a convolution in groups (groups, inputs, inputs), one per group. `output` (T, T),
    float64: the second moment of the loss's gradients at the layer's output; None where every output counts alike.
    Of a convolution in groups each group's own block of `output` counts.
    """

    input: Tensor
    output: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """The input's moments (groups, inputs, inputs), of one group too."""
        return self.input if self.input.dim() == 3 else self.input[None]

    @cached_property
    def outputs(self) -> Tensor | None:
        """The output's moments (groups, T / groups, T / groups), of one group too; None where there is none."""
        if self.output is None:
            return None
        groups = len(self.inputs)
        n_outputs = len(self.output) // groups
        blocks = self.output.reshape(groups, n_outputs, groups, n_outputs)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()

    @cached_property
    def output_roots(self) -> tuple[Tensor, Tensor] | None:
        """The symmetric square roots (groups, T / groups, T / groups) of the shrunk outputs, and their inverses.

        Shrunk to half the moment and half its mean diagonal, up to a factor: gradients of a few hundred examples
        know little of the directions in which they are small. None where every output counts alike.
        """
        return None if self.outputs is None else square_roots(self.outputs, ridge=1.0)

    def cost(self, difference: Tensor) -> float:
        """The cost of changing the weight by `difference`, of its shape; beyond 1,024 inputs an estimate.

        The estimate is the same at every call, so that it tells which of two changes costs less.
        """
        groups, n_inputs, _ = self.inputs.shape
        # Single precision is enough to choose between two candidates, and twice as fast on the largest layers.
        rows = difference.detach().flatten(1).float()
        seen = rows.reshape(groups, -1, n_inputs) @ self._roots
        weighed = seen if self.outputs is None else self.outputs.float() @ seen
        return float((weighed * seen).sum())

    @cached_property
    def _roots(self) -> Tensor:
        """R (groups, inputs, n), float32, with R R^T the input's moment, or nearly so where n is less than inputs."""
        n_inputs = self.inputs.shape[-1]
        if n_inputs <= MAX_EXACT_INPUTS:
            return torch.stack([_root(moment) for moment in self.inputs]).float()
        probes = torch.randn(n_inputs, N_PROBES, generator=torch.Generator().manual_seed(0)).to(self.input.device)
        roots = torch.stack([_root(moment.float()) for moment in self.inputs])
        return roots @ (probes / math.sqrt(N_PROBES))


def _root(moment: Tensor) -> Tensor:
    """A triangular root of a positive semi-definite matrix, to rounding."""
    scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for ridge in _RIDGES if moment.dtype is torch.float64 else _RIDGES[1:]:
        factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(moment + ridge * scale * identity)
        if not int(factor[1]):
            return factor[0]
    return torch.diag(moment.diagonal().clamp_min(0.0).sqrt())


def cheapest(metric: Metric, weight: Tensor, approximations: Sequence[Tensor]) -> int:
    """Which of the approximations of the weight costs least; the first of equals."""
    costs = [metric.cost(weight - approximation.to(weight)) for approximation in approximations]
    return costs.index(min(costs))
