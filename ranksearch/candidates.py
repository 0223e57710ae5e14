"""The candidate table: per layer and choice its predicted loss, its latency on the target, its bytes."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ranksearch.errors import StudyError
from ranksearch.latency_model import LatencyModel
from ranksearch.loss_model import LossModel
from ranksearch.plan import DENSE, LayerChoice, Plan

# Beside the controls so many random plans are measured whole, which draw from this share of each layer's candidates.
N_RANDOM_PLANS, WINDOW = 6, 0.5

# A plan's latency over dense's, and its loss in nats of KL to dense.
TimePlan = Callable[[Plan], float]
MeasureLoss = Callable[[Plan], float]

# No measurement gives more, and what is computed of these stays finite.
Figure = Annotated[float, Field(ge=-1e30, le=1e30)]
Bytes = Annotated[int, Field(ge=0, le=2**62)]


class Candidate(BaseModel):
    """One choice for one layer: predicted loss (in nats of KL to dense), latency on the target, bytes on disk.

    `rounding_loss` is the part of the loss that its bits cause; `storage_only` where no kernel of the target computes
    with them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: LayerChoice
    loss: Figure
    latency_ms: Figure
    n_bytes: Bytes
    rounding_loss: Figure = 0.0
    storage_only: bool = False

    @property
    def label(self) -> str:
        """The choice in a table's cell, with a word where its bits are for storage only."""
        return f"{self.choice.label}{' (storage only)' if self.storage_only else ''}"


