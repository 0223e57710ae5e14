"""The losses that a profile predicts, as arrays: by decomposition and by rounding apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ranksearch.candidates import Profile
from ranksearch.optimization.table import Floats, Indices, picked

SMALLEST_LOSS = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTable:
    """Predicted losses by (layer, candidate): by decomposition, by rounding, and which decomposition it is.

    `anchor` is the plan at whose loss the level of drops is told, `unit` a drop that would be too much.
    """

    decomposed: Floats
    rounded: Floats
    method: NDArray[np.int64]
    n_methods: int
    offered: NDArray[np.bool_]
    anchor: Indices
    unit: float

    @classmethod
    def of(cls, profile: Profile, anchor: Sequence[int], unit: float) -> Self:
        """The profile's losses."""
        shape = (len(profile.layers), max((len(layer.candidates) for layer in profile.layers), default=1))
        decomposed, rounded = np.zeros(shape), np.zeros(shape)
        method, offered = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        names = sorted({c.choice.decomposition for layer in profile.layers for c in layer.candidates})
        for row, layer in enumerate(profile.layers):
            n = len(layer.candidates)
            decomposed[row, :n] = [max(c.loss - c.rounding_loss, 0.0) for c in layer.candidates]
            rounded[row, :n] = [c.rounding_loss for c in layer.candidates]
            method[row, :n] = [names.index(c.choice.decomposition) for c in layer.candidates]
            offered[row, :n] = True
        return cls(
            decomposed=decomposed,
            rounded=rounded,
            method=method,
            n_methods=len(names),
            offered=offered,
            anchor=np.array([anchor], dtype=np.int64),
            unit=unit,
        )

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.decomposed)

    def anchor_place(self, power: float) -> float:
        """The logarithm of the anchor's power mean, by the profile's word alone."""
        losses = picked(self.decomposed, self.anchor) ** power + picked(self.rounded, self.anchor) ** power
        return float(np.log(losses.sum() + SMALLEST_LOSS**power) / power)
