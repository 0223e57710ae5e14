"""Evaluations in processes of this machine, one per GPU or per share of the cores.

A worker that crashes, hangs or is killed for its memory fails the trial that it had, and another takes its place.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, ClassVar, final

from ranksearch.errors import StudyError
from ranksearch.executors.base import MAX_REASON_CHARACTERS, AbstractExecutor, Job, Outcome
from ranksearch.executors.limits import TimeLimit
from ranksearch.executors.process_worker import Message
from ranksearch.executors.worker import Assignment
from ranksearch.masking import masked
from ranksearch.reading import printable
from ranksearch.recovery import Step

# A moment, after which it is looked whether a worker is alive, and whether the study shall stop.
TICK_S = 0.2
# A worker's log is kept below this, beside as much of what came before.
MAX_LOG_BYTES = 10 << 20
# How much of the end of its log the failure of a worker quotes.
N_LAST_LINES, MAX_TAIL_BYTES = 3, 4096
# So many workers in a row may die before they are ready.
MAX_DEATHS = 3


@final
class ProcessExecutor(AbstractExecutor):
    """Workers in processes of their own; `assignments` are theirs, one each, with the environment that it adds.

    `limit_s` is what a trial may take. Once `should_abort` says so the workers are ended, and what they had is
    interrupted. What they print goes to files in `logs`.
    """

    name: ClassVar[str] = "processes"

    def __init__(
        self,
        assignments: Sequence[tuple[Assignment, dict[str, str]]],
        *,
        logs: Path,
        limit_s: float | None = None,
        should_abort: Callable[[], bool] = lambda: False,
        on_step: Callable[[Step], None] = lambda _step: None,
    ) -> None:
        self.n_workers = len(assignments)
        self._limit = TimeLimit(limit_s)
        self._should_abort, self._on_step = should_abort, on_step
        self._n_deaths = 0
        logs.mkdir(parents=True, exist_ok=True)
        self._workers = [
            _Process(given, environment, _Log(logs / f"{i}.log")) for i, (given, environment) in enumerate(assignments)
        ]

    def submit(self, job: Job) -> None:
        next(worker for worker in self._workers if worker.job is None).take(job)

    def wait(self) -> list[Outcome]:
        if self._should_abort():
            jobs = [worker.job for worker in self._workers if worker.job is not None]
            self.close()
            return [Outcome(number=job.number, interrupted=True) for job in jobs]
        wait([worker.connection for worker in self._workers], timeout=TICK_S)
        return [outcome for worker in self._workers for outcome in self._look_at(worker)]

    def close(self) -> None:
        for worker in self._workers:
            worker.end()

    def _look_at(self, worker: "_Process") -> list[Outcome]:
        """What came of the worker's job, if it ended, however it did."""
        worker.log.bound()
        while (message := worker.hear()) is not None:
            if message.broken is not None:
                raise StudyError(f"a worker could not open the study: {message.broken}; it wrote {worker.log.path}")
            if message.step is not None:
                self._on_step(message.step)
            if message.ready:
                self._n_deaths = 0
            if message.outcome is not None:
                self._limit.took(message.outcome.seconds)
                worker.job = None
                return [message.outcome]
        if worker.is_gone():
            return self._replace(worker, f"its worker process {worker.how_it_ended()}; {worker.log.last_words()}")
        if worker.seconds() > self._limit.seconds:
            return self._replace(
                worker, f"it took longer than {self._limit.seconds:.0f} s, so its worker process was ended"
            )
        return []

    def _replace(self, worker: "_Process", reason: str) -> list[Outcome]:
        """Starts another process; the job fails, unless it had not begun, when the next process does it."""
        job, seconds, begun = worker.job, worker.seconds(), worker.ready
        if not begun:
            self._n_deaths += 1
            if self._n_deaths >= MAX_DEATHS:
                raise StudyError(f"{self._n_deaths} workers ended before they had opened the study; the last: {reason}")
        worker.restart()
        if job is None or not begun:
            return []
        worker.job = None
        return [Outcome(number=job.number, reason=reason[:MAX_REASON_CHARACTERS], seconds=seconds)]


@final
class _Log:
    """What the processes of one worker print, one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = 0

    def open(self) -> IO[bytes]:
        """For the next process, whose words come after those of the others."""
        file = self.path.open("ab")
        self._begun = file.tell()
        return file

    def bound(self) -> None:
        """Moves what there is to `N.log.old` once it is much; the process goes on with an empty file."""
        if self.path.stat().st_size < MAX_LOG_BYTES:
            return
        with contextlib.suppress(OSError):
            shutil.copyfile(self.path, self.path.with_suffix(".log.old"))
        os.truncate(self.path, 0)
        self._begun = 0

    def last_words(self) -> str:
        """The last lines of the latest process, and where the others are."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._begun, end - MAX_TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        quoted = " | ".join(printable(masked(line)) for line in lines[-N_LAST_LINES:])
        return f"it wrote {self.path}" + (f", at last: {quoted}" if lines else "")


@final
class _Process:
    """One worker process, from here."""

    def __init__(self, assignment: Assignment, environment: dict[str, str], log: "_Log") -> None:
        self._assignment, self._environment, self.log = assignment, environment, log
        self.job: Job | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self.ready, self._since = False, time.monotonic()
        with theirs, self.log.open() as written:
            # Not multiprocessing: its children run the user's main script again. In a session of its own, so that
            # Ctrl-C reaches the coordinator alone, and that what a worker starts ends with it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ranksearch.executors.process_worker", str(theirs.fileno())],
                # What it prints is there when it is killed.
                env={**os.environ, **self._environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._say(self._assignment.model_dump_json())

    def restart(self) -> None:
        """Ends the process, if it is there, and starts another, which does the job where there is one still."""
        self.end()
        self._start()

    def take(self, job: Job) -> None:
        """Has the job done, once the process is ready."""
        self.job, self._since = job, time.monotonic()
        if self.ready:
            self._say(job.model_dump_json(by_alias=True))

    def hear(self) -> Message | None:
        """The next of what the process said, if it said anything."""
        try:
            if not self.connection.poll():
                return None
            message = Message.model_validate_json(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        if message.ready:
            self.ready = True
            if self.job is not None:
                self.take(self.job)
        return message

    def seconds(self) -> float:
        """How long it has been at its job; 0 where it has none."""
        return 0.0 if self.job is None else time.monotonic() - self._since

    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def how_it_ended(self) -> str:
        """In words."""
        code = self._process.poll()
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (", as the system does when memory runs out" if code == -signal.SIGKILL else "")

    def end(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()

    def _say(self, text: str) -> None:
        # One that is gone is seen to be when it is looked at.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(text.encode())
