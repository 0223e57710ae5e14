"""Whose turn it is on a device: while one times there, those who work on it wait."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, final


class Turns(Protocol):
    """How timing and other work share a device."""

    def timing(self) -> AbstractContextManager[None]:
        """While open, nobody else works on the device."""

    def working(self) -> AbstractContextManager[None]:
        """While open, this process works on the device, but for the moments in which it gives way."""

    def give_way(self) -> None:
        """Between two steps of work: waits while somebody times."""


@final
class Alone:
    """Nobody else is there."""

    def timing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def give_way(self) -> None:
        pass


@final
class FileTurns:
    """Turns between the processes of one machine that name the same folder.

    By locks on two files, which the system lets go of however a process ends. Who times holds the door, so that
    nobody comes in, and then the room, which is empty once all have given way.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._door = os.open(folder / "door.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._room = os.open(folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Not to be opened by who works: it would wait for itself."""
        with _held(self._door, fcntl.LOCK_EX), _held(self._room, fcntl.LOCK_EX):
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def give_way(self) -> None:
        """Two calls of the system where nobody times."""
        try:
            fcntl.flock(self._door, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._door, fcntl.LOCK_UN)
        except BlockingIOError:
            fcntl.flock(self._room, fcntl.LOCK_UN)
            self._enter()

    def _enter(self) -> None:
        with _held(self._door, fcntl.LOCK_SH):
            fcntl.flock(self._room, fcntl.LOCK_SH)


@contextmanager
def _held(descriptor: int, kind: int) -> Iterator[None]:
    fcntl.flock(descriptor, kind)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def giving_way(batches: Iterable[Any], turns: Turns) -> Iterator[Any]:
    """The batches, with room for others before each."""
    for batch in batches:
        turns.give_way()
        yield batch
