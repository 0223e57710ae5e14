"""Sweeps of prices: the plans that Lagrange multipliers on latency and bytes decode to, from dense to the smallest."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.optimization.space import settled
from ranksearch.optimization.table import Floats, Table, Tie
from ranksearch.spec import OBJECTIVES, Objective

Plans = list[tuple[int, ...]]

# How much latency and bytes weigh in each direction of a sweep. None is zero: among equally fast choices the smaller.
DIRECTIONS: dict[frozenset[str], tuple[tuple[float, float], ...]] = {
    frozenset({"latency", "bytes"}): ((0.5, 0.5), (0.95, 0.05), (0.05, 0.95)),
    frozenset({"latency"}): ((0.95, 0.05),),
    frozenset({"bytes"}): ((0.05, 0.95),),
}

# A layer may cost nothing by the table, whose figures are differences of measurements.
SMALLEST_COST = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Rows that are decided together; what they may be, candidates of each row, with their sums of loss and cost."""

    rows: tuple[int, ...]
    points: list[tuple[int, ...]]
    loss: Floats
    cost: Floats


def price_path(table: Table, latency_weight: float, bytes_weight: float) -> Plans:
    """Every plan that some price from 0 to infinity on the weighted cost decodes to, from least loss to least cost."""
    cost = latency_weight * table.latency + bytes_weight * table.bytes
    tied = {row for tie in table.ties for row in tie.rows}
    units = [_single(row, row, table.loss, cost) for row in range(len(cost)) if row not in tied]
    return _path([*units, *(_together(tie, table.loss, cost) for tie in table.ties)], len(cost))


def _path(units: Sequence[_Unit], n_rows: int) -> Plans:
    """The plans that some price decodes to, dearest first, of rows that are decided unit by unit."""
    steps = [step for i, unit in enumerate(units) for step in _hull(i, unit.loss, unit.cost)]
    steps.sort()
    current = [0] * n_rows
    path: Plans = []
    for i, (price, unit, point) in enumerate(steps):
        for row, index in zip(units[unit].rows, units[unit].points[point], strict=True):
            current[row] = index
        if i + 1 == len(steps) or steps[i + 1][0] > price:
            path.append(tuple(current))
    return path


def _single(place: int, row: int, loss: Floats, cost: Floats, allowed: Sequence[int] | None = None) -> _Unit:
    """A row of the table that is decided alone, as the row `place` of a plan, out of its `allowed` candidates."""
    indices = list(range(loss.shape[1])) if allowed is None else list(allowed)
    return _Unit(rows=(place,), points=[(i,) for i in indices], loss=loss[row, indices], cost=cost[row, indices])


def _together(tie: Tie, loss: Floats, cost: Floats) -> _Unit:
    """The layers of a tie as one: in each bits what some price would decode them to, which no other price betters."""
    points: Plans = []
    for alike in tie.alike:
        alone = [
            _single(place, row, loss, cost, allowed)
            for place, (row, allowed) in enumerate(zip(tie.rows, alike, strict=True))
        ]
        points += _path(alone, len(tie.rows))
    rows = list(tie.rows)
    sums = [np.array([figures[rows, list(point)].sum() for point in points]) for figures in (loss, cost)]
    return _Unit(rows=tie.rows, points=points, loss=sums[0], cost=sums[1])


def price_sweep(
    profile: Profile, n: int, seed: int, objectives: Sequence[Objective] = OBJECTIVES
) -> list[tuple[int, ...]]:
    """`n` different plans from dense to the most compressed one, spread over the predicted front.

    Half weigh latency and bytes alike, the others mostly one of them; `seed` moves each within its stretch of the
    front. Fewer than `n` where the front holds fewer. Sorted from dear to cheap; dense first, the cheapest last.
    """
    table = Table.of(profile)
    directions = _directions(objectives)
    paths = [price_path(table, *weights) for weights in directions]
    cheapest = paths[0][-1] if paths[0] else table.dense
    ends = list(dict.fromkeys([table.dense, cheapest]))[: max(n, 0)]
    inner = _spread(table, paths, directions, n - len(ends), taken=set(ends), rng=np.random.default_rng(seed))
    inner.sort(key=lambda plan: -_cost(table, plan, directions[0]))
    return ends[:1] + inner + ends[1:]


def uniform(profile: Profile, share: float = 0.5) -> tuple[int, ...]:
    """For every layer the candidate of least loss that takes at most `share` of the undecomposed layer at its best.

    At its best: the least latency and the fewest bytes of any bits on offer. Where no candidate is that cheap, the
    one that comes nearest.
    """
    return settled(profile, [_uniform_choice(layer, share) for layer in profile.layers])


