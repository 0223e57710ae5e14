"""A layer's weight in its metric: what several decompositions compute of both, each once."""

from enum import Enum
from functools import cached_property
from typing import final

from torch import Tensor

from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.matrices import (
    UNSEEN,
    balanced_pair,
    mean_diagonal,
    principal_axes,
    principal_directions,
    right_factors,
    weighed_axes,
)

# R (groups, T / groups, T / groups), R^T R what the outputs count, and their inverses.
Roots = tuple[Tensor, Tensor]


class Weighing(Enum):
    """What of the metric a factorisation takes."""

    NOTHING = "nothing"
    INPUTS = "the inputs' moments"
    OUTPUTS = "the inputs' moments and what the outputs count"


@final
class WeighedWeight:
    """A float64 weight (T, S / groups, *kernel) with its inputs' moments and its outputs' roots, as in a `Metric`.

    What it computes is kept, for every decomposition of the same layer to use.
    """

    def __init__(
        self, weight: Tensor, groups: int, inputs: Tensor | None = None, output_roots: Roots | None = None
    ) -> None:
        self.weight, self.inputs, self.output_roots = weight, inputs, output_roots
        self.rows = weight.reshape(groups, len(weight) // groups, -1)
        self._seen: dict[Folding, Tensor] = {}
        self._pairs: dict[tuple[Folding, Weighing], tuple[Tensor, Tensor]] = {}
        self._outputs: dict[Weighing, tuple[Tensor, Tensor]] = {}

    @cached_property
    def single(self) -> Tensor:
        """The weight in float32."""
        return self.weight.float()

    @cached_property
    def counted(self) -> Tensor:
        """The rows (groups, T / groups, inputs), weighed by what the outputs count."""
        return self.rows if self.output_roots is None else self.output_roots[0] @ self.rows

    @cached_property
    def crossed(self) -> Tensor:
        """The moments (groups, T / groups, inputs) of the layer's outputs with its inputs."""
        assert self.inputs is not None
        return self.rows @ self.inputs

    def seen(self, folding: Folding) -> Tensor:
        """The moments (groups, inputs * a, inputs * a) of what the first factor of the folding sees."""
        assert self.inputs is not None
        if folding not in self._seen:
            self._seen[folding] = folding.seen(self.inputs)
        return self._seen[folding]

    def pair(self, folding: Folding, weighing: Weighing) -> tuple[Tensor, Tensor]:
        """last (groups, outputs * b, K) and first (groups, K, inputs * a), balanced, most important component first.

        At each rank they are the best in the metric of what the first factor sees, as far as the weighing takes it;
        without a metric, the singular value decomposition.
        """
        key = folding, weighing
        if key not in self._pairs:
            self._pairs[key] = balanced_pair(*self._pair(folding, weighing))
        return self._pairs[key]

    def outputs(self, weighing: Weighing) -> tuple[Tensor, Tensor]:
        """Columns P and Q (groups, T / groups, K), first to matter first: Q P^T rows is the best of its rank."""
        if weighing not in self._outputs:
            self._outputs[weighing] = self._output_directions(weighing)
        return self._outputs[weighing]

    def _pair(self, folding: Folding, weighing: Weighing) -> tuple[Tensor, Tensor]:
        matrix, roots = folding.matrix(self.weight), self._roots(weighing)
        seen = None if weighing is Weighing.NOTHING else self.seen(folding)
        if matrix.shape[1] > matrix.shape[2]:
            counted = matrix if roots is None else _mix_outputs(roots[0], matrix)
            return right_factors(matrix, counted.mT @ counted, seen)
        if folding.sizes[3] == 1:
            project, directions = self.outputs(weighing)
        else:
            project, directions = weighed_directions(matrix, seen, roots)
        return directions, project.mT @ matrix

    def _output_directions(self, weighing: Weighing) -> tuple[Tensor, Tensor]:
        roots = self._roots(weighing)
        inputs = None if weighing is Weighing.NOTHING else self.inputs
        if self.rows.shape[1] > self.rows.shape[2]:
            return weighed_directions(self.rows, inputs, roots)
        gram = self._gram if weighing is Weighing.NOTHING else self._moments
        if roots is None:
            directions = principal_axes(gram)
            return directions, directions
        return weighed_axes(gram, *roots)

    @cached_property
    def _gram(self) -> Tensor:
        return self.rows @ self.rows.mT

    @cached_property
    def _moments(self) -> Tensor:
        """The moments (groups, T / groups, T / groups) of the layer's outputs."""
        assert self.inputs is not None
        return self.crossed @ self.rows.mT + UNSEEN * mean_diagonal(self.inputs) * self._gram

    def _roots(self, weighing: Weighing) -> Roots | None:
        return self.output_roots if weighing is Weighing.OUTPUTS else None


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
    return _mix_outputs(root.mT, directions), _mix_outputs(inverse_root, directions)


def _mix_outputs(mixing: Tensor, matrix: Tensor) -> Tensor:
    """`mixing` (groups, outputs, outputs) applied to the outputs of a matrix (groups, outputs * b, n)."""
    groups, n_outputs, _ = mixing.shape
    return (mixing @ matrix.reshape(groups, n_outputs, -1)).reshape(matrix.shape)
