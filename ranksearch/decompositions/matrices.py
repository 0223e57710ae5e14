"""The arithmetic that the decompositions share: on float64 matrices, one or a batch of them, without modules."""

import logging
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ranksearch.errors import DecompositionError

_JITTERS = (0.0, 1e-12, 1e-8)
_RIDGES = (1e-10, 1e-7, 1e-4)
_log = logging.getLogger(__name__)


def eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), largest first, and their vectors as columns (..., n, n), of symmetric matrices (..., n, n).

    Where torch's solver does not converge, not even with jitter, numpy's singular vectors take its place, which are
    the same for a positive semi-definite matrix; a warning is logged once. Raises DecompositionError where a matrix
    is not finite or that fails too.
    """
    if not torch.isfinite(symmetric).all():
        raise DecompositionError("the weight or its input covariance holds NaN or infinity; check the calibration data")
    scale = mean_diagonal(symmetric)
    identity = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    for jitter in _JITTERS:
        try:
            values, vectors = torch.linalg.eigh(symmetric + jitter * scale * identity)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in torch's stubs
            continue
        return values.flip(-1), vectors.flip(-1)
    return _singular_vectors(symmetric)


def _singular_vectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    warn_of_the_second_solver()
    try:
        vectors, values, _ = np.linalg.svd(symmetric.cpu().numpy())
    except np.linalg.LinAlgError:
        n = symmetric.shape[-1]
        raise DecompositionError(f"the eigendecomposition of a {n}x{n} matrix does not converge") from None
    return torch.from_numpy(values).to(symmetric), torch.from_numpy(vectors).to(symmetric)


@cache
def warn_of_the_second_solver() -> None:
    """Logs a warning at the first call."""
    _log.warning("torch's eigensolver does not converge on a weight's matrix; numpy's SVD, which is slower, is used")


def principal_directions(matrix: Tensor, covariance: Tensor | None) -> Tensor:
    """Orthonormal columns (..., n, min(n, m)), most important first, that span all of `matrix` (..., n, m).

    The first r of them, Q, lose the least of the output's energy: Q Q^T matrix is the best approximation of rank r
    for inputs of this covariance (..., m, m), or in the Frobenius norm without one.
    """
    n_rows, n_columns = matrix.shape[-2:]
    # With more rows than columns the eigenvectors of the larger Gram matrix need not span the matrix where the
    # covariance is singular; those in an orthonormal basis of its columns do, and are cheaper.
    basis, reduced = torch.linalg.qr(matrix) if n_rows > n_columns else (None, matrix)
    gram = reduced @ reduced.mT
    if covariance is not None:
        # A trace of the plain Gram matrix orders the directions that these inputs never take.
        gram = reduced @ covariance @ reduced.mT + 1e-9 * mean_diagonal(covariance) * gram
    _, vectors = eigenvectors((gram + gram.mT) / 2)
    return vectors if basis is None else basis @ vectors


def square_roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The symmetric square root (..., n, n) of the covariance plus `ridge` times its mean diagonal, and its inverse."""
    values, vectors = eigenvectors(covariance)
    floor = ridge * values.mean(-1, keepdim=True).clamp_min(1e-30)
    root = (values.clamp_min(0.0) + floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def least_squares_step(normal: Tensor, right: Tensor) -> Tensor:
    """X (..., t, n) with X normal = right (..., t, n), `normal` (..., n, n) positive semi-definite.

    Ridges of its mean diagonal, as small as Cholesky's factorisation needs, keep X small where `normal` is singular;
    X is zero where no ridge helps.
    """
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    for ridge in _RIDGES:
        factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(normal + ridge * mean_diagonal(normal) * identity)
        if not bool(factor[1].any()):
            return torch.cholesky_solve(right.mT, factor[0]).mT
    return torch.zeros_like(right)


def balanced_pair(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(last (..., n, k), first (..., k, m)) with the same product, each column as long as the row that it meets."""
    ratio = floored(first.norm(dim=-1)) / floored(last.norm(dim=-2))
    scale = ratio.sqrt()
    return last * scale[..., None, :], first / scale[..., None]


def floored(norms: Tensor) -> Tensor:
    """Norms (..., k) with the vanishing ones raised, so that none divides by zero and a dead component can learn."""
    return norms.maximum((norms.amax(-1, keepdim=True) * 1e-6).clamp_min(1e-30))


def mean_diagonal(symmetric: Tensor) -> Tensor:
    """The mean (..., 1, 1) of each matrix's diagonal, raised above zero."""
    return symmetric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None]
