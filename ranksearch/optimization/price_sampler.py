"""The sampler that needs few trials: it learns what layers and decompositions cost, and decodes prices exactly."""

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.optimization.drop_model import DropModel, LossTable
from ranksearch.optimization.history_reader import HistoryReader, Known
from ranksearch.optimization.improvement import Undominated
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.prices import coarse_to_fine, price_sweep, uniform
from ranksearch.optimization.proposals import moved, priced, swapped
from ranksearch.optimization.space import distributions, settled, to_params
from ranksearch.optimization.table import Floats, Indices, Table
from ranksearch.pareto import REFERENCE_POINT, non_dominated
from ranksearch.spec import OBJECTIVES, Objective

N_SEED_PRICES = 6
# The fit takes no longer than a trial of a small model: the latest trials, near the front, teach most.
N_LEARNED_FROM = 256
# Every so many trials the neighbours of the front come before what prices decode to.
SWAP_TURN = 4
# How far off predicted latencies and bytes are, relative to themselves.
LATENCY_DEVIATION, BYTES_DEVIATION = 0.02, 0.005
NO_LIMITS = ResolvedLimits()
# A drop's standard deviation in units where a trial does not say it.
UNKNOWN_DEVIATION = 0.05
# A drop of so many times the goal is worth nothing, however fast the plan.
WORTHLESS = 1.5
BEYOND = 1.05


