"""Rounding that makes up for its own errors: GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranksearch.quantization.weight_formats import Levels

BLOCK = 64
# Of the mean squared input, added to all of them: inputs that hardly vary would take errors without end.
DAMPING = 0.01

Floats = NDArray[np.float64]


def compensated(weight: Tensor, moment: Tensor, levels: Levels) -> Tensor:
    """`weight` (G, T, D) rounded to its levels such that sums over inputs change little; float64.

    `moment` (G, D, D) is the second moment of the inputs of each of G groups, `levels` are (G * T, D). Inputs are
    rounded one after the other, those of largest moment first, and what each adds of error the later ones take off as
    far as they vary alike. Plainly rounded comes back where the moment is of no use.
    """
    # numpy, on the CPU: many short steps, for which torch's threads wait longer than they work.
    device, shape = weight.device, weight.shape
    step, lowest, highest = (values.cpu().double().reshape(shape) for values in levels)
    weight, moment = weight.cpu().double(), moment.cpu().double()
    plain = (weight / step).round().clamp(lowest, highest) * step
    order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    root, failed = _inverse_root(_ordered(moment, order))
    columns = order[:, None, :].expand(shape)
    parts = [values.gather(2, columns).numpy() for values in (weight, step, lowest, highest)]
    rounded = torch.empty_like(plain)
    rounded.scatter_(2, columns, torch.from_numpy(_round_in_turn(parts[0], root.numpy(), *parts[1:])))
    usable = (~failed)[:, None, None] & rounded.isfinite()
    return torch.where(usable, rounded, plain).to(device)


def _ordered(moment: Tensor, order: Tensor) -> Tensor:
    rows = moment.gather(1, order[:, :, None].expand(moment.shape))
    return rows.gather(2, order[:, None, :].expand(moment.shape))


def _inverse_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The upper triangular R with R^T R the inverse of the damped moment (G, D, D), and which of them failed (G,).

    By the lower root of the moment turned round, which is R's inverse turned round.
    """
    damped = moment.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(moment.dtype).tiny)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype).expand_as(moment)
    lower = torch.where((failed != 0)[:, None, None], identity, lower)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2), failed != 0


def _round_in_turn(weight: Floats, root: Floats, step: Floats, lowest: Floats, highest: Floats) -> Floats:
    """`weight` (G, T, D) on its levels, its inputs in turn; blocks of inputs hand on their errors together."""
    weight, rounded = weight.copy(), np.empty_like(weight)
    n_inputs = weight.shape[2]
    for start in range(0, n_inputs, BLOCK):
        stop = min(start + BLOCK, n_inputs)
        errors = np.empty((*weight.shape[:2], stop - start))
        for i in range(start, stop):
            now = weight[:, :, i]
            codes = np.clip(np.rint(now / step[:, :, i]), lowest[:, :, i], highest[:, :, i])
            rounded[:, :, i] = codes * step[:, :, i]
            error = (now - rounded[:, :, i]) / root[:, i, i, None]
            weight[:, :, i:stop] -= error[:, :, None] * root[:, None, i, i:stop]
            errors[:, :, i - start] = error
        weight[:, :, stop:] -= errors @ root[:, start:stop, stop:]
    return rounded
