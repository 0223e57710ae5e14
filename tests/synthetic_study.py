"""A candidate table and an evaluation that need no model: what the tests of optimization/ search over."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.evaluation import FRONT_COLUMNS, Evaluation
from ranksearch.executors import InlineExecutor
from ranksearch.export import PLAN, RUNTIME
from ranksearch.home import StudyHome, write_json
from ranksearch.optimization import ResolvedLimits, TrialRecord, open_study, optimise
from ranksearch.optimization.journal import Journal
from ranksearch.optimization.weight_errors import WeightErrors
from ranksearch.plan import DENSE, LayerChoice, Plan, Provenance
from ranksearch.spec import OBJECTIVES

IDENTITY = {"model": "m1", "data": "d1", "candidates": "c1"}
NO_LIMITS = ResolvedLimits()
LIMITS = ResolvedLimits(max_drop=0.03)
DENSE_MS = 10.0
INT8 = LayerChoice(weight_bits=8, activation_bits=8)


def make_profile(n_layers: int = 8, n_single: int = 1) -> Profile:
    """`n_layers` layers with six candidates each, fastest first, the last `n_single` with dense alone."""
    layers = [LayerProfile(name=f"block.{i}.conv", candidates=_candidates(i)) for i in range(n_layers - n_single)]
    dense = Candidate(choice=DENSE, loss=0.0, latency_ms=1.0, n_bytes=4000)
    layers += [LayerProfile(name=f"head.{i}", candidates=(dense,)) for i in range(n_single)]
    return Profile(layers=tuple(layers), dense_latency_ms=1.5 * n_layers, dense_bytes=6000 * n_layers)


def _candidates(i: int) -> tuple[Candidate, ...]:
    fragility = 0.002 * (1 + (i * 7) % 5)
    found = [Candidate(choice=DENSE, loss=0.0, latency_ms=1.0, n_bytes=4000)]
    rounding = {32: 0.0, 8: 0.4 * fragility}
    found.append(Candidate(choice=INT8, loss=rounding[8], rounding_loss=rounding[8], latency_ms=0.4, n_bytes=1000))
    for rank, share in ((8, 0.25), (16, 0.5)):
        for bits in (32, 8):
            choice = LayerChoice(decomposition="svd", ranks=(rank,), weight_bits=bits, activation_bits=bits)
            loss = fragility * (1 / share + 0.25) + rounding[bits]
            size, speed = (1.0, 1.0) if bits == 32 else (0.25, 0.7 + 0.1 * (i % 7))
            figures = {"latency_ms": share * speed, "n_bytes": int(4000 * share * size)}
            found.append(Candidate(choice=choice, loss=loss, rounding_loss=rounding[bits], **figures))
    return tuple(sorted(found, key=lambda candidate: candidate.latency_ms))


def evaluate_as_predicted(profile: Profile, **changes: Any) -> Callable[[Plan], Evaluation]:
    """An evaluation that measures what the table predicts; `changes` overwrite its fields."""

    def evaluate(plan: Plan) -> Evaluation:
        loss, latency, size = profile.predict(profile.indices(plan))
        fields: dict[str, Any] = {
            "rung": "fine_tuned", "accuracy": 0.9 - loss, "accuracy_drop": loss, "drop_low": loss - 0.004,
            "drop_high": loss + 0.004, "latency_ms": latency * 10, "latency_p95_ms": latency * 11,
            "latency_ratio": latency, "ratio_low": latency - 0.01, "ratio_high": latency + 0.01,
            "model_bytes": int(size * profile.dense_bytes), "bytes_ratio": size, "n_params": 1, "macs": 1,
            "predicted_loss": loss, "seconds": {},
        }  # fmt: skip
        return Evaluation(plan=plan, **(fields | changes))

    return evaluate


def make_errors(profile: Profile | None = None) -> WeightErrors:
    """Weights of which a candidate keeps the less the more it loses."""
    layers = (profile or make_profile()).layers
    lost = tuple(tuple(min(10 * c.loss, 0.99) for c in layer.candidates) for layer in layers)
    return WeightErrors(energy_lost=lost, spectral_error=lost, weakening=lost)


def make_controls(profile: Profile) -> list[tuple[str, Plan]]:
    """Dense, and every layer at 8 bits."""
    dense = profile.plan([layer.dense for layer in profile.layers])
    choices = {layer.name: INT8 for layer in profile.layers if len(layer.candidates) > 1}
    return [("dense", dense), ("int8", Plan(layers=choices))]


class Told:
    """Callbacks that remember."""

    def __init__(self) -> None:
        self.started: list[tuple[int, str]] = []
        self.finished: list[TrialRecord] = []
        self.failed: list[TrialRecord] = []
        self.seen: list[TrialRecord] = []

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        self.started.append((number, origin))
        return f"run-{number}"

    def trial_finished(self, record: TrialRecord) -> None:
        self.finished.append(record)

    def trial_seen(self, record: TrialRecord) -> None:
        self.seen.append(record)

    def trial_failed(self, record: TrialRecord) -> None:
        self.failed.append(record)


def search(study: Any, profile: Profile, evaluate: Callable[[Plan], Evaluation] | None = None, **changes: Any) -> Told:
    """`optimise` with everything at its plainest; `changes` overwrite its arguments."""
    told = Told()
    arguments: dict[str, Any] = {
        "objectives": OBJECTIVES, "limits": NO_LIMITS, "controls": make_controls(profile), "sampler_name": "nsga2",
        "seed": 0, "n_trials": 12, "deadline": None, "clock": time.monotonic, "callbacks": told,
        "should_stop": lambda: False, "weight_errors": lambda: make_errors(profile),
    }  # fmt: skip
    arguments |= changes
    measure = evaluate or evaluate_as_predicted(profile)
    executor = arguments.pop("executor", None) or InlineExecutor(lambda job: measure(job.plan), arguments["clock"])
    optimise(study, profile, executor, **arguments)
    return changes.get("callbacks", told)


def opened(storage: Any = None, **changes: Any) -> Any:
    """`open_study` with everything at its plainest."""
    arguments: dict[str, Any] = {"objectives": OBJECTIVES, "identity": IDENTITY, "limits": NO_LIMITS}
    return open_study(storage, "toy", **(arguments | changes))


def bundle(home: StudyHome, plan: Plan) -> None:
    """The folder of a finished plan, as far as an export reads it."""
    folder = home.plan(plan.hash())
    folder.mkdir(parents=True)
    written = plan.model_copy(update={"provenance": Provenance(versions={"torch": "2"}, sha256="ab" * 32)})
    (folder / PLAN).write_text(written.to_json())
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(folder / RUNTIME, {"sha256": {}, "target": {"runtime": "openvino"}})


def finished_study(directory: Path) -> StudyHome:
    """The home of a study of twelve trials, two controls among them, each with its folder."""
    profile, place = make_profile(4), StudyHome(directory)
    place.directory.mkdir()
    place.candidates.write_text(profile.to_json())
    write_json(
        place.study,
        {
            "name": "toy",
            "seed": 3,
            "objectives": list(OBJECTIVES),
            "dense_accuracy": 0.9,
            "dense_latency_ms": DENSE_MS,
            "dense_bytes": profile.dense_bytes,
            "noise_floor": 0.01,
            "skipped": {"embedding": "Embedding is not supported"},
            "target": {"runtime": "openvino"},
            "fingerprint": {"cores": "2"},
            "script": "/studies/toy.py",
        },
    )
    write_json(place.controls, {"controls": [dict.fromkeys(FRONT_COLUMNS) | {"origin": "control: int8"}]})
    with open_study(place.directory, "toy", objectives=OBJECTIVES, identity={}, limits=LIMITS) as study:
        told = search(study, profile, evaluate_as_predicted(profile), limits=LIMITS, n_trials=10)
    for record in told.finished:
        bundle(place, record.plan)
    return place


def _main(home: str, sampler_name: str, kill_at_write: int, kill_at_trial: int) -> None:
    """Runs a study in `home` and kills itself at the n-th write to the journal, or in the n-th evaluation."""
    import os
    import signal

    profile = make_profile()
    measured = evaluate_as_predicted(profile)
    counts = {"writes": 0, "trials": 0}

    def count(what: str, limit: int) -> None:
        counts[what] += 1
        if counts[what] == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def evaluate(plan: Plan) -> Evaluation:
        with (Path(home) / "evaluated.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plan.hash()) + "\n")
        count("trials", kill_at_trial)
        return measured(plan)

    append = Journal.append_logs

    def append_and_count(journal: Journal, logs: list[Any]) -> None:
        append(journal, logs)
        count("writes", kill_at_write)

    Journal.append_logs = append_and_count
    os.fsync = lambda _file: None
    with opened(Path(home)) as study:
        search(study, profile, evaluate, sampler_name=sampler_name)


if __name__ == "__main__":
    # Each kill in a child of its own: importing Optuna once serves them all.
    import os

    for line in sys.stdin:
        home, sampler_name, *points = line.split()
        child = os.fork()
        if child == 0:
            _main(home, sampler_name, *(int(point) for point in points))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
