"""Plans that cut a share of the multiply-adds, by rules that know nothing of what training wins back."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from decompositions_candidates import Candidate, candidates
from decompositions_networks import Subject, choice_macs

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.finding import LayerInfo
from ranksearch.plan import LayerChoice, Plan

Table = Mapping[str, Sequence[Candidate]]
Rule = Callable[[Subject, float], Plan]
UNIFORM_METHOD = "spatial_svd"
PRICED_METHODS = ("none", "svd", "spatial_svd", "tucker2")
N_HALVINGS = 24
TABLES: dict[str, Table] = {}


def uniform(subject: Subject, cut: float) -> Plan:
    """Every layer that has a spatial kernel and more than a few input channels at the same share, spatially.

    What whole ranks leave over raises ranks by one, first where the share is least.
    """
    low, high = 0.0, 1.0
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _ratio(subject, shares(subject, middle)) <= 1 - cut else (low, middle)
    plan = shares(subject, low)
    own = {
        name: choice_macs(subject.layers[name], choice) / subject.layers[name].macs
        for name, choice in plan.layers.items()
    }
    for name in sorted(own, key=own.__getitem__):
        (rank,) = plan.choice(name).ranks
        raised = Plan(layers={**plan.layers, name: LayerChoice(decomposition=UNIFORM_METHOD, ranks=(rank + 1,))})
        if _ratio(subject, raised) <= 1 - cut:
            plan = raised
    return plan


def one_shot(subject: Subject, cut: float) -> Plan:
    """The plan of least summed predicted loss that some price on multiply-adds decodes to."""
    return _priced(subject, cut, PRICED_METHODS)


def spatial(subject: Subject, cut: float) -> Plan:
    """The same with the uniform plan's method alone, so that loss orders ranks and no methods."""
    return _priced(subject, cut, ("none", UNIFORM_METHOD))


def tempered(subject: Subject, cut: float) -> Plan:
    """The plan of least summed square roots of losses, which ruin no layer to spare others a little."""
    return _priced(subject, cut, PRICED_METHODS, np.sqrt)


RULES: Mapping[str, Rule] = {
    "uniform": uniform,
    "one-shot loss": one_shot,
    "one-shot loss, spatial": spatial,
    "tempered loss": tempered,
}


def _priced(
    subject: Subject, cut: float, methods: Sequence[str], temper: Callable[[float], float] = lambda loss: loss
) -> Plan:
    if subject.name not in TABLES:
        TABLES[subject.name] = candidates(subject, multiple=2, fine=False)
    table = {
        name: [c for c in layer if c.choice.decomposition in methods] for name, layer in TABLES[subject.name].items()
    }
    dense = sum(layer[0].macs for layer in table.values())
    for price in np.geomspace(1e-5, 1e4, 600):
        costs = {name: [temper(c.loss) + price * c.macs / dense for c in layer] for name, layer in table.items()}
        chosen = {name: table[name][int(np.argmin(cost))] for name, cost in costs.items()}
        if sum(candidate.macs for candidate in chosen.values()) <= (1 - cut) * dense:
            return Plan(layers={name: candidate.choice for name, candidate in chosen.items()})
    raise ValueError(f"no price cuts {cut:.0%} of {subject.name}")


def shares(subject: Subject, share: float) -> Plan:
    """Each layer's largest spatial rank with at most this share of its multiply-adds."""
    found = {name: _largest(info, share) for name, info in subject.layers.items()}
    return Plan(layers={name: choice for name, choice in found.items() if choice is not None})


def _largest(info: LayerInfo, share: float) -> LayerChoice | None:
    """The largest rank with at most this share of the layer's multiply-adds; None where the method does not suit it."""
    method = DECOMPOSITIONS[UNIFORM_METHOD]
    if method.refuse(info.spec) is not None or info.spec.weight_shape[1] <= 3:
        return None
    (most,) = method.max_ranks(info.spec, {})
    ranks = [
        r
        for r in range(1, most + 1)
        if choice_macs(info, LayerChoice(decomposition=UNIFORM_METHOD, ranks=(r,))) <= share * info.macs
    ]
    return LayerChoice(decomposition=UNIFORM_METHOD, ranks=(ranks[-1] if ranks else 1,))


def _ratio(subject: Subject, plan: Plan) -> float:
    return sum(choice_macs(info, plan.choice(name)) for name, info in subject.layers.items()) / sum(
        info.macs for info in subject.layers.values()
    )
