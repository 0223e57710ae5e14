"""Signals that stop a run: no new trial, and the running one gets a grace."""

import os
import signal
import time
from types import FrameType
from typing import Any, NoReturn, final

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@final
class StopSignals:
    """Within `with`, the first signal asks the run to stop; a second one, or the end of `grace_s`, ends its trial.

    A third one waits for nothing more, MLflow included, which is told when the study is run again.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._first: float | None = None
        self._again = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._previous)

    def requested(self) -> bool:
        """Whether no new trial shall start."""
        return self._first is not None

    def overdue(self) -> bool:
        """Whether the running trial shall end at once."""
        return self._first is not None and (self._again or time.monotonic() - self._first > self._grace_s)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self._again:
            raise KeyboardInterrupt
        if self._first is not None:
            self._again = True
            return
        self._first = time.monotonic()
        # Not print: the signal may come in the middle of one.
        os.write(2, f"\nstopping; the running trial has {self._grace_s:g} s, a second signal ends it now\n".encode())


@final
class Interrupts:
    """Within `with`, SIGTERM ends the process as Ctrl-C does, so that what it started is ended too."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._previous)

    def _receive(self, _number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
