"""Contract suites for decompositions and runtimes of your own: they raise AssertionError with what does not hold."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ranksearch.decompositions import AbstractDecomposition, Factorisation, Metric, Options, Ranks
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec, PaddingMode, build_layer
from ranksearch.runtimes.contract import check_runtime

__all__ = ["check_decomposition", "check_runtime", "convolution"]

_PLAIN = (nn.Sequential, nn.Conv2d, nn.Linear)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...] = (3, 3),
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] | str = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    bias: bool = True,
) -> ConvSpec:
    """A convolution's spec with torch's usual defaults, padded by one pixel."""
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        bias=bias,
    )


# Layers as they are met in models: wide, narrow, strided, dilated, padded in every way, grouped.
SPECS: tuple[LayerSpec, ...] = (
    LinearSpec(in_features=20, out_features=12, bias=True),
    LinearSpec(in_features=5, out_features=16, bias=False),
    convolution(8, 12),
    convolution(3, 32, stride=(2, 2), bias=False),
    convolution(12, 4, stride=(2, 1), padding=(2, 0)),
    convolution(6, 10, (3, 5), padding=(0, 2), dilation=(2, 1)),
    convolution(10, 6, (1, 7), padding="same", padding_mode="circular"),
    convolution(8, 8, padding=(2, 1), padding_mode="reflect"),
    convolution(8, 8, padding="valid", padding_mode="replicate", bias=False),
    convolution(16, 8, (1, 1), stride=(2, 2), padding=(0, 0)),
    convolution(8, 8, groups=8),
    convolution(8, 16, groups=2),
)


def check_decomposition(
    decomposition: AbstractDecomposition, *, specs: Sequence[LayerSpec] = SPECS, seed: int = 0
) -> None:
    """Raises AssertionError where the decomposition breaks its contract on one of the layers that it takes.

    On each: the factors have the shapes of the modules that `build` gives; those are plain and only the last has a
    bias; at `max_ranks` they compute what the layer computes, with a metric and without; at lower ranks
    they compute what `weight` says; and the error does not grow with the ranks.
    """
    taken = [spec for spec in specs if decomposition.refuse(spec) is None]
    assert taken, f"{decomposition.name} refuses every layer of {len(specs)}"
    for spec in taken:
        for options in decomposition.options:
            _check_layer(decomposition, spec, options, torch.Generator().manual_seed(seed))


def _check_layer(
    decomposition: AbstractDecomposition, spec: LayerSpec, options: Options, generator: torch.Generator
) -> None:
    weight = torch.randn(spec.weight_shape, generator=generator)
    samples = torch.randn(3 * weight[0].numel(), weight[0].numel(), generator=generator, dtype=torch.float64)
    samples[:, 0] = 0.0  # a dead input, as ReLU makes them, so that the covariance is singular
    covariance = samples.T @ samples / len(samples)
    groups = spec.groups if isinstance(spec, ConvSpec) else 1
    seen = covariance if groups == 1 else covariance.repeat(groups, 1, 1)
    for metric in (None, Metric(input=seen)):
        where = f"{decomposition.name} {dict(options)} on {spec}, {'no' if metric is None else 'with a'} metric"
        factorisation = decomposition.factorise(weight, spec, options, metric)
        most = decomposition.max_ranks(spec, options)
        exact = factorisation.weight(most)
        assert torch.allclose(exact, weight, atol=1e-3), f"{where}: not exact at its largest ranks {most}"
        path = _path(most)
        for ranks in path:
            _check_ranks(decomposition, factorisation, spec, ranks, options, f"{where}, ranks {ranks}")
        errors = [float((factorisation.weight(ranks) - weight).norm()) for ranks in path]
        grows = any(after > before + 1e-3 for before, after in pairwise(errors))
        # With a metric the error that must not grow is another one, and some methods only approximate it.
        assert metric is not None or not grows, f"{where}: the error grows with the ranks: {errors}"


def _check_ranks(
    decomposition: AbstractDecomposition,
    factorisation: Factorisation,
    spec: LayerSpec,
    ranks: Ranks,
    options: Options,
    where: str,
) -> None:
    built = decomposition.build(spec, ranks, options)
    layers = list(_check_plain(built, spec, where))
    factors = factorisation.factors(ranks)
    shapes = [tuple(layer.weight.shape) for layer in layers]
    found = [tuple(factor.shape) for factor in factors]
    assert found == shapes, f"{where}: factors are {found}; build() has {shapes}"
    assert all(factor.dtype == torch.float32 for factor in factors), f"{where}: factors are not float32"
    weight = factorisation.weight(ranks)
    assert tuple(weight.shape) == spec.weight_shape, f"{where}: weight() is {tuple(weight.shape)}"

    dense = build_layer(spec)
    with torch.no_grad():
        dense.weight.copy_(weight)
        for layer, factor in zip(layers, factors, strict=True):
            layer.weight.copy_(factor)
        if layers[-1].bias is not None and dense.bias is not None:
            layers[-1].bias.copy_(dense.bias)
        inputs = _inputs(spec)
        expected, output = dense(inputs), built(inputs)
        assert output.shape == expected.shape, f"{where}: output is {output.shape}, the layer's {expected.shape}"
        close = torch.allclose(output, expected, atol=2e-3, rtol=1e-3)
        assert close, f"{where}: the modules compute something else than weight() says"
        for factor in factors:
            factor.zero_()
    assert torch.equal(factorisation.weight(ranks), weight), f"{where}: changing the factors changes weight()"


def _check_plain(built: nn.Module, spec: LayerSpec, where: str) -> Iterator[nn.Conv2d | nn.Linear]:
    """The built layers in order, once they are found plain and only the last has a bias."""
    kinds = {type(module).__name__ for module in built.modules() if type(module) not in _PLAIN}
    assert not kinds, f"{where}: build() gives {sorted(kinds)}; only Sequential, Conv2d and Linear serialise everywhere"
    layers = [module for module in built.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    biased = [layer.bias is not None for layer in layers]
    wanted = len(layers) > 1 or spec.bias
    assert not any(biased[:-1]) and biased[-1] == wanted, f"{where}: biases are {biased}; only the last must have one"
    if len(layers) > 1 and layers[-1].bias is not None:
        assert not layers[-1].bias.any(), f"{where}: the last bias is not zero"
    yield from layers


def _path(most: Ranks) -> list[Ranks]:
    """A few rank tuples from one up to the largest."""
    steps = [tuple(max(1, -(-rank * quarter // 4)) for rank in most) for quarter in range(5)]
    return list(dict.fromkeys(steps))


def _inputs(spec: LayerSpec) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(spec, LinearSpec):
        return torch.randn(3, spec.in_features, generator=generator)
    return torch.randn(2, spec.in_channels, 11, 9, generator=generator)
