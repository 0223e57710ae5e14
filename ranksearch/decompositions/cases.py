"""Layers as they are met in models, with inputs and metrics for them, to check decompositions on."""

import torch
from torch import Tensor

from ranksearch.decompositions.base import n_groups
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec, PaddingMode


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...] = (3, 3),
    *,
    stride: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | str | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    bias: bool = True,
) -> ConvSpec:
    """A convolution's spec with torch's usual defaults, padded by one pixel; a kernel of one size is a Conv1d's."""
    ones = tuple(1 for _ in kernel_size)
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=ones if stride is None else stride,
        padding=ones if padding is None else padding,
        dilation=ones if dilation is None else dilation,
        groups=groups,
        padding_mode=padding_mode,
        bias=bias,
    )


# Layers as they are met in models: wide, narrow, strided, dilated, padded in every way, grouped, over one axis.
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
    convolution(1, 6),
    convolution(6, 1, (5, 5), padding=(2, 2)),
    convolution(8, 8, groups=8),
    convolution(6, 12, (5, 3), stride=(2, 2), groups=6, bias=False),
    convolution(8, 16, groups=2),
    convolution(12, 6, (1, 1), padding=(0, 0), groups=3),
    convolution(8, 10, (5,), stride=(2,), padding=(2,)),
    convolution(6, 6, (3,), dilation=(2,), groups=2, padding_mode="circular", bias=False),
    convolution(12, 8, (1,), padding=(0,)),
)


def metrics(spec: LayerSpec) -> dict[str, Metric]:
    """Metrics for this layer by what is hard about them, from torch's global generator."""
    groups, n_inputs = n_groups(spec), torch.Size(spec.weight_shape[1:]).numel()
    n_outputs = spec.weight_shape[0]
    few = _moments(groups, n_inputs, max(n_inputs // 2, 1))
    many = _moments(groups, n_inputs, 3 * n_inputs)
    gradients = _moments(1, n_outputs, max(n_outputs // 2, 1))[0]
    few, many = (moments if groups > 1 else moments[0] for moments in (few, many))
    return {
        "dependent inputs": Metric(input=few),
        "dead inputs": Metric(input=many),
        "weighed outputs": Metric(input=many, output=gradients),
    }


def _moments(groups: int, size: int, n_samples: int) -> Tensor:
    """Second moments (groups, size, size) of mixed inputs of unlike strength, the first of several dead."""
    strength = torch.logspace(0, -1.5, size, dtype=torch.float64)[torch.randperm(size)]
    if size > 1:
        strength[0] = 0.0
    samples = torch.randn(groups, n_samples, size, dtype=torch.float64) @ torch.randn(size, size).double() * strength
    return samples.mT @ samples / n_samples


def ranks_up_to(most: Ranks) -> list[Ranks]:
    """A few rank tuples from one up to the largest."""
    steps = [tuple(max(1, -(-rank * quarter // 4)) for rank in most) for quarter in range(5)]
    return list(dict.fromkeys(steps))


def example_input(spec: LayerSpec) -> Tensor:
    """Two rows of input for the layer, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(spec, LinearSpec):
        return torch.randn(2, spec.in_features, generator=generator)
    return torch.randn(2, spec.in_channels, *(11, 9)[: len(spec.kernel_size)], generator=generator)
