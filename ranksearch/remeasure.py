"""Measure finished plans anew, from their artefacts alone: latency, and accuracy on the runtime itself."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ranksearch.device import other_cores
from ranksearch.disk import under_way
from ranksearch.errors import MeasurementError, StorageError
from ranksearch.home import StudyHome, artefact_of, write_json
from ranksearch.home_records import figures_again
from ranksearch.ladder import latency_columns
from ranksearch.runtimes import AbstractSession
from ranksearch.scoring import Drop, Scores, paired_drop
from ranksearch.spec import Data, load_study
from ranksearch.workbench import Workbench, open_workbench

Figures = dict[str, float | None]

# What a member of the front may take to narrow its latency's interval.
MAX_LATENCY_SECONDS = 2.0
# Plans that are open at once, to be timed beside each other; memory holds them all.
N_TOGETHER = 8
# As the command line has it: run again.
EXIT_FULL = 75


def remeasure_in_fresh_process(
    script: Path,
    home: StudyHome,
    plan_hashes: list[str],
    dense_latency_ms: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Measures the plans in a process of its own, which imports the study script, and stores their figures.

    Ends early once `should_stop` says so: each plan's figures are stored as it ends. Raises MeasurementError with
    the last line that the process wrote where it fails, StorageError where a full disk is behind that.
    """
    # Not multiprocessing: its children run the user's main script again.
    words = [sys.executable, "-m", "ranksearch.remeasure", str(script), str(home.directory), repr(dense_latency_ms)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        # In a session of its own, so that Ctrl-C reaches the parent alone, which then ends it.
        process = subprocess.Popen(
            [*words, *plan_hashes], stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            while process.poll() is None and not should_stop():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said.seek(0)
        last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
    if process.returncode == EXIT_FULL and not should_stop():
        raise StorageError(last)
    if process.returncode != 0 and not should_stop():
        raise MeasurementError(f"measuring the front again in a fresh process failed: {last}")


def remeasure_plans(
    bench: Workbench,
    home: StudyHome,
    plan_hashes: list[str],
    dense_latency_ms: float,
    max_seconds: float = MAX_LATENCY_SECONDS,
) -> dict[str, Figures]:
    """Measures the plans that were not measured yet, stores the figures of each as it ends, and gives them all.

    Latencies are taken side by side, of dense and some plans at a time.
    """
    known: dict[str, Figures] = figures_again(home)
    artefacts = {name: found for name in plan_hashes if (found := artefact_of(home.plan(name))) is not None}
    missing = unmeasured(known, artefacts, bench.data)
    judge = Judge(bench, max_seconds)
    for start in range(0, len(missing), N_TOGETHER):
        names = missing[start : start + N_TOGETHER]
        sessions = [bench.open(artefacts[name]) for name in names]
        latencies = judge.latencies(sessions, dense_latency_ms)
        for name, session, latency in zip(names, sessions, latencies, strict=True):
            known[name] = latency | judge.accuracies(session)
            write_json(home.remeasured, known)
        # Before the next are opened.
        sessions.clear()
    return known


def unmeasured(known: Mapping[str, Figures], plan_hashes: Iterable[str], data: Data) -> list[str]:
    """Of the plans those whose figures are not known, or not on the tie-break data where there is such data now."""
    last = "runtime_accuracy" if data.tiebreak is None else "tiebreak_accuracy"
    return [name for name in plan_hashes if last not in known.get(name, {})]


class Judge:
    """Measures opened artefacts against dense; dense is scored on the runtime once."""

    def __init__(self, bench: Workbench, max_seconds: float = MAX_LATENCY_SECONDS) -> None:
        self.bench = bench
        self.max_seconds = max_seconds
        self._dense: dict[str, Scores] = {}

    def figures(self, session: AbstractSession, dense_latency_ms: float) -> Figures:
        """Latency as the front's columns, and the drops on the runtime."""
        return self.latency(session, dense_latency_ms) | self.accuracies(session)

    def latency(self, session: AbstractSession, dense_latency_ms: float) -> Figures:
        """The session's latency, interleaved with dense."""
        return self.latencies([session], dense_latency_ms)[0]

    def latencies(self, sessions: Sequence[AbstractSession], dense_latency_ms: float) -> list[Figures]:
        """The latency of each, interleaved with the others and dense."""
        found = self.bench.compare_all(sessions, n_blocks=40, max_seconds=self.max_seconds * len(sessions))
        return [dict(latency_columns(latency, dense_latency_ms)) for latency in found]

    def accuracies(self, session: AbstractSession) -> Figures:
        """The drops on the runtime: `runtime_*` on validation, `tiebreak_*` and `test_*` where there is such data."""
        figures = self.accuracy(session, "validation", "runtime_")
        for split in ("tiebreak", "test"):
            if getattr(self.bench.data, split) is not None:
                figures |= self.accuracy(session, split, f"{split}_")
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
        # A module, since scores of the kind evaluate(model) may use it as one.
        return self.bench.score(self.bench.as_model(session), getattr(self.bench.data, split))


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


def target_record(bench: Workbench) -> dict[str, Any]:
    """The target and its fingerprint, as `study.json` holds them."""
    return {"target": asdict(bench.spec.target), "fingerprint": bench.runtime.fingerprint(bench.spec.target)}


def main() -> None:
    """`python -m ranksearch.remeasure SCRIPT HOME DENSE_LATENCY_MS PLAN_HASH...`"""
    script, directory, dense_latency_ms, *plan_hashes = sys.argv[1:]
    study = load_study(script)
    home = StudyHome(Path(directory))
    try:
        with other_cores(study.target), under_way(home.directory):
            remeasure_plans(open_workbench(study), home, plan_hashes, float(dense_latency_ms))
    except StorageError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_FULL)


if __name__ == "__main__":
    main()
