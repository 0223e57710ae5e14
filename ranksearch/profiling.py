"""Make the candidate table: predicted losses, set to scale by measured KLs, and latencies on the target."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ranksearch.bits import OfferedBits
from ranksearch.candidates import Candidate, LayerProfile, Profile, TimePlan, fit_latency, fit_loss, whole_plans
from ranksearch.compression import rebuild
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.factorisations import Factorisations
from ranksearch.finding import EmbeddingInfo, LayerInfo, WeightInfo
from ranksearch.layer_timing import LayerTimes
from ranksearch.layers import LayerSpec, WeightSpec, layer_weight
from ranksearch.loss_meter import LossMeter
from ranksearch.loss_model import SMALLEST_LOSS
from ranksearch.pareto import non_dominated
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.spec import Objective, Space
from ranksearch.statistics import predicted_loss
from ranksearch.weights import bytes_in_file

# So many choices are timed for layers of one shape, of at most so many ranks per decomposition.
MAX_CANDIDATES, RANKS_TRIED = 12, 5
# A layer's loss is set to scale at these shares of its choices' order. Over 113 random plans of ResNet-20 the rank
# correlation of the summed losses and the measured one was 0.917 so, 0.875 with the middle alone.
REFERENCES = (0.1, 0.5, 0.9)

# What 16-bit floats lose is beyond measuring.
MILDEST_BITS = 16

TimeLayer = Callable[[LayerInfo, nn.Module, Sequence[LayerChoice]], LayerTimes]


@dataclass(kw_only=True, slots=True)
class _Alike:
    """What layers of equal spec and input shape share, which the first of them settles: the choices, their bytes."""

    timed: list[LayerChoice] | None = None
    n_bytes: dict[LayerChoice, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileMaker:
    """Makes the candidate table of a model. What is slow or noisy, `time_layer` and `time_plan`, is given.

    Embeddings are chosen bits alone, and are not timed: what looks rows up takes no time that bits would change.
    Layers of equal spec and input shape share what is timed, which the first of them settles.
    """

    model: nn.Module
    layers: Mapping[str, WeightInfo]
    factorisations: Factorisations
    meter: LossMeter
    space: Space
    objectives: tuple[Objective, ...]
    bits: Callable[[WeightSpec], Sequence[OfferedBits]]
    time_layer: TimeLayer
    time_plan: TimePlan

    def make(
        self,
        controls: Sequence[Plan],
        dense_latency_ms: float,
        dense_bytes: int,
        on_layer: Callable[[str], None] = lambda _name: None,
    ) -> Profile:
        """The table; the choices of `controls` and dense are never dropped from it."""
        kept = {name: {DENSE, *(plan.choice(name) for plan in controls)} for name in self.layers}
        layers = []
        alike: dict[tuple[LayerSpec, tuple[int, ...]], _Alike] = defaultdict(_Alike)
        for name, info in self.layers.items():
            on_layer(name)
            found = (
                self._embeddings(info, kept[name])
                if isinstance(info, EmbeddingInfo)
                else self._candidates(info, kept[name], alike[info.spec, info.input_shape])
            )
            layers.append(LayerProfile(name=name, candidates=found))
        on_layer("whole plans")
        table = Profile(layers=tuple(layers), dense_latency_ms=dense_latency_ms, dense_bytes=dense_bytes)
        plans = whole_plans(table, controls)
        return fit_loss(fit_latency(table, plans, self.time_plan), plans, self.meter.of_plan)

    def _embeddings(self, info: EmbeddingInfo, kept: set[LayerChoice]) -> tuple[Candidate, ...]:
        choices = sorted({*kept, *(bits.of(DENSE) for bits in self.bits(info.spec))}, key=LayerChoice.key)
        layer = self.model.get_submodule(info.name)
        losses = {c: 0.0 if c.weight_bits >= MILDEST_BITS else self.meter.of_layer(info, c) for c in choices}
        candidates = (
            Candidate(
                choice=choice,
                loss=losses[choice],
                rounding_loss=losses[choice],
                latency_ms=0.0,
                n_bytes=self._bytes(layer, choice),
                storage_only=choice != DENSE,
            )
            for choice in choices
        )
        return tuple(sorted(candidates, key=lambda candidate: candidate.loss))

    def _bytes(self, layer: nn.Module, choice: LayerChoice) -> int:
        """What the layer takes in a file."""
        return bytes_in_file(rebuild(nn.Sequential(layer), Plan(layers={"0": choice})))

    def _candidates(self, info: LayerInfo, kept: set[LayerChoice], alike: _Alike) -> tuple[Candidate, ...]:
        losses, rounding = self._losses(info, kept, alike.timed)
        layer = self.model.get_submodule(info.name)
        worth_timing = _worth_timing(info, kept, losses) if alike.timed is None else list(losses)
        alike.timed = alike.timed or worth_timing
        sizes = alike.n_bytes
        sizes.update({choice: self._bytes(layer, choice) for choice in worth_timing if choice not in sizes})
        stored = {(b.weight_bits, b.activation_bits) for b in self.bits(info.spec) if b.storage_only}
        ratios, dense_ms = self._times(info, layer, worth_timing, stored)
        columns: dict[Objective, Callable[[LayerChoice], float]] = {
            "drop": losses.__getitem__,
            "latency": ratios.__getitem__,
            "bytes": sizes.__getitem__,
        }
        undominated = _undominated(
            worth_timing, kept, lambda choice: tuple(columns[objective](choice) for objective in self.objectives)
        )
        chosen = _thinned(sorted(undominated, key=losses.__getitem__), kept, MAX_CANDIDATES)
        self._keep_factors(info.name, chosen)
        candidates = [
            Candidate(
                choice=choice,
                loss=losses[choice],
                rounding_loss=rounding[_only_rounded(choice)],
                latency_ms=ratios[choice] * dense_ms,
                n_bytes=sizes[choice],
                storage_only=(choice.weight_bits, choice.activation_bits) in stored,
            )
            for choice in chosen
        ]
        return tuple(sorted(candidates, key=lambda candidate: (candidate.latency_ms, candidate.loss)))

    def _times(
        self, info: LayerInfo, layer: nn.Module, choices: Sequence[LayerChoice], stored: set[tuple[int, int]]
    ) -> tuple[dict[LayerChoice, float], float]:
        """Each choice's latency ratio to dense, and dense's milliseconds in all its calls.

        Bits that are only `stored` are computed in float, and take as long.
        """
        runs = {c: c.in_float if (c.weight_bits, c.activation_bits) in stored else c for c in choices}
        # Dense is timed as the others' reference, and is 1 by definition.
        timed = [choice for choice in dict.fromkeys(runs.values()) if choice != DENSE] or [DENSE]
        times = self.time_layer(info, layer, timed)
        dense_ms = float(np.median([reference_ms for _, reference_ms in times.values()])) * info.n_calls
        ratios = {**{choice: ratio for choice, (ratio, _) in times.items()}, DENSE: 1.0}
        return {choice: ratios[run] for choice, run in runs.items()}, dense_ms

    def _losses(
        self, info: LayerInfo, kept: set[LayerChoice], timed: Sequence[LayerChoice] | None
    ) -> tuple[dict[LayerChoice, float], dict[LayerChoice, float]]:
        """The predicted loss in nats of KL to dense: of each choice that is `timed`, of all where that is not settled.

        The closed form is set to scale by measured KLs; the loss of bits is measured once for each pair, on the layer
        that is only quantized, and added to each choice in those bits. It is given apart too, by that layer's choice.
        """
        bits = self.bits(info.spec)
        wanted = kept if timed is None else kept | set(timed)
        shapes = _shapes(info.spec, self.space, wanted) if timed is None else _factored(wanted)
        raw = dict(self._closed_forms(info, shapes))
        scale = self._scale(info, raw)
        floats = {DENSE: 0.0, **{shape: loss * scale for shape, loss in raw.items()}}
        offered = [b.of(shape) for shape in floats for b in bits if shape.decomposition in self.space.decompositions]
        choices = sorted({*offered, *kept} if timed is None else wanted, key=LayerChoice.key)
        plain = dict.fromkeys(_only_rounded(choice) for choice in choices)
        rounding = {c: self.meter.of_layer(info, c) if c.weight_bits < MILDEST_BITS else 0.0 for c in plain}
        return {choice: floats[choice.in_float] + rounding[_only_rounded(choice)] for choice in choices}, rounding

    def _closed_forms(self, info: LayerInfo, shapes: Sequence[LayerChoice]) -> Iterator[tuple[LayerChoice, float]]:
        """Predicted losses, not yet to scale, of float choices that shrink the layer."""
        weight = layer_weight(self.model.get_submodule(info.name))
        statistics = self.factorisations.statistics[info.name]
        for shape in shapes:
            difference = weight - self.factorisations.of(info.name, shape).weight(shape.ranks)
            yield shape, max(predicted_loss(statistics, difference, mean_absorbed=True), SMALLEST_LOSS)

    def _scale(self, info: LayerInfo, raw: Mapping[LayerChoice, float]) -> float:
        """Measured over predicted loss, their geometric mean over a mild, a middling and a harsh choice.

        One alone misleads: small changes are within the closed form's reach and large ones saturate.
        """
        ratios = [self.meter.of_layer(info, choice) / raw[choice] for choice in references(raw)]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0

    def _keep_factors(self, name: str, choices: Sequence[LayerChoice]) -> None:
        """Has the factors of these choices cut and cached while the layer's factorisations are at hand."""
        for choice in choices:
            if choice.decomposition != "none":
                self.factorisations.factors(name, choice)