@final
class PriceSampler(BaseSampler):
    """Proposes plans of a candidate table: one integer parameter per layer, named as it, the candidate's index.

    First the `controls`, a uniform plan and six prices; then it refits what layers and decompositions cost to what
    trials measured, draws from what is still possible (Thompson sampling), decodes exactly, and proposes what is
    expected to add most to the hypervolume of the front, below the corner (`drop_unit`, 1.05, 1). With `limits`, what
    may miss them counts by its chance of meeting them. Every fourth trial comes out of the front's neighbourhood.

    The study's trials are its only state and random numbers come from `seed` and the trial's number, so that resumed
    studies go on as they would have; running trials count as what they are expected to measure. The study minimises
    the `objectives` in their order. A trial may say its drop's 95 % interval and the distance of its outputs to
    dense's as user attributes `drop_interval` and `output_distance`.
    """

    def __init__(
        self,
        profile: Profile,
        limits: ResolvedLimits = NO_LIMITS,
        objectives: Sequence[Objective] = OBJECTIVES,
        seed: int = 0,
        *,
        controls: Sequence[Sequence[int]] = (),
        drop_unit: float = REFERENCE_POINT[0],
    ) -> None:
        self._space = distributions(profile)
        self._profile, self._limits, self._seed = profile, limits, seed
        self._objectives = tuple(objectives)
        anchor = uniform(profile)
        seeds = [*controls, anchor, *coarse_to_fine(price_sweep(profile, N_SEED_PRICES, seed, self._objectives))]
        self._seeds = list(dict.fromkeys(settled(profile, indices) for indices in seeds))
        self._unit = drop_unit if limits.max_drop is None else max(WORTHLESS * limits.max_drop, drop_unit / 10)
        self._table, self._losses = Table.of_layers(profile), LossTable.of(profile, anchor, self._unit)
        self._reader = HistoryReader(profile, self._objectives, UNKNOWN_DEVIATION * self._unit)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every layer that has a choice. Raises StudyError where the study has other objectives."""
        if study.directions != [StudyDirection.MINIMIZE] * len(self._objectives):
            raise StudyError(
                f"the study has {len(study.directions)} objectives; PriceSampler needs one that minimises "
                f"{', '.join(self._objectives)}, in this order"
            )
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next plan as parameters."""
        return to_params(self._profile, self.propose(self._reader.read(study, trial.number), trial.number))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuses: a parameter that is no layer of the profile, or has another range."""
        expected = self._space.get(param_name)
        raise StudyError(
            f"parameter {param_name!r} with {param_distribution} does not fit the profile, "
            + (f"which has {expected}" if expected else f"whose layers are {', '.join(self._space)}")
        )

    def propose(self, known: Known, number: int) -> tuple[int, ...]:
        """The plan for the trial of this number, as candidates' indices."""
        for seed in self._seeds:
            if seed not in known.tried:
                return seed
        rng = np.random.default_rng([self._seed % 2**63, number])
        model = DropModel.fit(self._losses, known.observed.last(N_LEARNED_FROM))
        drawn = model.drawn(rng)
        table = self._table.timed_by(self._latency(known))
        front = self._front(known, model, drawn, table)
        for plans in self._pools(known, drawn, table, front, number, rng):
            fresh = self._fresh(plans, known)
            if len(fresh):
                return tuple(int(index) for index in self._best(fresh, front[1], model, drawn, table, rng))
        return self._seeds[-1]

    def _pools(
        self,
        known: Known,
        drawn: DropModel,
        table: Table,
        front: tuple[Indices, Floats],
        number: int,
        rng: np.random.Generator,
    ) -> Any:
        """Plans to choose from, the preferred first."""
        decoded = priced(table, drawn.losses(), self._objectives, rng)
        members = front[0] if len(front[0]) else decoded
        swaps = swapped(table, members, rng)
        pools = [swaps, decoded] if number % SWAP_TURN == 0 else [decoded, swaps]
        yield from pools
        everything = np.concatenate([members, decoded])
        for _ in range(4):
            everything = moved(table, everything, rng)
            yield everything

    def _fresh(self, plans: Indices, known: Known) -> Indices:
        new = [tuple(plan) not in known.tried for plan in plans.tolist()]
        return plans[np.array(new, dtype=np.bool_)]

    def _front(self, known: Known, model: DropModel, drawn: DropModel, table: Table) -> tuple[Indices, Floats]:
        """The front by the estimates, running trials with what they are expected to measure among them."""
        values = known.values.copy()
        if "drop" in self._objectives:
            column = self._objectives.index("drop")
            values[:, column], _ = model.shrunk(known.plans, values[:, column], known.observed.deviations)
        plans = np.concatenate([known.plans, known.pending])
        values = np.concatenate([values, self._predicted(known.pending, drawn, table)])
        best = non_dominated(values)
        return plans[best], values[best]

    def _best(
        self,
        plans: Indices,
        front: Floats,
        model: DropModel,
        drawn: DropModel,
        table: Table,
        rng: np.random.Generator,
    ) -> Indices:
        """The plan of the largest expected gain; where none gains anything, the one that comes nearest to it."""
        losses = self._predicted(plans, drawn, table)
        corner = np.array([self._corner[name] for name in self._objectives])
        low = np.minimum(losses.min(axis=0), front.min(axis=0, initial=np.inf))
        chances = self._chances(plans, model, table)
        undominated = Undominated.sample(front, low, np.maximum(corner, low + 1e-9), rng)
        gains = undominated.gains(losses) * np.exp(chances)
        if gains.max() > 0:
            return np.asarray(plans[int(gains.argmax())])
        nearest = rng.integers(len(plans)) if chances.max() == 0 else chances.argmax()
        return np.asarray(plans[int(nearest)])

    @property
    def _corner(self) -> dict[Objective, float]:
        """What is worth nothing: little beyond the limits, where there are any."""
        _, latency, n_bytes = REFERENCE_POINT
        most_latency, most_bytes = self._limits.max_latency_ratio, self._limits.max_bytes_ratio
        return {
            "drop": self._unit,
            "latency": latency if most_latency is None else min(latency, BEYOND * most_latency),
            "bytes": n_bytes if most_bytes is None else min(n_bytes, BEYOND * most_bytes),
        }

    def _predicted(self, plans: Indices, drawn: DropModel, table: Table) -> Floats:
        columns: dict[Objective, Any] = {
            "drop": drawn.predict,
            "latency": table.latency_ratios,
            "bytes": table.bytes_ratios,
        }
        return np.stack([columns[name](plans) for name in self._objectives], axis=1)

    def _chances(self, plans: Indices, model: DropModel, table: Table) -> Floats:
        """Logarithms of each plan's chance to meet every limit."""
        chances = np.zeros(len(plans))
        limits = self._limits
        if limits.max_drop is not None and "drop" in self._objectives:
            chances += _log_chance((limits.max_drop - model.predict(plans)) / model.deviations(plans))
        if limits.max_latency_ratio is not None:
            ratios = table.latency_ratios(plans)
            chances += _log_chance((limits.max_latency_ratio / np.maximum(ratios, 1e-9) - 1) / LATENCY_DEVIATION)
        if limits.max_bytes_ratio is not None:
            chances += _log_chance(
                (limits.max_bytes_ratio / np.maximum(table.bytes_ratios(plans), 1e-9) - 1) / BYTES_DEVIATION
            )
        return chances

    def _latency(self, known: Known) -> Any:
        """The profile's latency model, fitted to what the trials measured as well."""
        if "latency" not in self._objectives:
            return self._profile.latency_model
        sums = self._table.latency_ratios(known.plans)
        measured = known.values[:, self._objectives.index("latency")]
        return self._profile.latency_model.with_measured(sums.tolist(), measured.tolist())


def _log_chance(deviations: Floats) -> Floats:
    """The logarithm of the normal distribution function, by its tail's leading term where it is tiny."""
    chance = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in deviations.tolist()])
    tail = -0.5 * deviations**2 - np.log(np.maximum(-deviations, 1.0) * math.sqrt(2 * math.pi))
    return np.where(deviations < -8, tail, np.log(np.maximum(chance, 1e-300)))
