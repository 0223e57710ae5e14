"""Executors evaluate plans somewhere; what fails there fails one trial, and nothing is left behind."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import write_study
from synthetic_study import Told, evaluate_as_predicted, make_profile, opened, search

from ranksearch.early_stopping import StopRule
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors import (
    EXECUTORS,
    AbstractExecutor,
    InlineExecutor,
    Job,
    Outcome,
    Setting,
    check_executor,
    open_executor,
    processes,
)
from ranksearch.executors.placement import placements
from ranksearch.executors.worker import now_and_then
from ranksearch.export import load
from ranksearch.home import StudyHome
from ranksearch.ladder import Figures, Terms
from ranksearch.optimization import read_records
from ranksearch.plan import LayerChoice, Plan
from ranksearch.recovery import Step
from ranksearch.spec import StudySpec, Target, load_study
from ranksearch.workbench import Workbench, open_workbench

SVD = LayerChoice(decomposition="svd", ranks=(2,))
PLAN = Plan(layers={"2": SVD})

# What a plan's training does is told by a file beside the script, so that one opened study can be asked for anything.
TRAINING = """
import os, pathlib, signal, time

HERE = pathlib.Path(__file__).parent


def fine_tune(model, budget):
    told = HERE / "what_to_do"
    what = told.read_text() if told.exists() else ""
    if what == "raise":
        raise ValueError("the loss is upside down")
    if what == "die":
        print("https://me:secret@here says that the end is near")
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        (HERE / "hanging").touch()
        time.sleep(600)


study = __import__("dataclasses").replace(study, recovery=rs.Recovery(fine_tune=fine_tune, steps=1))
"""


@pytest.fixture(scope="module", autouse=True)
def quick_timing() -> Iterator[None]:
    """For the workers as well, which have this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKSEARCH_MAX_TIMING_SECONDS", "0.1")
        yield


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("workers"), after=TRAINING)


@pytest.fixture(scope="module")
def here(script: Path) -> Workbench:
    return open_workbench(load_study(script))


