"""A thread that does jobs one after the other, while whoever gives them goes on."""

import threading
from collections.abc import Callable, Hashable
from typing import final

Job = Callable[[], object]


@final
class Worker:
    """Does jobs in their order, in one daemon thread; when there are none for `idle_s`, the `idle` job.

    A job takes the place of the one that still waits under its key, so that no more wait than there are keys, however
    slow they are. Jobs raise nothing.
    """

    def __init__(self, name: str, idle: Job, idle_s: float) -> None:
        self._idle = idle
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._waiting: dict[Hashable, Job] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, key: Hashable, job: Job) -> None:
        """Has the job done, after all that wait now."""
        with self._changed:
            assert not self._closed, "a closed worker takes no jobs"
            self._waiting.pop(key, None)
            self._waiting[key] = job
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread once it has done what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def ended(self, within_s: float) -> bool:
        """Whether the thread has ended, waiting so long for it; a forked child has none."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while jobs := self._take():
            for job in jobs:
                job()

    def _take(self) -> list[Job]:
        """All that waits, so that a job which is replaced again and again has its turn; none where it was closed."""
        with self._changed:
            woken = self._changed.wait_for(lambda: self._waiting or self._closed, self._idle_s)
            jobs, self._waiting = list(self._waiting.values()), {}
        return jobs if woken else [self._idle]
