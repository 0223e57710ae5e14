"""A k x k convolution as 1 x 1 to fewer channels, k x k between them, 1 x 1 to the outputs."""

from dataclasses import dataclass
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
from ranksearch.decompositions.bottleneck import LastSolver, folding_of, is_small, weighings
from ranksearch.decompositions.building import chain, filtering, pointwise
from ranksearch.decompositions.folding import Folding
from ranksearch.decompositions.matrices import floored
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.ways import BestOf, Latest
from ranksearch.decompositions.weighed import Roots, WeighedWeight, Weighing, weighed_directions
from ranksearch.layers import ConvSpec, LayerSpec

_BALANCING_STEPS = 60


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Tucker2Factorisation(Factorisation):
    """weight = core (K_out, K_in, *kernel), times output (T, K_out) in mode 0 and input (S, K_in) in mode 1."""

    output: Tensor
    core: Tensor
    input: Tensor

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        output, core, given = self._cut(ranks)
        pixel = tuple(1 for _ in core.shape[2:])
        scale_in, scale_out = _balancing_scales(given, core, output)
        core = core * scale_out.reshape(-1, 1, *pixel) * scale_in.reshape(1, -1, *pixel)
        first = (given / scale_in).T.reshape(-1, len(given), *pixel)
        last = (output / scale_out).reshape(len(output), -1, *pixel)
        return first.clone(memory_format=torch.contiguous_format), core, last

    def weight(self, ranks: Ranks) -> Tensor:
        output, core, given = self._cut(ranks)
        narrow = torch.einsum("oi...,si->os...", core, given)
        return torch.einsum("to,os...->ts...", output, narrow)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        output, core, given = self._cut(ranks)
        narrow = given.T @ inputs.reshape(len(given), -1)
        return (output @ (core.flatten(1) @ narrow.reshape(-1, inputs.shape[-1])))[None]

    def _cut(self, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        rank_out, rank_in = ranks
        return self.output[:, :rank_out], self.core[:rank_out, :rank_in], self.input[:, :rank_in]


@final
class SequentialFactorisation(Factorisation):
    """Cuts the inputs first, solves all that follows for those that are left, and cuts the outputs of that."""

    def __init__(self, whole: Tucker2Factorisation, solver: LastSolver, output_roots: Roots | None) -> None:
        self._whole, self._solver, self._output_roots = whole, solver, output_roots
        self._latest = Latest(self._given)

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return self._latest.at(ranks[1:]).factors(ranks)

    def weight(self, ranks: Ranks) -> Tensor:
        return self._latest.at(ranks[1:]).weight(ranks)

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        return self._latest.at(ranks[1:]).outputs(ranks, inputs)

    def _given(self, ranks_in: Ranks) -> Tucker2Factorisation:
        """The factors at this input rank and every output rank."""
        (rank_in,) = ranks_in
        if rank_in == self._solver.folding.max_rank:
            return self._whole
        solved, normal = self._solver.solve(rank_in)
        project, output = weighed_directions(solved, normal, self._output_roots)
        core = (project.mT @ solved).reshape(-1, rank_in, *self._solver.folding.last_kernel)
        # So few inputs may not fill all output ranks; the rest is nothing.
        n_missing = self._whole.output.shape[1] - core.shape[0]
        columns = torch.nn.functional.pad(output[0], (0, n_missing))
        slices = torch.cat([core, core.new_zeros(n_missing, *core.shape[1:])])
        return _single(columns, slices, self._solver.first[0, :rank_in].T)


@final
class Tucker2(AbstractDecomposition):
    """Ranks: (rank_out, rank_in), the channels after and before the k x k convolution.

    The truncated higher-order SVD (Kim et al., "Compression of deep convolutional neural networks", 2016): one
    eigendecomposition per mode, the core once, cut for every rank. With a metric, the input mode takes the principal
    components in the channels' covariance and the output mode those of the output, on layers of up to 1,200 inputs
    after the core was solved for the inputs that are left; the plain one is kept where it loses less. On wider ones
    a larger output rank beside a small input rank can lose more, since either mode is cut without the other.
    """

    name: ClassVar[str] = "tucker2"

    def refuse(self, spec: LayerSpec) -> str | None:
        return refuse_groups(spec) or refuse_pointwise(spec)

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        n_outputs, n_inputs, *kernel = spec.weight_shape
        n_taps = torch.Size(kernel).numel()
        return min(n_outputs, n_inputs * n_taps), min(n_inputs, n_outputs * n_taps)

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
        rank_out, rank_in = ranks
        return chain(
            pointwise(spec, spec.in_channels, rank_in),
            filtering(spec, rank_in, rank_out),
            pointwise(spec, rank_out, spec.out_channels, bias=True),
        )

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        weighed, metric = double_precision(weight, spec, metric)
        plain = _hosvd(weighed, spec, Weighing.NOTHING)
        if metric is None:
            return plain
        aware = _sequential if is_small(metric) else _hosvd
        return BestOf(weighed, metric, *(aware(weighed, spec, weighing) for weighing in weighings(metric)), plain)


def _hosvd(weighed: WeighedWeight, spec: LayerSpec, weighing: Weighing) -> Tucker2Factorisation:
    """The full factors, both modes of the weight cut alone."""
    folding = _cutting_inputs(spec)
    last, first = weighed.pair(folding, weighing)
    project, output = weighed.outputs(weighing)
    taps = last.reshape(len(weighed.weight), -1, first.shape[1]).transpose(1, 2)
    core = torch.einsum("to,tik->oik", project[0], taps).reshape(-1, first.shape[1], *folding.last_kernel)
    return _single(output[0], core, first[0].T)


def _sequential(weighed: WeighedWeight, spec: LayerSpec, weighing: Weighing) -> SequentialFactorisation:
    folding = _cutting_inputs(spec)
    roots = weighed.output_roots if weighing is Weighing.OUTPUTS else None
    solver = LastSolver(weighed, *weighed.pair(folding, weighing), folding)
    return SequentialFactorisation(_hosvd(weighed, spec, weighing), solver, roots)


def _cutting_inputs(spec: LayerSpec) -> Folding:
    assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
    return folding_of(spec, tuple(1 for _ in spec.kernel_size), spec.kernel_size)


def _single(output: Tensor, core: Tensor, given: Tensor) -> Tucker2Factorisation:
    return Tucker2Factorisation(output=output.float(), core=core.float(), input=given.float())


def _balancing_scales(given: Tensor, core: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the core's inputs (K_in,) and outputs (K_out,) that make each as long as the factor it meets.

    They are the scales at which the factors' summed squares are least; alternating finds them, since the sum is
    convex in their logarithms.
    """
    slices = core.double().pow(2).flatten(2).sum(2)
    energy = slices.clamp_min(max(float(slices.max()) * 1e-12, 1e-30))
    inputs = floored(given.double().norm(dim=0))
    outputs = floored(output.double().norm(dim=0))
    squared_out = torch.ones_like(outputs)
    for _ in range(_BALANCING_STEPS):
        squared_in = inputs / (squared_out @ energy).sqrt()
        squared_out = outputs / (energy @ squared_in).sqrt()
    return squared_in.sqrt().float(), squared_out.sqrt().float()