@pytest.fixture(scope="module")
def make_setting(script: Path, here: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Setting]:
    home = StudyHome(tmp_path_factory.mktemp("home") / "tiny")
    factorisations = here.factorisations()

    def make(**changes: object) -> Setting:
        fields: dict[str, object] = {
            "bench": here, "factorisations": factorisations, "home": home, "dense_latency_ms": 1.0, "limits": {},
            "script": script, "n_workers": 1, "trial_limit_s": None, "should_abort": lambda: False,
            "on_step": lambda _step: None,
        }  # fmt: skip
        return Setting(**(fields | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module", params=EXECUTORS)
def executor(request: pytest.FixtureRequest, make_setting: Callable[..., Setting]) -> Iterator[AbstractExecutor]:
    if request.param == "ray":
        pytest.importorskip("ray")
    with open_executor(request.param, make_setting()) as started:
        yield started


@pytest.fixture
def ask(script: Path) -> Iterator[Callable[[str], None]]:
    """Says what trainings do from now on."""
    told = script.parent / "what_to_do"
    yield told.write_text
    told.unlink(missing_ok=True)
    (script.parent / "hanging").unlink(missing_ok=True)


def outcome_of(executor: AbstractExecutor, job: Job, timeout_s: float = 120.0) -> Outcome:
    executor.submit(job)
    return next_outcome(executor, timeout_s)


def next_outcome(executor: AbstractExecutor, timeout_s: float = 120.0) -> Outcome:
    give_up = time.monotonic() + timeout_s
    while not (found := executor.wait()):
        assert time.monotonic() < give_up, "no outcome"
    (only,) = found
    return only


def test_an_executor_gives_what_the_evaluation_measured_and_keeps_the_weights(
    executor: AbstractExecutor, make_setting: Callable[..., Setting]
) -> None:
    outcome = outcome_of(executor, Job(number=7, plan=PLAN, terms=Terms(predicted_loss=0.25)))
    assert (outcome.number, outcome.reason, outcome.interrupted) == (7, None, False)
    assert outcome.seconds > 0
    evaluation = outcome.evaluation
    assert evaluation is not None and evaluation.rung == "fine_tuned" and evaluation.plan == PLAN
    assert evaluation.predicted_loss == 0.25 and evaluation.latency_ratio > 0
    folder = make_setting().home.plan(PLAN.hash())
    assert evaluation.model_bytes == (folder / "model.safetensors").stat().st_size
    assert (folder / "runtime.json").is_file()


def test_the_same_plan_has_the_same_figures_wherever_it_is_evaluated(
    executor: AbstractExecutor, make_setting: Callable[..., Setting]
) -> None:
    with open_executor("inline", make_setting()) as inline:
        expected = outcome_of(inline, Job(number=0, plan=PLAN)).evaluation
    found = outcome_of(executor, Job(number=1, plan=PLAN)).evaluation
    assert expected is not None and found is not None
    for name in ("accuracy", "accuracy_drop", "drop_low", "quick_drop", "output_distance", "model_bytes", "macs"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def test_what_an_evaluation_raises_is_the_reason_why_there_is_none(
    executor: AbstractExecutor, ask: Callable[[str], None]
) -> None:
    ask("raise")
    outcome = outcome_of(executor, Job(number=2, plan=PLAN))
    assert (outcome.evaluation, outcome.reason) == (None, "ValueError: the loss is upside down")
    unknown = outcome_of(executor, Job(number=3, plan=Plan(layers={"nowhere": SVD})))
    assert unknown.reason is not None and unknown.reason.startswith("the model has no layer 'nowhere'")


def test_a_control_is_not_stopped_by_what_stops_others(executor: AbstractExecutor) -> None:
    beaten = StopRule.model_validate(
        {
            "witnesses": {"predicted_loss": {"tau": 0.9, "figures": [0.0], "least_drops": [1.0]}},
            "members": [{"trial": 4, "ratio_high": 0.0, "bytes_ratio": 0.0, "drop_high": 0.0}],
        }
    )
    stopped = outcome_of(executor, Job(number=4, plan=PLAN, terms=Terms(predicted_loss=0.0, rule=beaten))).evaluation
    assert stopped is not None and stopped.rung == "latency" and "trial 4" in (stopped.stopped or "")
    control = Terms(predicted_loss=0.0, rule=beaten, may_stop=False)
    assert getattr(outcome_of(executor, Job(number=5, plan=PLAN, terms=control)).evaluation, "rung", "") == "fine_tuned"


def test_a_worker_that_dies_fails_its_trial_alone(executor: AbstractExecutor, ask: Callable[[str], None]) -> None:
    if isinstance(executor, InlineExecutor):
        pytest.skip("it would be this process")
    ask("die")
    outcome = outcome_of(executor, Job(number=6, plan=PLAN))
    assert outcome.evaluation is None and not outcome.interrupted and outcome.reason is not None
    assert "memory runs out" in outcome.reason or "Ray actor failed" in outcome.reason
    if executor.name == "processes":
        assert outcome.reason.endswith("0.log, at last: https://***@here says that the end is near")
    ask("")
    assert outcome_of(executor, Job(number=8, plan=PLAN)).evaluation is not None


def test_how_far_an_actor_is_reaches_the_coordinator(
    executor: AbstractExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor.name != "ray":
        pytest.skip("it has no board")
    heard: list[Step] = []
    monkeypatch.setattr(executor, "_on_step", heard.append)
    for number in (1, 2):
        step = Step(number=number, share=number / 2, loss=0.5)
        now_and_then(executor._board.put.remote)(step)  # type: ignore[attr-defined]
        wait_until(lambda: bool(executor.wait()) or bool(heard))
        assert heard.pop() == step and not heard
    assert executor.wait() == [] and not heard


def test_plans_of_actors_on_another_machine_are_timed_here(
    executor: AbstractExecutor, make_setting: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor.name != "ray":
        pytest.skip("all on this machine")
    setting, timed = make_setting(), list[Plan]()
    plan = Plan(layers={"2": SVD.model_copy(update={"ranks": (3,)})})
    assert outcome_of(executor, Job(number=0, plan=plan)).evaluation is not None
    machine = executor._machine  # type: ignore[attr-defined]

    def measure(plan: Plan) -> Figures:
        timed.append(plan)
        return machine.measure(plan) | {"latency_ms": 123.0}

    (hired,) = executor._idle  # type: ignore[attr-defined]
    monkeypatch.setattr(executor, "_idle", [replace(hired, times=False)])
    monkeypatch.setattr(executor, "_machine", replace(machine, measure=measure))
    shutil.rmtree(setting.home.plan(plan.hash()))
    evaluation = outcome_of(executor, Job(number=1, plan=plan)).evaluation
    assert timed == [plan] and evaluation is not None
    assert "latency" not in evaluation.seconds and evaluation.latency_ms == 123.0
    assert load(setting.home.plan(plan.hash()), setting.bench.model) is not None


def test_a_worker_that_hangs_is_ended(
    make_setting: Callable[..., Setting], ask: Callable[[str], None], script: Path
) -> None:
    with open_executor("processes", make_setting(trial_limit_s=20.0)) as executor:
        ask("hang")
        executor.submit(Job(number=0, plan=PLAN))
        wait_until(lambda: bool(executor.wait()) or (script.parent / "hanging").exists())
        # Its time is up now.
        executor._limit = type(executor._limit)(0.1)  # type: ignore[attr-defined]
        outcome = next_outcome(executor)
        assert outcome.reason == "it took longer than 0 s, so its worker process was ended"
        # Another is started in its place, which bears its name only once it runs.
        wait_until(lambda: bool(worker_pids()))
    assert not worker_pids()


def test_what_runs_when_the_study_shall_end_at_once_is_interrupted(
    make_setting: Callable[..., Setting], ask: Callable[[str], None], script: Path
) -> None:
    stop: list[bool] = []
    with open_executor("processes", make_setting(should_abort=lambda: bool(stop))) as executor:
        ask("hang")
        executor.submit(Job(number=3, plan=PLAN))
        wait_until(lambda: bool(executor.wait()) or (script.parent / "hanging").exists())
        stop.append(True)
        assert executor.wait() == [Outcome(number=3, interrupted=True)]
        assert not worker_pids()


def test_workers_that_cannot_open_the_study_end_it(make_setting: Callable[..., Setting], tmp_path: Path) -> None:
    other = write_study(tmp_path, ("torch.manual_seed(0)", "torch.manual_seed(1)"), after=TRAINING)
    with open_executor("processes", make_setting(script=other)) as executor:
        executor.submit(Job(number=0, plan=PLAN))
        with pytest.raises(StudyError, match=r"could not open the study: .*study.py gives another .*model"):
            next_outcome(executor)


def test_an_executor_that_cannot_serve_is_refused() -> None:
    with pytest.raises(StudyError, match="executor 'threads' is unknown; choose one of inline, processes, ray"):
        check_executor("threads", "study.py", None)
    with pytest.raises(StudyError, match="this study has none, as in a notebook"):
        check_executor("processes", None, 2)
    with pytest.raises(StudyError, match="'inline' is one worker, not 2"):
        check_executor("inline", "study.py", 2)
    with pytest.raises(StudyError, match="0 workers evaluate nothing"):
        check_executor("processes", "study.py", 0)
    with pytest.raises(StudyError, match=r"'inline' .* cannot end a trial that hangs: .* give --executor processes"):
        check_executor("inline", "study.py", None, 60.0)
    with pytest.raises(StudyError, match="a trial timeout of 0 s leaves no time"):
        check_executor("processes", "study.py", None, 0.0)


def test_the_log_of_a_worker_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 1000)
    path = tmp_path / "0.log"
    path.write_text("an earlier process\n")
    log = processes._Log(path)
    with log.open() as written:
        assert log.last_words() == f"it wrote {path}"
        for i in range(100):
            written.write(b"line %d of this process\n" % i)
            written.flush()
            log.bound()
        last = " | ".join(f"line {i} of this process" for i in (97, 98, 99))
        assert log.last_words() == f"it wrote {path}, at last: {last}"
    kept = path.with_suffix(".log.old").read_text() + path.read_text()
    assert len(kept) < 2100 and kept.endswith("line 99 of this process\n") and "earlier" not in kept


def test_workers_share_the_cores_and_have_a_gpu_each(here: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(n_workers: int | None, **changes: object) -> list[tuple[int, str | None, str | None]]:
        spec = StudySpec(**{f: getattr(here.spec, f) for f in here.spec.__slots__} | changes)  # type: ignore[arg-type]
        return [(p.threads, p.environment.get("CUDA_VISIBLE_DEVICES"), p.device) for p in placements(spec, n_workers)]

    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)))
    assert place(None) == [(4, None, "cpu")] * 4
    assert place(1) == [(16, None, None)]
    assert place(32)[0] == (1, None, "cpu")
    assert place(2, target=Target(batch_size=4, cores="0-1"))[0] == (8, None, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    cuda = Target(runtime="torch", device="cuda", batch_size=4)
    assert place(None, target=cuda) == [(8, "2", None), (8, "5", None)]
    assert place(3, target=cuda) == [(5, "2", "gpu-2"), (5, "5", "gpu-5"), (5, "2", "gpu-2")]
    with pytest.raises(StudyError, match="Target.device is 'cuda:1', but each worker is given a GPU of its own"):
        place(None, target=Target(runtime="torch", device="cuda:1", batch_size=4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StudyError, match="there is none here"):
        place(None, target=cuda)


def wait_until(reached: Callable[[], bool], timeout_s: float = 120.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < give_up, "never"
        time.sleep(0.02)


def worker_pids() -> list[int]:
    """The worker processes that this one has started and that are there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields, words = path.read_text().rsplit(")", 1)[1].split(), (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and b"process_worker" in words and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


class Many(AbstractExecutor):
    """Several workers that end in the order that a test says."""

    name = "many"

    def __init__(
        self, n_workers: int, evaluate: Callable[[Plan], Evaluation], pick: Callable[[list[Job]], int]
    ) -> None:
        self.n_workers, self._evaluate, self._pick = n_workers, evaluate, pick
        self.jobs: list[Job] = []
        self.most = 0

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))
        assert len({j.plan.hash() for j in self.jobs}) == len(self.jobs) <= self.n_workers

    def wait(self) -> list[Outcome]:
        job = self.jobs.pop(self._pick(self.jobs))
        return [Outcome(number=job.number, evaluation=self._evaluate(job.plan))]

    def close(self) -> None:
        self.jobs.clear()


@pytest.mark.parametrize("sampler", ["price", "tpe", "nsga2", "random"])
@pytest.mark.parametrize("pick", [lambda _jobs: 0, lambda jobs: len(jobs) - 1], ids=["oldest", "newest"])
def test_several_workers_run_no_plan_twice_and_no_trial_too_many(
    sampler: str, pick: Callable[[list[Job]], int]
) -> None:
    profile = make_profile()
    many = Many(4, evaluate_as_predicted(profile), pick)
    with opened() as study:
        told = search(study, profile, executor=many, sampler_name=sampler, n_trials=24)
        found = read_records(study)
    assert many.most == 4
    assert sum(record.counted for record in found) == 24
    hashes = [record.plan_hash for record in told.finished]
    assert len(set(hashes)) == len(hashes) == 26
    assert not [record for record in found if record.state == "running"]
    for record in found:
        if record.duplicate_of is not None:
            assert record.plan_hash == next(r.plan_hash for r in found if r.number == record.duplicate_of)


def test_what_several_workers_had_is_queued_again_whatever_ends_the_loop() -> None:
    profile = make_profile()

    def evaluate(plan: Plan) -> Evaluation:
        if plan.changes():
            raise StudyError("the coordinator's own trouble")
        return evaluate_as_predicted(profile)(plan)

    with opened() as study:
        with pytest.raises(StudyError, match="own trouble"):
            search(study, profile, executor=Many(3, evaluate, lambda _jobs: 0), n_trials=10)
        found = read_records(study)
        assert [record.state for record in found if record.state != "complete"].count("failed") == 3
        assert all(record.queued_again for record in found if record.state == "failed")
        told = search(study, profile, n_trials=10)
        assert sum(record.counted for record in read_records(study)) == 10
    hashes = [record.plan_hash for record in told.finished]
    assert len(set(hashes)) == len(hashes)


def test_a_plan_asked_for_while_it_runs_waits_for_its_outcome() -> None:
    profile = make_profile()
    many = Many(2, evaluate_as_predicted(profile), lambda _jobs: 0)
    with opened() as study:
        dense = {layer.name: layer.dense for layer in profile.layers if len(layer.candidates) > 1}
        for _ in range(2):
            study.enqueue_trial(dense)
        told = search(study, profile, executor=many, controls=[], n_prices=0, n_trials=3, callbacks=Told())
        found = {record.number: record for record in read_records(study)}
    assert found[1].duplicate_of == 0 and found[1].state == found[0].state == "complete" and not found[1].counted
    assert len(told.finished) == 3
