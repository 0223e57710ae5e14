"""Where does a trial's time go? Building, converting, storing and logging must stay small beside the work itself.

Targets: at most 10 % of the digits study's trials, and at most 2 s per trial of ResNet-20 (which needs the folder
that RANKSEARCH_DATA names; left out without it). Profile and process start stand apart and are printed too.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, options, report, scratch

# What a trial is for; everything else that passes while it runs is overhead.
WORK = ("latency", "compress", "quick", "fine_tune", "validate")


class Stopwatch:
    """Progress of a study as seconds: of each trial, and of what comes before the first."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.before_trials = 0.0
        self.walls: list[float] = []
        self.steps: list[dict[str, float]] = []
        self._last = self.started

    def stage(self, text: str) -> None:
        pass

    def study_opened(self, bench: Any, home: Any, history: Sequence[Any], total: int | None) -> None:
        self._last = time.perf_counter()
        self.before_trials = self._last - self.started

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
    studies = {"digits": 4 if arguments.quick else 12}
    if os.environ.get("RANKSEARCH_DATA") and not arguments.quick:
        studies["resnet20_cifar10"] = 4
    lines, figures, holds = [], {}, True
    for name, trials in studies.items():
        figure = measured(ROOT / "studies" / f"{name}.py", trials)
        target = 0.10 * figure["wall_s"] if name == "digits" else 2.0
        figure["target_s"] = target
        holds = holds and figure["overhead_s"] <= target
        figures[name] = figure
        lines.append(f"{name}: {figure['before_trials_s']:.1f} s before the first trial; per trial, median:")
        lines += [f"  {step:10} {seconds:7.2f} s" for step, seconds in figure["steps_s"].items()]
        lines.append(f"  {'logging':10} {figure['logging_s']:7.2f} s")
        lines.append(f"  overhead {figure['overhead_s']:.2f} s of {figure['wall_s']:.2f} s; target {target:.2f} s")
    scope = ", ".join(f"{name} ({trials} trials)" for name, trials in studies.items())
    report(arguments, lines, {"figures": figures, "holds": holds, "scope": scope})


def measured(script: Path, trials: int) -> dict[str, Any]:
    """The medians over a study's trials: wall time, its steps, and what is neither work nor named: logging."""
    import ranksearch as rs
    from ranksearch.spec import load_study

    watch = Stopwatch()
    study = load_study(script)
    study = dataclasses.replace(study, name=f"overhead-{study.name}")
    with scratch():
        rs.search(study, trials=trials, home="home", tracking_uri="sqlite:///mlflow.db", progress=watch)
    steps = {step: statistics.median(s.get(step, 0.0) for s in watch.steps) for step in watch.steps[0]}
    walls_and_steps = list(zip(watch.walls, watch.steps, strict=True))
    return {
        "before_trials_s": watch.before_trials,
        "wall_s": statistics.median(watch.walls),
        "steps_s": steps,
        "logging_s": statistics.median(wall - sum(s.values()) for wall, s in walls_and_steps),
        "overhead_s": statistics.median(wall - sum(s.get(step, 0.0) for step in WORK) for wall, s in walls_and_steps),
    }


if __name__ == "__main__":
    main()