def _shapes(spec: LayerSpec, space: Space, kept: set[LayerChoice]) -> list[LayerChoice]:
    """The float choices that shrink a layer: a spread of ranks per decomposition, and those that must be kept."""
    shapes = set(_factored(kept))
    # What the target's kernels compute in, session.make_profile has measured.
    assert space.rank_multiple is not None, "a profile is made in a space whose multiple is settled"
    for name in space.decompositions:
        method = DECOMPOSITIONS[name]
        if name == "none" or method.refuse(spec) is not None:
            continue
        for options in method.options_for(spec):
            ranks = method.rank_choices(spec, options, space.rank_multiple)
            shapes.update(
                LayerChoice(decomposition=name, ranks=r, options=dict(options)) for r in _spread(ranks, RANKS_TRIED)
            )
    return sorted(shapes, key=LayerChoice.key)


def _only_rounded(choice: LayerChoice) -> LayerChoice:
    """The undecomposed layer in the choice's bits."""
    return DENSE.with_bits(choice.weight_bits, choice.activation_bits, **choice.rounding_options)


def _factored(choices: Iterable[LayerChoice]) -> list[LayerChoice]:
    """The choices that factor the layer, in float."""
    return sorted({choice.in_float for choice in choices if choice.decomposition != "none"}, key=LayerChoice.key)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, both ends included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def references(losses: Mapping[LayerChoice, float]) -> list[LayerChoice]:
    """The choices at a tenth, the half and nine tenths of the order of their losses; fewer where there are fewer."""
    ordered = sorted(losses, key=losses.__getitem__)
    return list(dict.fromkeys(ordered[round(share * (len(ordered) - 1))] for share in REFERENCES if ordered))


