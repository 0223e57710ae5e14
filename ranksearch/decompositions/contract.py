"""The contract of every decomposition, as a check that a user's own can run too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.decompositions.base import AbstractDecomposition, Factorisation, Options, n_groups
from ranksearch.decompositions.cases import SPECS, example_input, metrics, ranks_up_to
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import LayerSpec, build_layer

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
_PLAIN = (nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d)
# Relative; the factors are float32, whose own rounding is 6e-8.
EXACT, ROUNDING = 1e-5, 1e-4


def check_decomposition(
    decomposition: AbstractDecomposition, *, specs: Sequence[LayerSpec] = SPECS, seed: int = 0
) -> None:
    """Raises AssertionError where the decomposition breaks its contract on one of the layers that it takes.

    On each, with a metric and without: the factors have the shapes of the modules that `build` gives, which are plain
    and have a bias on the last alone, and the counted parameters and multiply-adds are theirs; at `max_ranks` they
    give the layer back to 1e-5 of its norm; at lower ranks, however uneven, they compute what `weight` says; the error
    does not grow with the ranks, without a metric in the Frobenius norm and with one of inputs alone in its cost; no
    cost is above that of the factors found without the metric; every trainable factor gets a gradient; and weights of
    zero, dead channels and inputs that depend on each other give finite numbers.
    """
    taken = [spec for spec in specs if decomposition.refuse(spec) is None]
    assert taken, f"{decomposition.name} refuses every layer of {len(specs)}"
    for spec in taken:
        for options in decomposition.options_for(spec):
            most = decomposition.max_ranks(spec, options)
            case = _Case(decomposition=decomposition, spec=spec, options=options, path=ranks_up_to(most))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                _check_layer(case)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One layer with one setting and the ranks to try, smallest first."""

    decomposition: AbstractDecomposition
    spec: LayerSpec
    options: Options
    path: list[Ranks]

    def factorise(self, weight: Tensor, metric: Metric | None) -> Factorisation:
        return self.decomposition.factorise(weight, self.spec, self.options, metric)

    def at(self, detail: str) -> str:
        return f"{self.decomposition.name} {dict(self.options)} on {self.spec}, {detail}"


def _check_layer(case: _Case) -> None:
    weight = torch.randn(case.spec.weight_shape)
    plain = case.factorise(weight, None)
    _check_exact(case, plain, weight, "no metric")
    for ranks in [*case.path, *_uneven(case.path[-1])]:
        _check_modules(case, plain, ranks)
    errors = [float((plain.weight(ranks) - weight).norm() / weight.norm()) for ranks in case.path]
    _check_falling(case, errors, "no metric")
    for name, metric in metrics(case.spec).items():
        _check_metric(case, plain, weight, name, metric)
    _check_finite(case)


def _uneven(most: Ranks) -> list[Ranks]:
    """Each rank at its least with the others at their most."""
    return [(*most[:i], 1, *most[i + 1 :]) for i in range(len(most))] if len(most) > 1 else []


def _check_metric(case: _Case, plain: Factorisation, weight: Tensor, name: str, metric: Metric) -> None:
    aware = case.factorise(weight, metric)
    _check_exact(case, aware, weight, name)
    for ranks in [*case.path, *_uneven(case.path[-1])]:
        _check_function(case, aware, ranks, name)
    whole = max(metric.cost(weight), 1e-30)
    costs = [metric.cost(weight - aware.weight(ranks)) / whole for ranks in case.path]
    for ranks, cost in zip(case.path, costs, strict=True):
        other = metric.cost(weight - plain.weight(ranks)) / whole
        assert cost <= other + EXACT, case.at(f"{name}, ranks {ranks}: costs {cost}, without the metric {other}")
    if metric.output is None:  # how far outputs may be weighed by a moment of few examples is the method's choice
        _check_falling(case, costs, name)


def _check_exact(case: _Case, found: Factorisation, weight: Tensor, name: str) -> None:
    error = float((found.weight(case.path[-1]) - weight).norm() / weight.norm().clamp_min(1e-30))
    assert error <= EXACT, case.at(f"{name}: not exact at its largest ranks {case.path[-1]}, but off by {error:.1e}")


def _check_falling(case: _Case, errors: list[float], name: str) -> None:
    grows = any(after > before + ROUNDING for before, after in pairwise(errors))
    assert not grows, case.at(f"{name}: the error grows along the ranks {case.path}: {errors}")


