"""What a decomposition is: its arithmetic on weights, its modules, and the ranks worth trying."""

import abc
import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ranksearch.decompositions.matrices import all_finite
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks, equal_share_path, geometric_spread, neighbours
from ranksearch.decompositions.weighed import WeighedWeight
from ranksearch.errors import DecompositionError
from ranksearch.layers import ConvSpec, LayerSpec, count_macs
from ranksearch.plan import Option

Options = Mapping[str, Option]

# Candidates to time per layer and decomposition.
MAX_CHOICES = 12


class Factorisation(abc.ABC):
    """One layer's weight, factored once, for every rank."""

    @abc.abstractmethod
    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        """The float32 weights of the modules that `build` gives at these ranks, in their order, balanced.

        They are the caller's own: changing them changes nothing here.
        """

    @abc.abstractmethod
    def weight(self, ranks: Ranks) -> Tensor:
        """The weight that the factors amount to, float32, in the layer's own shape."""

    def outputs(self, ranks: Ranks, inputs: Tensor) -> Tensor:
        """What that weight gives (groups, T / groups, n), float32, for inputs (groups, inputs, n) of its rows.

        Worth overriding where it takes less time without the whole weight.
        """
        rows = self.weight(ranks).flatten(1)
        return rows.reshape(len(inputs), -1, rows.shape[1]) @ inputs


