"""The arithmetic of eight bits: weights symmetric per output channel, activations affine per tensor."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Weight codes are -127..127; activation codes 0..255.
CODE_LIMIT = 127
ACTIVATION_LEVELS = 255
N_CLIPPINGS = 21
# Below this a weight is zero: its step would not be a normal float32.
SMALLEST_WEIGHT = 1e-30

Counts = NDArray[np.float64]


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """`scale` (T,) in a shape that multiplies `weight` (T, ...)."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def weight_codes(weight: Tensor, scale: Tensor, limit: int = CODE_LIMIT) -> Tensor:
    """The int8 codes of `weight` (T, ...), steps of `scale` (T,), held within -limit..limit."""
    codes = (weight.detach().float() / per_channel(scale, weight)).round()
    return codes.clamp(-limit, limit).to(torch.int8)


def weight_scale(weight: Tensor, limit: int = CODE_LIMIT, n_clippings: int = N_CLIPPINGS) -> Tensor:
    """The step of each output channel (T,) that rounds `weight` (T, ...) with the least squared error.

    Tries clippings from 40 % to all of the channel's largest weight, a single one being all. Always positive: a
    channel of zeros takes the largest step of the others, since kernels with a step of zero do not run in int8.
    """
    # numpy: many short steps, for which torch's threads wait longer than they work.
    rows = weight.detach().float().flatten(1).cpu().numpy()
    largest = np.abs(rows).max(1)
    usable = largest > SMALLEST_WEIGHT
    steps = np.where(usable, largest, 1.0)[:, None] / limit
    clippings = np.linspace(1.0, 0.4, n_clippings, dtype=np.float32)
    errors = [_weight_error(rows, steps * clipping, limit) for clipping in clippings]
    best = steps[:, 0] * clippings[np.argmin(errors, axis=0)]
    fallback = best[usable].max() if usable.any() else 1.0 / limit
    return torch.from_numpy(np.where(usable, best, fallback).astype(np.float32)).to(weight.device)


def _weight_error(rows: NDArray[np.float32], steps: NDArray[np.float32], limit: int) -> NDArray[np.float32]:
    """The squared rounding error of each row (T,) with `steps` (T, 1)."""
    difference = np.rint(rows / steps)
    np.clip(difference, -limit, limit, out=difference)
    difference *= steps
    difference -= rows
    return np.asarray(np.einsum("ij,ij->i", difference, difference))


def affine_step(low: float, high: float) -> tuple[float, int]:
    """Step and zero point of codes 0..255 that cover low..high and hold zero exactly; the step is positive."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / ACTIVATION_LEVELS
    if step < SMALLEST_WEIGHT:
        return 1.0 / ACTIVATION_LEVELS, 0
    return step, int(min(max(round(-low / step), 0), ACTIVATION_LEVELS))


def affine_range(step: float, zero_point: int) -> tuple[float, float]:
    """The lowest and highest value that the codes 0..255 hold."""
    return -zero_point * step, (ACTIVATION_LEVELS - zero_point) * step


def best_range(counts: Counts, centres: Counts, low: float, high: float, n_clippings: int = 40) -> tuple[float, float]:
    """The range within low..high that rounds a histogram with the least squared error.

    `counts` and `centres` are (n_bins,). The upper end is clipped first, then the lower.
    """
    used = counts > 0
    counts, centres = counts[used], centres[used]
    shares = np.linspace(0.2, 1.0, n_clippings)
    if high > 0:
        high = min((high * share for share in shares), key=lambda top: _rounding_error(counts, centres, low, top))
    if low < 0:
        low = min((low * share for share in shares), key=lambda end: _rounding_error(counts, centres, end, high))
    return low, high


def _rounding_error(counts: Counts, centres: Counts, low: float, high: float) -> float:
    step, zero_point = affine_step(low, high)
    codes = np.clip(np.round(centres / step) + zero_point, 0, ACTIVATION_LEVELS)
    return float((counts * ((codes - zero_point) * step - centres) ** 2).sum())
