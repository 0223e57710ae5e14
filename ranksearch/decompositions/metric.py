"""What it costs to change a layer's weight, and the choice between factorisations by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Beyond so many inputs a cost is estimated on as many probes: exactly, it takes the square of the inputs.
MAX_EXACT_INPUTS, N_PROBES = 1024, 512
_RIDGES = (1e-10, 1e-6, 1e-3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric:
    """What it costs to change a layer's weight by D (T, inputs): tr(output D input D^T).

    `input` (inputs, inputs), float64: the centred second moment of what the weight multiplies, its rows in the order
    of `weight.flatten(1)`; for a convolution in groups (groups, inputs, inputs), one per group. `output` (T, T),
    float64: the second moment of the loss's gradients at the layer's output; None where every output counts alike.
    """

    input: Tensor
    output: Tensor | None = None

    def cost(self, difference: Tensor) -> float:
        """The cost of changing the weight by `difference`, of its shape; beyond 1,024 inputs an estimate.

        The estimate is the same at every call, so that it tells which of two changes costs less.
        """
        groups = self.input.shape[0] if self.input.dim() == 3 else 1
        # Single precision is enough to choose between two candidates, and twice as fast on the largest layers.
        rows = difference.detach().flatten(1).float()
        seen = torch.bmm(rows.reshape(groups, -1, rows.shape[1]), self._roots).flatten(0, 1)
        weighed = seen if self.output is None else self.output.float() @ seen
        return float((weighed * seen).sum())

    @cached_property
    def _roots(self) -> Tensor:
        """R (groups, inputs, n), float32, with R R^T the input's moment, or nearly so where n is less than inputs."""
        moments = self.input if self.input.dim() == 3 else self.input[None]
        n_inputs = moments.shape[-1]
        roots = torch.stack([_root(moment) for moment in moments])
        if n_inputs > MAX_EXACT_INPUTS:
            probes = torch.randn(n_inputs, N_PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            roots = roots @ probes.to(roots) / N_PROBES**0.5
        return roots.float()


def _root(moment: Tensor) -> Tensor:
    """A triangular root of a positive semi-definite matrix, to rounding."""
    scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for ridge in _RIDGES:
        factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(moment + ridge * scale * identity)
        if not int(factor[1]):
            return factor[0]
    return torch.diag(moment.diagonal().clamp_min(0.0).sqrt())


def cheapest(metric: Metric, weight: Tensor, approximations: Sequence[Tensor]) -> int:
    """Which of the approximations of the weight costs least; the first of equals."""
    costs = [metric.cost(weight - approximation.to(weight)) for approximation in approximations]
    return costs.index(min(costs))
