"""Signals that stop a run: no new trial, and the running one gets a grace."""

import signal
import time
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if getattr(signal, name, None))


class StopSignals:
    """Within `with`, the first signal asks the run to stop; a second one, or the end of `grace_s`, ends its trial."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._first: float | None = None
        self._again = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether no new trial shall start."""
        return self._first is not None

    def overdue(self) -> bool:
        """Whether the running trial shall end at once."""
        return self._first is not None and (self._again or time.monotonic() - self._first > self._grace_s)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
        else:
            self._again = True
