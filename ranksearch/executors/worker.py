"""What every worker does, wherever it runs: it opens the study from its script, and takes plans up the ladder."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from ranksearch.device import other_cores
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors.base import Job
from ranksearch.export import write_bundle
from ranksearch.factorisations import Factorisations
from ranksearch.home import StudyHome
from ranksearch.identity import workbench_identity
from ranksearch.ladder import Evaluator, Figures
from ranksearch.preparation import weights_of
from ranksearch.recovery import Step
from ranksearch.spec import Objective, load_study
from ranksearch.statistics import from_tensors, to_tensors
from ranksearch.turns import Alone, FileTurns
from ranksearch.workbench import Workbench, open_workbench

STATISTICS, SOURCE = "statistics.safetensors", "source.safetensors"
STEP_EVERY_S = 0.5


class Assignment(BaseModel):
    """What a worker is told once: which study, on which terms, and where what it needs and what it makes lie.

    `shared` is the folder of what was computed once for all workers, `home` that of the plans which it keeps, `turns`
    that by which those who share a device take turns; None where nobody does.
    """

    model_config = ConfigDict(frozen=True)

    script: str
    seed: int
    identity: dict[str, str]
    dense_latency_ms: float
    limits: dict[Objective, float]
    home: str
    shared: str
    weight_limit: int
    threads: int
    turns: str | None = None


def assignment(
    bench: Workbench, *, script: Path, dense_latency_ms: float, limits: dict[Objective, float], home: StudyHome
) -> Assignment:
    """That of a study opened here, for workers on this machine; on another, folders and threads are others."""
    return Assignment(
        script=str(script.resolve()),
        seed=bench.spec.seed,
        identity=workbench_identity(bench),
        dense_latency_ms=dense_latency_ms,
        limits=limits,
        home=str(home.directory.resolve()),
        shared=str((home.directory / "workers").resolve()),
        weight_limit=bench.weight_limit,
        threads=torch.get_num_threads(),
    )


def write_shared(bench: Workbench, factorisations: Factorisations, folder: Path) -> None:
    """Writes what workers read instead of computing it: the statistics, and the prepared model where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_tensors(factorisations.statistics), folder / STATISTICS)
    (folder / SOURCE).unlink(missing_ok=True)
    if bench.source is not bench.model:
        save_file(weights_of(bench.source), folder / SOURCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """An opened study that takes plans up the ladder; `fingerprint` is this machine's as a target."""

    evaluator: Evaluator
    fingerprint: dict[str, str]

    def evaluate(self, job: Job, figures: Figures | None = None) -> Evaluation:
        """What came of the job's plan; `figures` are those that were measured elsewhere."""
        with other_cores(self.evaluator.bench.spec.target):
            return self.evaluator.evaluate(job.plan, job.terms, figures)


def open_worker(given: Assignment, on_step: Callable[[Step], None] = lambda _step: None) -> Worker:
    """The study, opened here.

    Raises StudyError where the script gives another study than where it was begun.
    """
    torch.set_num_threads(given.threads)
    spec = replace(load_study(given.script), seed=given.seed)
    source, home = Path(given.shared) / SOURCE, StudyHome(Path(given.home))
    with other_cores(spec.target):
        bench = open_workbench(
            spec, prepared=load_file(source) if source.is_file() else None, weight_limit=given.weight_limit
        )
    _check_same(workbench_identity(bench), given)
    evaluator = Evaluator(
        bench=bench,
        factorisations=bench.factorisations(from_tensors(load_file(Path(given.shared) / STATISTICS))),
        dense_latency_ms=given.dense_latency_ms,
        limits=given.limits,
        keep=lambda plan, model: write_bundle(bench, plan, model, home.plan(plan.hash())),
        on_step=on_step,
        turns=Alone() if given.turns is None else FileTurns(Path(given.turns)),
    )
    return Worker(evaluator=evaluator, fingerprint=bench.runtime.fingerprint(spec.target))


def now_and_then(tell: Callable[[Step], None], clock: Callable[[], float] = time.monotonic) -> Callable[[Step], None]:
    """Steps are many, and the coordinator is told of some: one in half a second."""
    told_at = -math.inf

    def on_step(step: Step) -> None:
        nonlocal told_at
        if clock() - told_at >= STEP_EVERY_S:
            told_at = clock()
            tell(step)

    return on_step


def _check_same(here: dict[str, str], given: Assignment) -> None:
    differing = [name for name, digest in given.identity.items() if here.get(name) != digest]
    if differing:
        raise StudyError(
            f"{given.script} gives another {', '.join(differing)} in a worker than in the process that runs the study: "
            "a study must be the same each time that its script is imported; fix its seeds, and let it read nothing "
            "that changes"
        )
