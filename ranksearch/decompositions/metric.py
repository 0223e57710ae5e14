"""What it costs to change a layer's weight, and the choice between factorisations by it."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ranksearch.decompositions.matrices import all_finite, triangular_root, weighing_roots
from ranksearch.decompositions.weighed import WeighedWeight

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
        """Triangular R (groups, T / groups, T / groups), R^T R the shrunk outputs' moments, and their inverses.

        Shrunk to half the moment and half its mean diagonal, up to a factor: gradients of a few hundred examples
        know little of the directions in which they are small. None where every output counts alike.
        """
        return None if self.outputs is None else weighing_roots(self.outputs, ridge=1.0)

    @cached_property
    def is_finite(self) -> tuple[bool, bool]:
        """Whether all numbers are finite, of the input's moments and of the output's."""
        return all_finite(self.input), self.output is None or all_finite(self.output)

    def weighed(self, weight: Tensor) -> WeighedWeight:
        """A float64 weight in this metric; the last one is kept, with all that was computed of it."""
        if not self._weighed or not torch.equal(self._weighed[0].weight, weight):
            self._weighed[:] = [WeighedWeight(weight, len(self.inputs), self.inputs, self.output_roots)]
        return self._weighed[0]

    @cached_property
    def _weighed(self) -> list[WeighedWeight]:
        return []

    def cost(self, difference: Tensor) -> float:
        """The cost of changing the weight by `difference`, of its shape; beyond 1,024 inputs an estimate.

        The estimate is the same at every call, so that it tells which of two changes costs less.
        """
        # Single precision is enough to choose between two candidates, and twice as fast on the largest layers.
        rows = difference.detach().flatten(1).float()
        return self.cost_of_outputs(rows.reshape(len(self.inputs), -1, rows.shape[1]) @ self.probes)

    def cost_of_outputs(self, difference: Tensor) -> float:
        """The cost of a change of the weight by what it makes of the probes (groups, T / groups, n), float32."""
        weighed = difference if self.outputs is None else self.outputs.float() @ difference
        return float((weighed * difference).sum())

    @cached_property
    def probes(self) -> Tensor:
        """Inputs R (groups, inputs, n), float32, with R R^T their moments, or nearly so where n is below `inputs`."""
        n_inputs = self.inputs.shape[-1]
        if n_inputs <= MAX_EXACT_INPUTS:
            return triangular_root(self.inputs, _RIDGES).float()
        probes = torch.randn(n_inputs, N_PROBES, generator=torch.Generator().manual_seed(0)).to(self.input.device)
        return triangular_root(self.inputs.float(), _RIDGES[1:]) @ (probes / math.sqrt(N_PROBES))
