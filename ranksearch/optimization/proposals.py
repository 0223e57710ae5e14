"""The plans that are worth a thought: those that prices decode to, and swaps around plans that are good already."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ranksearch.optimization.table import Floats, Indices, Table, picked
from ranksearch.spec import Objective

# So many prices in each direction of latency against bytes, and so many directions.
N_PRICES, N_DIRECTIONS = 40, 5
N_SWAPS = 400
# A swap keeps both costs within this share of the dense model's.
SAME_COST = 0.01


def priced(table: Table, losses: Floats, objectives: tuple[Objective, ...], rng: np.random.Generator) -> Indices:
    """The different plans that prices on latency and bytes decode to, (n_plans, n_layers), the mildest among them.

    `losses` (n_layers, most candidates) take the place of the table's. Directions are drawn, each within its stretch.
    """
    latency, n_bytes = np.zeros(0), np.zeros(0)
    for weight in _latency_weights(objectives, rng):
        prices = _price_range(losses, weight * table.latency + (1 - weight) * table.bytes)
        latency, n_bytes = np.append(latency, weight * prices), np.append(n_bytes, (1 - weight) * prices)
    return np.unique(replace(table, loss=losses).decode(latency, n_bytes), axis=0)


def swapped(table: Table, plans: Indices, rng: np.random.Generator) -> Indices:
    """Plans that differ from one of `plans` in two layers, of which one gives what the other takes.

    Latency and bytes stay within a hundredth of the dense model's. Ties are left alone.
    """
    starts = plans[rng.integers(len(plans), size=N_SWAPS)]
    found = _moved(table, _moved(table, starts, rng), rng)
    same = (np.abs(_costs(table, found) - _costs(table, starts)) <= SAME_COST).all(axis=1)
    return np.unique(found[same], axis=0)


def moved(table: Table, plans: Indices, rng: np.random.Generator) -> Indices:
    """Plans that differ from one of `plans` in one layer, whatever it costs. Ties are left alone."""
    return np.unique(_moved(table, plans[rng.integers(len(plans), size=N_SWAPS)], rng), axis=0)


def _moved(table: Table, plans: Indices, rng: np.random.Generator) -> Indices:
    """Each plan with a random candidate for a random layer."""
    n_candidates = np.isfinite(table.loss).sum(axis=1)
    tied = [row for tie in table.ties for row in tie.rows]
    free = np.setdiff1d(np.flatnonzero(n_candidates > 1), tied)
    if len(free) == 0:
        return plans
    rows = free[rng.integers(len(free), size=len(plans))]
    changed = plans.copy()
    changed[np.arange(len(plans)), rows] = rng.integers(n_candidates[rows])
    return changed


def _latency_weights(objectives: tuple[Objective, ...], rng: np.random.Generator) -> Floats:
    """How much latency weighs against bytes in each direction; what is no objective weighs little, and not nothing."""
    if "latency" not in objectives:
        return np.array([0.02])
    if "bytes" not in objectives:
        return np.array([0.98])
    return (np.arange(N_DIRECTIONS) + rng.random(N_DIRECTIONS)) / N_DIRECTIONS


def _price_range(losses: Floats, costs: Floats) -> Floats:
    """Prices at which single layers leave their mildest candidate, or come to their cheapest.

    Not all of them, but as many in each stretch as there are such changes; the first is zero, the last beyond all.
    """
    offered = np.isfinite(losses)
    mildest, cheapest = losses.argmin(axis=1), np.where(offered, costs, np.inf).argmin(axis=1)
    changes = np.concatenate([_worth(losses, costs, end, offered) for end in (mildest, cheapest)])
    if len(changes) == 0:
        return np.zeros(1)
    inner = np.quantile(changes, np.linspace(0, 1, N_PRICES - 2))
    return np.concatenate([[0.0], inner, [2 * inner[-1]]])


def _worth(losses: Floats, costs: Floats, end: Indices, offered: NDArray[np.bool_]) -> Floats:
    """The loss per saved cost between each layer's candidate at one `end` and its others, where there is a trade."""
    rows = np.arange(len(end))
    lost = losses - losses[rows, end][:, None]
    saved = costs[rows, end][:, None] - costs
    trade = offered & (lost * saved > 0)
    return lost[trade] / saved[trade]


def _costs(table: Table, plans: Indices) -> Floats:
    """Latency and bytes of plans as shares of the dense model's, (n_plans, 2)."""
    return np.stack([picked(table.latency, plans).sum(axis=1), picked(table.bytes, plans).sum(axis=1)], axis=1)
