"""Does what is known of a plan before training order plans of like latency as their fine-tuned drops do?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from search_evaluations import Evaluations, Indices, Row

from ranksearch.optimization.proposals import moved, priced
from ranksearch.optimization.table import Floats, Table
from ranksearch.spec import OBJECTIVES

# Where on the way from the fastest plan to dense the bands lie, where plans lose what training cannot give back.
BANDS = (0.03, 0.08, 0.2)
N_BANDS, N_PER_BAND, HALF_WIDTH = len(BANDS), 10, 0.025
# Plans in a band must differ in what they spare: losses are multiplied by random factors before they are decoded.
N_DRAWS, SPREAD, N_MOVES = 40, 1.0, 5
SIGNALS = ("predicted", "quick", "distance")


def agreement(evaluations: Evaluations) -> dict[str, Any]:
    """By band its plans' figures, and the rank correlation of each signal with the fine-tuned drops inside bands."""
    bands = [[_figures(evaluations, indices) for indices in band] for band in banded_plans(evaluations.profile)]
    return {
        "bands": bands,
        "correlation": {signal: _within(bands, signal) for signal in SIGNALS},
        "test": _within(bands, "fine_tuned", against="test"),
    }


def agreement_lines(name: str, figures: Mapping[str, Any]) -> list[str]:
    """The figures as they are printed."""
    lines = [f"  {name}: rank correlation with the fine-tuned drop, by band and their mean"]
    for signal, found in figures["correlation"].items():
        lines.append(f"    {signal:10} " + ", ".join(f"{value:.2f}" for value in found) + f"; {np.mean(found):.2f}")
    same = figures["test"]
    lines.append(f"    fine-tuned on validation with fine-tuned on test images: {np.mean(same):.2f}")
    for place, band in zip(BANDS, figures["bands"], strict=True):
        spans = {column: [row[column] for row in band] for column in ("latency", "quick", "fine_tuned")}
        told = ", ".join(f"{column} {min(values):.3f} to {max(values):.3f}" for column, values in spans.items())
        lines.append(f"    band at {place:g}: {told}")
    return lines


def banded_plans(profile: Any) -> list[list[Indices]]:
    """In each band ten plans, the same for the same table: decoded after random factors on the layers' losses, and such
    with one layer changed.
    """
    table, rng = Table.of(profile), np.random.default_rng(0)
    factors = rng.lognormal(0.0, SPREAD, size=(N_DRAWS, len(profile.layers), 1))
    decoded = np.concatenate([priced(table, f * table.loss, OBJECTIVES, rng) for f in factors])
    plans = np.unique(np.concatenate([decoded, *(moved(table, decoded, rng) for _ in range(N_MOVES))]), axis=0)
    latencies = table.latency_ratios(plans)
    bands = []
    for place in BANDS:
        centre = latencies.min() + place * (1 - latencies.min())
        inside = np.flatnonzero(np.abs(latencies / centre - 1) <= HALF_WIDTH)
        chosen = rng.permutation(inside)[:N_PER_BAND]
        bands.append([tuple(int(i) for i in plans[row]) for row in sorted(chosen)])
    return bands


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; 0 where either is constant."""
    a, b = _ranks(np.array(first)), _ranks(np.array(second))
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    below = (values[None] < values[:, None]).sum(axis=1)
    return below + ((values[None] == values[:, None]).sum(axis=1) - 1) / 2


def _within(bands: Sequence[Sequence[Row]], signal: str, against: str = "fine_tuned") -> list[float]:
    return [rank_correlation([row[signal] for row in band], [row[against] for row in band]) for band in bands]


def _figures(evaluations: Evaluations, indices: Indices) -> Row:
    figures = evaluations.figures(indices)
    trained = evaluations.fine_tuned(indices)
    loss, latency, _ = evaluations.profile.predict(indices)
    return {
        "indices": list(indices),
        "predicted": loss,
        "latency": latency,
        "quick": figures.drop,
        "distance": figures.distance,
        "fine_tuned": trained["drop"],
        "test": trained["test"],
    }
