"""Weights by least squares on sampled rows."""

import torch
from torch import Tensor


def solve_centred(inputs: Tensor, outputs: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The (G, T, D) weights and (G, T) biases that map `inputs` (G, M, D) to `outputs` (G, M, T), float64.

    Least squares on centred rows, group by group; `ridge` times the mean square of a group's inputs pulls towards
    `weight`, which a group keeps where its inputs leave no way to solve.
    """
    input_mean, output_mean = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
    solved = solve(inputs - input_mean, outputs - output_mean, weight, ridge)
    return solved, (output_mean - input_mean @ solved.mT)[:, 0]


def solve(inputs: Tensor, outputs: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """As solve_centred, on rows as they are: the weights alone."""
    residual = outputs - inputs @ weight.mT
    gram = inputs.mT @ inputs
    diagonals = gram.diagonal(dim1=1, dim2=2)
    diagonals += (ridge * diagonals.mean(1, keepdim=True)).clamp_min(torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram)
    step = torch.cholesky_solve(inputs.mT @ residual, factor).mT
    return torch.where((failed == 0)[:, None, None] & step.isfinite(), weight + step, weight)


def relative_error(outputs: Tensor, wanted: Tensor) -> float:
    """The squared error of `outputs` (groups, M, T) over the variance of what was wanted."""
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean()
    return float((outputs - wanted).square().mean() / spread.clamp_min(1e-30))
