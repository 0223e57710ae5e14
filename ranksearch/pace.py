"""Work that takes longer the more trials there are, done as often as takes but a share of the time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar, final

SHARE = 0.1
# What takes no longer than this may be done after every trial.
FREE_S = 0.01

T = TypeVar("T")


@final
class Pace:
    """Says when work is due again: where it takes a second, no sooner than nine seconds after its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock()

    def due(self) -> bool:
        """Whether it is time."""
        return self._clock() >= self._next

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block does the work."""
        began = self._clock()
        yield
        ended = self._clock()
        took = ended - began
        self._next = ended + (took * (1 / SHARE - 1) if took > FREE_S else 0.0)


@final
class Paced(Generic[T]):
    """What `make` made last, made anew where that is due."""

    def __init__(self, make: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> None:
        self._make, self._pace = make, Pace(clock)

    def __call__(self) -> T:
        if self._pace.due():
            with self._pace.working():
                self._made = self._make()
        return self._made
