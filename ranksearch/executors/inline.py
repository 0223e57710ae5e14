"""Evaluations in this very process, one after the other."""

import time
from collections.abc import Callable
from typing import ClassVar, final

from ranksearch.evaluation import Evaluation
from ranksearch.executors.base import AbstractExecutor, Job, Outcome, run_job


@final
class InlineExecutor(AbstractExecutor):
    """Calls `evaluate` when it is waited for."""

    name: ClassVar[str] = "inline"

    def __init__(self, evaluate: Callable[[Job], Evaluation], clock: Callable[[], float] = time.monotonic) -> None:
        self._evaluate, self._clock = evaluate, clock
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> list[Outcome]:
        return [run_job(self._evaluate, self._jobs.pop(0), self._clock)] if self._jobs else []

    def close(self) -> None:
        self._jobs.clear()
