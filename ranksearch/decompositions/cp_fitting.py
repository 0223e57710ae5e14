"""The arithmetic of CP: a tensor as a sum of rank-one terms, by alternating least squares that cannot diverge."""

import logging
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ranksearch.decompositions.matrices import eigenvectors

# What a term's squared norm costs, over what the residual's costs: terms that cancel each other do not pay.
PENALTY = 0.03
_LEAST_PENALTY = 1e-10
# A sweep that lowers the objective by less than this share is the last.
_TOLERANCE = 1e-3
# Below this share of the tensor's energy a residual is rounding.
_EXACT = 1e-20
_OVERSAMPLING = 8
# Sweeps go by the weights times the terms: few on the largest layers and ranks, where each takes a second.
_SWEEPING_WORK, _RANK_OF_OVERHEAD, _FEWEST_SWEEPS, _MOST_SWEEPS = 1_400_000_000, 32, 2, 15
_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Strengths (R,) times the columns, of unit length, of output (T, R), input (S, R), rows (kh, R), columns (kw, R).

    float64; their sum is a tensor, as slices (kh * kw, T, S), one for each tap.
    """

    strengths: Tensor
    output: Tensor
    input: Tensor
    rows: Tensor
    columns: Tensor

    def missing(self, slices: Tensor) -> Tensor:
        """What the sum of the terms lacks of a tensor's slices (kh * kw, T, S)."""
        left = (taps(self.rows, self.columns) * self.strengths)[:, None] * self.output
        return torch.addmm(slices.flatten(0, 1), left.flatten(0, 1), self.input.T, alpha=-1).reshape(slices.shape)

    @property
    def modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.output, self.input, self.rows, self.columns

    def followed_by(self, others: "Terms", n: int) -> "Terms":
        """These and the first `n` of the others."""
        output, given, rows, columns = (
            torch.cat((mine, theirs[:, :n]), 1) for mine, theirs in zip(self.modes, others.modes, strict=True)
        )
        strengths = torch.cat((self.strengths, others.strengths[:n]))
        return Terms(strengths=strengths, output=output, input=given, rows=rows, columns=columns)


def taps(rows: Tensor, columns: Tensor) -> Tensor:
    """The kernels (kh * kw, R) of their columns (kh, R) and rows (kw, R)."""
    return (rows[:, None] * columns[None]).flatten(0, 1)


def no_terms(slices: Tensor, kernel: tuple[int, int]) -> Terms:
    """The empty sum for a tensor."""
    _, n_outputs, n_inputs = slices.shape
    output, given, rows, columns = (slices.new_zeros(size, 0) for size in (n_outputs, n_inputs, *kernel))
    return Terms(strengths=slices.new_zeros(0), output=output, input=given, rows=rows, columns=columns)


def exact_terms(slices: Tensor, kernel: tuple[int, int]) -> Terms:
    """The tensor as kh * kw * min(T, S) terms: every slice's rows or, where they are fewer, its columns."""
    n_taps, n_outputs, n_inputs = slices.shape
    least = min(n_outputs, n_inputs)
    vectors = slices.mT if n_outputs <= n_inputs else slices
    other, strengths = unit_columns(vectors.transpose(0, 1).flatten(1))
    unit = torch.eye(least).to(slices).repeat(1, n_taps)
    output, given = (unit, other) if n_outputs <= n_inputs else (other, unit)
    kernels = torch.eye(n_taps).to(slices).reshape(*kernel, n_taps)
    rows, columns = (kernels.sum(axis).repeat_interleave(least, 1) for axis in (1, 0))
    return Terms(strengths=strengths, output=output, input=given, rows=rows, columns=columns)


