"""The rows that a layer's weight multiplies: what im2col gives for a convolution."""

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ranksearch.layers import ConvSpec, LayerSpec


def input_patches(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """The inputs of every output position, (N, positions, D), where D runs as `weight.flatten(1)` does.

    `inputs` is (N, ..., in_features) for a linear layer and (N, C, *pixels) for a convolution. With groups D counts
    the taps of all input channels, one group after the other.
    """
    return channels_first(spec, tap_patches(spec, inputs))


def tap_patches(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """As `input_patches`, but D runs over taps, then channels: whole pixels are copied, several times as fast."""
    if not isinstance(spec, ConvSpec):
        return inputs.reshape(inputs.shape[0], -1, spec.in_features)
    windows = _windows(*_over_two_axes(spec, inputs))
    return windows.reshape(len(inputs), windows.shape[1] * windows.shape[2], -1)


def sampled_patches(spec: LayerSpec, inputs: Tensor, index: Tensor) -> Tensor:
    """Rows of `tap_patches`, (M, D), by their index over examples and positions; nothing is copied for the others."""
    if not isinstance(spec, ConvSpec):
        return inputs.reshape(-1, spec.in_features)[index]
    windows = _windows(*_over_two_axes(spec, inputs))
    height, width = windows.shape[1:3]
    rows = windows[index // (height * width), index // width % height, index % width]
    return rows.flatten(1)


def by_group(spec: LayerSpec, patches: Tensor) -> Tensor:
    """Patches (..., M, taps of all channels) of tap_patches as (groups, ..., M, D), D over taps, then channels."""
    groups = count_groups(spec)
    taps = patches.reshape(*patches.shape[:-1], count_taps(spec), groups, -1)
    return taps.movedim(-2, 0).flatten(-2)


def count_positions(spec: LayerSpec, outputs: Tensor) -> int:
    """The positions at which a layer computed the outputs of one example."""
    return int(outputs[0].numel()) // spec.weight_shape[0]


def channels_first(spec: LayerSpec, columns: Tensor) -> Tensor:
    """The last dimension put from taps, then channels, into the order of `weight.flatten(1)`."""
    n_taps = count_taps(spec)
    by_tap = columns.reshape(*columns.shape[:-1], n_taps, -1)
    return columns if n_taps == 1 else by_tap.transpose(-1, -2).flatten(-2)


def output_rows(spec: LayerSpec, outputs: Tensor) -> Tensor:
    """A layer's outputs (or their gradients) by position, (N, positions, T)."""
    if isinstance(spec, ConvSpec):
        return outputs.flatten(2).transpose(1, 2)
    return outputs.reshape(outputs.shape[0], -1, spec.out_features)


def count_taps(spec: LayerSpec) -> int:
    """The pixels under a convolution's kernel; one for a linear layer."""
    return math.prod(spec.kernel_size) if isinstance(spec, ConvSpec) else 1


def count_groups(spec: LayerSpec) -> int:
    """The groups of a convolution; one for a linear layer."""
    return spec.groups if isinstance(spec, ConvSpec) else 1


def _over_two_axes(spec: ConvSpec, inputs: Tensor) -> tuple[ConvSpec, Tensor]:
    """A convolution over one axis as one over two, the second of one pixel."""
    if len(spec.kernel_size) == 2:
        return spec, inputs
    padding = spec.padding if isinstance(spec.padding, str) else (*spec.padding, 0)
    wider = replace(
        spec,
        kernel_size=(*spec.kernel_size, 1),
        stride=(*spec.stride, 1),
        padding=padding,
        dilation=(*spec.dilation, 1),
    )
    return wider, inputs.unsqueeze(-1)


def _windows(spec: ConvSpec, inputs: Tensor) -> Tensor:
    """What the kernel sees at every output position, (N, H, W, kh, kw, C): a view, which copies nothing."""
    pixels = _padded(spec, inputs)
    (rows, columns), (row_step, column_step) = spec.kernel_size, spec.dilation
    height = (pixels.shape[1] - row_step * (rows - 1) - 1) // spec.stride[0] + 1
    width = (pixels.shape[2] - column_step * (columns - 1) - 1) // spec.stride[1] + 1
    n, h, w, c = pixels.stride()
    return pixels.as_strided(
        (len(pixels), height, width, rows, columns, pixels.shape[3]),
        (n, h * spec.stride[0], w * spec.stride[1], h * row_step, w * column_step, c),
    )


def _padded(spec: ConvSpec, inputs: Tensor) -> Tensor:
    """The padded images with channels last, (N, H, W, C)."""
    padding = _padding(spec)
    if spec.padding_mode == "zeros" and any(padding):
        left, right, top, bottom = padding
        n, channels, height, width = inputs.shape
        # One copy that pads and turns: F.pad on a turned tensor takes several times as long.
        pixels = inputs.new_zeros(n, top + height + bottom, left + width + right, channels)
        pixels[:, top : top + height, left : left + width] = inputs.permute(0, 2, 3, 1)
        return pixels
    if not any(padding):
        return inputs.permute(0, 2, 3, 1).contiguous()
    return F.pad(inputs, padding, mode=spec.padding_mode).permute(0, 2, 3, 1).contiguous()


def _padding(spec: ConvSpec) -> tuple[int, int, int, int]:
    """Pixels to add at the left, right, top and bottom."""
    if spec.padding == "valid":
        return (0, 0, 0, 0)
    if isinstance(spec.padding, str):
        # "same", as torch splits it: the odd pixel goes to the right and to the bottom.
        rows, columns = (d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True))
        return (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return (spec.padding[1], spec.padding[1], spec.padding[0], spec.padding[0])
