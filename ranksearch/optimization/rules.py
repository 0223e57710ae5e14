"""Published rules that choose every layer's candidate by one knob."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ranksearch.errors import StudyError
from ranksearch.optimization.table import Floats, Indices, picked

# Below this, savings count as nothing.
SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTable:
    """The candidates in one kind of bits as arrays (n_layers, most candidates): all that rules see.

    `cost` is what plans' sums are compared by; `share` the larger of a candidate's latency and bytes over those of the
    layer undecomposed; the others are figures to keep small, as in `WeightErrors`. What is not on offer in these bits
    has infinite figures and an infinite share; every layer has one candidate at least whose figures are finite.
    """

    cost: Floats
    share: Floats
    loss: Floats
    energy_lost: Floats
    spectral_error: Floats
    weakening: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """The plans (n_plans, n_layers) of a rule, mildest first, each with the least knob (n_plans,) that gives it."""

    knobs: Floats
    plans: Indices

    def at(self, knob: float) -> tuple[int, ...]:
        """The plan at a knob from 0, the mildest, to 1, the harshest. Raises StudyError for any other knob."""
        if not 0 <= knob <= 1:
            raise StudyError(f"knob {knob} is not between 0, the mildest plan, and 1, the harshest")
        row = np.searchsorted(self.knobs, knob, side="right") - 1
        return tuple(self.plans[row].tolist())


Rule = Callable[[RuleTable], Path]


def by_share(table: RuleTable) -> Path:
    """For every layer the candidate of least loss that takes at most the share 1 - knob of the undecomposed layer.

    Where none is that cheap, the cheapest: what `prices.uniform` gives where all candidates have the same bits.
    """
    shares = np.unique(np.append(table.share[table.share < 1], 1.0))[::-1]
    return _path(_after(1 - shares), _walk(table.share, table.loss, shares))


def by_energy(table: RuleTable) -> Path:
    """For every layer the cheapest candidate that keeps a share, one for all, of its squared Frobenius norm.

    "SVD-Energy" in the comparison of Liebenwein et al., 2021, after Alvarez and Salzmann, "Compression-aware training
    of deep networks", 2017. Usual shares are 0.9 (the rule of thumb in Leskovec, Rajaraman and Ullman, "Mining of
    massive datasets"), 0.95 and 0.99; here it is the largest that saves what the knob asks for.
    """
    return _by_budget(table, table.energy_lost)


def by_evbmf(table: RuleTable) -> Path:
    """For every layer the cheapest candidate that keeps the ranks of EVBMF, weakened: full ones at 0, EVBMF's at 1.

    After Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications",
    2016 (arXiv 1511.06530); weakened as in MUSCO (Gusak et al., "Automated multi-stage compression of neural
    networks", 2019), whose smallest rank of 21 is left out, since the candidates have theirs.
    """
    weakenings = np.unique(np.append(table.weakening[table.weakening <= 1], 0.0))
    return _path(weakenings, _walk(table.weakening, table.cost, weakenings))


def by_operator_norm(table: RuleTable) -> Path:
    """The plan whose largest relative error in operator norm is the least at which it saves what the knob asks for.

    So ALDS allots a budget among layers (Liebenwein et al., "Compressing neural networks: towards determining the
    optimal layer-wise decomposition", 2021, arXiv 2107.11442).
    """
    return _by_budget(table, table.spectral_error)


def by_own_loss(table: RuleTable) -> Path:
    """For every layer the cheapest candidate that loses, alone in the model, at most what one threshold allows.

    AIMET's greedy compression ratio selection (its documentation, "AIMET greedy compression ratio selection"): a
    dictionary of scores with one layer compressed at a time, then the score that every layer may fall to for the
    model to meet its target. The scores here are the table's one-shot losses.
    """
    return _by_budget(table, table.loss)


RULES: Mapping[str, Rule] = {
    "uniform": by_share,
    "energy": by_energy,
    "evbmf": by_evbmf,
    "alds": by_operator_norm,
    "greedy": by_own_loss,
}
# The rules that know nothing of a candidate without `WeightErrors`.
NEED_WEIGHT_ERRORS = frozenset({"energy", "evbmf", "alds"})


def _path(knobs: Floats, plans: Indices) -> Path:
    """The path without plans that repeat the one before."""
    new = np.append(True, (plans[1:] != plans[:-1]).any(axis=1))
    return Path(knobs=knobs[new], plans=plans[new])


def _after(ends: Floats) -> Floats:
    """The least knobs of plans that are given up to these ones, the first from 0."""
    return np.append(0.0, np.minimum(np.nextafter(ends[:-1], np.inf), 1.0))


def _by_budget(table: RuleTable, figures: Floats) -> Path:
    """The plans of thresholds on the figures; the knob is the least share of what they can save that a plan saves."""
    thresholds = np.unique(figures[np.isfinite(figures)])
    plans = _path(thresholds, _walk(figures, table.cost, thresholds)).plans
    cost = picked(table.cost, plans).sum(axis=1)
    saved = (cost[0] - cost) / max(float(cost[0] - cost[-1]), SMALLEST)
    # Sums of floats can stay, or grow by a rounding error, where the plan gets cheaper.
    return Path(knobs=_after(np.maximum.accumulate(np.clip(saved, 0.0, 1.0))), plans=plans)


def _walk(figures: Floats, preferred: Floats, thresholds: Floats) -> Indices:
    """For each threshold (n,) the plan (n, n_layers) of the candidates within it that are `preferred` least.

    Layers with none within take the candidate of the least figure; of equally preferred ones, too.
    """
    plans = np.empty((len(thresholds), len(figures)), dtype=np.int64)
    for row, (figure, preference) in enumerate(zip(figures, preferred, strict=True)):
        order = np.lexsort((preference, figure))
        least_before = np.minimum.accumulate(np.append(np.inf, preference[order][:-1]))
        better = np.where(preference[order] < least_before, np.arange(len(order)), 0)
        n_within = np.searchsorted(figure[order], thresholds, side="right")
        plans[:, row] = order[np.maximum.accumulate(better)][np.maximum(n_within - 1, 0)]
    return plans