def leading_terms(residual: Tensor, kernel: tuple[int, int], n: int) -> Terms:
    """At most `n` orthogonal terms of a tensor's slices, strongest first, at little cost.

    In the eigenvectors of either kernel axis, the singular triplets of every slice; the leading ones come from a
    random sketch (Halko et al., "Finding structure with randomness", 2011), the same at every call. Each takes its
    squared strength from the residual's energy.
    """
    n_taps, n_outputs, n_inputs = residual.shape
    flat = residual.flatten(1)
    gram = (flat @ flat.T).reshape(*kernel, *kernel)
    rows = eigenvectors(gram.diagonal(dim1=1, dim2=3).sum(-1))[1]
    columns = eigenvectors(gram.diagonal(dim1=0, dim2=2).sum(-1))[1]
    rotated = (torch.kron(rows, columns).T @ flat).reshape(residual.shape)
    n_sketched = min(n + _OVERSAMPLING, n_outputs, n_inputs)
    noise = torch.randn(n_inputs, n_sketched, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sketch = rotated @ noise.to(residual)
    basis = torch.linalg.qr(rotated @ (sketch.mT @ rotated).mT)[0]
    projected = basis.mT @ rotated
    left = eigenvectors(projected @ projected.mT)[1]
    given, strengths = unit_columns((left.mT @ projected).flatten(0, 1).T)
    chosen = strengths.argsort(descending=True, stable=True)[:n]
    tap = chosen // n_sketched
    return Terms(
        strengths=strengths[chosen],
        output=(basis @ left).transpose(0, 1).flatten(1)[:, chosen],
        input=given[:, chosen],
        rows=rows[:, tap // kernel[1]],
        columns=columns[:, tap % kernel[1]],
    )


def unit_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The columns at unit length, such as vanish in a constant direction, and their norms."""
    norms = matrix.norm(dim=0)
    units = torch.where(norms > 0, matrix / norms.clamp_min(1e-300), len(matrix) ** -0.5)
    return units, norms


@final
class LeastSquares:
    """Alternating least squares for the terms of one tensor, its slices (kh * kw, T, S) in float64.

    It minimises the squared residual plus `PENALTY` times the residual's present share of the tensor's energy times
    the terms' summed squared norms: the Lagrangian of error-preserving correction (Phan et al., "Stable low-rank
    tensor decomposition for compression of convolutional neural networks", 2020), whose multiplier falls with the
    residual. So terms whose norms diverge while they cancel never arise, and small residuals stay within reach.
    """

    def __init__(self, slices: Tensor, kernel: tuple[int, int]) -> None:
        self.kernel, self.energy = kernel, float(slices.square().sum())
        self._by_output = slices
        self._by_input = slices.permute(2, 0, 1).flatten(1)

    def refine(self, terms: Terms, squared_error: float) -> tuple[Terms, float]:
        """Better terms, as many, and their squared error, which is never above that of those given."""
        n_sweeps = self._n_sweeps(len(terms.strengths))
        best, current, objective = (terms, squared_error), terms, float("inf")
        for _ in range(n_sweeps if squared_error > _EXACT * self.energy else 0):
            penalty = max(PENALTY * best[1] / self.energy, _LEAST_PENALTY)
            current, error = self._sweep(current, penalty)
            if not torch.isfinite(current.strengths).all():
                _log.warning("CP's least squares fail at rank %d; the terms before are kept", len(terms.strengths))
                break
            if error < best[1]:
                best = current, error
            previous, objective = objective, error + penalty * float(current.strengths.square().sum())
            if objective > (1 - _TOLERANCE) * previous:
                break
        return best

    def _n_sweeps(self, rank: int) -> int:
        """As many sweeps as take about as long on every layer and at every rank, within bounds."""
        work = self._by_output.numel() * (rank + _RANK_OF_OVERHEAD) + 2 * rank**3
        affordable = _SWEEPING_WORK // work
        return min(max(affordable, _FEWEST_SWEEPS), _MOST_SWEEPS)

    def _sweep(self, terms: Terms, penalty: float) -> tuple[Terms, float]:
        """Every mode solved for once, the kernel's after the output's, and the squared error then."""
        given, rows, columns = terms.input, terms.rows, terms.columns

        seen = self._by_output @ given
        wanted = (seen * taps(rows, columns)[:, None]).sum(0)
        output, _ = _solve(wanted, _products(given, rows, columns), penalty)

        rows, columns = self._solve_kernels((seen * output).sum(1), output, given, (rows, columns), penalty)

        wanted = self._by_input @ (taps(rows, columns)[:, None] * output).flatten(0, 1)
        products = _products(output, rows, columns)
        given, strengths = _solve(wanted, products, penalty)

        scaled = given * strengths
        error = self.energy - 2 * float((wanted * scaled).sum()) + float((products * (scaled.T @ scaled)).sum())
        result = Terms(strengths=strengths, output=output, input=given, rows=rows, columns=columns)
        return result, max(error, 0.0)

    def _solve_kernels(
        self, seen: Tensor, output: Tensor, given: Tensor, kernels: tuple[Tensor, Tensor], penalty: float
    ) -> tuple[Tensor, Tensor]:
        """New rows and columns; `seen` (kh * kw, R) is the tensor as its channels' factors see it."""
        (rows, columns), (height, width) = kernels, self.kernel
        kernel = seen.reshape(height, width, -1)
        if height > 1:
            rows, _ = _solve((kernel * columns).sum(1), _products(output, given, columns), penalty)
        if width > 1:
            columns, _ = _solve((kernel * rows[:, None]).sum(0), _products(output, given, rows), penalty)
        return rows, columns


def _products(*modes: Tensor) -> Tensor:
    """The scalar products (R, R) of the terms, one mode left out."""
    first, second, third = (mode.T @ mode for mode in modes)
    return first * second * third


def _solve(wanted: Tensor, products: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The unit columns and norms of X (n, R) with X (products + penalty) = wanted; NaN where there is none."""
    normal = products.clone()
    normal.diagonal().add_(penalty)
    factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(normal)
    if int(factor[1]):
        return torch.full_like(wanted, torch.nan), torch.full_like(wanted[0], torch.nan)
    return unit_columns(torch.cholesky_solve(wanted.T, factor[0]).T)
