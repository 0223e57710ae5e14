"""Published rules as Optuna samplers: a rule's plans, from coarse to fine along its knob, one for every trial."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.errors import StudyError
from ranksearch.optimization.prices import DIRECTIONS, Plans, coarse_to_fine, price_sweep
from ranksearch.optimization.rules import NEED_WEIGHT_ERRORS, RULES, SMALLEST, Path, Rule, RuleTable
from ranksearch.optimization.space import distributions
from ranksearch.optimization.table import Floats, Indices, Table
from ranksearch.optimization.weight_errors import Figures, WeightErrors
from ranksearch.plan import DENSE, LayerChoice
from ranksearch.spec import OBJECTIVES, Objective

Mask = NDArray[np.bool_]

# After so many knobs, what plans they have missed come in order.
N_KNOBS = 1025
# Whatever the number of trials, so that a study that goes on has the plans that it would have had.
N_PRICES = 128


@final
class RuleSampler(BaseSampler):
    """Proposes the plans of a published rule: one integer parameter per layer, named as it, the candidate's index.

    `rule` is one of ORDERS. The plans come from coarse to fine along the rule's knob, in turn for each of the bits on
    offer, and each once: what any trial of the study has, running and waiting ones too, is passed over. The study's
    trials are the only state. When no plan is left, it repeats the last one. `seed` and `n_prices` are the price
    sweep's. Raises StudyError for an unknown rule, and for one that goes by the weights without their `errors`.
    """

    def __init__(
        self,
        profile: Profile,
        rule: str,
        errors: WeightErrors | None = None,
        *,
        objectives: Sequence[Objective] = OBJECTIVES,
        seed: int = 0,
        n_prices: int = N_PRICES,
    ) -> None:
        if rule not in ORDERS:
            raise StudyError(f"rule {rule!r} is unknown; choose one of {sorted(ORDERS)}")
        if rule in NEED_WEIGHT_ERRORS and errors is None:
            raise StudyError(f"rule {rule!r} goes by the weights' errors: give those of measure_weights(...)")
        self._space = distributions(profile)
        rows = [row for row, layer in enumerate(profile.layers) if layer.name in self._space]
        order = ORDERS[rule](profile, errors, objectives, seed, n_prices)
        self._plans = list(dict.fromkeys(tuple(plan[row] for row in rows) for plan in order))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every layer that has a choice."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The rule's next plan."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        plans = [self._plan_of(other) for other in others]
        taken = set(plans)
        # What was asked for before this one, but has not said its plan yet, takes the first that are free.
        earlier = [other.state is TrialState.RUNNING and other.number < trial.number for other in others]
        n_ahead = sum(plan is None and ahead for plan, ahead in zip(plans, earlier, strict=True))
        free = (plan for plan in self._plans if plan not in taken)
        plan = next(islice(free, n_ahead, None), self._plans[-1])
        return {name: index for name, index in zip(self._space, plan, strict=True) if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Raises StudyError: what the table does not hold has no value."""
        known = self._space.get(param_name, "no layer of the table with a choice")
        raise StudyError(f"parameter {param_name!r} is asked for as {param_distribution}, but is {known}")

    def _plan_of(self, trial: FrozenTrial) -> tuple[int, ...] | None:
        """The plan that a trial has, or is queued with; None where it has none yet."""
        params = trial.params
        if len(params) < len(self._space):
            params = {**trial.system_attrs.get("fixed_params", {}), **params}
        try:
            return tuple(params[name] for name in self._space)
        except KeyError:
            return None


def rule_tables(
    profile: Profile, errors: WeightErrors | None = None, objectives: Sequence[Objective] = OBJECTIVES
) -> list[RuleTable]:
    """A table for each kind of bits that every layer offers which offers any beside dense's, most bits first.

    Layers that offer no other, and those tied to one, stay at dense's bits in all of them. The cost is latency, bytes
    or half of each, as the objectives say, in shares of the dense model's. Without `errors` their figures are infinite
    but for undecomposed layers. Raises StudyError for errors of other candidates.
    """
    table = Table.of(profile)
    plain = _is_plain(profile, table.loss.shape)
    latency_weight, bytes_weight = DIRECTIONS.get(
        frozenset(objectives) - {"drop"}, DIRECTIONS[frozenset({"latency", "bytes"})]
    )[0]
    cost = latency_weight * table.latency + bytes_weight * table.bytes
    unknown = np.where(plain, 0.0, np.inf)
    energy_lost, spectral_error, weakening = (
        (unknown, unknown, unknown)
        if errors is None
        else [_array(profile, rows) for rows in (errors.energy_lost, errors.spectral_error, errors.weakening)]
    )
    return [
        RuleTable(
            cost=cost,
            share=np.where(offered, _shares(table, plain & offered), np.inf),
            loss=np.where(offered, table.loss, np.inf),
            energy_lost=np.where(offered, energy_lost, np.inf),
            spectral_error=np.where(offered, spectral_error, np.inf),
            weakening=np.where(offered, weakening, np.inf),
        )
        for offered in _offers(profile, table.loss.shape)
    ]


