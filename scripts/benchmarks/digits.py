"""Does the embedded study find a plan that is worth it? Repeats training, search, export and verification over seeds.

Targets, as medians: at least 4x smaller and 3x faster than dense float32, faster than dense at the runtime's default
precision, smaller or faster by 1.2x than the best control at the same drop, at least 8 plans on the front, and a drop
of at most 0.01 on the test split, measured again in a fresh process. Intervals are the range over the seeds.
`--quick` searches nothing: one uniform plan in 8 bits, on a network trained for a quarter of the time, against the
runtime's own int8 and on validation data.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, median_and_range, options, report, scratch

STUDY = ROOT / "studies" / "digits.py"
TARGETS = {
    "smaller": 4.0,
    "faster": 3.0,
    "over default precision": 1.0,
    "over best control": 1.2,
    "plans on the front": 8,
}
QUICK_TARGETS = {"smaller": 6.0, "faster": 3.0, "faster than own int8": 1.2}
MAX_DROP = 0.01


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=28)
    arguments = parser.parse_args()
    if arguments.quick:
        scope = "digits, no search: uniform Tucker-2 in 8 bits on a briefly trained network, validation data"
        answer(arguments, [one_plan()], QUICK_TARGETS, "validation drop", scope)
    rows = []
    for seed in range(arguments.seeds):
        with scratch() as directory:
            rows.append(one_search(seed, arguments.trials, directory))
        if not arguments.json:
            print(f"seed {seed}: {rows[-1]}", flush=True)
    scope = f"digits, {arguments.seeds} seed(s) of training and search, {arguments.trials} trials each"
    answer(arguments, rows, TARGETS, "test drop", scope)


def answer(
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, float]],
    targets: Mapping[str, float],
    drop: str,
    scope: str,
) -> None:
    """Prints medians and ranges beside the targets, and exits."""
    figures = {name: median_and_range([row[name] for row in rows]) for name in rows[0]}
    holds = all(figures[name]["median"] >= target for name, target in targets.items())
    holds = holds and figures[drop]["median"] <= MAX_DROP
    lines = ["", f"{'':24} {'median':>9} {'low':>9} {'high':>9}   target"]
    for name, figure in figures.items():
        target = targets.get(name, f"<= {MAX_DROP}" if name == drop else "")
        lines.append(f"{name:24} {figure['median']:9.4f} {figure['low']:9.4f} {figure['high']:9.4f}   {target}")
    report(
        arguments, lines, {"figures": figures, "targets": {**targets, drop: MAX_DROP}, "holds": holds, "scope": scope}
    )


def one_plan() -> dict[str, float]:
    """A uniform plan's figures against dense and against the runtime's own int8, measured in one process."""
    import dataclasses

    import ranksearch as rs
    from ranksearch.controls import uniform_plan
    from ranksearch.plan import Plan
    from ranksearch.remeasure import Judge
    from ranksearch.spec import load_study
    from ranksearch.workbench import open_workbench

    study = load_study(STUDY)
    train = study.model.__globals__["train_network"]
    network = train(seed=0, n_epochs=5)
    study = dataclasses.replace(study, name="digits-quick", model=lambda: network)
    bench = open_workbench(study)
    inputs = (inputs for inputs, _ in bench.calibration)
    own = Judge(bench).figures(bench.runtime.quantize_own(bench.model, inputs, bench.example, study.target), 1.0)
    floats = uniform_plan(bench.found.layers, ("tucker2",), 0.5, study.space.rank_multiple)
    eight = {"weight_bits": 8, "activation_bits": 8}
    plan = Plan(layers={name: choice.model_copy(update=eight) for name, choice in floats.layers.items()})
    evaluation = rs.evaluate(study, plan)
    return {
        "smaller": 1 / evaluation.bytes_ratio,
        "faster": 1 / evaluation.latency_ratio,
        "faster than own int8": float(own["latency_ratio"] or 0.0) / evaluation.latency_ratio,
        "validation drop": float(evaluation.accuracy_drop or 0.0),
    }


def one_search(seed: int, trials: int, directory: Path) -> dict[str, float]:
    """The exported plan's figures against dense and against the controls."""
    environment = {**os.environ, "RANKSEARCH_DIGITS_SEED": str(seed), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    ranksearch(environment, "run", STUDY, "--trials", trials, "--seed", seed)
    ranksearch(environment, "export", "--study", "digits", "-o", "best")
    ranksearch(environment, "verify", "best", "--study", STUDY)
    plan = json.loads((directory / "best" / "runtime.json").read_text())["measured"]
    every = json.loads(ranksearch(environment, "front", "--study", "digits", "--all", "--format", "json"))
    records = json.loads((directory / ".ranksearch" / "digits" / "controls.json").read_text())["controls"]
    controls = [row for row in every if str(row["origin"]).startswith("control")] + records
    default = next(row for row in records if "default precision" in row["origin"])
    n_front = sum(row["pareto"] for row in every)
    return {
        "smaller": 1 / plan["bytes_ratio"],
        "faster": 1 / plan["latency_ratio"],
        "over default precision": default["latency_ratio"] / plan["latency_ratio"],
        "over best control": gain_over_controls(plan, controls),
        "test drop": plan["test_accuracy_drop"],
        "plans on the front": n_front,
    }


def gain_over_controls(plan: dict[str, Any], controls: list[dict[str, Any]]) -> float:
    """How many times smaller or faster, whichever is more, than the best control for each at the same drop."""
    known = [row for row in controls if row["accuracy_drop"] is not None and row["latency_ratio"] is not None]
    equal = [
        row for row in known if row["test_accuracy_drop"] is None or row["test_accuracy_drop"] <= plan["test_drop_high"]
    ]
    speed = min(row["latency_ratio"] for row in equal) / plan["latency_ratio"]
    size = min(row["bytes_ratio"] for row in equal) / plan["bytes_ratio"]
    return float(max(speed, size))


def ranksearch(environment: dict[str, str], *arguments: object) -> str:
    """Runs the command; its standard output. Ends the benchmark where it fails."""
    command = [sys.executable, "-c", "from ranksearch.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(
            f"ranksearch {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}\n{done.stdout}"
        )
    return done.stdout


if __name__ == "__main__":
    main()
