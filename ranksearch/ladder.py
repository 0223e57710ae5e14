"""The ladder: a plan's latency and bytes, its accuracy after BatchNorm re-estimation, and after short fine-tuning."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from ranksearch.compression import calibrate_ranges, compress, count_params, rebuild
from ranksearch.early_stopping import StopRule
from ranksearch.evaluation import Evaluation
from ranksearch.factorisations import Factorisations
from ranksearch.latency import Latency
from ranksearch.layers import count_macs, in_eval_mode
from ranksearch.plan import Plan
from ranksearch.progressive import compress_in_stages, n_cuts
from ranksearch.quantization import freeze
from ranksearch.recovery import Step, diverged, recover, reestimate_batchnorm
from ranksearch.scoring import output_distance, paired_drop
from ranksearch.spec import Objective
from ranksearch.turns import Alone, Turns, giving_way
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench, first_rows

# A trial's latency interval is as narrow as this, or what these seconds give; the front is measured again at length.
MAX_CURVE_POINTS = 40
N_LATENCY_BLOCKS, NARROW, MAX_LATENCY_SECONDS = 12, 0.02, 1.0

Figures = dict[str, Any]


class Terms(BaseModel):
    """What a plan's way up the ladder depends on beside the plan; a value that workers can be sent.

    A plan that `may_stop` is stopped by goals that it misses and by the `rule`; a control is not.
    """

    model_config = ConfigDict(frozen=True)

    predicted_loss: float | None = None
    may_stop: bool = True
    rule: StopRule = StopRule()


NO_TERMS = Terms()


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Takes plans up the ladder on a workbench.

    `limits` are the goals as ratios: a plan that surely misses one of latency or bytes stops there. `keep` is given
    each complete plan with the model that was scored. Once `should_abort` says so, the evaluation ends with
    KeyboardInterrupt. It times and works by `turns` with whoever else is on the device.
    """

    bench: Workbench
    factorisations: Factorisations
    dense_latency_ms: float
    limits: Mapping[Objective, float] = field(default_factory=dict)
    keep: Callable[[Plan, nn.Module], None] = lambda _plan, _model: None
    should_abort: Callable[[], bool] = lambda: False
    on_step: Callable[[Step], None] = lambda _step: None
    turns: Turns = Alone()
    max_latency_seconds: float = MAX_LATENCY_SECONDS
    clock: Callable[[], float] = time.perf_counter

    def evaluate(self, plan: Plan, terms: Terms = NO_TERMS, figures: Figures | None = None) -> Evaluation:
        """The plan's figures, up to the rung of short fine-tuning; `figures` are those that were measured already.

        A plan that the terms' rule calls not worth training stops by its prediction or after the quick rung. Raises
        PlanError where the plan does not fit the model; whatever the model, the data or the runtime raise goes
        through.
        """
        seconds: dict[str, float] = {}
        figures = (figures or self.measure(plan, seconds)) | {"predicted_loss": terms.predicted_loss}
        stopped = (self._misses(figures) or terms.rule.beaten_by(figures)) if terms.may_stop else None
        if stopped is not None:
            return Evaluation(**figures, rung="latency", stopped=stopped, seconds=seconds)
        with self.turns.working():
            return self._judge(plan, terms, figures, seconds)

    def _judge(self, plan: Plan, terms: Terms, figures: Figures, seconds: dict[str, float]) -> Evaluation:
        """What accuracy the plan has, as far up the ladder as it gets."""
        if not plan.changes():
            self._keep(plan, self.bench.model, seconds)
            return Evaluation(**figures, **self._dense_accuracy(), rung="fine_tuned", seconds=seconds)
        model, quick_drop = self._fit(plan, seconds)
        stopped = terms.rule.beaten_by({**figures, "quick_drop": quick_drop}) if terms.may_stop else None
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

    def measure(self, plan: Plan, seconds: dict[str, float]) -> Figures:
        """Latency and bytes, from the architecture alone: cheap, so it comes first."""
        bench = self.bench
        with self._timed(seconds, "build"):
            candidate = in_eval_mode(rebuild(bench.model, plan, bench.weight_limit, bench.shared))
            model_bytes, n_params = packed_bytes(candidate), count_params(candidate)
            macs = count_macs(candidate, first_rows(bench.calibration, 1))
        with self._timed(seconds, "convert"):
            session = bench.prepare(candidate)
            in_float = bench.stayed_float(candidate, session)
        with self._timed(seconds, "latency"), self.turns.timing():
            latency = bench.compare(
                session, n_blocks=N_LATENCY_BLOCKS, narrow=NARROW, max_seconds=self.max_latency_seconds
            )
        return {
            "plan": plan,
            "model_bytes": model_bytes,
            "bytes_ratio": model_bytes / bench.dense.model_bytes,
            "n_params": n_params,
            "macs": macs,
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
        compressed = compress(
            source,
            plan,
            calibration=bench.calibration,
            factorisations=known,
            weight_limit=bench.weight_limit,
            shared=bench.shared,
        )
        return in_eval_mode(compressed)

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
            should_stop=self._shall_stop,
            on_step=self.on_step,
        )

    def _shall_stop(self) -> bool:
        """Asked before every step of training."""
        self.turns.give_way()
        return self.should_abort()

    def _accuracy(self, model: nn.Module) -> dict[str, Any]:
        bench, spec = self.bench, self.bench.spec
        scores = bench.score(model, giving_way(bench.data.validation, self.turns))
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
