"""The candidate table: per layer and choice its predicted loss, its latency on the target, its bytes."""

import hashlib
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ranksearch.errors import StudyError
from ranksearch.plan import DENSE, LayerChoice, Plan


class Candidate(BaseModel):
    """One choice for one layer: predicted loss (in nats of KL to dense), latency on the target, bytes on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: LayerChoice
    loss: float
    latency_ms: float
    n_bytes: int


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

    @property
    def dense(self) -> int:
        """The index of the choice that leaves the layer as it is."""
        return self.index(DENSE)


class Profile(BaseModel):
    """The candidate table of a study, with the dense model's own figures on the target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerProfile, ...]
    dense_latency_ms: float
    dense_bytes: int

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

    def predict(self, indices: Sequence[int]) -> tuple[float, float, float]:
        """Predicted (loss, latency ratio, bytes ratio): sums over the layers, the rest of the model as in dense."""
        chosen = [layer.candidates[i] for layer, i in zip(self.layers, indices, strict=True)]
        dense = [layer.candidates[layer.dense] for layer in self.layers]
        saved_ms = sum(d.latency_ms - c.latency_ms for d, c in zip(dense, chosen, strict=True))
        saved_bytes = sum(d.n_bytes - c.n_bytes for d, c in zip(dense, chosen, strict=True))
        return (
            sum(candidate.loss for candidate in chosen),
            1 - saved_ms / self.dense_latency_ms,
            1 - saved_bytes / self.dense_bytes,
        )

    def to_json(self) -> str:
        """The table as JSON; from_json gives it back, equal."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "candidate table") -> Self:
        """Reads a table. Raises StudyError where it is damaged."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise StudyError(f"{source} is damaged: {error.errors()[0]['msg']}") from None

    def hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of the table."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