def _check_function(case: _Case, found: Factorisation, ranks: Ranks, name: str) -> nn.Module:
    """The built modules with the factors in them, once they are found to compute what `weight` says."""
    where = case.at(f"{name}, ranks {ranks}")
    built = case.decomposition.build(case.spec, ranks, case.options)
    layers, factors, weight = factor_layers(built), found.factors(ranks), found.weight(ranks)
    shapes, given = [tuple(layer.weight.shape) for layer in layers], [tuple(factor.shape) for factor in factors]
    assert given == shapes, f"{where}: factors are {given}; build() has {shapes}"
    assert all(factor.dtype == torch.float32 for factor in factors), f"{where}: factors are not float32"
    assert tuple(weight.shape) == case.spec.weight_shape, f"{where}: weight() is {tuple(weight.shape)}"
    dense = build_layer(case.spec)
    fill(built, factors)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if dense.bias is not None and layers[-1].bias is not None:
            layers[-1].bias.copy_(dense.bias)
        inputs = example_input(case.spec)
        # In double precision, so that the sums of float32 do not blur what the factors are.
        expected, output = dense.double()(inputs.double()), built.double()(inputs.double())
        assert output.shape == expected.shape, f"{where}: output is {output.shape}, the layer's {expected.shape}"
        apart = float((output - expected).norm() / expected.norm().clamp_min(1e-30))
        assert apart <= EXACT, f"{where}: the modules compute something else than weight() says, off by {apart:.1e}"
        for factor in factors:
            factor.zero_()
    assert torch.equal(found.weight(ranks), weight), f"{where}: changing the factors changes weight()"
    _check_outputs(case, found, ranks, where)
    return built.float()


def _check_outputs(case: _Case, found: Factorisation, ranks: Ranks, where: str) -> None:
    rows = found.weight(ranks).reshape(n_groups(case.spec), -1, math.prod(case.spec.weight_shape[1:]))
    inputs = torch.randn(len(rows), rows.shape[2], 3, generator=torch.Generator().manual_seed(2))
    expected = rows @ inputs
    apart = float((found.outputs(ranks, inputs) - expected).norm() / expected.norm().clamp_min(1e-30))
    assert apart <= ROUNDING, f"{where}: outputs() is not what weight() gives, off by {apart:.1e}"


def _check_modules(case: _Case, plain: Factorisation, ranks: Ranks) -> None:
    where = case.at(f"ranks {ranks}")
    _check_plain(case.decomposition.build(case.spec, ranks, case.options), case.spec, where)
    built = _check_function(case, plain, ranks, "no metric")
    held = sum(parameter.numel() for parameter in built.parameters())
    n_params = case.decomposition.n_params(case.spec, ranks, case.options)
    assert held == n_params, f"{where}: n_params() is {n_params}; the modules hold {held}"
    inputs = example_input(case.spec)
    with FlopCounterMode(display=False) as counter:
        output = built(inputs)
    applied = counter.get_total_flops() // 2 // len(inputs)
    macs = case.decomposition.macs(case.spec, ranks, case.options, tuple(inputs.shape))
    assert applied == macs, f"{where}: macs() is {macs}; the modules multiply and add {applied} times"
    output.square().sum().backward()
    for name, parameter in built.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all() and parameter.grad.any())
        assert reached or not parameter.requires_grad, f"{where}: no gradient flows into {name}"


def _check_plain(built: nn.Module, spec: LayerSpec, where: str) -> None:
    kinds = {type(module).__name__ for module in built.modules() if type(module) not in _PLAIN}
    assert not kinds, f"{where}: build() gives {sorted(kinds)}; only Sequential, Linear and Conv serialise everywhere"
    layers = factor_layers(built)
    biased = [layer.bias is not None for layer in layers]
    wanted = len(layers) > 1 or spec.bias
    assert not any(biased[:-1]) and biased[-1] == wanted, f"{where}: biases are {biased}; only the last must have one"
    if len(layers) > 1 and layers[-1].bias is not None:
        assert not layers[-1].bias.any(), f"{where}: the last bias is not zero"


def _check_finite(case: _Case) -> None:
    """Weights and metrics without much in them."""
    dead = torch.randn(case.spec.weight_shape)
    dead[len(dead) // 2 :], dead[:, : dead.shape[1] // 2] = 0.0, 0.0
    singular = metrics(case.spec)["dependent inputs"]
    nothing = Metric(input=torch.zeros_like(singular.input))
    zero = torch.zeros(case.spec.weight_shape)
    hard = {
        "weights of zero": (zero, None),
        "weights of zero, dependent inputs": (zero, singular),
        "dead channels, dependent inputs": (dead, singular),
        "dead channels, inputs of zero": (dead, nothing),
    }
    for name, (weight, metric) in hard.items():
        found = case.factorise(weight, metric)
        for ranks in case.path:
            numbers = [*found.factors(ranks), found.weight(ranks)]
            finite = all(bool(values.isfinite().all()) for values in numbers)
            assert finite, case.at(f"{name}, ranks {ranks}: NaN or infinity")
        _check_exact(case, found, weight, name)


def factor_layers(built: nn.Module) -> list[Layer]:
    """The built layers in the order in which they run."""
    return [module for module in built.modules() if isinstance(module, Layer)]


@torch.no_grad()
def fill(built: nn.Module, factors: Sequence[Tensor]) -> None:
    """Puts the factors into the built modules, in place."""
    for layer, factor in zip(factor_layers(built), factors, strict=True):
        layer.weight.copy_(factor)
