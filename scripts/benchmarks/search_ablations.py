"""What PriceSampler is without a part of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from search_evaluations import Evaluations
from search_runs import MakeSampler, subject_of

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.latency_model import LatencyModel
from ranksearch.optimization.price_sampler import PriceSampler
from ranksearch.optimization.prices import uniform
from ranksearch.optimization.space import settled
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.spec import OBJECTIVES

# The table as an ablation sees it.
See = Callable[[Evaluations], Profile]


def controls(profile: Profile) -> Sequence[tuple[str, Plan]]:
    in_8_bits = LayerChoice(weight_bits=8, activation_bits=8)
    offered = {layer.name: [c.choice for c in layer.candidates] for layer in profile.layers}
    int8 = {name: in_8_bits if in_8_bits in choices else DENSE for name, choices in offered.items()}
    return [("control: dense", Plan(layers=dict.fromkeys(offered, DENSE))), ("control: 8 bits", Plan(layers=int8))]


def price(changes: Mapping[str, object], see: See, evaluations: Evaluations, seed: int) -> BaseSampler:
    """PriceSampler, its constants changed, on a table as it is made to see it."""
    profile = evaluations.profile
    first = [profile.indices(plan) for _, plan in controls(profile)]
    return Changed(PriceSampler(see(evaluations), objectives=OBJECTIVES, seed=seed, controls=first), changes)


def _unseeded(evaluations: Evaluations, seed: int) -> BaseSampler:
    """PriceSampler without the uniform plan among its first."""
    profile = evaluations.profile
    sampler = PriceSampler(profile, objectives=OBJECTIVES, seed=seed)
    shares = settled(profile, uniform(profile))
    sampler._seeds = [profile.indices(plan) for _, plan in controls(profile)] + [
        plan for plan in sampler._seeds if plan != shares
    ]
    return sampler


class Changed(BaseSampler):
    """A sampler that samples with other constants than its own."""

    def __init__(self, sampler: PriceSampler, changes: Mapping[str, object]) -> None:
        self.sampler, self.changes = sampler, changes

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with ExitStack() as stack:
            for target, value in self.changes.items():
                stack.enter_context(mock.patch(f"ranksearch.optimization.{target}", value))
            return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def as_it_is(evaluations: Evaluations) -> Profile:
    return evaluations.profile


def by_macs(evaluations: Evaluations) -> Profile:
    """A table whose latencies are multiply-adds, for which dense takes as long as it does."""
    profile, macs = evaluations.profile, subject_of(evaluations).macs
    each = profile.dense_latency_ms / sum(of[layer.dense] for layer, of in zip(profile.layers, macs, strict=True))

    def counted(layer: LayerProfile, of: Sequence[float]) -> LayerProfile:
        pairs = zip(layer.candidates, of, strict=True)
        return layer.model_copy(
            update={"candidates": tuple(c.model_copy(update={"latency_ms": each * n}) for c, n in pairs)}
        )

    layers = tuple(counted(layer, of) for layer, of in zip(profile.layers, macs, strict=True))
    return profile.model_copy(update={"layers": layers, "latency_model": LatencyModel()})


def _by_size_alone(evaluations: Evaluations) -> Profile:
    """A table without predictions: what a candidate loses is the share of the layer's bytes that it saves."""
    profile = evaluations.profile

    def blind(layer: LayerProfile) -> LayerProfile:
        most = max(c.n_bytes for c in layer.candidates)
        losses = [1 - c.n_bytes / most for c in layer.candidates]
        return layer.model_copy(
            update={
                "candidates": tuple(
                    c.model_copy(update={"loss": loss, "rounding_loss": 0.0})
                    for c, loss in zip(layer.candidates, losses, strict=True)
                )
            }
        )

    return profile.model_copy(update={"layers": tuple(blind(layer) for layer in profile.layers)})


# The sampler whole, and without what a name says.
ABLATIONS: Mapping[str, MakeSampler] = {
    "PriceSampler": partial(price, {}, as_it_is),
    "no refit": partial(price, {"drop_model.LAYER_SPREAD": 1e-3, "drop_model.METHOD_SPREAD": 1e-3}, as_it_is),
    "no swaps": partial(price, {"price_sampler.SWAP_TURN": 1 << 62}, as_it_is),
    "no power means": partial(price, {"drop_model.POWERS": (1.0,)}, as_it_is),
    "no equal shares": _unseeded,
    "no closed form": partial(price, {}, _by_size_alone),
    "no latency": partial(price, {}, by_macs),
}