class AbstractDecomposition(abc.ABC):
    """A way to factor a layer's weight; `options` lists every setting of it that a plan may name, the default first.

    `default_options` are what a plan means that leaves a setting out, so that either spelling names the same choice;
    `options` lists the one that candidates bear. The bias is not its concern: the last module that `build` gives
    carries it.
    """

    name: ClassVar[str]
    # Multiples suit kernels where ranks are channels; where they count terms, each of which has many, all are offered.
    ranks_are_channels: ClassVar[bool] = True
    # Candidates have at most this share of the layer's parameters; for a method whose large ranks take long to fit.
    max_share: ClassVar[float] = 1.0
    options: ClassVar[tuple[Options, ...]] = ({},)
    default_options: ClassVar[Options] = {}

    def options_for(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Those of `options` that make a difference to this layer, the default first."""
        return self.options

    @abc.abstractmethod
    def refuse(self, spec: LayerSpec) -> str | None:
        """Why it cannot take this layer; None where it can."""

    @abc.abstractmethod
    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        """The largest ranks, at which the factors give back the weight exactly; () where there are none."""

    def path_end(self, spec: LayerSpec, options: Options) -> Ranks:
        """Where the path of equal shares ends: the largest ranks, unless one of them is no limit beside the others."""
        return self.max_ranks(spec, options)

    @abc.abstractmethod
    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        """The plain modules that take the layer's place; only the last has a bias, always, of zeros."""

    @abc.abstractmethod
    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        """Factors the weight such that its changes cost little in the metric; None counts every weight alike.

        At no ranks may the factors cost more in the metric than those of the plain method, which knows none. Raises
        DecompositionError where the numbers are not finite or do not fit.
        """

    @final
    def spell_out(self, options: Options) -> dict[str, Option]:
        """The options with the defaults that they leave out."""
        return {**self.default_options, **options}

    @final
    def n_params(self, spec: LayerSpec, ranks: Ranks, options: Options) -> int:
        """The parameters of what `build` gives, biases included."""
        with torch.device("meta"):
            module = self.build(spec, ranks, options)
        return sum(parameter.numel() for parameter in module.parameters())

    @final
    def macs(self, spec: LayerSpec, ranks: Ranks, options: Options, input_shape: tuple[int, ...]) -> int:
        """The multiply-adds of what `build` gives for one row of an input of this shape, batch included."""
        with torch.device("meta"):
            return count_macs(self.build(spec, ranks, options), torch.empty(input_shape))

    @final
    def break_even(self, spec: LayerSpec, options: Options) -> Ranks | None:
        """The largest ranks, in equal shares, with fewer parameters than the layer; None if none have."""
        path = equal_share_path(self.path_end(spec, options), 1)
        fitting = self._fitting(path, spec, options, n_dense_params(spec) - 1)
        return fitting[-1] if fitting else None

    @final
    def rank_choices(self, spec: LayerSpec, options: Options, multiple: int) -> list[Ranks]:
        """The ranks worth timing, fewest parameters first: at most twelve, spread geometrically.

        All are multiples and have fewer parameters than the layer, or at most `max_share` of them. With several
        ranks they lie along equal shares, some with neighbours that favour one rank. Without ranks there is only ().
        """
        most = self.path_end(spec, options)
        if not most:
            return [()]
        multiple = multiple if self.ranks_are_channels else 1
        limit = min(math.floor(self.max_share * n_dense_params(spec)), n_dense_params(spec) - 1)
        smaller = self._fitting(equal_share_path(most, multiple), spec, options, limit)
        if len(most) == 1:
            return geometric_spread(smaller, MAX_CHOICES)
        # Shares below a sixteenth on every side at once leave next to nothing of the layer.
        line = geometric_spread(smaller, MAX_CHOICES // 2, start=len(smaller) / 16)
        beside = [ranks for middle in line[1::2] for ranks in neighbours(middle, most, multiple)]
        sizes = {ranks: self.n_params(spec, ranks, options) for ranks in dict.fromkeys(line + beside)}
        small_enough = [ranks for ranks, size in sizes.items() if size <= limit][:MAX_CHOICES]
        return sorted(small_enough, key=lambda ranks: (sizes[ranks], ranks))

    @final
    def uniform_ranks(self, spec: LayerSpec, options: Options, share: float, multiple: int) -> Ranks | None:
        """The largest ranks, in equal shares, with at most `share` of the layer's parameters; None if none have."""
        path = equal_share_path(self.path_end(spec, options), multiple if self.ranks_are_channels else 1)
        fitting = self._fitting(path, spec, options, math.floor(share * n_dense_params(spec)))
        return fitting[-1] if fitting else None

    @final
    def _fitting(self, path: list[Ranks], spec: LayerSpec, options: Options, limit: int) -> list[Ranks]:
        """The part of the path with at most `limit` parameters; they grow along it."""
        return path[: bisect_right(path, limit, key=lambda ranks: self.n_params(spec, ranks, options))]


def n_dense_params(spec: LayerSpec) -> int:
    """The parameters of the layer as it is, bias included."""
    return math.prod(spec.weight_shape) + (spec.weight_shape[0] if spec.bias else 0)


def n_groups(spec: LayerSpec) -> int:
    """The groups of channels that the layer keeps apart."""
    return spec.groups if isinstance(spec, ConvSpec) else 1


def describe(spec: LayerSpec) -> str:
    """The layer in an error message: `Conv2d(16 -> 32, 3x3, groups=4)`."""
    if not isinstance(spec, ConvSpec):
        return f"Linear({spec.in_features} -> {spec.out_features})"
    kernel = "x".join(str(size) for size in spec.kernel_size)
    groups = f", groups={spec.groups}" if spec.groups > 1 else ""
    return f"Conv{len(spec.kernel_size)}d({spec.in_channels} -> {spec.out_channels}, {kernel}{groups})"


def refuse_depthwise(spec: LayerSpec) -> str | None:
    """Why channels cannot be mixed before or after the filters of a depthwise convolution; None for other layers."""
    if isinstance(spec, ConvSpec) and 1 < spec.groups == spec.in_channels:
        return "a depthwise convolution filters each channel alone: there is no rank to cut"
    return None


def refuse_groups(spec: LayerSpec) -> str | None:
    """Why a grouped convolution is not factored; None for every other layer."""
    if n_groups(spec) == 1:
        return None
    return refuse_depthwise(spec) or f"a convolution in {n_groups(spec)} groups is not factored"


def refuse_pointwise(spec: LayerSpec) -> str | None:
    """Why a layer without a spatial kernel is not for spatial decompositions; None for k x k convolutions."""
    if not isinstance(spec, ConvSpec):
        return "a Linear has no spatial kernel; svd factors it"
    if math.prod(spec.kernel_size) == 1:
        return "a 1x1 convolution has no spatial kernel; svd factors it"
    return None


def double_precision(weight: Tensor, spec: LayerSpec, metric: Metric | None) -> tuple[WeighedWeight, Metric | None]:
    """Weight and metric in float64 on the weight's device; one metric gives equal weights as one.

    Raises DecompositionError where shapes do not fit or a number is not finite.
    """
    groups, n_outputs, n_inputs = n_groups(spec), spec.weight_shape[0], math.prod(spec.weight_shape[1:])
    _check(weight, spec.weight_shape, all_finite(weight), f"{describe(spec)}: the weight")
    exact = weight.detach().to(torch.float64, copy=True)  # what is computed of it must not change with it
    if metric is None:
        return WeighedWeight(exact, groups), None
    shape = (n_inputs, n_inputs) if groups == 1 else (groups, n_inputs, n_inputs)
    input_is_finite, output_is_finite = metric.is_finite
    _check(metric.input, shape, input_is_finite, f"{describe(spec)}: the input covariance")
    if metric.output is not None:
        what = f"{describe(spec)}: the output gradients' covariance"
        _check(metric.output, (n_outputs, n_outputs), output_is_finite, what)
    if metric.input.dtype is not exact.dtype or metric.input.device != exact.device:
        output = None if metric.output is None else metric.output.detach().to(exact)
        metric = Metric(input=metric.input.detach().to(exact), output=output)
    return metric.weighed(exact), metric


def _check(values: Tensor, shape: tuple[int, ...], is_finite: bool, what: str) -> None:
    if tuple(values.shape) != shape:
        raise DecompositionError(f"{what} is {tuple(values.shape)}; it must be {shape}")
    if not is_finite:
        raise DecompositionError(f"{what} holds NaN or infinity; look for them in the model and the calibration data")