def _by_bits(choices: Iterable[LayerChoice]) -> dict[str, list[LayerChoice]]:
    groups: dict[str, list[LayerChoice]] = {}
    for choice in choices:
        groups.setdefault(choice.bits, []).append(choice)
    return groups


def _worth_timing(info: LayerInfo, kept: set[LayerChoice], losses: Mapping[LayerChoice, float]) -> list[LayerChoice]:
    """The kept choices, and of all bits as many of those that no other beats in loss, parameters and MACs."""
    counts = {choice: _counts(info, choice) for choice in dict.fromkeys(choice.in_float for choice in losses)}
    chosen: list[LayerChoice] = []
    groups = list(_by_bits(losses).values())
    for i, group in enumerate(groups):
        undominated = _undominated(group, kept, lambda choice: (losses[choice], *counts[choice.in_float]))
        kept_later = sum(choice in kept for later in groups[i + 1 :] for choice in later)
        kept_here = sum(choice in kept for choice in group)
        room = (MAX_CANDIDATES - len(chosen) - kept_here - kept_later) // (len(groups) - i)
        chosen += _thinned(sorted(undominated, key=losses.__getitem__), kept, kept_here + max(room, 0))
    return chosen


def _undominated(
    choices: Sequence[LayerChoice],
    kept: set[LayerChoice],
    columns: Callable[[LayerChoice], tuple[float, ...]],
) -> list[LayerChoice]:
    mask = non_dominated(np.array([columns(choice) for choice in choices], dtype=np.float64))
    return [choice for choice, stays in zip(choices, mask, strict=True) if stays or choice in kept]


def _thinned(ordered: list[LayerChoice], kept: set[LayerChoice], most: int) -> list[LayerChoice]:
    """At most so many of the choices, evenly along their order; the kept ones stay."""
    others = [choice for choice in ordered if choice not in kept]
    room = max(most - len(ordered) + len(others), 0)
    stays = set(_spread(others, room)) | kept
    return [choice for choice in ordered if choice in stays]


def _counts(info: LayerInfo, choice: LayerChoice) -> tuple[float, float]:
    """Parameters, and multiply-adds for one row: a filter before bytes and times are measured, never a result."""
    method = DECOMPOSITIONS[choice.decomposition]
    what = info.spec, choice.ranks, choice.factor_options
    return float(method.n_params(*what)), float(method.macs(*what, info.input_shape))
