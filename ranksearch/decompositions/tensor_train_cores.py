"""The arithmetic of tensor trains: their four cores, cut, multiplied and balanced."""

import torch
from torch import Tensor

from ranksearch.decompositions.matrices import principal_directions, right_factors

_MOST_BALANCING_STEPS, _BALANCED = 100, 1e-4

# First (r1, S), vertical (r2, r1, kh), horizontal (r3, r2, kw) and last (T, r3).
Cores = tuple[Tensor, Tensor, Tensor, Tensor]


def module_weights(*cores: Tensor) -> tuple[Tensor, ...]:
    """The weights of the four modules, float32, balanced."""
    first, vertical, horizontal, last = cores
    shaped = first[:, :, None, None], vertical[:, :, :, None], horizontal[:, :, None, :], last[:, :, None, None]
    return tuple(factor.float() for factor in balanced_chain(*shaped))


def product(*cores: Tensor) -> Tensor:
    """The weight (T, S, kh, kw) that the cores amount to, float32."""
    first, vertical, horizontal, last = (core.float() for core in cores)
    columns = torch.einsum("to,omw->tmw", last, horizontal)
    rows = torch.einsum("mih,is->msh", vertical, first)
    return torch.einsum("tmw,msh->tshw", columns, rows)


def outputs_of(inputs: Tensor, *cores: Tensor) -> Tensor:
    """What the cores make of float32 inputs (1, S * kh * kw, n)."""
    first, vertical, horizontal, last = (core.float() for core in cores)
    mixed = (first @ inputs.reshape(first.shape[1], -1)).reshape(vertical[0].numel(), -1)
    filtered = (vertical.flatten(1) @ mixed).reshape(-1, inputs.shape[-1])
    return (last @ (horizontal.flatten(1) @ filtered))[None]


def split(core: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A core (r1, kh, kw, r3) as vertical (rank, r1, kh) and horizontal (r3, rank, kw), the best of this rank."""
    rank_in, height, width, rank_out = core.shape
    matrix = core.reshape(rank_in * height, width * rank_out)
    left, right = _leading_product(matrix, rank)
    vertical = left.T.reshape(rank, rank_in, height)
    return vertical, right.reshape(rank, width, rank_out).permute(2, 0, 1)


def _leading_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (n, rank) and right (rank, m) whose product is the best of this rank to a matrix (n, m)."""
    n_rows, n_columns = matrix.shape
    if rank < n_columns < n_rows:
        left, right = right_factors(matrix, matrix.T @ matrix, None)
        return left[:, :rank], right[:rank]
    if rank < min(n_rows, n_columns):
        left = principal_directions(matrix, None)[:, :rank]
        return left, left.T @ matrix
    identity = torch.eye(min(n_rows, n_columns)).to(matrix)
    left, right = (identity, matrix) if n_rows <= n_columns else (matrix, identity)
    # More channels than there is to carry meet zeros behind, ahead of which they can still learn.
    spare = torch.arange(rank - len(identity), device=matrix.device) % len(identity)
    return torch.cat((left, left[:, spare]), 1), torch.cat((right, right.new_zeros(len(spare), n_columns)))


def padded(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The factor with zeros up to `rank` channels."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat((factor, factor.new_zeros(shape)), axis)


def balanced_chain(*factors: Tensor) -> list[Tensor]:
    """Factors (r_i+1, r_i, ...), scaled at every joint such that each channel enters as strong as it leaves.

    At each joint a channel's weights on either side get the same norm. These scales are the ones at which the
    factors' summed squares are least; alternating finds them, since the sum is convex in their logarithms.
    """
    energies = [_floored_energy(factor.double().square().reshape(*factor.shape[:2], -1).sum(-1)) for factor in factors]
    squared = [torch.ones_like(energy[:, 0]) for energy in energies[:-1]]
    outer_in, outer_out = torch.ones_like(energies[0][0]), torch.ones_like(energies[-1][:, 0])
    for _ in range(_MOST_BALANCING_STEPS):
        largest_change = 1.0
        for joint in range(len(squared)):
            before = energies[joint] @ (1 / (squared[joint - 1] if joint else outer_in))
            ahead = squared[joint + 1] if joint + 1 < len(squared) else outer_out
            # Channel c leaves with scale q_c and enters what follows with 1 / q_c.
            scale = ((ahead @ energies[joint + 1]) / before).sqrt()
            largest_change = max(largest_change, float((scale / squared[joint]).log().abs().amax().exp()))
            squared[joint] = scale
        if largest_change < 1 + _BALANCED:
            break
    scales = [outer_in, *(each.sqrt() for each in squared), outer_out]
    return [_scaled(factor, scales[i + 1], 1 / scales[i]) for i, factor in enumerate(factors)]


def _scaled(factor: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    taps = tuple(1 for _ in factor.shape[2:])
    return factor * (outputs[:, None] * inputs).to(factor).reshape(len(outputs), len(inputs), *taps)


def _floored_energy(energy: Tensor) -> Tensor:
    return energy.clamp_min(max(float(energy.max()) * 1e-12, 1e-30))
