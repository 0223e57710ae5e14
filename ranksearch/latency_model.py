"""Whole-model latency out of the sum of its layers': a straight line, fitted to measured plans."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]

# How far off, relative to what was measured, a plan lies by noise and by what no sum can tell.
NOISE = 0.03
# How far intercept and slope are expected from 0 and 1, which a few plans at one place cannot tell apart.
SPREAD = 0.5
HUBER = 1.345  # of robust regression: residuals beyond so many deviations count linearly
N_REWEIGHTINGS = 20
SMALLEST_SLOPE = 0.05


class LatencyModel(BaseModel):
    """`intercept + slope * sum`: a plan's latency over dense's, where `sum` is the layer table's figure for it.

    A table's sum overlooks what layers do to one another, such as kernels that fuse and tensors that are read where
    they lie; the line makes up for that. Without `sums` that were `measured` it is the table's own figure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    intercept: float = 0.0
    slope: float = 1.0
    sums: tuple[float, ...] = ()
    measured: tuple[float, ...] = ()

    @classmethod
    def fit(cls, sums: Sequence[float], measured: Sequence[float]) -> Self:
        """The line of least relative error through (sum, measured ratio), outliers weighed down (Huber, 1964)."""
        line = _huber_line(np.array(sums, dtype=np.float64), np.array(measured, dtype=np.float64))
        return cls(
            intercept=float(line[0]),
            slope=float(line[1]),
            sums=tuple(float(value) for value in sums),
            measured=tuple(float(value) for value in measured),
        )

    def with_measured(self, sums: Sequence[float], measured: Sequence[float]) -> Self:
        """The line fitted to these plans beside those that it was fitted to."""
        return self.fit((*self.sums, *sums), (*self.measured, *measured)) if len(sums) else self

    def predict(self, total: float) -> float:
        """The latency ratio of a plan whose layers sum up to `total`; a straight line, as prices decode by it."""
        return self.intercept + self.slope * total


def _huber_line(sums: Floats, measured: Floats) -> Floats:
    """(intercept, slope) by reweighted least squares; slopes that say that faster layers make a slower model are cut.

    Two rows more, of what is expected of either, keep plans that are all alike from turning the line.
    """
    rows = np.stack([np.ones_like(sums), sums], axis=1) / (NOISE * measured[:, None])
    wanted = np.full_like(measured, 1 / NOISE)
    expected = np.eye(2) / SPREAD
    weights = np.ones_like(measured)
    line = np.array([0.0, 1.0])
    for _ in range(N_REWEIGHTINGS):
        stacked = np.concatenate([rows * weights[:, None], expected])
        line = np.linalg.lstsq(stacked, np.concatenate([wanted * weights, expected[:, 1]]), rcond=None)[0]
        residuals = np.abs(rows @ line - wanted)
        weights = np.sqrt(HUBER / np.maximum(residuals / _deviation(residuals), HUBER))
    if line[1] < SMALLEST_SLOPE:
        intercepts: Any = measured - SMALLEST_SLOPE * sums
        line = np.array([np.median(intercepts), SMALLEST_SLOPE])
    return line


def _deviation(residuals: Floats) -> float:
    """The standard deviation that the median tells of, but no less than noise alone."""
    return max(float(np.median(residuals)) / 0.6745, 1.0)
