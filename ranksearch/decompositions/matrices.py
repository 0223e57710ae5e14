"""The arithmetic that the decompositions share: on float64 matrices, without modules."""

import torch
from torch import Tensor

from ranksearch.errors import DecompositionError

_JITTERS = (0.0, 1e-12, 1e-8)


def eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), largest first, and their vectors as columns (n, n), of a symmetric (n, n) matrix.

    Raises DecompositionError where the matrix is not finite or the solver does not converge, jitter or not.
    """
    if not torch.isfinite(symmetric).all():
        raise DecompositionError("the weight or its input covariance holds NaN or infinity; check the calibration data")
    scale = symmetric.diagonal().mean()
    identity = torch.eye(len(symmetric), dtype=symmetric.dtype, device=symmetric.device)
    for jitter in _JITTERS:
        try:
            values, vectors = torch.linalg.eigh(symmetric + jitter * scale * identity)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in torch's stubs
            continue
        return values.flip(0), vectors.flip(1)
    n = len(symmetric)
    raise DecompositionError(f"the eigendecomposition of a {n}x{n} matrix does not converge, not even with jitter")


def principal_directions(matrix: Tensor, covariance: Tensor | None) -> Tensor:
    """Orthonormal columns (n, min(n, m)), most important first, that span all of `matrix` (n, m).

    The first r of them, Q, lose the least of the output's energy: Q Q^T matrix is the best approximation of rank r
    for inputs of this covariance (m, m), or in the Frobenius norm without one.
    """
    n_rows, n_columns = matrix.shape
    # With more rows than columns the eigenvectors of the larger Gram matrix need not span the matrix where the
    # covariance is singular; those in an orthonormal basis of its columns do, and are cheaper.
    basis, reduced = torch.linalg.qr(matrix) if n_rows > n_columns else (None, matrix)
    gram = reduced @ reduced.T
    if covariance is not None:
        # A trace of the plain Gram matrix orders the directions that these inputs never take.
        gram = reduced @ covariance @ reduced.T + 1e-9 * covariance.diagonal().mean() * gram
    _, vectors = eigenvectors((gram + gram.T) / 2)
    return vectors if basis is None else basis @ vectors


def square_roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The symmetric square root (n, n) of the covariance plus `ridge` times its mean diagonal, and its inverse."""
    values, vectors = eigenvectors(covariance)
    floor = ridge * max(float(values.mean()), 1e-30)
    root = (values.clamp_min(0.0) + floor).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def balanced_pair(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(last (n, k), first (k, m)) with the same product, each column as long as the row that it meets."""
    ratio = floored(first.norm(dim=1)) / floored(last.norm(dim=0))
    scale = ratio.sqrt()
    return last * scale, first / scale[:, None]


def floored(norms: Tensor) -> Tensor:
    """Norms with the vanishing ones raised, so that none divides by zero and a dead component can still learn."""
    return norms.clamp_min(max(float(norms.max()) * 1e-6, 1e-30))
