"""A k x k convolution as 1 x 1, k x 1, 1 x k and 1 x 1, with fewer channels in between."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    BestOf,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.bottleneck import (
    Folding,
    LastSolver,
    Roots,
    folding_of,
    is_small,
    weighed_directions,
    weighings,
)
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.matrices import principal_directions, square_roots
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec

# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
_RIDGE = 1e-4
_MOST_BALANCING_STEPS, _BALANCED = 100, 1e-4


@final
class TensorTrainFactorisation(Factorisation):
    """weight = output (T, K_3), in mode 0, and input (S, K_1), in mode 1, times a core (K_1, kh, kw, K_3).

    At any ranks the core's leading block is cut once more between rows and columns, by the singular vectors of its
    unfolding, and `solve_last`, if given, solves for what follows the rows. What that gives is kept.
    """

    def __init__(self, output: Tensor, core: Tensor, given: Tensor, solve_last: "LastFactors | None" = None) -> None:
        self._output, self._core, self._input, self._solve_last = output, core, given, solve_last
        self._known: dict[Ranks, tuple[Tensor, ...]] = {}

    def solving(self, solve_last: "LastFactors") -> "TensorTrainFactorisation":
        """This one with the last factors solved for."""
        return TensorTrainFactorisation(self._output, self._core, self._input, solve_last)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        first, vertical, horizontal, last = self._cut(ranks)
        shaped = first[:, :, None, None], vertical[:, :, :, None], horizontal[:, :, None, :], last[:, :, None, None]
        return tuple(factor.float() for factor in balanced_chain(*shaped))

    def weight(self, ranks: Ranks) -> Tensor:
        first, vertical, horizontal, last = self._cut(ranks)
        columns = torch.einsum("to,omw->tmw", last, horizontal)
        rows = torch.einsum("mih,is->msh", vertical, first)
        return torch.einsum("tmw,msh->tshw", columns, rows).float()

    def _cut(self, ranks: Ranks) -> tuple[Tensor, ...]:
        """First (r1, S), vertical (r2, r1, kh), horizontal (r3, r2, kw) and last (T, r3)."""
        if ranks not in self._known:
            rank_in, rank_between, rank_out = ranks
            vertical, horizontal = _split(self._core[:rank_in, :, :, :rank_out], rank_between)
            cut = self._input[:, :rank_in].T, vertical, horizontal, self._output[:, :rank_out]
            self._known[ranks] = cut if self._solve_last is None else self._solve_last(*cut)
        return self._known[ranks]


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LastFactors:
    """Solves for the horizontal and last factors of a weight in the whole metric, the first two given."""

    weight: Tensor
    metric: Metric
    folding: Folding
    roots: Roots | None

    def __call__(self, first: Tensor, vertical: Tensor, horizontal: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        """All four factors, of the same ranks."""
        rank_between, rank_out = len(vertical), len(horizontal)
        rows = torch.einsum("mih,is->msh", vertical, first).flatten(1)
        columns = torch.einsum("to,omw->twm", last, horizontal).flatten(0, 1)
        solver = LastSolver(self.weight, columns[None], rows[None], self.folding, self.metric.inputs)
        solved, normal = solver.solve(rank_between)
        project, output = weighed_directions(solved, normal, self.roots)
        narrow = (project[0, :, :rank_out].T @ solved[0]).reshape(-1, rank_between, horizontal.shape[2])
        return first, vertical, _padded(narrow, 0, rank_out), _padded(output[0, :, :rank_out], 1, rank_out)


@final
class TensorTrain(AbstractDecomposition):
    """Ranks: (rank_in, rank_between, rank_out), the channels after the first 1 x 1, the k x 1 and the 1 x k.

    A tensor train over inputs, rows, columns and outputs (Oseledets, "Tensor-train decomposition", 2011), whose
    outer modes are cut by their own singular vectors, once for all ranks. With a metric, inputs are whitened by the
    channels' covariance, averaged over the taps, and outputs take the principal components of what the layer gives,
    weighed by the moment of its gradients; the plain one is kept where it loses less.
    """

    name: ClassVar[str] = "tensor_train"

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec) or _refuse_one_axis(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, n_inputs, height, width = spec.weight_shape
        n_taps = height * width
        return (
            min(n_inputs, n_outputs * n_taps),
            min(n_inputs * height, n_outputs * width),
            min(n_outputs, n_inputs * n_taps),
        )

    def path_end(self, spec: LayerSpec, options: Options) -> Ranks:
        # More channels between rows and columns than at either end cut nothing, and cost most of the weights.
        rank_in, rank_between, rank_out = self.max_ranks(spec, options)
        return rank_in, min(rank_between, max(rank_in, rank_out)), rank_out

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        rank_in, rank_between, rank_out = ranks
        return chain(
            pointwise(spec, spec.in_channels, rank_in),
            filtering(spec, rank_in, rank_between, axes=(0,)),
            filtering(spec, rank_between, rank_out, axes=(1,)),
            pointwise(spec, rank_out, spec.out_channels, bias=True),
        )

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        exact, metric = double_precision(weight, spec, metric)
        plain = _cut_outer_modes(exact, spec, None)
        if metric is None:
            return plain
        aware = _cut_outer_modes(exact, spec, metric)
        if not is_small(metric):
            return BestOf(exact, metric, aware, plain)
        kernel = exact.shape[2:]
        folding = folding_of(spec, (kernel[0], 1), (1, kernel[1]))
        solvers = [LastFactors(weight=exact, metric=metric, folding=folding, roots=each) for each in weighings(metric)]
        solved = [start.solving(solver) for start in (aware, plain) for solver in solvers]
        return BestOf(exact, metric, *solved, plain)


def balanced_chain(*factors: Tensor) -> list[Tensor]:
    """Factors (r_i+1, r_i, ...), scaled at every joint such that each channel enters as strong as it leaves.

    At each joint a channel's weights on either side get the same norm. These scales are the ones at which the
    factors' summed squares are least; alternating finds them, since the sum is convex in their logarithms.
    """
    energies = [_floored_energy(factor.double().square().reshape(*factor.shape[:2], -1).sum(-1)) for factor in factors]
    squared = [torch.ones_like(energy[:, 0]) for energy in energies[:-1]]
    outer_in, outer_out = torch.ones_like(energies[0][0]), torch.ones_like(energies[-1][:, 0])
    for _ in range(_MOST_BALANCING_STEPS):
        largest_change = 1.0
        for joint in range(len(squared)):
            before = energies[joint] @ (1 / (squared[joint - 1] if joint else outer_in))
            ahead = squared[joint + 1] if joint + 1 < len(squared) else outer_out
            # Channel c leaves with scale q_c and enters what follows with 1 / q_c.
            scale = ((ahead @ energies[joint + 1]) / before).sqrt()
            largest_change = max(largest_change, float((scale / squared[joint]).log().abs().amax().exp()))
            squared[joint] = scale
        if largest_change < 1 + _BALANCED:
            break
    scales = [outer_in, *(each.sqrt() for each in squared), outer_out]
    return [_scaled(factor, scales[i + 1], 1 / scales[i]) for i, factor in enumerate(factors)]


def _scaled(factor: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    taps = tuple(1 for _ in factor.shape[2:])
    return factor * (outputs[:, None] * inputs).to(factor).reshape(len(outputs), len(inputs), *taps)


def _floored_energy(energy: Tensor) -> Tensor:
    return energy.clamp_min(max(float(energy.max()) * 1e-12, 1e-30))


def _cut_outer_modes(weight: Tensor, spec: LayerSpec, metric: Metric | None) -> TensorTrainFactorisation:
    """The full factors of a float64 weight (T, S, kh, kw), fitted in the metric if there is one."""
    by_input = weight.transpose(0, 1).flatten(1)
    if metric is None:
        project_in = given = principal_directions(by_input, None)
        project_out = output = principal_directions(weight.flatten(1), None)
    else:
        channels = folding_of(spec, (1, 1), tuple(weight.shape[2:])).seen(metric.inputs)[0]
        root, inverse_root = square_roots(channels, _RIDGE)
        directions = principal_directions(root @ by_input, None)
        project_in, given = root @ directions, inverse_root @ directions
        pair = weighed_directions(weight.flatten(1)[None], metric.inputs, metric.output_roots)
        project_out, output = pair[0][0], pair[1][0]
    core = torch.einsum("tshw,si,to->ihwo", weight, project_in, project_out)
    return TensorTrainFactorisation(output, core, given)


def _split(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A core (r1, kh, kw, r3) as vertical (rank, r1, kh) and horizontal (r3, rank, kw), the best of this rank."""
    rank_in, height, width, rank_out = core.shape
    matrix = core.reshape(rank_in * height, width * rank_out)
    left, right = _leading_product(matrix, rank)
    vertical = left.T.reshape(rank, rank_in, height)
    return vertical, right.reshape(rank, width, rank_out).permute(2, 0, 1)


def _leading_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (n, rank) and right (rank, m) whose product is the best of this rank to a matrix (n, m)."""
    n_rows, n_columns = matrix.shape
    if rank < min(n_rows, n_columns):
        left = principal_directions(matrix, None)[:, :rank]
        return left, left.T @ matrix
    identity = torch.eye(min(n_rows, n_columns)).to(matrix)
    left, right = (identity, matrix) if n_rows <= n_columns else (matrix, identity)
    # More channels than there is to carry meet zeros behind, ahead of which they can still learn.
    spare = torch.arange(rank - len(identity), device=matrix.device) % len(identity)
    return torch.cat((left, left[:, spare]), 1), torch.cat((right, right.new_zeros(len(spare), n_columns)))


def _padded(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The factor with zeros up to `rank` channels."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat((factor, factor.new_zeros(shape)), axis)


def _refuse_one_axis(spec: LayerSpec) -> str | None:
    """Why a kernel along one axis alone has no tensor train of its own; None for every other layer."""
    if isinstance(spec, ConvSpec) and sum(size > 1 for size in spec.kernel_size) == 1:
        return "its kernel has one axis; tucker2 is its tensor train"
    return None
