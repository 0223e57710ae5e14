"""How long a trial may take before it is taken to hang."""

from typing import final

# Where no limit is given: ten times the longest trial so far, and an hour in any case.
TIMES_LONGEST, LEAST_S = 10.0, 3600.0


@final
class TimeLimit:
    """The limit that was given, or one that grows with what trials took."""

    def __init__(self, given_s: float | None) -> None:
        self._given_s, self._longest_s = given_s, 0.0

    def took(self, seconds: float) -> None:
        """A trial ended after so long."""
        self._longest_s = max(self._longest_s, seconds)

    @property
    def seconds(self) -> float:
        """What the next may take."""
        return self._given_s or max(LEAST_S, TIMES_LONGEST * self._longest_s)
