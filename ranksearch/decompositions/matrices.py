"""The arithmetic that the decompositions share: on float64 matrices, one or a batch of them, without modules."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from ranksearch.errors import DecompositionError

_JITTERS = (0.0, 1e-12, 1e-8)
_RIDGES = (1e-10, 1e-7, 1e-4)
_NESTED_RIDGES = (1e-8, 1e-6, 1e-4)
# The strength of inputs that are never seen, over the others' mean.
UNSEEN = 1e-9
_log = logging.getLogger(__name__)


def eigenvectors(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., n), largest first, and their vectors as columns (..., n, n), of symmetric matrices (..., n, n).

    Where torch's solver does not converge, not even with jitter, numpy's singular vectors take its place, which are
    the same for a positive semi-definite matrix; a warning is logged once. Raises DecompositionError where a matrix
    is not finite or that fails too.
    """
    if not all_finite(symmetric):
        raise DecompositionError("the weight or its input covariance holds NaN or infinity; check the calibration data")
    scale = mean_diagonal(symmetric)
    identity = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    for jitter in _JITTERS:
        try:
            values, vectors = torch.linalg.eigh(symmetric + jitter * scale * identity if jitter else symmetric)
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
    gram = reduced @ reduced.mT if covariance is None else reduced @ with_unseen(covariance) @ reduced.mT
    vectors = principal_axes(gram)
    return vectors if basis is None else basis @ vectors


def with_unseen(covariance: Tensor) -> Tensor:
    """The covariance (..., n, n) and a trace of equal inputs, to order the directions that no input takes."""
    raised = covariance.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(UNSEEN * mean_diagonal(covariance)[..., 0])
    return raised


def principal_axes(gram: Tensor) -> Tensor:
    """The eigenvectors (..., n, n) of a matrix that is symmetric but for rounding, as columns, largest first."""
    return eigenvectors((gram + gram.mT) / 2)[1]


def weighed_axes(gram: Tensor, root: Tensor, inverse_root: Tensor) -> tuple[Tensor, Tensor]:
    """Columns P and Q (..., n, n), first to matter first: Q P^T matrix is the best of its rank for weighed rows.

    `gram` (..., n, n) is the matrix's own; what its rows count is root^T root.
    """
    directions = principal_axes(root @ gram @ root.mT)
    return root.mT @ directions, inverse_root @ directions


def right_factors(matrix: Tensor, gram: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """last (..., n, m) and first (..., m, m) whose product is `matrix` (..., n, m), most important component first.

    Where `gram` (..., m, m) is the matrix's own, its first components are those that `principal_directions` gives;
    with the Gram matrix of its rows, weighed, they lose the least of the weighed rows' energy. It takes the cube of
    the columns: the way for matrices with fewer columns than rows.
    """
    if covariance is None:
        vectors = principal_axes(gram)
        return matrix @ vectors, vectors.mT
    scale = mean_diagonal(covariance)
    root = triangular_root(covariance / scale, (UNSEEN, 1e-6, 1e-3))
    vectors = principal_axes(root.mT @ gram @ root)
    return matrix @ (root @ vectors), torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT


def triangular_root(symmetric: Tensor, ridges: Sequence[float]) -> Tensor:
    """A lower triangular root (..., n, n) of positive semi-definite matrices plus a ridge of their mean diagonal.

    The ridge is the first that Cholesky's factorisation takes; where it takes none, the diagonal stands for all.
    """
    root = _ridged_root(symmetric, ridges)
    if root is not None:
        return root[0]
    diagonal = symmetric.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    return (diagonal + ridges[-1] * mean_diagonal(symmetric)[..., 0]).sqrt().diag_embed()


def _ridged_root(symmetric: Tensor, ridges: Sequence[float]) -> tuple[Tensor, Tensor] | None:
    """The Cholesky factor with the first ridge that allows one, and that ridge (..., 1, 1); None where none does."""
    scale = mean_diagonal(symmetric)
    for ridge in ridges:
        raised = symmetric.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(ridge * scale[..., 0])
        factor: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(raised)
        if not bool(factor[1].any()):
            return factor[0], ridge * scale
    return None


def square_roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The symmetric square root (..., n, n) of the covariance plus `ridge` times its mean diagonal, and its inverse."""
    values, vectors = eigenvectors(covariance)
    floor = ridge * values.mean(-1, keepdim=True).clamp_min(1e-30)
    root = (values.clamp_min(0.0) + floor).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def weighing_roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Upper triangular R (..., n, n), R^T R the covariance plus `ridge` times its mean diagonal, and its inverse.

    In a tenth of the time of `square_roots`, for ridges that keep the sum far from singular.
    """
    raised = covariance.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(ridge * mean_diagonal(covariance)[..., 0])
    root = torch.linalg.cholesky(raised, upper=True)
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    return root, torch.linalg.solve_triangular(root, identity, upper=True)


def least_squares_step(normal: Tensor, right: Tensor) -> Tensor:
    """X (..., t, n) with X normal = right (..., t, n), `normal` (..., n, n) positive semi-definite.

    Ridges of its mean diagonal, as small as Cholesky's factorisation needs, keep X small where `normal` is singular;
    X is zero where no ridge helps.
    """
    root = _ridged_root(normal, _RIDGES)
    return torch.zeros_like(right) if root is None else torch.cholesky_solve(right.mT, root[0]).mT


@final
class NestedLeastSquares:
    """X (..., t, r) with X normal = wanted, for the first r of n unknowns at any r, by one factorisation.

    `normal` (..., n, n) is positive semi-definite, `wanted` (..., t, n). A ridge of its mean diagonal, as small as
    Cholesky's factorisation needs, keeps X near the guess (..., t, n) where `normal` does not tell; so it is never
    worse than the guess, which it is where no ridge helps.
    """

    def __init__(self, normal: Tensor, wanted: Tensor, guess: Tensor, ridges: Sequence[float] = _NESTED_RIDGES) -> None:
        self._guess = guess
        self._root = _ridged_root(normal, ridges)
        if self._root is not None:
            # The factor of a leading block is the leading block of the factor, and so it is with what it solves.
            root, ridge = self._root
            self._halfway = torch.linalg.solve_triangular(root, (wanted + ridge * guess).mT, upper=False)

    def solve(self, n: int, less: Tensor | None = None) -> Tensor:
        """X for the first `n` unknowns, in which `wanted` lacks `less` (..., t, n)."""
        if self._root is None:
            return self._guess[..., :n]
        root, halfway = self._root[0][..., :n, :n], self._halfway[..., :n, :]
        if less is not None:
            halfway = halfway - torch.linalg.solve_triangular(root, less.mT, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(root.mT, halfway, upper=True)
        return solved.mT


def balanced_pair(last: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(last (..., n, k), first (..., k, m)) with the same product, each column as long as the row that it meets."""
    ratio = floored(first.norm(dim=-1)) / floored(last.norm(dim=-2))
    scale = ratio.sqrt()
    return last * scale[..., None, :], first / scale[..., None]


def floored(norms: Tensor) -> Tensor:
    """Norms (..., k) with the vanishing ones raised, so that none divides by zero and a dead component can learn."""
    return norms.maximum((norms.amax(-1, keepdim=True) * 1e-6).clamp_min(1e-30))


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite; a sum tells at a tenth of the time, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def mean_diagonal(symmetric: Tensor) -> Tensor:
    """The mean (..., 1, 1) of each matrix's diagonal, raised above zero."""
    return symmetric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None]
