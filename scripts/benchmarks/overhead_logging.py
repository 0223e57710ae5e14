"""What it costs to keep a study's records: the front anew after each trial, MLflow on SQLite, pictures now and then."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import scratch
from search_asking import deep_profile

from ranksearch.candidates import Profile
from ranksearch.evaluation import Evaluation
from ranksearch.home import StudyHome, write_json
from ranksearch.listener import Listener, Silent
from ranksearch.optimization import DropEstimator, ResolvedLimits, TrialRecord, drop_unit
from ranksearch.plan import Plan
from ranksearch.spec import OBJECTIVES
from ranksearch.tracking import Tracker

DENSE_SCORE = 0.9


def logging_s(n_layers: int, n_trials: int) -> dict[str, Any]:
    """Seconds per trial (median, 95th percentile, median of the last ten) and of the end, with made-up figures."""
    profile, rng = deep_profile(n_layers), np.random.default_rng(0)
    sizes = np.array([len(layer.candidates) for layer in profile.layers])
    took = []
    with scratch():
        listener = listener_of(profile)
        for number in range(n_trials):
            # From a plan that hardly changes the model to one that ruins it.
            indices = [int(i) for i in rng.random(n_layers) ** rng.uniform(0.1, 2.0) * sizes]
            record = _record(profile, number, indices, float(rng.normal(0, 0.002)))
            started = time.perf_counter()
            listener.trial_started(number, record.plan, record.origin)
            listener.trial_finished(record)
            took.append(time.perf_counter() - started)
        started = time.perf_counter()
        listener.finish("FINISHED")
        end_s = time.perf_counter() - started
    return {
        "layers": n_layers,
        "trials": n_trials,
        "median_s": statistics.median(took),
        "p95_s": float(np.quantile(took, 0.95)),
        "last_s": statistics.median(took[-10:]),
        "end_s": end_s,
    }


def listener_of(profile: Profile) -> Listener:
    """As a run has it, its home and its store new."""
    place = StudyHome(Path("home") / "deep")
    place.directory.mkdir(parents=True)
    target = {"runtime": "openvino", "device": "cpu", "batch_size": 1, "threads": 1, "precision": "f32"}
    record = {
        "name": place.name, "seed": 0, "noise_floor": 0.01, "dense_accuracy": DENSE_SCORE, "target": target,
        "dense_latency_ms": profile.dense_latency_ms, "dense_bytes": profile.dense_bytes, "fingerprint": {},
    }  # fmt: skip
    write_json(place.study, record)
    tracker = Tracker.open("sqlite:///mlflow.db", None, place.name, "")
    estimator = DropEstimator(profile, drop_unit(DENSE_SCORE))
    return Listener(OBJECTIVES, ResolvedLimits(max_drop=0.02), estimator, place, tracker, Silent(), [])


def _record(profile: Profile, number: int, indices: Sequence[int], noise: float) -> TrialRecord:
    """A trial that found what the profile predicts, but for noise."""
    return record_of_plan(profile, number, profile.plan(indices), noise)


def record_of_plan(profile: Profile, number: int, plan: Plan, noise: float) -> TrialRecord:
    """That of a plan."""
    loss, latency, size = profile.predict(profile.indices(plan))
    drop = 0.1 * loss + noise
    evaluation = Evaluation(
        plan=plan, rung="fine_tuned", accuracy=DENSE_SCORE - drop, accuracy_drop=drop, drop_low=drop - 0.006,
        drop_high=drop + 0.006, latency_ms=latency, latency_p95_ms=latency, ratio_low=0.98 * latency,
        latency_ratio=latency, ratio_high=1.02 * latency, model_bytes=int(size * profile.dense_bytes), bytes_ratio=size,
        n_params=1000, macs=1000, learning_curve=tuple(1.0 / (1 + i) for i in range(40)), seconds=dict.fromkeys(
            ("build", "convert", "latency", "compress", "quick", "fine_tune", "validate", "store"), 1.0
        ),
    )  # fmt: skip
    return TrialRecord(number=number, state="complete", origin="price", plan=plan, evaluation=evaluation)
