"""What grows with a study, and what with its workers?

Targets: eight Ray workers on one machine, whose evaluations mostly sleep, end at least seven times the trials of one in
the same time; the coordinator, with its sampler, journal and MLflow, handles five trials per second at 20 layers; after
500 trials a run's memory is at most 1.1 times what it was after 50. `--quick` asks for two workers and 1.6 times, and
for 60 trials.
"""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from common import Answer, ask, options, scratch
from optuna.trial import FrozenTrial, create_trial
from overhead_logging import listener_of, record_of_plan
from search_asking import deep_profile
from small_study import import_all, start, write_script

from ranksearch.candidates import Profile
from ranksearch.evaluation import Evaluation
from ranksearch.executors import InlineExecutor, Job, Setting, open_executor
from ranksearch.home import StudyHome
from ranksearch.optimization import ResolvedLimits, open_study, optimise, read_records
from ranksearch.optimization.history_reader import sampler_attributes
from ranksearch.optimization.records import objective_values
from ranksearch.optimization.space import distributions, settled, to_params
from ranksearch.pace import Paced
from ranksearch.plan import LayerChoice, Plan
from ranksearch.spec import OBJECTIVES, load_study
from ranksearch.workbench import open_workbench

SLEEP_S, N_LAYERS, PAGE = 30.0, 20, os.sysconf("SC_PAGE_SIZE")
# Of an evaluation here neither the timings nor the arithmetic matter.
BRIEF = {"RANKSEARCH_MAX_TIMING_SECONDS": "0.02", "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=list(QUESTIONS), help="one question instead of all")
    ask(parser.parse_args(), QUESTIONS)


def workers(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Trials per second of many Ray workers against those of one, each with a CPU of Ray's, which need not be there."""
    import ray

    many, least, sleep_s = (2, 1.6, 4.0) if arguments.quick else (8, 7.0, SLEEP_S)
    os.environ |= BRIEF  # actors take it from here
    ray.init(num_cpus=many, include_dashboard=False, log_to_driver=False)
    with scratch() as folder:
        script = write_script(Path(folder), sleep_s=sleep_s)
        rates = {n: _rate(script, n, n_jobs=3 * n if n > 1 else 3) for n in (1, many)}
    ray.shutdown()
    ratio = rates[many] / rates[1]
    return {
        "trials_per_s": rates, "ratio": ratio, "target": least, "holds": ratio >= least,
        "scope": f"{many} Ray workers against one; an evaluation sleeps {sleep_s:g} s, and else computes",
    }, [f"{many} workers: {rates[many]:.2f} trials per second, one: {rates[1]:.2f}: {ratio:.2f}x"]  # fmt: skip


def _rate(script: Path, n_workers: int, n_jobs: int) -> float:
    """Jobs per second, once all workers are there."""
    bench = open_workbench(load_study(script))
    setting = Setting(
        bench=bench, factorisations=bench.factorisations(), home=StudyHome(script.parent / "home" / f"of-{n_workers}"),
        dense_latency_ms=1.0, limits={}, script=script, n_workers=n_workers, trial_limit_s=None,
        should_abort=lambda: False, on_step=lambda _step: None,
    )  # fmt: skip
    plans = [Plan(layers={"0": LayerChoice(decomposition="svd", ranks=(4 + i,))}) for i in range(n_jobs)]
    with open_executor("ray", setting) as executor:
        # The first round opens the study in each of them.
        _have_done(executor, [Job(number=i, plan=plans[0]) for i in range(n_workers)])
        started = time.monotonic()
        _have_done(executor, [Job(number=i, plan=plan) for i, plan in enumerate(plans)])
        return n_jobs / (time.monotonic() - started)


def _have_done(executor: object, jobs: list[Job]) -> None:
    n_running = 0
    while jobs or n_running:
        while jobs and n_running < executor.n_workers:  # type: ignore[attr-defined]
            executor.submit(jobs.pop())  # type: ignore[attr-defined]
            n_running += 1
        for outcome in executor.wait():  # type: ignore[attr-defined]
            assert outcome.reason is None, outcome.reason
            n_running -= 1


def coordinator(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Trials per second where an evaluation takes no time: the sampler, the journal, the front and MLflow's thread."""
    n_trials = 60 if arguments.quick else 300
    rate = _coordinated(n_earlier=0, n_trials=n_trials)
    return {
        "trials_per_s": rate, "target": 5.0, "holds": rate >= 5.0,
        "scope": f"{n_trials} trials of {N_LAYERS} layers on a journal, PriceSampler, MLflow on SQLite",
    }, [f"{rate:.1f} trials per second"]  # fmt: skip


def late(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The same of a study that has many trials already; not judged."""
    n_earlier, n_trials = (500, 20) if arguments.quick else (10_000, 100)
    rate = _coordinated(n_earlier, n_trials)
    return {
        "trials_per_s": rate, "holds": True,
        "scope": f"{n_trials} trials after {n_earlier:,} earlier ones, {N_LAYERS} layers, a journal, MLflow on SQLite, "
        "which has but the later ones",
    }, [f"{rate:.1f} trials per second after {n_earlier:,} trials"]  # fmt: skip


def _coordinated(n_earlier: int, n_trials: int) -> float:
    """Trials per second of the coordinator alone."""
    profile, noise = deep_profile(N_LAYERS), np.random.default_rng(0)

    def evaluate(plan: Plan) -> Evaluation:
        evaluation = record_of_plan(profile, 0, plan, float(noise.normal(0, 0.002))).evaluation
        assert evaluation is not None
        return evaluation

    with scratch():
        listener = listener_of(profile)
        with open_study(
            listener.home.directory, "deep", objectives=OBJECTIVES, identity={}, limits=ResolvedLimits(max_drop=0.02)
        ) as study:
            study.add_trials(_earlier(profile, evaluate, n_earlier))
            listener.history[:] = read_records(study)
            started = time.monotonic()
            executor = InlineExecutor(lambda job: evaluate(job.plan))
            optimise(
                study, profile, executor, objectives=OBJECTIVES, limits=listener.limits, controls=[],
                sampler_name="price", seed=0, n_trials=n_earlier + n_trials, deadline=None, clock=time.monotonic,
                callbacks=listener, stop_rule=Paced(listener.stop_rule), should_stop=lambda: False,
            )  # fmt: skip
            rate = n_trials / (time.monotonic() - started)
            listener.finish("FINISHED")
    return rate


def _earlier(profile: Profile, evaluate: Callable[[Plan], Evaluation], n: int) -> Iterator[FrozenTrial]:
    """Trials as a study tells them, from plans that hardly change the model to such as ruin it."""
    rng = np.random.default_rng(1)
    sizes = np.array([len(layer.candidates) for layer in profile.layers])
    for _ in range(n):
        indices = settled(profile, [int(i) for i in rng.random(len(sizes)) ** rng.uniform(0.1, 2.0) * sizes])
        evaluation = evaluate(profile.plan(indices))
        told = {
            "plan": evaluation.plan.model_dump_json(by_alias=True), "origin": "price", "seconds": 1.0,
            "evaluation": evaluation.model_dump_json(by_alias=True), **sampler_attributes(evaluation),
        }  # fmt: skip
        yield create_trial(
            params=to_params(profile, indices), distributions=distributions(profile),
            values=objective_values(evaluation, OBJECTIVES), user_attrs=told,
        )  # fmt: skip


def memory(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Resident memory of `ranksearch run` along its trials."""
    early, late = (10, 60) if arguments.quick else (50, 500)
    import_all()
    with scratch() as folder:
        write_script(Path(folder), n_layers=N_LAYERS)
        log = Path(folder) / "log"
        words = ("run", "study.py", "--trials", str(late + 1), "--tracking-uri", "sqlite:///runs.db")
        sizes = dict(_sizes(start(Path(folder), *words, log=log, RANKSEARCH_CACHE="cache", **BRIEF), log))
    before, after = sizes[early] / 2**20, sizes[late] / 2**20
    return {
        "mib": {early: before, late: after}, "ratio": after / before, "target": 1.1, "holds": after / before <= 1.1,
        "scope": f"a run's memory after {late} trials against {early}, {N_LAYERS} layers, torch, MLflow on SQLite",
    }, [f"{before:.0f} MiB after {early}, {after:.0f} MiB after {late}: {after / before:.3f}x"]  # fmt: skip


def _sizes(pid: int, log: Path) -> Iterator[tuple[int, int]]:
    """(trials that have ended, bytes of the process), until it ends."""
    while not os.waitpid(pid, os.WNOHANG)[0]:
        n_ended = len(re.findall(r"^trial \d+ ", log.read_text(errors="replace"), re.MULTILINE)) if log.exists() else 0
        yield n_ended, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        time.sleep(0.05)


QUESTIONS = {"workers": workers, "coordinator": coordinator, "late": late, "memory": memory}

if __name__ == "__main__":
    main()
