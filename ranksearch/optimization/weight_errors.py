"""What factoring does to the weights alone, without data: the figures that published rules go by."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.decompositions.bottleneck import folding_of
from ranksearch.decompositions.folding import Folding
from ranksearch.errors import StudyError
from ranksearch.factorisations import Factorisations
from ranksearch.layers import ConvSpec, LayerSpec, layer_spec, layer_weight
from ranksearch.optimization.table import Floats
from ranksearch.plan import LayerChoice

Figures = tuple[tuple[float, ...], ...]

# Below this, norms count as nothing.
SMALLEST = 1e-12
# EVBMF's noise is sought on a grid of its logarithm, and again around the best point.
N_GRID_POINTS, N_ZOOMS = 257, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightErrors:
    """What factoring does to the weights W, by layer and candidate of a profile; bits make no difference.

    `energy_lost` is the squared Frobenius norm of W - W' over W's. `spectral_error` is the largest singular value of
    W - W' over W's, both as (T, S * kernel), of several groups the largest. `weakening` is how far ranks are on the
    way from the full ones, 0, to EVBMF's, 1; infinite where EVBMF says nothing of them.
    """

    energy_lost: Figures
    spectral_error: Figures
    weakening: Figures


def no_weight_errors() -> WeightErrors:
    """Raises StudyError: there is no model at hand."""
    raise StudyError("this rule goes by the weights: it needs their errors, as measure_weights gives them")


def measure_weights(model: nn.Module, factorisations: Factorisations, profile: Profile) -> WeightErrors:
    """The weights' errors of every candidate, from the factorisations that plans are compressed with.

    Raises DecompositionError where a candidate cannot be factored.
    """
    layers = [_layer_errors(model.get_submodule(layer.name), layer, factorisations) for layer in profile.layers]
    by_figure = [tuple(tuple(errors[figure] for errors in layer) for layer in layers) for figure in range(3)]
    return WeightErrors(energy_lost=by_figure[0], spectral_error=by_figure[1], weakening=by_figure[2])


def evbmf_rank(matrix: Floats) -> int:
    """The rank of a matrix (L, M) with noise, by empirical variational Bayesian matrix factorisation.

    The analytic global solution, its noise that of least free energy: Nakajima et al., "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", 2013, in the form of "Condition for perfect
    dimensionality recovery by variational Bayesian PCA", 2015: a component stays where its x = s^2 / (M * noise)
    exceeds (1 + t) (1 + a / t), with a = L / M, L <= M, and t the zero of log(1 + t) + a log(1 + t / a) - t.
    """
    short, long = sorted(matrix.shape)
    squares = np.linalg.svd(matrix, compute_uv=False).astype(np.float64) ** 2 / long
    if squares[0] == 0:
        return 0
    # Without any noise its logarithm would not be finite.
    squares = np.maximum(squares, squares[0] * np.finfo(np.float64).eps ** 2)
    ratio = short / long
    zero = _least_signal(ratio)
    least = (1 + zero) * (1 + ratio / zero)
    n_most = math.ceil(short / (1 + ratio)) - 1
    low, high = max(squares[n_most] / least, squares[n_most:].mean()), squares.mean()
    noise = low
    for _ in range(N_ZOOMS):
        grid = np.geomspace(low, high, N_GRID_POINTS)
        best = int(_free_energies(squares / grid[:, None], least, ratio).argmin())
        noise, low, high = grid[best], grid[max(best - 1, 0)], grid[min(best + 1, N_GRID_POINTS - 1)]
    return int((squares > noise * least).sum())


def _layer_errors(
    module: nn.Module, layer: LayerProfile, factorisations: Factorisations
) -> list[tuple[float, float, float]]:
    """The candidates' energy lost, spectral error and weakening."""
    spec = layer_spec(module)
    if spec is None:  # an embedding, which takes bits alone
        return [(0.0, 0.0, 0.0)] * len(layer.candidates)
    weight = layer_weight(module).double()
    rows, _ = _foldings(spec)
    energy, norm = max(float(weight.square().sum()), SMALLEST), max(_operator_norm(rows.matrix(weight)), SMALLEST)
    evbmf_ranks: dict[Folding, int] = {}
    known: dict[LayerChoice, tuple[float, float, float]] = {}
    for choice in dict.fromkeys(candidate.choice.in_float for candidate in layer.candidates):
        change = weight - factorisations.of(layer.name, choice).weight(choice.ranks).double()
        lost, error = float(change.square().sum()) / energy, _operator_norm(rows.matrix(change)) / norm
        known[choice] = lost, error, _weakening(choice, spec, weight, evbmf_ranks)
    return [known[candidate.choice.in_float] for candidate in layer.candidates]