def _uniform_choice(layer: LayerProfile, share: float) -> int:
    plain = [c for c in layer.candidates if c.choice.decomposition == "none"]
    most_ms = share * min(c.latency_ms for c in plain)
    most_bytes = share * min(c.n_bytes for c in plain)

    def excess_then_loss(index: int) -> tuple[float, float]:
        candidate = layer.candidates[index]
        excess_ms = (candidate.latency_ms - most_ms) / max(most_ms, 1e-12)
        excess_bytes = (candidate.n_bytes - most_bytes) / max(most_bytes, 1e-12)
        return max(excess_ms, excess_bytes, 0.0), candidate.loss

    return min(range(len(layer.candidates)), key=excess_then_loss)


def coarse_to_fine(plans: Plans) -> Plans:
    """The same plans, ends first, then middles of ever smaller stretches: a sweep cut short still spans the front."""
    if len(plans) < 3:
        return list(plans)
    order, stretches = [0, len(plans) - 1], deque([(0, len(plans) - 1)])
    while stretches:
        low, high = stretches.popleft()
        middle = (low + high) // 2
        if middle > low:
            order.append(middle)
            stretches += [(low, middle), (middle, high)]
    return [plans[i] for i in order]


def _hull(unit: int, loss: Floats, cost: Floats) -> list[tuple[float, int, int]]:
    """One unit's walk down the lower convex hull of (cost, loss): (price from which it is taken, unit, point)."""
    order = np.lexsort((cost, loss))
    current = int(order[0])
    walk = [(0.0, unit, current)]
    while True:
        cheaper = np.flatnonzero((cost < cost[current]) & np.isfinite(loss))
        if len(cheaper) == 0:
            return walk
        prices = (loss[cheaper] - loss[current]) / (cost[current] - cost[cheaper])
        best = int(np.lexsort((cost[cheaper], prices))[0])
        current = int(cheaper[best])
        walk.append((float(prices[best]), unit, current))


def _directions(objectives: Sequence[Objective]) -> tuple[tuple[float, float], ...]:
    """The directions of a sweep for these objectives, the main one first."""
    return DIRECTIONS.get(frozenset(objectives) - {"drop"}, DIRECTIONS[frozenset({"latency", "bytes"})])


def _log_costs(table: Table, plans: Sequence[tuple[int, ...]], weights: tuple[float, float]) -> Floats:
    """The logarithms of the plans' weighted costs: twice as small is worth the same anywhere."""
    costs = np.array([_cost(table, plan, weights) for plan in plans], dtype=np.float64)
    return np.log(np.maximum(costs, SMALLEST_COST))


def _cost(table: Table, plan: tuple[int, ...], weights: tuple[float, float]) -> float:
    """The plan's weighted cost, over the layers of the table."""
    rows = np.arange(len(plan))
    return float((weights[0] * table.latency[rows, list(plan)] + weights[1] * table.bytes[rows, list(plan)]).sum())


def _spread(
    table: Table,
    paths: list[Plans],
    directions: Sequence[tuple[float, float]],
    n: int,
    taken: set[tuple[int, ...]],
    rng: np.random.Generator,
) -> Plans:
    """`n` plans that are not `taken`, spread along each path; what one path cannot give, the others do."""
    chosen: Plans = []
    n_others = len(directions) - 1
    shares = [max(n, 0) - 2 * (max(n, 0) // 4)] + [max(n, 0) // 4] * n_others if n_others else [max(n, 0)]
    for path, weights, share in zip(paths, directions, shares, strict=True):
        chosen += _along(table, path, weights, share, taken | set(chosen), rng)
    for path, weights in zip(paths, directions, strict=True):
        chosen += _along(table, path, weights, n - len(chosen), taken | set(chosen), rng)
    return chosen


def _along(
    table: Table,
    path: Plans,
    weights: tuple[float, float],
    n: int,
    taken: set[tuple[int, ...]],
    rng: np.random.Generator,
) -> Plans:
    """Up to `n` plans of the path, one near a random place of each of `n` stretches of its cost.

    Stretches are equal in the logarithm, since drops begin where cost is low.
    """
    free = [plan for plan in dict.fromkeys(path) if plan not in taken]
    costs = _log_costs(table, free, weights)
    left = costs.copy()
    chosen: Plans = []
    for stretch in range(min(n, len(free))):
        place = (stretch + rng.uniform(0.25, 0.75)) / n
        nearest = int(np.abs(left - (costs.max() - place * np.ptp(costs))).argmin())
        left[nearest] = np.inf
        chosen.append(free[nearest])
    return chosen
