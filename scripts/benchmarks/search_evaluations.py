"""What plans measure, each evaluated once and then read from a file: accuracy on either rung of the ladder, bytes."""

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from search_subjects import Subject, drawn
from torch import nn

from ranksearch.candidates import Profile
from ranksearch.compression import calibrate_ranges, compress
from ranksearch.evaluation import Evaluation
from ranksearch.plan import Plan
from ranksearch.quantization import freeze
from ranksearch.recovery import recover, reestimate_batchnorm
from ranksearch.scoring import output_distance, paired_drop
from ranksearch.weights import packed_bytes

EVALUATIONS = "evaluations.jsonl"
N_BATCHNORM, SEED = 2048, 0
# Whose weights are kept; ResNet-56 has 3.4 MB.
N_MODELS = 128
# Of what is put on record; a thousandth of an image of ten thousand.
N_DIGITS = 7

# What a row tells: of BatchNorm re-estimation its drop on a split, of the study's own fine-tuning both drops.
Split = Literal["validation", "test", "fine_tuned"]
# The rung whose drops searches are told.
Rung = Literal["quick", "fine_tuned"]
Indices = tuple[int, ...]
Row = dict[str, Any]
# (plan, split) -> its row: drop, low and high; where it is of validation, distance and bytes_ratio; after fine-tuning
# the drop on `test` images too.
Measure = Callable[[Indices, Split], Row]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a search is told of a plan: its drop in score units with the paired 95 % interval, the distance of its
    outputs to dense's, and ratios to dense. Latency is the table's own prediction, so that all are told the same.
    """

    drop: float
    low: float
    high: float
    distance: float
    latency_ratio: float
    bytes_ratio: float

    @property
    def losses(self) -> tuple[float, float, float]:
        """Drop, latency ratio, bytes ratio."""
        return self.drop, self.latency_ratio, self.bytes_ratio


class Recorded:
    """Rows by plan and split, in memory and, where there is a path, in a file of a JSON object a line that only grows.

    A line that was torn when a process ended is not read; its plan is evaluated again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}
        text = path.read_bytes() if path is not None and path.is_file() else b""
        for line in text.split(b"\n"):
            row = _read(line)
            if row is not None:
                self.rows[row["plan"], row["split"]] = row
        if text and not text.endswith(b"\n"):
            self._append(b"\n")

    def get(self, plan: str, split: Split) -> Row | None:
        """The row, None where there is none."""
        return self.rows.get((plan, split))

    def put(self, row: Row) -> None:
        """Adds a row, which names its plan and split."""
        self.rows[row["plan"], row["split"]] = row
        self._append(json.dumps(row).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self.path is None:
            return
        # One write at the end of the file: several processes may fill it.
        with self.path.open("ab", buffering=0) as file:
            file.write(line)


class Evaluations:
    """The evaluations of a table's plans on a rung: those on record, others by `measure`, which are put on record.

    Dense is known: it loses nothing, and is 1 in latency and bytes.
    """

    def __init__(
        self,
        profile: Profile,
        recorded: Recorded,
        measure: Measure,
        rung: Rung = "quick",
        subject: Subject | None = None,
    ) -> None:
        self.profile, self.recorded, self.measure, self.rung, self.subject = profile, recorded, measure, rung, subject
        self.dense = tuple(layer.dense for layer in profile.layers)
        self.n_new = 0
        self._figures = {
            self.dense: Figures(drop=0.0, low=0.0, high=0.0, distance=0.0, latency_ratio=1.0, bytes_ratio=1.0)
        }
        self._test = {self.dense: 0.0}

    def figures(self, indices: Indices) -> Figures:
        """What a search is told of the plan."""
        if indices not in self._figures:
            row = self.fine_tuned(indices) if self.rung == "fine_tuned" else self._row(indices, "validation")
            told = {name: row[name] for name in ("drop", "low", "high", "distance", "bytes_ratio")}
            self._figures[indices] = Figures(**told, latency_ratio=self.profile.predict(indices)[1])
        return self._figures[indices]

    def test_drop(self, indices: Indices) -> float:
        """What the plan loses on images that no search sees."""
        if indices not in self._test:
            if self.rung == "fine_tuned":
                self._test[indices] = self.fine_tuned(indices)["test"]
            else:
                self._test[indices] = self._row(indices, "test")["drop"]
        return self._test[indices]

    def fine_tuned(self, indices: Indices) -> Row:
        """What the plan loses after the study's fine-tuning: `drop` on validation, and on `test` images."""
        return self._row(indices, "fine_tuned")

    def quick_drop(self, indices: Indices) -> float:
        """What the plan loses before it is fine-tuned."""
        return 0.0 if indices == self.dense else self._row(indices, "validation")["drop"]

    def seconds(self) -> list[float]:
        """How long each evaluation of the rung took, without test images."""
        split = "fine_tuned" if self.rung == "fine_tuned" else "validation"
        return [
            row["seconds"]["all"] for (_, of), row in self.recorded.rows.items() if of == split and "seconds" in row
        ]

    def evaluation(self, indices: Indices) -> Evaluation:
        """The figures in the product's words, for samplers that read them from a study's trials."""
        figures, plan = self.figures(indices), self.profile.plan(indices)
        ms = figures.latency_ratio * self.profile.dense_latency_ms
        return Evaluation(
            plan=plan, rung="fine_tuned", accuracy=1 - figures.drop, accuracy_drop=figures.drop, drop_low=figures.low,
            drop_high=figures.high, quick_drop=figures.drop, output_distance=figures.distance, latency_ms=ms,
            latency_p95_ms=ms, latency_ratio=figures.latency_ratio, ratio_low=figures.latency_ratio,
            ratio_high=figures.latency_ratio, model_bytes=round(figures.bytes_ratio * self.profile.dense_bytes),
            bytes_ratio=figures.bytes_ratio, n_params=0, macs=0, predicted_loss=self.profile.predict(indices)[0],
            seconds={},
        )  # fmt: skip

    def _row(self, indices: Indices, split: Split) -> Row:
        plan = self.profile.plan(indices).hash()
        row = self.recorded.get(plan, split)
        if row is None:
            row = {"plan": plan, "split": split, "indices": list(indices), **self.measure(indices, split)}
            self.recorded.put(row)
            self.n_new += 1
        return row


def open_evaluations(subject: Subject, rung: Rung = "quick") -> Evaluations:
    """A subject's evaluations, those on record in its folder."""
    measure = Measurement(subject).measure
    return Evaluations(subject.profile, Recorded(subject.folder / EVALUATIONS), measure, rung, subject)


class Measurement:
    """Evaluates plans of a subject as the product does before it trains; what is the same for every plan is kept.

    So are the last plans' models, of which some are asked for test figures later. Nothing is loaded before it is
    needed.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._models: dict[str, nn.Module] = {}

    def measure(self, indices: Indices, split: Split) -> Row:
        """The plan's row, and where its time went."""
        plan, seconds, started = self.subject.profile.plan(indices), dict[str, float](), time.perf_counter()
        if split == "fine_tuned":
            row = self._fine_tuned(plan, seconds)
        else:
            row = self._told(self._model(plan, seconds), split, seconds)
        seconds["all"] = time.perf_counter() - started - seconds.pop("test", 0.0)
        rounded = {name: round(value, N_DIGITS) for name, value in row.items()}
        return rounded | {"seconds": {step: round(value, 3) for step, value in seconds.items()}}

    def _told(self, model: nn.Module, split: Split, seconds: dict[str, float]) -> Row:
        """The drop on a split; on validation with the distance to dense's outputs, and bytes."""
        started = time.perf_counter()
        bench, spec = self.subject.bench, self.subject.bench.spec
        scores, dense = bench.score(model, self._batches[split]), self._dense[split]
        drop = paired_drop(dense, scores, spec.score, spec.higher_is_better, spec.seed)
        assert drop.low is not None and drop.high is not None, "these studies' score has an interval"
        row: Row = {"drop": drop.value, "low": drop.low, "high": drop.high}
        if split == "validation":
            row |= {"distance": output_distance(scores.outputs, dense.outputs, spec.loss)}
            row |= {"bytes_ratio": packed_bytes(model) / bench.dense.model_bytes}
        seconds["score"] = time.perf_counter() - started
        return row

    def _fine_tuned(self, plan: Plan, seconds: dict[str, float]) -> Row:
        """The same of a plan that is fine-tuned by the study's recovery, as the product does it, and the test drop."""
        bench, spec = self.subject.bench, self.subject.bench.spec
        model, started = self._compressed(plan, seconds), time.perf_counter()
        recover(model, bench.model, bench.train, spec.loss, spec.recovery, seed=spec.seed)
        model.eval()
        calibrate_ranges(model, bench.calibration)
        freeze(model)
        seconds["fine_tune"] = time.perf_counter() - started
        row = self._told(model, "validation", seconds)
        started = time.perf_counter()
        row["test"] = self._told(model, "test", {})["drop"]
        seconds["test"] = time.perf_counter() - started
        return row

    def _model(self, plan: Plan, seconds: dict[str, float]) -> nn.Module:
        name = plan.hash()
        model = self._models.pop(name, None)
        if model is None:
            model = self._compressed(plan, seconds)
        self._models[name] = model
        if len(self._models) > N_MODELS:
            del self._models[next(iter(self._models))]
        return model

    def _compressed(self, plan: Plan, seconds: dict[str, float]) -> nn.Module:
        started = time.perf_counter()
        bench = self.subject.bench
        model = compress(
            bench.source,
            plan,
            calibration=bench.calibration,
            factorisations=self.subject.factorisations,
            weight_limit=bench.weight_limit,
            shared=bench.shared,
        ).eval()
        seconds["compress"] = time.perf_counter() - started
        reestimate_batchnorm(model, self._training, bench.model, bench.calibration, bench.spec.loss, seed=SEED)
        seconds["batchnorm"] = time.perf_counter() - started - seconds["compress"]
        return model

    @functools.cached_property
    def _training(self) -> list[tuple[Any, Any]]:
        """The batches that BatchNorm is estimated on: those that each plan would draw from the same seed."""
        return list(drawn(self.subject.bench.train, N_BATCHNORM, SEED))

    @functools.cached_property
    def _batches(self) -> Mapping[Split, list[tuple[Any, Any]]]:
        data = self.subject.bench.data
        assert data.test is not None, "all subjects have test images"
        return {"validation": list(data.validation), "test": list(data.test)}

    @functools.cached_property
    def _dense(self) -> Mapping[Split, Any]:
        bench = self.subject.bench
        return {"validation": bench.dense.scores, "test": bench.score(bench.model, self._batches["test"])}


def mean_seconds(recorded: Recorded) -> dict[str, float]:
    """Where an evaluation's time goes before training, by step: means over those on record; the median of all."""
    rows = [row["seconds"] for (_, of), row in recorded.rows.items() if of == "validation" and "seconds" in row]
    steps = {step for row in rows for step in row}
    means = {step: float(np.mean([row.get(step, 0.0) for row in rows])) for step in sorted(steps)}
    return means | ({"median": float(np.median([row["all"] for row in rows]))} if rows else {})


def _read(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