def _foldings(spec: LayerSpec) -> tuple[Folding, Folding]:
    """The foldings of a weight whose ranks are those of its outputs, and of its inputs."""
    kernel = spec.kernel_size if isinstance(spec, ConvSpec) else ()
    pixel = tuple(1 for _ in kernel)
    return folding_of(spec, kernel, pixel), folding_of(spec, pixel, kernel)


def _svd_foldings(spec: LayerSpec, choice: LayerChoice) -> tuple[Folding, ...]:
    return (_foldings(spec)[choice.options.get("folding") == "kernel_last"],)


def _spatial_foldings(spec: LayerSpec, choice: LayerChoice) -> tuple[Folding, ...]:
    assert isinstance(spec, ConvSpec), "refuse() turns every other layer away"
    height, width = spec.kernel_size
    return (folding_of(spec, (height, 1), (1, width)),)


# The decompositions whose ranks are those of matrices, with the matrix of each rank.
_RANKED: Mapping[str, Callable[[LayerSpec, LayerChoice], tuple[Folding, ...]]] = {
    "svd": _svd_foldings,
    "spatial_svd": _spatial_foldings,
    "tucker2": lambda spec, choice: _foldings(spec),
}


def _weakening(choice: LayerChoice, spec: LayerSpec, weight: Tensor, evbmf_ranks: dict[Folding, int]) -> float:
    """The least weakening at which every rank is large enough; `evbmf_ranks` keeps what was computed."""
    if choice.decomposition == "none":
        return 0.0
    if choice.decomposition not in _RANKED:
        return math.inf
    foldings = _RANKED[choice.decomposition](spec, choice)
    for folding in foldings:
        if folding not in evbmf_ranks:
            evbmf_ranks[folding] = max(evbmf_rank(group.cpu().numpy()) for group in folding.matrix(weight))
    pairs = zip(foldings, choice.ranks, strict=True)
    return max(_share_given_up(rank, evbmf_ranks[folding], folding.max_rank) for folding, rank in pairs)


def _share_given_up(rank: int, evbmf: int, full: int) -> float:
    """How far `rank` is from the full one, 0, to EVBMF's, 1; where that finds nothing, the full one is kept."""
    if rank >= full:
        return 0.0
    return (full - rank) / (full - evbmf) if 0 < evbmf < full else math.inf


def _operator_norm(matrices: Tensor) -> float:
    """The largest singular value of several matrices (groups, m, n)."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    # The eigenvalues of the small side take a fraction of the time of singular values, and the largest is as exact.
    return math.sqrt(max(float(torch.linalg.eigvalsh(wide @ wide.mT).max()), 0.0))


def _least_signal(ratio: float) -> float:
    """The positive zero of log(1 + t) + ratio * log(1 + t / ratio) - t, for a ratio up to 1."""
    low, high = math.sqrt(ratio), 3.0
    for _ in range(60):
        middle = (low + high) / 2
        positive = math.log1p(middle) + ratio * math.log1p(middle / ratio) > middle
        low, high = (middle, high) if positive else (low, middle)
    return low


def _free_energies(squares: Floats, least: float, ratio: float) -> Floats:
    """The free energy, up to constants, for each noise: `squares` (n, L) are the squared singular values over it."""
    kept = np.maximum(squares, least) - 1 - ratio
    signal = (kept + np.sqrt(kept**2 - 4 * ratio)) / 2
    # What it gains by a component is nothing at `least`, below which no component is kept.
    gained = np.log1p(signal) + ratio * np.log1p(signal / ratio) - signal
    energies: Floats = (squares - np.log(squares) + gained).sum(axis=1)
    return energies
