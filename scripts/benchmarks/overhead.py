"""Where does a trial's time go? Building, converting, storing and logging must stay small beside the work itself.

Targets: at most 10 % of the digits study from its first control to its end, and at most 2 s per trial of ResNet-20
(which needs the folder that RANKSEARCH_DATA names; left out without it). Loading and profile stand apart.
Keeping records alone, estimates and MLflow on SQLite: at most 0.15 s per trial in the median of 100, of 20 layers;
500 trials of 200 layers are told beside it.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, options, report, scratch
from overhead_logging import logging_s

# What a trial is for; everything else that passes while it runs is overhead.
RECORDS, MOST_RECORDS_S = ((20, 100), (200, 500)), 0.15
WORK = ("latency", "compress", "quick", "fine_tune", "validate")


class Stopwatch:
    """Progress of a study as seconds: of each trial and of each stage, by what the stage says of itself."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.walls: list[float] = []
        self.steps: list[dict[str, float]] = []
        self._last = time.perf_counter()

    def stage(self, text: str) -> None:
        self.stages[text] = time.perf_counter()

    def study_opened(self, bench: Any, home: Any, history: Sequence[Any], total: int | None) -> None:
        self._last = time.perf_counter()

    def trial_started(self, number: int, plan: Any, origin: str) -> None:
        pass

    def trial_ended(self, record: Any, row: Any) -> None:
        now = time.perf_counter()
        if record.evaluation is not None and record.evaluation.rung == "fine_tuned" and record.plan.changes():
            self.walls.append(now - self._last)
            self.steps.append(record.evaluation.seconds)
        self._last = now


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    studies = {"digits": 3 if arguments.quick else 28}
    if os.environ.get("RANKSEARCH_DATA") and not arguments.quick:
        studies["resnet20_cifar10"] = 4
    lines, figures, holds = [], {}, True
    for name, trials in studies.items():
        figure = measured(ROOT / "studies" / f"{name}.py", trials)
        measure, target = ("share_of_study", 0.10) if name == "digits" else ("overhead_s", 2.0)
        holds = holds and figure[measure] <= target
        figures[name] = {**figure, "target": {measure: target}}
        lines.append(
            f"{name}: {figure['before_s']:.1f} s before the study, {figure['study_s']:.1f} s in it; per trial:"
        )
        lines += [f"  {step:10} {seconds:7.2f} s" for step, seconds in figure["steps_s"].items()]
        lines.append(f"  {'logging':10} {figure['logging_s']:7.2f} s")
        lines.append(f"  overhead {figure['overhead_s']:.2f} s of {figure['wall_s']:.2f} s")
        lines.append(f"  {figure['share_of_study']:.1%} of the study; target: {measure} <= {target}")
    for n_layers, n_trials in RECORDS[: 1 if arguments.quick else None]:
        kept = logging_s(n_layers, n_trials)
        figures[f"records of {n_layers} layers"] = kept
        lines.append(
            f"records, {n_trials} trials of {n_layers} layers: {kept['median_s']:.3f} s per trial in the median, "
            f"95 % within {kept['p95_s']:.3f} s, the last {kept['last_s']:.3f} s, the end {kept['end_s']:.1f} s"
        )
        holds = holds and (n_layers > 20 or kept["median_s"] <= MOST_RECORDS_S)
    scope = ", ".join(f"{name} ({trials} trials)" for name, trials in studies.items())
    report(arguments, lines, {"figures": figures, "holds": holds, "scope": scope})


def measured(script: Path, trials: int) -> dict[str, Any]:
    """Means over a study's trials: wall time, its steps, and what is neither work nor named: logging; and the share
    of the study that is overhead, which writing the front at its end belongs to."""
    import ranksearch as rs
    from ranksearch.spec import load_study

    watch = Stopwatch()
    study = load_study(script)
    study = dataclasses.replace(study, name=f"overhead-{study.name}")
    started = time.perf_counter()
    with scratch():
        rs.search(study, trials=trials, home="home", tracking_uri="sqlite:///mlflow.db", progress=watch)
    ended = time.perf_counter()
    steps = {step: statistics.mean(s.get(step, 0.0) for s in watch.steps) for step in watch.steps[0]}
    named = [sum(s.values()) for s in watch.steps]
    overheads = [
        wall - sum(s.get(step, 0.0) for step in WORK) for wall, s in zip(watch.walls, watch.steps, strict=True)
    ]
    began = watch.stages["measuring controls"]
    writing = ended - watch.stages["writing the report, and the front to MLflow"]
    return {
        "before_s": began - started,
        "study_s": ended - began,
        "wall_s": statistics.mean(watch.walls),
        "steps_s": steps,
        "logging_s": statistics.mean(wall - n for wall, n in zip(watch.walls, named, strict=True)),
        "overhead_s": statistics.mean(overheads),
        "share_of_study": (sum(overheads) + writing) / (ended - began),
    }


if __name__ == "__main__":
    main()
