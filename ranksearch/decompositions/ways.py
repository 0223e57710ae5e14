"""Several ways to factor one weight, of which each ranks take the one that costs least."""

from collections.abc import Callable
from functools import cached_property
from typing import Generic, TypeVar, final

from torch import Tensor

from ranksearch.decompositions.base import Factorisation
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.weighed import WeighedWeight

T = TypeVar("T")


@final
class BestOf(Factorisation):
    """Of several factorisations of one weight, at each ranks the one that costs least in the metric.

    The first is the one to take where they tie; the plain one belongs among them.
    """

    def __init__(self, weighed: WeighedWeight, metric: Metric, *ways: Factorisation) -> None:
        self.weighed, self.metric, self.ways = weighed, metric, ways
        self._chosen: dict[Ranks, Factorisation] = {}

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return self._best(ranks).factors(ranks)

    def weight(self, ranks: Ranks) -> Tensor:
        return self._best(ranks).weight(ranks)

    def _best(self, ranks: Ranks) -> Factorisation:
        if ranks not in self._chosen:
            costs = [self._cost(way, ranks) for way in self.ways]
            self._chosen[ranks] = self.ways[costs.index(min(costs))]
        return self._chosen[ranks]

    def _cost(self, way: Factorisation, ranks: Ranks) -> float:
        if self.metric.probes.shape[-1] == self.metric.probes.shape[-2]:
            return self.metric.cost(self.weighed.single - way.weight(ranks))
        # With fewer probes than inputs they are sooner led through the factors than the factors multiplied.
        return self.metric.cost_of_outputs(self._given - way.outputs(ranks, self.metric.probes))

    @cached_property
    def _given(self) -> Tensor:
        """What the weight makes of the metric's probes."""
        return self.weighed.single.reshape(self.weighed.rows.shape) @ self.metric.probes


@final
class Latest(Generic[T]):
    """What a function gives for the ranks last asked for; what is compared and then chosen is computed once."""

    def __init__(self, compute: Callable[[Ranks], T]) -> None:
        self._compute = compute
        self._known: dict[Ranks, T] = {}

    def at(self, ranks: Ranks) -> T:
        if ranks not in self._known:
            self._known = {ranks: self._compute(ranks)}
        return self._known[ranks]
