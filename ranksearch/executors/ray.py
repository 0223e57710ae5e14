"""Evaluations in Ray actors, on this machine or on many hosts.

Ray places, feeds and watches the actors (https://docs.ray.io). Each host needs the study script, its data and this
package under the same paths. Actors on another machine than the target's train and score; their plans are timed here.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

from ranksearch.errors import RuntimeUnavailableError, StudyError
from ranksearch.executors.base import AbstractExecutor, Job, Outcome, failed, run_job
from ranksearch.executors.limits import TimeLimit
from ranksearch.executors.placement import CORES_EACH
from ranksearch.executors.worker import Assignment, Worker, now_and_then, open_worker
from ranksearch.home import StudyHome
from ranksearch.ladder import Figures
from ranksearch.plan import Plan
from ranksearch.recovery import Step
from ranksearch.runtimes import differing_keys

TICK_S = 0.2

Files = Mapping[str, bytes]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TargetMachine:
    """What is done on the target's machine, which is this one, for actors elsewhere.

    `measure` times a plan; `keep` stores a finished plan's files, made anew where the flag says that they come from
    another machine.
    """

    fingerprint: Mapping[str, str]
    measure: Callable[[Plan], Figures]
    keep: Callable[[Plan, Files, bool], None]


class Board:
    """Where workers write how far they are, and the coordinator looks: the latest step of any."""

    def __init__(self) -> None:
        self._step: Step | None = None

    def put(self, step: Step) -> None:
        """Writes over what is there."""
        self._step = step

    def take(self) -> Step | None:
        """What was written since it was last taken, if anything was."""
        step, self._step = self._step, None
        return step


class Actor:
    """A worker under Ray, which writes its steps to the `board`, an actor too."""

    def __init__(self, given: Assignment, shared: Files, board: Any) -> None:
        self._given, self._shared, self._board = given, shared, board
        self._folder = tempfile.TemporaryDirectory(prefix="ranksearch-")
        self._worker: Worker

    def open(self) -> dict[str, str]:
        """Opens the study; what this actor's machine is as a target."""
        folder = Path(self._folder.name)
        for name, content in self._shared.items():
            (folder / name).write_bytes(content)
        here = {"home": str(folder), "shared": str(folder)}
        self._worker = open_worker(self._given.model_copy(update=here), now_and_then(self._board.put.remote))
        return self._worker.fingerprint

    def do(self, job: Job, figures: Figures | None) -> tuple[Outcome, Files]:
        """What came of the job, and the files of its plan where it went all the way."""
        outcome = run_job(lambda job: self._worker.evaluate(job, figures), job)
        folder = StudyHome(Path(self._folder.name)).plan(job.plan.hash())
        if not folder.is_dir():
            return outcome, {}
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(folder)
        return outcome, files


