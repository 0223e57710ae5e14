"""The sampler that needs few trials: it learns what layers and decompositions cost, and decodes prices exactly."""

from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.optimization.drop_model import DropModel
from ranksearch.optimization.history_reader import HistoryReader, Known
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.loss_table import LossTable
from ranksearch.optimization.outlook import Outlook
from ranksearch.optimization.prices import coarse_to_fine, price_sweep, uniform
from ranksearch.optimization.proposals import moved, priced, swapped
from ranksearch.optimization.space import distributions, settled, to_params
from ranksearch.optimization.table import Floats, Indices, Table
from ranksearch.pareto import REFERENCE_POINT, non_dominated
from ranksearch.spec import OBJECTIVES, Objective

N_SEED_PRICES = 4
# The fit takes no longer than a trial of a small model: the latest trials, near the front, teach most.
N_LEARNED_FROM = 160
# Every so many trials the neighbours of the front come before what prices decode to, once there is a front to refine:
# before, prices have more to gain.
SWAP_TURN, SWAPS_FROM = 4, 30
N_WIDENINGS = 4
NO_LIMITS = ResolvedLimits()
# A drop of so many times the goal is worth nothing, however fast the plan.
WORTHLESS = 1.5


@final
class PriceSampler(BaseSampler):
    """Proposes plans of a candidate table: one integer parameter per layer, named as it, the candidate's index.

    First the `controls`, a uniform plan and a few prices; then it refits what layers and decompositions cost to what
    trials measured, draws from what is still possible (Thompson sampling), decodes exactly, and proposes what is
    expected to add most to the hypervolume of the front, below the corner (`drop_unit`, 1.05, 1). With `limits`, what
    may miss them counts by its chance of meeting them. From the thirtieth on every fourth trial comes out of the
    front's neighbourhood.

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
        self._reader = HistoryReader(profile, self._objectives, self._unit)

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
        outlook = self._outlook(known, rng)
        members, front = self._front(known, outlook)
        passed_over: list[Indices] = []
        for plans in self._pools(members, outlook, number, rng):
            fresh = plans[[tuple(plan) not in known.tried for plan in plans.tolist()]]
            if len(fresh) and (best := outlook.best(fresh, front, rng)) is not None:
                return best
            passed_over += [fresh] if len(fresh) else []
        return outlook.nearest(passed_over[0], rng) if passed_over else self._seeds[-1]

    def _outlook(self, known: Known, rng: np.random.Generator) -> Outlook:
        """What the trials teach."""
        fitted = DropModel.fit(self._losses, known.observed.last(N_LEARNED_FROM))
        latency = self._profile.latency_model
        if "latency" in self._objectives:
            sums = self._table.latency_ratios(known.plans[-N_LEARNED_FROM:])
            measured = known.values[-N_LEARNED_FROM:, self._objectives.index("latency")]
            latency = latency.with_measured(sums.tolist(), measured.tolist())
        return Outlook(
            fitted=fitted,
            drawn=fitted.drawn(rng),
            table=self._table.timed_by(latency),
            objectives=self._objectives,
            limits=self._limits,
            # With a goal for the drop, what can barely be told from none meets it, and is as good as none.
            resolution=0.0 if self._limits.max_drop is None else known.observed.resolution,
        )

    def _front(self, known: Known, outlook: Outlook) -> tuple[Indices, Floats]:
        """The front by the estimates, running trials with what they are expected to measure among them."""
        values = known.values.copy()
        if "drop" in self._objectives:
            column = self._objectives.index("drop")
            values[:, column], _ = outlook.fitted.shrunk(known.plans, values[:, column], known.observed.deviations)
        plans = np.concatenate([known.plans, known.pending])
        values = np.concatenate([values, outlook.expected(known.pending)])
        best = non_dominated(values)
        return plans[best], values[best]

    def _pools(self, members: Indices, outlook: Outlook, number: int, rng: np.random.Generator) -> Iterator[Indices]:
        """Plans to choose from, the preferred first; the last are ever farther from the front's `members`."""
        if number % SWAP_TURN == 0 and number >= SWAPS_FROM and len(members):
            yield swapped(outlook.table, members, rng)
        decoded = priced(outlook.table, outlook.drawn.losses(), self._objectives, rng)
        yield decoded
        nearby = np.concatenate([members, decoded])
        yield swapped(outlook.table, nearby, rng)
        for _ in range(N_WIDENINGS):
            nearby = moved(outlook.table, nearby, rng)
            yield nearby
