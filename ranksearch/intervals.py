"""95 % intervals of paired differences; none has zero width, since no finite sample proves that nothing changes."""

from collections.abc import Callable
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
N_RESAMPLES = 400
Interval = tuple[float, float]


def flips_interval(n_worse: int, n_better: int, n_examples: int) -> Interval:
    """Agresti and Min's interval (2005) of the share that gets worse minus the share that gets better.

    It adds half an example to each of the four cells of the paired table.
    """
    n = n_examples + 2
    difference = (n_worse - n_better) / n
    variance = ((n_worse + n_better + 1) / n - difference**2) / n
    half_width = _normal_quantile() * sqrt(variance)
    return max(difference - half_width, -1.0), min(difference + half_width, 1.0)


def mean_interval(differences: NDArray[np.float64], spread: float) -> Interval:
    """Student's interval of the mean of `differences`; `spread` stands in for their unknown size if all are equal."""
    n, mean = len(differences), float(differences.mean())
    deviation = float(differences.std(ddof=1)) if n > 1 else 0.0
    half_width = student_quantile(n - 1) * deviation / sqrt(n) if deviation > 0 else unseen_change(spread, n)
    return mean - half_width, mean + half_width


def bootstrap_interval(
    resampled: Callable[[NDArray[np.int64]], Interval], n_examples: int, seed: int
) -> Interval | None:
    """The percentile interval over resampled examples of the second of what `resampled(rows)` gives.

    The first is the dense score on these rows, whose spread tells the weight of one example where no resample
    changes anything. None where most resamples give no finite number.
    """
    random = np.random.default_rng(seed)
    pairs = np.array([resampled(random.integers(0, n_examples, n_examples)) for _ in range(N_RESAMPLES)])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if len(pairs) < N_RESAMPLES / 2:
        return None
    low, high = np.quantile(pairs[:, 1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if high > low:
        return float(low), float(high)
    spread = float(pairs[:, 0].std()) * sqrt(n_examples) or 1.0
    half_width = unseen_change(spread, n_examples)
    return float(low) - half_width, float(high) + half_width


def unseen_change(spread: float, n_examples: int) -> float:
    """The mean change that could have gone unseen: by the rule of three, 3 in n examples, each by `spread`."""
    return 3 / n_examples * spread


def student_quantile(degrees: int) -> float:
    """Student's two-sided 95 % quantile: exact for one and two degrees of freedom, else by Cornish and Fisher."""
    exact = {1: 12.7062, 2: 4.3027}
    if degrees in exact:
        return exact[degrees]
    z = _normal_quantile()
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum((term / float(degrees) ** (i + 1) for i, term in enumerate(terms)), 0.0)


def _normal_quantile() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