@final
class RayExecutor(AbstractExecutor):
    """Actors, each with an equal share of the CPUs, and a GPU where one is needed; `shared` goes to each of them once.

    Unless told there are as many as there are GPUs, or one for every four CPUs. The cluster is that of RAY_ADDRESS, or
    one that is started here, and ended with this. A trial may take `limit_s`.
    Once `should_abort` says so the actors are ended, and what they had is interrupted.
    Raises RuntimeUnavailableError where Ray is not installed, StudyError where the cluster has no room for an actor.
    """

    name: ClassVar[str] = "ray"

    def __init__(
        self,
        given: Assignment,
        shared: Files,
        machine: TargetMachine,
        *,
        n_workers: int | None = None,
        n_gpus: int = 0,
        limit_s: float | None = None,
        should_abort: Callable[[], bool] = lambda: False,
        on_step: Callable[[Step], None] = lambda _step: None,
    ) -> None:
        self._ray = _load_ray()
        self._started_here = not self._ray.is_initialized()
        if self._started_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
        self._machine, self._should_abort, self._on_step = machine, should_abort, on_step
        self._limit = TimeLimit(limit_s)
        self._queue: list[Job] = []
        self._idle: list[_Hired] = []
        self._busy: dict[Any, tuple[_Hired, Job, float]] = {}
        self._opening: dict[Any, Any] = {}
        self._board = self._ray.remote(Board).options(num_cpus=0).remote()
        self._looked = self._board.take.remote()
        self.n_workers, n_cpus = self._shares(n_workers, n_gpus)
        make, sent = self._ray.remote(Actor).options(num_cpus=n_cpus, num_gpus=n_gpus), self._ray.put(shared)
        self._hire = partial(make.remote, given.model_copy(update={"threads": n_cpus}), sent, self._board)
        for _ in range(self.n_workers):
            self._take_on()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def wait(self) -> list[Outcome]:
        if self._should_abort():
            jobs = [*self._queue, *(job for _, job, _ in self._busy.values())]
            self.close()
            return [Outcome(number=job.number, interrupted=True) for job in jobs]
        ended = self._hand_out()
        ready, _ = self._ray.wait([*self._opening, *self._busy], num_returns=1, timeout=0 if ended else TICK_S)
        for reference in ready:
            if reference in self._opening:
                self._take_in(reference)
            else:
                ended.append(self._outcome(reference))
        self._end_late()
        self._look_at_board()
        return ended

    def close(self) -> None:
        hired = [*self._idle, *(one for one, *_ in self._busy.values())]
        for actor in [*self._opening.values(), *(one.actor for one in hired)]:
            self._ray.kill(actor)
        self._opening, self._idle, self._busy, self._queue = {}, [], {}, []
        if not self._ray.is_initialized():
            return
        self._ray.kill(self._board)
        if self._started_here:
            self._ray.shutdown()

    def _look_at_board(self) -> None:
        """Hands on how far a worker is; never waits for it."""
        ready, _ = self._ray.wait([self._looked], timeout=0)
        # A board that is lost costs the progress, no trial.
        with contextlib.suppress(self._ray.exceptions.RayError):
            if ready and (step := self._ray.get(self._looked)) is not None:
                self._on_step(step)
        if ready:
            self._looked = self._board.take.remote()

    def _shares(self, n_workers: int | None, n_gpus: int) -> tuple[int, int]:
        """How many workers, and with how many CPUs each; Ray would wait for ever for what the cluster has not."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        n_all = n_workers or (sum(gpus) if n_gpus else max(1, sum(cpus) // CORES_EACH))
        # A worker lies on one node; the least of them decides how many fit.
        n_cpus = max(1, min(max(cpus, default=0), sum(cpus) // max(n_all, 1)))
        while n_cpus > 1 and sum(node // n_cpus for node in cpus) < n_all:
            n_cpus -= 1
        n_fit = sum(min(c // n_cpus, g // n_gpus if n_gpus else c) for c, g in zip(cpus, gpus, strict=True))
        if n_all < 1 or n_fit < n_all:
            self.close()
            raise StudyError(
                f"the Ray cluster has {sum(cpus)} CPUs and {sum(gpus)} GPUs on {len(nodes)} nodes: room for {n_fit} "
                f"workers of one CPU{' and one GPU' if n_gpus else ''} or more, not for {n_all}"
            )
        return n_all, n_cpus

    def _hand_out(self) -> list[Outcome]:
        """Gives waiting jobs to idle actors; the outcomes of those that could not even be timed."""
        ended = []
        while self._queue and self._idle:
            job, hired = self._queue.pop(0), self._idle.pop(0)
            try:
                figures = None if hired.times else self._machine.measure(job.plan)
            except Exception as error:
                ended.append(failed(job, error, 0.0))
                self._idle.append(hired)
                continue
            self._busy[hired.actor.do.remote(job, figures)] = hired, job, time.monotonic()
        return ended

    def _take_on(self) -> None:
        """One actor more, as soon as the cluster has room."""
        actor = self._hire()
        self._opening[actor.open.remote()] = actor

    def _take_in(self, reference: Any) -> None:
        """An actor that has opened the study."""
        actor = self._opening.pop(reference)
        try:
            fingerprint = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise StudyError(f"a Ray actor could not open the study: {_cause(error)}") from error
        self._idle.append(_Hired(actor, times=not differing_keys(dict(self._machine.fingerprint), fingerprint)))

    def _outcome(self, reference: Any) -> Outcome:
        """What came of a job; its plan's files are kept."""
        hired, job, since = self._busy.pop(reference)
        try:
            outcome, files = self._ray.get(reference)
            self._idle.append(hired)
            if files:
                self._machine.keep(job.plan, files, not hired.times)
        except self._ray.exceptions.RayError as error:
            # Another takes its place.
            self._ray.kill(hired.actor)
            self._take_on()
            reason = f"its Ray actor failed: {_cause(error)}"
            return Outcome(number=job.number, reason=reason, seconds=time.monotonic() - since)
        except Exception as error:
            return failed(job, error, time.monotonic() - since)
        self._limit.took(outcome.seconds)
        return Outcome(**dict(outcome))

    def _end_late(self) -> None:
        """Ends what takes too long: its reference then says that the actor died."""
        for hired, _, since in self._busy.values():
            if time.monotonic() - since > self._limit.seconds:
                self._ray.kill(hired.actor)


@dataclass(frozen=True, slots=True)
class _Hired:
    """An actor that is ready, and whether it is on the target's machine, or one of its kind."""

    actor: Any
    times: bool


def _cause(error: Exception) -> str:
    """The last line of what Ray says, which is the exception's own."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)


def _load_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise RuntimeUnavailableError("the executor 'ray' needs Ray: pip install 'ranksearch[ray]'") from None
    return ray
