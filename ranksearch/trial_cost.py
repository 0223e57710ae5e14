"""What a trial of a study costs, from one plan taken through every stage with two steps of fine-tuning."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ranksearch.controls import control_plans
from ranksearch.export import write_bundle
from ranksearch.ladder import Evaluator
from ranksearch.recovery import count_steps
from ranksearch.session import dense_latency
from ranksearch.spec import StudySpec
from ranksearch.workbench import open_workbench

N_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialCost:
    """The dense model's figures, what is skipped and why, and the seconds of a trial and of the preparation before.

    `notes` are what the user should hear of the model.
    """

    dense_score: float
    n_validation: int
    dense_latency_ms: float
    noise_floor: float
    n_layers: int
    skipped: Mapping[str, str]
    trial_s: float
    fine_tuning_s: float
    preparation_s: float
    notes: tuple[str, ...] = ()


def estimate(study: StudySpec) -> TrialCost:
    """Takes the last of the controls through every stage, and reckons with the study's own number of steps."""
    short = dataclasses.replace(study, recovery=dataclasses.replace(study.recovery, steps=N_STEPS, prepare=None))
    bench = open_workbench(short)
    latency_ms, noise_floor = dense_latency(bench)
    _, plan = control_plans(bench)[-1]
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(
            bench=bench,
            factorisations=bench.factorisations(),
            dense_latency_ms=latency_ms,
            # A study keeps each trial: what no artefact can be made of fails all of them.
            keep=lambda plan, model: write_bundle(bench, plan, model, Path(folder) / plan.hash()),
        )
        seconds = evaluator.evaluate(plan).seconds
    per_step = seconds.get("fine_tune", 0.0) / N_STEPS
    n_steps, most = count_steps(bench.train, study.recovery), study.recovery.seconds or math.inf
    fine_tuning_s = most if n_steps is None else min(per_step * n_steps, most)
    prepare = study.recovery.prepare
    others = sum(duration for step, duration in seconds.items() if step != "fine_tune")
    return TrialCost(
        dense_score=bench.dense.scores.value,
        n_validation=bench.dense.scores.n_judged,
        dense_latency_ms=latency_ms,
        noise_floor=noise_floor,
        n_layers=len(bench.found.all),
        skipped=bench.found.skipped,
        trial_s=others + fine_tuning_s,
        fine_tuning_s=fine_tuning_s,
        preparation_s=0.0 if prepare is None else per_step * prepare.steps,
        notes=bench.notes,
    )
