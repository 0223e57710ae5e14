"""A plan's loss out of its layers': how their errors meet, fitted to measured plans."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]

COHERENCES = np.linspace(0.0, 1.0, 101)
# Beyond so many nats of KL outputs are arbitrary and losses saturate: more says nothing of how errors add up.
SATURATED = 1.0
SMALLEST_LOSS = 1e-12


class LossModel(BaseModel):
    """`(1 - coherence) * sum of losses + coherence * (sum of their square roots)^2`, in nats of KL.

    A loss goes with the square of an error. Errors that are independent add up in power (coherence 0), those of one
    direction in amplitude (coherence 1); truncations shrink what layers compute, so that theirs are alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    coherence: float = 0.0

    @classmethod
    def fit(cls, losses: Sequence[Sequence[float]], measured: Sequence[float]) -> Self:
        """The coherence of least mean deviation, in the logarithm, from what plans with these layers' losses measured.

        Of equals the least; 0 where no plan says anything.
        """
        layers = [np.array(plan, dtype=np.float64) for plan in losses]
        deviations = np.abs(_log_loss(_sums(layers)) - _log_loss(np.array(measured, dtype=np.float64))[:, None])
        return cls(coherence=float(COHERENCES[deviations.sum(axis=0).argmin()]))

    def predict(self, losses: Sequence[float]) -> float:
        """The loss of a plan whose layers alone lose these."""
        return float(_joined(np.array(losses, dtype=np.float64), np.array([self.coherence]))[0])


def _sums(layers: Sequence[Floats]) -> Floats:
    """Each plan's loss at each coherence, (n_plans, n_coherences)."""
    return np.array([_joined(plan, COHERENCES) for plan in layers]).reshape(len(layers), len(COHERENCES))


def _joined(losses: Floats, coherences: Floats) -> Floats:
    together: Floats = (1 - coherences) * losses.sum() + coherences * np.sqrt(losses).sum() ** 2
    return together


def _log_loss(losses: Floats) -> Floats:
    return np.log(np.clip(losses, SMALLEST_LOSS, SATURATED))
