"""The candidate table as arrays, and prices on latency and bytes, which decode to one plan each, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ranksearch.candidates import Profile
from ranksearch.latency_model import LatencyModel

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tie:
    """Layers, by their rows, that share their bits; for each bits on offer, the candidates of each layer in them."""

    rows: tuple[int, ...]
    alike: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The candidates as arrays (n_layers, most candidates); latency and bytes as shares of the dense model's.

    `latency_rest` and `bytes_rest` are what is the same in every plan. Rows with fewer candidates are filled up with
    infinite loss at no cost, which no finite price ever takes.
    """

    loss: Floats
    latency: Floats
    bytes: Floats
    dense: tuple[int, ...]
    latency_rest: float = 0.0
    bytes_rest: float = 0.0
    ties: tuple[Tie, ...] = ()

    @classmethod
    def of(cls, profile: Profile, losses: Sequence[Sequence[float] | Floats] | None = None) -> Self:
        """The profile's table; `losses`, one sequence per layer, take the place of the predicted ones."""
        return cls.of_layers(profile, losses).timed_by(profile.latency_model)

    @classmethod
    def of_layers(cls, profile: Profile, losses: Sequence[Sequence[float] | Floats] | None = None) -> Self:
        """The same with latencies as the layers' own figures sum up to."""
        shape = (len(profile.layers), max((len(layer.candidates) for layer in profile.layers), default=1))
        loss, latency, n_bytes = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        for row, layer in enumerate(profile.layers):
            n = len(layer.candidates)
            loss[row, :n] = [c.loss for c in layer.candidates] if losses is None else losses[row][:n]
            latency[row, :n] = [c.latency_ms for c in layer.candidates]
            n_bytes[row, :n] = [c.n_bytes for c in layer.candidates]
        latency /= profile.dense_latency_ms
        n_bytes /= profile.dense_bytes
        dense = tuple(layer.dense for layer in profile.layers)
        rows = np.arange(len(dense))
        return cls(
            loss=loss,
            latency=latency,
            bytes=n_bytes,
            dense=dense,
            latency_rest=1 - float(latency[rows, list(dense)].sum()),
            bytes_rest=1 - float(n_bytes[rows, list(dense)].sum()),
            ties=tuple(Tie(rows=tied, alike=tuple(profile.alike(tied))) for tied in profile.tied_rows()),
        )

    def latency_ratios(self, plans: Indices) -> Floats:
        """Predicted latency over dense's of plans (n_plans, n_layers)."""
        ratios: Floats = self.latency_rest + picked(self.latency, plans).sum(axis=1)
        return ratios

    def bytes_ratios(self, plans: Indices) -> Floats:
        """Bytes over dense's of plans (n_plans, n_layers)."""
        ratios: Floats = self.bytes_rest + picked(self.bytes, plans).sum(axis=1)
        return ratios

    def timed_by(self, model: LatencyModel) -> Self:
        """A table of the layers' own figures, its latency as `model` makes of them."""
        return replace(self, latency=model.slope * self.latency, latency_rest=model.predict(self.latency_rest))

    def decode(self, latency_prices: Floats, bytes_prices: Floats) -> Indices:
        """For each pair of prices (n_prices,) the plan of least loss + price * cost, as indices (n_prices, n_layers).

        Exact, since the sum parts into layers and ties; of equals, the first candidate.
        """
        shape = (-1, 1, 1)
        costs = self.loss + latency_prices.reshape(shape) * self.latency + bytes_prices.reshape(shape) * self.bytes
        plans: Indices = costs.argmin(axis=2)
        for tie in self.ties:
            plans[:, list(tie.rows)] = _decode_tie(tie, costs)
        return plans


def picked(figures: Floats, plans: Indices) -> Floats:
    """What the plans (n_plans, n_layers) take out of figures by (layer, candidate)."""
    return figures[np.arange(figures.shape[0]), plans]


def decode(
    profile: Profile,
    latency_price: float,
    bytes_price: float,
    losses: Sequence[Sequence[float] | Floats] | None = None,
) -> tuple[int, ...]:
    """The plan of least loss + latency_price * latency ratio + bytes_price * bytes ratio, as candidates' indices.

    Prices are in nats per whole dense model, so they mean the same on every model. `losses`, one sequence per layer,
    take the place of the predicted ones.
    """
    plans = Table.of(profile, losses).decode(np.array([latency_price]), np.array([bytes_price]))
    return tuple(int(index) for index in plans[0])


def _decode_tie(tie: Tie, costs: Floats) -> Indices:
    """The candidates of tied layers, in the bits of least cost together, (n_prices, n_tied)."""
    choices, sums = [], []
    for alike in tie.alike:
        found = [(allowed, costs[:, row, list(allowed)]) for row, allowed in zip(tie.rows, alike, strict=True)]
        choices.append(np.stack([np.array(allowed)[cost.argmin(axis=1)] for allowed, cost in found], axis=1))
        sums.append(np.sum([cost.min(axis=1) for _, cost in found], axis=0))
    best = np.argmin(sums, axis=0)
    chosen: Indices = np.stack(choices)[best, np.arange(len(best))]
    return chosen
