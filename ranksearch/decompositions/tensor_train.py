"""A k x k convolution as 1 x 1, k x 1, 1 x k and 1 x 1, with fewer channels in between."""

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.base import (
    AbstractDecomposition,
    Factorisation,
    Options,
    double_precision,
    refuse_groups,
    refuse_pointwise,
)
from ranksearch.decompositions.bottleneck import MAX_REFIT_INPUTS, LastSolver, folding_of, is_small
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.matrices import principal_directions, square_roots
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.tensor_train_cores import Cores, module_weights, outputs_of, padded, product, split
from ranksearch.decompositions.ways import BestOf, Latest
from ranksearch.decompositions.weighed import Roots, WeighedWeight, Weighing, weighed_directions
from ranksearch.layers import ConvSpec, LayerSpec

# Directions that inputs hardly take would make large factors and lose float32 digits once unwhitened.
_RIDGE = 1e-4


@final
class TensorTrainFactorisation(Factorisation):
    """weight = output (T, K_3), in mode 0, and input (S, K_1), in mode 1, times a core (K_1, kh, kw, K_3).

    At any ranks the core's leading block is cut once more between rows and columns, by the singular vectors of its
    unfolding; but where neither outer mode is cut, `rows_first`, if given, is: the weight as (T * kw, K) times
    (K, S * kh).
    """

    def __init__(
        self, output: Tensor, core: Tensor, given: Tensor, rows_first: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._output, self._core, self._input, self._rows_first = output, core, given, rows_first
        self._latest = Latest(self._cut)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return module_weights(*self.cut(ranks))

    def weight(self, ranks: Ranks) -> Tensor:
        return product(*self.cut(ranks))

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        return outputs_of(inputs, *self.cut(ranks))

    def cut(self, ranks: Ranks) -> Cores:
        """The cores, float64, at these ranks."""
        return self._latest.at(ranks)

    def _cut(self, ranks: Ranks) -> Cores:
        rank_in, rank_between, rank_out = ranks
        if self._rows_first is not None and (rank_in, rank_out) == (len(self._input), len(self._output)):
            return self._uncut_outside(*self._rows_first, rank_between)
        vertical, horizontal = split(self._core[:rank_in, :, :, :rank_out], rank_between)
        return self._input[:, :rank_in].T, vertical, horizontal, self._output[:, :rank_out]

    def _uncut_outside(self, last: Tensor, first: Tensor, rank: int) -> Cores:
        _, height, width, _ = self._core.shape
        n_inputs, n_outputs = len(self._input), len(self._output)
        vertical = first[:rank].reshape(rank, n_inputs, height)
        horizontal = last[:, :rank].reshape(n_outputs, width, rank).transpose(1, 2)
        return torch.eye(n_inputs).to(first), vertical, horizontal, torch.eye(n_outputs).to(last)


@final
class LastFactors:
    """Solves for the horizontal and last factors in the whole metric, the first two as a tensor train has them."""

    def __init__(self, start: TensorTrainFactorisation, weighed: WeighedWeight, folding: Folding, most: Ranks) -> None:
        self.start, self.most = start, most
        self._weighed, self._folding = weighed, folding
        self._latest = Latest(self._solve)

    def cut(self, ranks: Ranks, roots: Roots | None) -> Cores:
        """The cores at these ranks, the outputs of what is solved for cut in the metric of what they count."""
        cores = first, vertical, horizontal, _ = self.start.cut(ranks)
        if ranks == self.most:
            return cores
        solved, normal = self._latest.at(ranks)
        _, rank_between, rank_out = ranks
        project, output = weighed_directions(solved, normal, roots)
        narrow = (project[0, :, :rank_out].T @ solved[0]).reshape(-1, rank_between, horizontal.shape[2])
        return first, vertical, padded(narrow, 0, rank_out), padded(output[0, :, :rank_out], 1, rank_out)

    def _solve(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        first, vertical, horizontal, last = self.start.cut(ranks)
        rows = torch.einsum("mih,is->msh", vertical, first).flatten(1)
        columns = torch.einsum("to,omw->twm", last, horizontal).flatten(0, 1)
        return LastSolver(self._weighed, columns[None], rows[None], self._folding).solve(len(rows))


@final
class SolvedTensorTrain(Factorisation):
    """A tensor train with its last factors solved for."""

    def __init__(self, last_factors: LastFactors, roots: Roots | None) -> None:
        self._last_factors, self._roots = last_factors, roots
        self._latest = Latest(self._cut)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return module_weights(*self._latest.at(ranks))

    def weight(self, ranks: Ranks) -> Tensor:
        return product(*self._latest.at(ranks))

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        return outputs_of(inputs, *self._latest.at(ranks))

    def _cut(self, ranks: Ranks) -> Cores:
        return self._last_factors.cut(ranks, self._roots)


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
        weighed, metric = double_precision(weight, spec, metric)
        plain = _cut_outer_modes(weighed, spec, Weighing.NOTHING)
        if metric is None:
            return plain
        aware = _cut_outer_modes(weighed, spec, Weighing.OUTPUTS)
        if not is_small(metric):
            return BestOf(weighed, metric, aware, plain)
        most, folding = self.max_ranks(spec, options), _parting_rows(spec)
        roots = [metric.output_roots] if metric.output is None else [metric.output_roots, None]
        last_factors = [LastFactors(start, weighed, folding, most) for start in (aware, plain)]
        solved = [SolvedTensorTrain(each, outputs) for each in last_factors for outputs in roots]
        return BestOf(weighed, metric, *solved, plain)


def _cut_outer_modes(weighed: WeighedWeight, spec: LayerSpec, weighing: Weighing) -> TensorTrainFactorisation:
    """The full factors of a weight (T, S, kh, kw), fitted in the metric as far as the weighing takes it."""
    by_input = weighed.weight.transpose(0, 1).flatten(1)
    if weighing is Weighing.NOTHING:
        project_in = given = principal_directions(by_input, None)
    else:
        channels = weighed.seen(folding_of(spec, (1, 1), spec.weight_shape[2:]))[0]
        root, inverse_root = square_roots(channels, _RIDGE)
        directions = principal_directions(root @ by_input, None)
        project_in, given = root @ directions, inverse_root @ directions
    project_out, output = (columns[0] for columns in weighed.outputs(weighing))
    core = torch.einsum("tshw,si,to->ihwo", weighed.weight, project_in, project_out)
    if weighed.inputs is None or weighed.inputs.shape[-1] <= MAX_REFIT_INPUTS:
        return TensorTrainFactorisation(output, core, given)
    # On wide layers the largest split takes seconds, and is known where spatial_svd is.
    last, first = weighed.pair(_parting_rows(spec), weighing)
    return TensorTrainFactorisation(output, core, given, (last[0], first[0]))


def _parting_rows(spec: LayerSpec) -> Folding:
    height, width = spec.weight_shape[2:]
    return folding_of(spec, (height, 1), (1, width))


def _refuse_one_axis(spec: LayerSpec) -> str | None:
    """Why a kernel along one axis alone has no tensor train of its own; None for every other layer."""
    if isinstance(spec, ConvSpec) and sum(size > 1 for size in spec.kernel_size) == 1:
        return "its kernel has one axis; tucker2 is its tensor train"
    return None
