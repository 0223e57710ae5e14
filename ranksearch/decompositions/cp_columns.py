"""The factors of CP as columns: for every term one of the inputs, one of each filter and one of the outputs."""

import math

import torch
from torch import Tensor

from ranksearch.decompositions.cp_fitting import taps, unit_columns
from ranksearch.decompositions.matrices import floored, least_squares_step, mean_diagonal
from ranksearch.decompositions.metric import Metric

# Of the inputs (S, R), of the filters (taps, R), of the outputs (T, R); the weight is the sum of their outer products.
Columns = tuple[Tensor, ...]

# Directions that inputs hardly take would make large terms that cancel.
_SOLVING_RIDGE = 1e-7


def max_rank(shape: tuple[int, ...]) -> int:
    """The terms that surely make up any weight (T, S, *kernel)."""
    n_outputs, n_inputs, *kernel = shape
    return math.prod(kernel) * min(n_outputs, n_inputs)


def filtered_axes(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The kernel's axes that each filter takes: one each, or all at once where only one is longer than a pixel."""
    if sum(size > 1 for size in kernel) > 1:
        return [(axis,) for axis in range(len(kernel))]
    return [tuple(range(len(kernel)))]


def balanced(strengths: Tensor, *columns: Tensor) -> Columns:
    """The columns, float32, times the strengths (R,), the norm of each term spread evenly over them."""
    units, norms = zip(*(unit_columns(each) for each in columns), strict=True)
    total = strengths * torch.stack(norms).prod(0)
    share = floored(total) ** (1 / len(columns))
    # The last takes what a vanishing term lacks, so that the sum stays what it is and the term can still learn.
    *others, last = units
    return *((unit * share).float() for unit in others), (last * (total / share ** (len(columns) - 1))).float()


def module_weights(columns: Columns, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The weights of the modules, the caller's own, for a layer's weight of this shape."""
    given, *filters, output = columns
    kernel, rank = shape[2:], output.shape[1]
    pixel = tuple(1 for _ in kernel)
    kernels = [
        each.T.reshape(rank, 1, *(size if axis in axes else 1 for axis, size in enumerate(kernel)))
        for each, axes in zip(filters, filtered_axes(kernel), strict=True)
    ]
    shaped = (given.T.reshape(rank, -1, *pixel), *kernels, output.reshape(-1, rank, *pixel))
    return tuple(factor.clone(memory_format=torch.contiguous_format) for factor in shaped)


def weight_of(columns: Columns, shape: tuple[int, ...]) -> Tensor:
    """The weight of this shape that the columns amount to."""
    return (columns[-1] @ patterns_of(columns)).reshape(shape)


def padded(columns: Columns, rank: int) -> Columns:
    """The columns with terms up to `rank` that add nothing but can learn."""
    *others, output = columns
    n_terms = output.shape[1]
    spare = torch.arange(rank - n_terms, device=output.device) % n_terms
    silent = output.new_zeros(len(output), len(spare))
    return *(torch.cat((each, each[:, spare]), 1) for each in others), torch.cat((output, silent), 1)


def with_solved_outputs(columns: Columns, weight: Tensor, metric: Metric) -> Columns:
    """The columns with those of the outputs that cost least in the metric, balanced; `weight` is float64.

    How much each output counts makes no difference to them.
    """
    *others, output = (each.double() for each in columns)
    patterns = patterns_of((*others, output))
    seen = patterns @ metric.inputs[0]
    normal = seen @ patterns.T
    normal.diagonal().add_(_SOLVING_RIDGE * mean_diagonal(normal).item())
    # Correcting what is there never costs more, whatever the ridge.
    output = output + least_squares_step(normal, (weight.flatten(1) - output @ patterns) @ seen.T)
    return balanced(torch.ones_like(output[0]), *others, output)


def patterns_of(columns: Columns) -> Tensor:
    """What each term takes of the inputs (R, S * taps), in the order of `weight.flatten(1)`."""
    given, *filters, _ = columns
    kernel = filters[0] if len(filters) == 1 else taps(filters[0], filters[1])
    return (given[:, None] * kernel).flatten(0, 1).T
