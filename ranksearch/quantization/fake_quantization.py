"""Rounding to a grid and back, as torch's operators of that name compute it."""

from typing import Any, cast, final

import torch
from torch import Tensor


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """The values as codes of lowest..highest hold them: the nearest multiples of `scale` that these reach.

    `scale` and `zero_point` have no axis, or that of the values' first. Gradients pass where nothing is clipped. What
    is not float32 on the CPU, and what a converter traces, goes to torch.fake_quantize_per_tensor_affine and
    torch.fake_quantize_per_channel_affine: on the CPU these take one number after the other, some ten times as long
    for the same result.
    """
    if values.is_cpu and values.dtype == torch.float32 and not cast(Any, torch.jit).is_tracing():
        shape = (-1, *[1] * (values.dim() - 1)) if scale.dim() else ()
        scale, zero_point = scale.view(shape), zero_point.view(shape)
        if torch.is_grad_enabled() and values.requires_grad:
            return cast(Tensor, cast(Any, _StraightThrough).apply(values, scale, zero_point, lowest, highest))
        return _codes(values, scale, zero_point).clamp_(lowest, highest).sub_(zero_point).mul_(scale)
    if scale.dim():
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, lowest, highest)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, lowest, highest)


@final
class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
        codes = _codes(values, scale, zero_point)
        kept = codes.clamp(lowest, highest)
        ctx.save_for_backward(kept == codes)
        return kept.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (is_kept,) = ctx.saved_tensors
        return gradients[0] * is_kept, None, None, None, None


def _codes(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Whole numbers, not yet clipped. Torch multiplies by the step's reciprocal too: a quotient may round elsewhere."""
    return (values * scale.reciprocal()).round_().add_(zero_point)
