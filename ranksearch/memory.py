"""Memory that was freed, given back to the system."""

import ctypes
import functools
from collections.abc import Callable


def release_freed_memory() -> None:
    """Gives freed memory back to the system where the C library is glibc; elsewhere it does nothing.

    Where models of many sizes come and go glibc keeps what lies between blocks in use, and a long study seems to grow
    (malloc_trim(3)).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (TypeError, AttributeError):  # Windows names no library of its own; other C libraries trim by themselves
        return None
