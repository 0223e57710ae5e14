"""What every executor does: it has plans evaluated, somewhere, and says what came of each."""

import abc
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from ranksearch.disk import told_full
from ranksearch.errors import RankSearchError
from ranksearch.evaluation import Evaluation
from ranksearch.ladder import Terms
from ranksearch.masking import masked
from ranksearch.memory import release_freed_memory
from ranksearch.plan import Plan

MAX_REASON_CHARACTERS = 2000

_logger = logging.getLogger(__name__)


class Job(BaseModel):
    """A trial's plan to evaluate, and on which terms."""

    model_config = ConfigDict(frozen=True)

    number: int
    plan: Plan
    terms: Terms = Terms()


class Outcome(BaseModel):
    """What came of a job: an evaluation, or the reason why there is none.

    `interrupted` says that it is through no fault of the plan: since the study shall end, or for the `reason`.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    evaluation: Evaluation | None = None
    reason: str | None = None
    interrupted: bool = False
    seconds: float = 0.0


class AbstractExecutor(abc.ABC):
    """Where evaluations run. Used in a `with` block, at whose end nothing that it started is left."""

    name: ClassVar[str]
    n_workers: int = 1

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Takes a job, of `n_workers` at most that are under way."""

    @abc.abstractmethod
    def wait(self) -> list[Outcome]:
        """What ended, after a moment at most; an evaluation that fails is an outcome, never an exception."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends what is under way, without an outcome."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_job(evaluate: Callable[[Job], Evaluation], job: Job, clock: Callable[[], float] = time.monotonic) -> Outcome:
    """The job, done here.

    Any exception fails this job alone: it may be the user's own code that cannot take one plan.
    """
    started = clock()
    try:
        evaluation = evaluate(job)
    except (KeyboardInterrupt, SystemExit):
        return Outcome(number=job.number, interrupted=True, seconds=clock() - started)
    except Exception as error:
        _logger.debug("trial %d failed", job.number, exc_info=True)
        return failed(job, error, clock() - started)
    finally:
        release_freed_memory()
    return Outcome(number=job.number, evaluation=evaluation, seconds=clock() - started)


def failed(job: Job, error: Exception, seconds: float) -> Outcome:
    """What came of a job that raised: it failed; where a disk is full that is no fault of its plan."""
    full = told_full(error)
    return Outcome(number=job.number, reason=full or told(error), interrupted=full is not None, seconds=seconds)


def told(error: Exception) -> str:
    """What a user reads: our own errors are sentences, others need their kind."""
    text = str(error) if isinstance(error, RankSearchError) else f"{type(error).__name__}: {error}"
    return masked(text)[:MAX_REASON_CHARACTERS]
