"""Executors by their names, opened for a study."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ranksearch.cache import content_hash
from ranksearch.errors import StudyError
from ranksearch.executors.base import AbstractExecutor
from ranksearch.executors.inline import InlineExecutor
from ranksearch.executors.placement import placements, uses_gpu
from ranksearch.executors.worker import Assignment, assignment, write_shared
from ranksearch.export import load, write_bundle, written_aside
from ranksearch.factorisations import Factorisations
from ranksearch.home import StudyHome
from ranksearch.ladder import Evaluator, Figures
from ranksearch.plan import Plan
from ranksearch.recovery import Step
from ranksearch.spec import Objective
from ranksearch.workbench import Workbench


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What an executor is opened with: the study as it stands, and what was asked of the run.

    `limits` are the goals as ratios, `trial_limit_s` what a trial may take; None leaves it to the executor. Without a
    `script` only `inline` works: workers import it.
    """

    bench: Workbench
    factorisations: Factorisations
    home: StudyHome
    dense_latency_ms: float
    limits: dict[Objective, float]
    script: Path | None
    n_workers: int | None
    trial_limit_s: float | None
    should_abort: Callable[[], bool]
    on_step: Callable[[Step], None]


def open_executor(name: str, setting: Setting) -> AbstractExecutor:
    """The executor of that name. Raises StudyError for an unknown one, or one that cannot be had here."""
    check_executor(name, setting.script, setting.n_workers, setting.trial_limit_s)
    return EXECUTORS[name](setting)


def check_executor(
    name: str, script: str | Path | None, n_workers: int | None, trial_limit_s: float | None = None
) -> None:
    """Raises StudyError where there is no such executor, or it cannot serve such a study."""
    if name not in EXECUTORS:
        raise StudyError(f"executor {name!r} is unknown; choose one of {', '.join(EXECUTORS)}")
    if n_workers is not None and n_workers < 1:
        raise StudyError(f"{n_workers} workers evaluate nothing; give at least 1")
    if trial_limit_s is not None and trial_limit_s <= 0:
        raise StudyError(f"a trial timeout of {trial_limit_s:g} s leaves no time for a trial; give more, or none")
    if name == "inline":
        if trial_limit_s is not None:
            raise StudyError(
                "the executor 'inline' evaluates plans in this very process, which cannot end a trial that hangs: for "
                "--trial-timeout give --executor processes, with --workers 1 where one at a time is wanted"
            )
        if n_workers not in (None, 1):
            raise StudyError(f"the executor 'inline' is one worker, not {n_workers}; choose 'processes' or 'ray'")
    elif script is None:
        raise StudyError(
            f"the executor {name!r} imports the study's script in its workers, and this study has none, as in a "
            "notebook; write it to a file and pass script=PATH, or use 'inline'"
        )


def _inline(setting: Setting) -> AbstractExecutor:
    evaluator = _evaluator(setting)
    return InlineExecutor(lambda job: evaluator.evaluate(job.plan, job.terms))


def _processes(setting: Setting) -> AbstractExecutor:
    from ranksearch.executors.processes import ProcessExecutor

    given, folder = _assigned(setting), setting.home.directory / "workers"
    assigned = [
        (
            given.model_copy(
                update={
                    "threads": place.threads,
                    "turns": None if place.device is None else str((folder / place.device).resolve()),
                }
            ),
            place.environment,
        )
        for place in placements(setting.bench.spec, setting.n_workers)
    ]
    return ProcessExecutor(
        assigned, logs=folder, limit_s=setting.trial_limit_s, should_abort=setting.should_abort, on_step=setting.on_step
    )


def _ray(setting: Setting) -> AbstractExecutor:
    from ranksearch.executors.ray import RayExecutor, TargetMachine

    bench, folder = setting.bench, setting.home.directory / "workers"
    evaluator = _evaluator(setting)

    def measure(plan: Plan) -> Figures:
        return evaluator.measure(plan, {})

    given, target = _assigned(setting), bench.spec.target
    if target.device == "cpu" and target.cores is None:
        # Of each host's own, by a name that is the same for all.
        name = f"ranksearch-turns-{content_hash(str(setting.home.directory.resolve()))}"
        given = given.model_copy(update={"turns": str(Path(tempfile.gettempdir()) / name)})
    machine = TargetMachine(
        fingerprint=bench.runtime.fingerprint(bench.spec.target),
        measure=measure,
        keep=lambda plan, files, foreign: _keep(bench, setting.home.plan(plan.hash()), plan, files, foreign),
    )
    return RayExecutor(
        given,
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")},
        machine,
        n_workers=setting.n_workers,
        n_gpus=int(uses_gpu(bench.spec)),
        limit_s=setting.trial_limit_s,
        should_abort=setting.should_abort,
        on_step=setting.on_step,
    )


# Executors by their names.
EXECUTORS: dict[str, Callable[[Setting], AbstractExecutor]] = {
    "inline": _inline,
    "processes": _processes,
    "ray": _ray,
}
DEFAULT_EXECUTOR = "inline"


def _evaluator(setting: Setting) -> Evaluator:
    bench, home = setting.bench, setting.home
    return Evaluator(
        bench=bench,
        factorisations=setting.factorisations,
        dense_latency_ms=setting.dense_latency_ms,
        limits=setting.limits,
        keep=lambda plan, model: write_bundle(bench, plan, model, home.plan(plan.hash())),
        should_abort=setting.should_abort,
        on_step=setting.on_step,
    )


def _assigned(setting: Setting) -> Assignment:
    """What all workers are told; what they share is written beside."""
    assert setting.script is not None, "told by check_executor"
    write_shared(setting.bench, setting.factorisations, setting.home.directory / "workers")
    return assignment(
        setting.bench,
        script=setting.script,
        dense_latency_ms=setting.dense_latency_ms,
        limits=setting.limits,
        home=setting.home,
    )


def _keep(bench: Workbench, folder: Path, plan: Plan, files: Mapping[str, bytes], foreign: bool) -> None:
    """A plan's folder as a worker elsewhere made it; of a foreign machine its weights alone, the rest anew."""
    with written_aside(folder) as aside:
        for name, content in files.items():
            (aside / Path(name).name).write_bytes(content)
    if foreign:
        # Which kernels run, and what the artefact is optimised for, is the target's to say.
        write_bundle(bench, plan, load(folder, bench.model), folder)
