"""What one trial measured, as a value; no torch here."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ranksearch.plan import Plan

Rung = Literal["latency", "quick", "fine_tuned", "full"]

FRONT_COLUMNS = (
    "trial", "run_id", "summary", "accuracy", "accuracy_drop", "drop_low", "drop_high", "estimated_drop",
    "latency_ms", "latency_p95_ms", "latency_ratio", "ratio_low", "ratio_high",
    "model_bytes", "bytes_ratio", "n_params", "macs",
    "feasible", "surely_feasible", "pareto", "rung", "origin",
    "test_accuracy", "test_accuracy_drop", "test_drop_low", "test_drop_high",
)  # fmt: skip


class Evaluation(BaseModel):
    """What one trial measured, and how far up the ladder it went.

    Drops are dense minus plan in score units, ratios plan over dense, intervals at 95 %. What a stopped plan did
    not reach is None. `stayed_float` names the 8- and 4-bit layers that the runtime does not compute so, with the
    kernel that runs each. `learning_curve` are mean losses along the fine-tuning, which `diverged` where it ended early
    with a number that was not finite. `seconds` says where the time went, by step.
    """

    # What is no number, such as a prediction that nobody made, must not be written as null, which is not read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    plan: Plan
    rung: Rung
    stopped: str | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    quick_drop: float | None = None
    output_distance: float | None = None
    latency_ms: float
    latency_p95_ms: float
    latency_ratio: float
    ratio_low: float
    ratio_high: float
    model_bytes: int
    bytes_ratio: float
    n_params: int
    macs: int
    predicted_loss: float | None = None
    stayed_float: dict[str, str] = Field(default_factory=dict)
    learning_curve: tuple[float, ...] = ()
    diverged: bool = False
    seconds: dict[str, float]

    @property
    def losses(self) -> dict[str, float]:
        """The objectives' values by name; drop is infinite where it was not measured."""
        return {
            "drop": float("inf") if self.accuracy_drop is None else self.accuracy_drop,
            "latency": self.latency_ratio,
            "bytes": self.bytes_ratio,
        }