class LayerProfile(BaseModel):
    """A layer's candidates, fastest first; dense and the controls' are always among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    candidates: tuple[Candidate, ...]

    def index(self, choice: LayerChoice) -> int:
        """Where `choice` stands among the candidates. Raises StudyError where it does not."""
        for i, candidate in enumerate(self.candidates):
            if candidate.choice == choice:
                return i
        raise StudyError(f"layer {self.name!r}: {choice.label} is not among its candidates")

    def by_rounding(self) -> dict[str, tuple[int, ...]]:
        """The candidates by their bits and how these are rounded."""
        groups: dict[str, list[int]] = {}
        for i, candidate in enumerate(self.candidates):
            groups.setdefault(candidate.choice.rounding, []).append(i)
        return {key: tuple(indices) for key, indices in groups.items()}

    @property
    def dense(self) -> int:
        """The index of the choice that leaves the layer as it is."""
        return self.index(DENSE)


class Profile(BaseModel):
    """The candidate table of a study, with the dense model's own figures on the target.

    `latency_model` and `loss_model` make a plan's latency and loss out of its layers'; `ties` are the names of layers
    that share their bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerProfile, ...]
    dense_latency_ms: Annotated[Figure, Field(gt=0)]
    dense_bytes: Annotated[Bytes, Field(gt=0)]
    latency_model: LatencyModel = LatencyModel()
    loss_model: LossModel = LossModel()
    ties: tuple[tuple[str, ...], ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names) or not {name for tied in self.ties for name in tied} <= set(names):
            raise ValueError("a layer is there twice, or tied and not there")
        return self

    def tied_rows(self) -> tuple[tuple[int, ...], ...]:
        """The places of tied layers, by tie."""
        rows = {layer.name: row for row, layer in enumerate(self.layers)}
        return tuple(tuple(rows[name] for name in tied) for tied in self.ties)

    def alike(self, rows: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
        """For each kind of rounding that all these layers offer, the candidates of each that have it."""
        by_rounding = [self.layers[row].by_rounding() for row in rows]
        shared = [key for key in by_rounding[0] if all(key in other for other in by_rounding)]
        return [tuple(groups[key] for groups in by_rounding) for key in shared]

    def plan(self, indices: Sequence[int]) -> Plan:
        """The plan that takes candidate `indices[i]` for the i-th layer."""
        chosen = zip(self.layers, indices, strict=True)
        return Plan(layers={layer.name: layer.candidates[i].choice for layer, i in chosen})

    def indices(self, plan: Plan) -> tuple[int, ...]:
        """The plan as indices. Raises StudyError where a layer or its choice is not in the table."""
        unknown = plan.changes().keys() - {layer.name for layer in self.layers}
        if unknown:
            raise StudyError(f"layer {min(unknown)!r} is not in the candidate table")
        return tuple(layer.index(plan.choice(layer.name)) for layer in self.layers)

    def chosen(self, indices: Sequence[int]) -> list[Candidate]:
        """The candidate of each layer."""
        return [layer.candidates[i] for layer, i in zip(self.layers, indices, strict=True)]

    def decomposition_losses(self, indices: Sequence[int]) -> list[float]:
        """What each layer loses by its decomposition, its bits apart."""
        return [max(candidate.loss - candidate.rounding_loss, 0.0) for candidate in self.chosen(indices)]

    def predict(self, indices: Sequence[int]) -> tuple[float, float, float]:
        """Predicted (loss, latency ratio, bytes ratio) out of the layers', the rest of the model as in dense.

        What bits lose, independently from layer to layer, adds up; what decompositions lose does so by `loss_model`.
        """
        chosen = self.chosen(indices)
        dense = [layer.candidates[layer.dense] for layer in self.layers]
        saved_bytes = sum(d.n_bytes - c.n_bytes for d, c in zip(dense, chosen, strict=True))
        return (
            sum(c.rounding_loss for c in chosen) + self.loss_model.predict(self.decomposition_losses(indices)),
            self.latency_model.predict(self.summed_latency(indices)),
            1 - saved_bytes / self.dense_bytes,
        )

    def summed_latency(self, indices: Sequence[int]) -> float:
        """What the layers' figures alone say of a plan's latency over dense's, the rest of the model as in dense."""
        chosen = self.chosen(indices)
        dense = [layer.candidates[layer.dense] for layer in self.layers]
        return 1 - sum(d.latency_ms - c.latency_ms for d, c in zip(dense, chosen, strict=True)) / self.dense_latency_ms

    def corrected(self, plans: Sequence[Sequence[int]], ratios: Sequence[float]) -> Self:
        """The same table, its latency model fitted to these plans' measured latency ratios as well."""
        sums = [self.summed_latency(indices) for indices in plans]
        return self.model_copy(update={"latency_model": self.latency_model.with_measured(sums, ratios)})

    def to_json(self) -> str:
        """The table as JSON; from_json gives it back, equal."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "candidate table") -> Self:
        """Reads a table. Raises StudyError where it is damaged."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise StudyError(f"{source} is damaged: {error.errors()[0]['msg']}; restore it, or start over") from None

    def hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of the table."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def whole_plans(profile: Profile, controls: Sequence[Plan], seed: int = 0) -> list[tuple[int, ...]]:
    """The plans that are measured whole to see how layers' figures add up: the controls, and random ones; not dense."""
    plans = [profile.indices(plan) for plan in controls] + spread_plans(profile, N_RANDOM_PLANS, seed)
    dense = tuple(layer.dense for layer in profile.layers)
    return [indices for indices in dict.fromkeys(plans) if indices != dense]


def fit_latency(profile: Profile, plans: Sequence[tuple[int, ...]], time_plan: TimePlan) -> Profile:
    """The profile with its latency model fitted to dense and these plans, timed.

    The layers' latencies become what each takes of the model's, so that the line's slope is 1 from then on.
    """
    dense = tuple(layer.dense for layer in profile.layers)
    ratios = [1.0, *(time_plan(profile.plan(indices)) for indices in plans)]
    slope = profile.corrected([dense, *plans], ratios).latency_model.slope
    scaled = profile.model_copy(update={"layers": tuple(_scaled(layer, slope) for layer in profile.layers)})
    return scaled.corrected([dense, *plans], ratios)


def fit_loss(profile: Profile, plans: Sequence[tuple[int, ...]], measure_loss: MeasureLoss) -> Profile:
    """The profile with its loss model fitted to what these plans lose in float32, measured."""
    lost = [profile.decomposition_losses(indices) for indices in plans]
    told = {tuple(losses): plan for losses, plan in zip(lost, plans, strict=True) if any(losses)}
    measured = [measure_loss(profile.plan(indices).in_float) for indices in told.values()]
    return profile.model_copy(update={"loss_model": LossModel.fit(list(told), measured)})


def spread_plans(profile: Profile, n: int, seed: int) -> list[tuple[int, ...]]:
    """`n` random plans from mostly fast candidates to mostly slow ones."""
    random = np.random.default_rng(seed)
    plans = []
    for place in np.linspace(0, 1, n):
        sizes = np.array([len(layer.candidates) for layer in profile.layers])
        shares = place * (1 - WINDOW) + WINDOW * random.random(len(sizes))
        plans.append(tuple(int(i) for i in np.minimum(shares * sizes, sizes - 1)))
    return plans


def _scaled(layer: LayerProfile, scale: float) -> LayerProfile:
    candidates = (c.model_copy(update={"latency_ms": c.latency_ms * scale}) for c in layer.candidates)
    return layer.model_copy(update={"candidates": tuple(candidates)})