def visiting_order(path: Path) -> Indices:
    """The plans of a path, each once, in the order in which knobs come to them: the ends, the middle, and on.

    The knobs are 0, 1 and then van der Corput's sequence in base two; what they miss comes last.
    """
    inner = [int(f"{number:b}"[::-1], 2) / 2 ** number.bit_length() for number in range(1, N_KNOBS - 1)]
    rows = np.searchsorted(path.knobs, [0.0, 1.0, *inner], side="right") - 1
    return path.plans[list(dict.fromkeys([*rows.tolist(), *range(len(path.plans))]))]


def _by_knob(
    rule: Rule,
    profile: Profile,
    errors: WeightErrors | None,
    objectives: Sequence[Objective],
    seed: int,
    n_prices: int,
) -> Plans:
    """The plans of a rule, from all bits in turn."""
    orders = [visiting_order(rule(table)).tolist() for table in rule_tables(profile, errors, objectives)]
    return [tuple(plan) for plan in chain.from_iterable(zip_longest(*orders)) if plan is not None]


def _by_price(
    profile: Profile, errors: WeightErrors | None, objectives: Sequence[Objective], seed: int, n_prices: int
) -> Plans:
    """The plans of the price sweep, which chooses bits as well."""
    return coarse_to_fine(price_sweep(profile, n_prices, seed, objectives))


Order = Callable[[Profile, WeightErrors | None, Sequence[Objective], int, int], Plans]
ORDERS: Mapping[str, Order] = {name: partial(_by_knob, rule) for name, rule in RULES.items()} | {
    "price_sweep": _by_price
}


def _is_plain(profile: Profile, shape: tuple[int, ...]) -> Mask:
    """Which candidates (n_layers, most candidates) leave the layer undecomposed."""
    plain = np.zeros(shape, dtype=np.bool_)
    for row, layer in enumerate(profile.layers):
        plain[row, : len(layer.candidates)] = [c.choice.decomposition == "none" for c in layer.candidates]
    return plain


def _array(profile: Profile, figures: Figures) -> Floats:
    """Figures by layer and candidate as an array, filled up with infinity."""
    if [len(row) for row in figures] != [len(layer.candidates) for layer in profile.layers]:
        raise StudyError("the weights' errors are not those of this candidate table: measure them again")
    filled = np.full((len(figures), max(map(len, figures))), np.inf)
    for row, known in zip(filled, figures, strict=True):
        row[: len(known)] = known
    return filled


def _shares(table: Table, undecomposed: Mask) -> Floats:
    """The larger of each candidate's latency and bytes over those of the layer's undecomposed one."""
    rows, whole = np.arange(len(undecomposed)), undecomposed.argmax(axis=1)
    ratios = [f / np.maximum(f[rows, whole], SMALLEST)[:, None] for f in (table.latency, table.bytes)]
    shares: Floats = np.maximum(*ratios)
    return shares


def _offers(profile: Profile, shape: tuple[int, ...]) -> list[Mask]:
    """For each kind of bits, most bits first, which candidates (n_layers, most candidates) are on offer in it."""
    groups = [layer.by_rounding() for layer in profile.layers]
    whole = [_undecomposed(layer) for layer in profile.layers]
    choosing = [set(choices) for choices in whole if len(choices) > 1]
    kinds = set.intersection(*choosing) if choosing else {DENSE.rounding}
    tied = {row: tie for tie in profile.tied_rows() for row in tie}

    def offered(kind: str) -> Mask:
        mask = np.zeros(shape, dtype=np.bool_)
        for row, group in enumerate(groups):
            all_have_it = all(kind in whole[other] for other in tied.get(row, (row,)))
            mask[row, list(group[kind if all_have_it else DENSE.rounding])] = True
        return mask

    choices = {kind: choice for row in whole for kind, choice in row.items()}
    mildest_first = sorted(kinds, key=lambda kind: (-choices[kind].weight_bits, -choices[kind].activation_bits, kind))
    return [offered(kind) for kind in mildest_first]


def _undecomposed(layer: LayerProfile) -> dict[str, LayerChoice]:
    """The choices that leave the layer undecomposed, by the kind of their bits."""
    plain = [c.choice for c in layer.candidates if c.choice.decomposition == "none"]
    return {choice.rounding: choice for choice in plain}
