"""The ladder: a plan's latency and bytes, its accuracy after BatchNorm re-estimation, and after short fine-tuning."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ranksearch.compression import calibrate_ranges, compress, count_params, rebuild
from ranksearch.factorisations import Factorisations
from ranksearch.latency import Latency
from ranksearch.layers import count_macs
from ranksearch.plan import Plan
from ranksearch.progressive import compress_in_stages, n_cuts
from ranksearch.quantization import freeze
from ranksearch.recovery import Step, diverged, recover, reestimate_batchnorm
from ranksearch.scoring import output_distance, paired_drop
from ranksearch.spec import Objective
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench, first_rows

Rung = Literal["latency", "quick", "fine_tuned", "full"]

# A trial's latency interval is as narrow as this, or what these seconds give; the front is measured again at length.
MAX_CURVE_POINTS = 40
N_LATENCY_BLOCKS, NARROW, MAX_LATENCY_SECONDS = 12, 0.02, 1.0

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

    model_config = ConfigDict(frozen=True, extra="forbid")

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Takes plans up the ladder on a workbench.

    `limits` are the goals as ratios; a plan that surely misses one of latency or bytes stops there, and so does one
    that `beaten_by` calls not worth training, by its prediction or after the quick rung; those whose hashes are
    `never_stopped` go on. `keep` is given each complete plan with the model that was scored. Once `should_abort` says
    so, the evaluation ends with KeyboardInterrupt.
    """

    bench: Workbench
    factorisations: Factorisations
    dense_latency_ms: float
    limits: Mapping[Objective, float] = field(default_factory=dict)
    predict_loss: Callable[[Plan], float | None] = lambda _plan: None
    beaten_by: Callable[[Mapping[str, Any]], str | None] = lambda _figures: None
    never_stopped: frozenset[str] = frozenset()
    keep: Callable[[Plan, nn.Module], None] = lambda _plan, _model: None
    should_abort: Callable[[], bool] = lambda: False
    on_step: Callable[[Step], None] = lambda _step: None
    max_latency_seconds: float = MAX_LATENCY_SECONDS
    clock: Callable[[], float] = time.perf_counter

    def evaluate(self, plan: Plan) -> Evaluation:
        """The plan's figures, up to the rung of short fine-tuning.

        Raises PlanError where the plan does not fit the model; whatever the model, the data or the runtime raise
        goes through.
        """
        seconds: dict[str, float] = {}
        figures = self._measure(plan, seconds)
        stopped = None if plan.hash() in self.never_stopped else self._misses(figures) or self.beaten_by(figures)
        if stopped is not None:
            return Evaluation(**figures, rung="latency", stopped=stopped, seconds=seconds)
        if not plan.changes():
            self._keep(plan, self.bench.model, seconds)
            return Evaluation(**figures, **self._dense_accuracy(), rung="fine_tuned", seconds=seconds)
        model, quick_drop = self._fit(plan, seconds)
        stopped = None if plan.hash() in self.never_stopped else self.beaten_by({**figures, "quick_drop": quick_drop})
        if stopped is not None:
            return Evaluation(**figures, rung="quick", stopped=stopped, quick_drop=quick_drop, seconds=seconds)
        with self._timed(seconds, "fine_tune"):
            losses = self._fine_tune(model, 1 / n_cuts(plan, self.bench.spec.recovery.stages))
        with self._timed(seconds, "validate"):
            accuracy = self._accuracy(model)
        self._keep(plan, model, seconds)
        return Evaluation(
            **figures,
            **accuracy,
            rung="fine_tuned",
            quick_drop=quick_drop,
            learning_curve=_curve(losses),
            diverged=diverged(losses),
            seconds=seconds,
        )

    def _keep(self, plan: Plan, model: nn.Module, seconds: dict[str, float]) -> None:
        with self._timed(seconds, "store"):
            self.keep(plan, model)

    def _measure(self, plan: Plan, seconds: dict[str, float]) -> dict[str, Any]:
        """Latency and bytes, from the architecture alone: cheap, so it comes first."""
        bench = self.bench
        with self._timed(seconds, "build"):
            candidate = rebuild(bench.model, plan, bench.weight_limit, bench.shared).eval()
            model_bytes, n_params = packed_bytes(candidate), count_params(candidate)
            macs = count_macs(candidate, first_rows(bench.calibration, 1))
        with self._timed(seconds, "convert"):
            session = bench.prepare(candidate)
            in_float = bench.stayed_float(candidate, session)
        with self._timed(seconds, "latency"):
            latency = bench.compare(
                session, n_blocks=N_LATENCY_BLOCKS, narrow=NARROW, max_seconds=self.max_latency_seconds
            )
        return {
            "plan": plan,
            "model_bytes": model_bytes,
            "bytes_ratio": model_bytes / bench.dense.model_bytes,
            "n_params": n_params,
            "macs": macs,
            "predicted_loss": self.predict_loss(plan),
            "stayed_float": in_float,
            **latency_columns(latency, self.dense_latency_ms),
        }

    def _misses(self, figures: Mapping[str, Any]) -> str | None:
        """Why the plan cannot meet the goals whatever its accuracy, or None."""
        latency = self.limits.get("latency")
        if latency is not None and figures["ratio_low"] > latency:
            return f"latency {figures['latency_ratio']:.3f}x misses the goal of {latency:.3f}x"
        size = self.limits.get("bytes")
        if size is not None and figures["bytes_ratio"] > size:
            return f"size {figures['bytes_ratio']:.3f}x misses the goal of {size:.3f}x"
        return None

    def _fit(self, plan: Plan, seconds: dict[str, float]) -> tuple[nn.Module, float | None]:
        """The compressed model with BatchNorm re-estimated where it helps, and its drop."""
        with self._timed(seconds, "compress"):
            stages = self.bench.spec.recovery.stages
            model = compress_in_stages(self.bench.source, plan, stages, self._cut, self._train)
        with self._timed(seconds, "quick"):
            self._estimate_norms(model)
            quick_drop = self._accuracy(model)["accuracy_drop"]
        return model, quick_drop

    def _cut(self, source: nn.Module, plan: Plan) -> nn.Module:
        bench = self.bench
        known = self.factorisations if source is bench.source else bench.factorisations_of(source)
        return compress(
            source,
            plan,
            calibration=bench.calibration,
            factorisations=known,
            weight_limit=bench.weight_limit,
            shared=bench.shared,
        ).eval()

    def _train(self, model: nn.Module, share: float) -> None:
        """Training between stages, for a share of the budget."""
        self._estimate_norms(model)
        self._recover(model, share)
        model.eval()

    def _estimate_norms(self, model: nn.Module) -> None:
        bench = self.bench
        reestimate_batchnorm(model, bench.train, bench.model, bench.calibration, bench.spec.loss)

    def _fine_tune(self, model: nn.Module, share: float) -> list[float]:
        """Short training, in place, and its losses; afterwards ranges are set anew and weights put on their grid."""
        losses = self._recover(model, share)
        model.eval()
        calibrate_ranges(model, self.bench.calibration)
        freeze(model)
        return losses

    def _recover(self, model: nn.Module, share: float) -> list[float]:
        bench, spec = self.bench, self.bench.spec
        return recover(
            model,
            bench.model,
            bench.train,
            spec.loss,
            spec.recovery.part(share),
            seed=spec.seed,
            should_stop=self.should_abort,
            on_step=self.on_step,
        )

    def _accuracy(self, model: nn.Module) -> dict[str, Any]:
        bench, spec = self.bench, self.bench.spec
        scores = bench.score(model, bench.data.validation)
        drop = paired_drop(bench.dense.scores, scores, spec.score, spec.higher_is_better, spec.seed)
        distance = None
        if scores.outputs is not None and bench.dense.scores.outputs is not None:
            distance = output_distance(scores.outputs, bench.dense.scores.outputs, spec.loss)
        return {
            "accuracy": scores.value,
            "accuracy_drop": drop.value,
            "drop_low": drop.low,
            "drop_high": drop.high,
            "output_distance": distance,
        }

    def _dense_accuracy(self) -> dict[str, Any]:
        return {"accuracy": self.bench.dense.scores.value, "accuracy_drop": 0.0, "drop_low": 0.0, "drop_high": 0.0}

    @contextmanager
    def _timed(self, seconds: dict[str, float], step: str) -> Iterator[None]:
        start = self.clock()
        yield
        if self.should_abort():
            raise KeyboardInterrupt
        seconds[step] = seconds.get(step, 0.0) + self.clock() - start


def _curve(losses: Sequence[float]) -> tuple[float, ...]:
    """The mean losses of equal stretches of the training, in order; what is not finite left out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    stretches = np.array_split(finite, max(1, min(len(finite), MAX_CURVE_POINTS)))
    return tuple(float(np.mean(stretch)) for stretch in stretches if len(stretch))


def latency_columns(latency: Latency, dense_latency_ms: float) -> dict[str, float]:
    """A measured ratio as the front's columns, in the milliseconds that dense took when the study began."""
    scale = dense_latency_ms / latency.reference_ms
    return {
        "latency_ratio": latency.ratio,
        "ratio_low": latency.ratio_low,
        "ratio_high": latency.ratio_high,
        "latency_ms": latency.ratio * dense_latency_ms,
        "latency_p95_ms": latency.latency_p95_ms * scale,
    }
