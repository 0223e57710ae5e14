"""Measure finished plans anew, from their artefacts alone: latency, and accuracy on the runtime itself."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ranksearch.evaluation import latency_columns
from ranksearch.home import StudyHome, read_json, write_json
from ranksearch.latency import compare, device_lock
from ranksearch.runtimes import AbstractSession
from ranksearch.scoring import Drop, Scores, paired_drop
from ranksearch.spec import load_study
from ranksearch.workbench import Workbench, open_workbench, session_predict, to_arrays

Figures = dict[str, float | None]


def remeasure_in_fresh_process(script: Path, home: StudyHome, plan_hashes: list[str], dense_latency_ms: float) -> None:
    """Measures the plans in a process of its own, which imports the study script, and stores their figures."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        pool.submit(_remeasure_script, script, home, plan_hashes, dense_latency_ms).result()


def remeasure(
    bench: Workbench,
    home: StudyHome,
    plan_hashes: list[str],
    dense_latency_ms: float,
    on_plan: Callable[[str], None] = lambda _hash: None,
) -> dict[str, Figures]:
    """Measures the plans that were not measured yet, stores the figures of each as it ends, and gives them all."""
    known: dict[str, Figures] = dict(read_json(home.remeasured))
    judge = Judge(bench)
    for plan_hash in plan_hashes:
        artefact = read_json(home.plan(plan_hash) / "runtime.json").get("artefact")
        if plan_hash in known or artefact is None:
            continue
        on_plan(plan_hash)
        session = bench.runtime.open(home.plan(plan_hash) / artefact, bench.spec.target)
        known[plan_hash] = judge.figures(session, dense_latency_ms)
        write_json(home.remeasured, known)
    return known


class Judge:
    """Measures opened artefacts against dense; dense is scored on the runtime once."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._dense: dict[str, Scores] = {}

    def figures(self, session: AbstractSession, dense_latency_ms: float) -> Figures:
        """Latency as the front's columns, and the drops on the runtime: `runtime_*` on validation, `test_*` on test."""
        bench = self.bench
        run = session.bind(to_arrays(bench.example))
        with device_lock(bench.spec.target):
            latency = compare(run, bench.dense.run, n_blocks=40, max_seconds=3.0, seed=bench.spec.seed)
        figures: Figures = dict(latency_columns(latency, dense_latency_ms))
        figures |= self.accuracy(session, "validation", "runtime_")
        if bench.data.test is not None:
            figures |= self.accuracy(session, "test", "test_")
        return figures

    def accuracy(self, session: AbstractSession, split: str, prefix: str) -> Figures:
        """The session's score on a split, and its paired drop against dense on the same runtime."""
        bench = self.bench
        if split not in self._dense:
            self._dense[split] = self._score(bench.dense.session, split)
        scores = self._score(session, split)
        drop = paired_drop(self._dense[split], scores, bench.spec.score, bench.spec.higher_is_better, bench.spec.seed)
        return drop_columns(scores.value, drop, prefix)

    def _score(self, session: AbstractSession, split: str) -> Scores:
        predict = session_predict(session, self.bench.spec.target.batch_size)
        return self.bench.score(predict, getattr(self.bench.data, split))


def drop_columns(accuracy: float, drop: Drop, prefix: str) -> Figures:
    """A score and its drop as columns that begin with `prefix`."""
    return {
        f"{prefix}accuracy": accuracy,
        f"{prefix}accuracy_drop": drop.value,
        f"{prefix}drop_low": drop.low,
        f"{prefix}drop_high": drop.high,
    }


def has_gap(row: Mapping[str, Any], figures: Figures) -> bool:
    """Whether the runtime's accuracy differs from torch's by more than the width of the drop's interval."""
    accuracy, on_runtime = row.get("accuracy"), figures.get("runtime_accuracy")
    low, high = row.get("drop_low"), row.get("drop_high")
    if accuracy is None or on_runtime is None or low is None or high is None or high <= low:
        return False
    return bool(abs(accuracy - on_runtime) > high - low)


def _remeasure_script(script: Path, home: StudyHome, plan_hashes: list[str], dense_latency_ms: float) -> None:
    bench = open_workbench(load_study(script))
    remeasure(bench, home, plan_hashes, dense_latency_ms)


def target_record(bench: Workbench) -> dict[str, Any]:
    """The target and its fingerprint, as `study.json` holds them."""
    return {"target": asdict(bench.spec.target), "fingerprint": bench.runtime.fingerprint(bench.spec.target)}
