"""Goals in the user's words, read: `1%`, `0.5x`, `2MB`."""

import re
from dataclasses import dataclass
from typing import Literal

from ranksearch.errors import StudyError


@dataclass(frozen=True, slots=True)
class Limit:
    """A parsed goal: `value` in the unit `kind` (absolute, relative, ms, bytes, ratio)."""

    value: float
    kind: Literal["absolute", "relative", "ms", "bytes", "ratio"]

    def resolve(self, dense: float) -> float:
        """The limit in the unit of `dense`, the dense model's own figure."""
        return self.value * dense if self.kind in ("relative", "ratio") else self.value


_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)\s*"
_SECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_drop(text: str | float) -> Limit:
    """`1%` is 0.01 in score units, `1%rel` relative to dense, a bare number is in score units."""
    if isinstance(text, int | float):
        if not 0 <= text < float("inf"):
            raise StudyError(f"max_drop {text!r} must be a number from 0 up")
        return Limit(float(text), "absolute")
    match = re.fullmatch(_NUMBER + r"(%rel|%)?\s*", text)
    if not match:
        raise StudyError(f"max_drop {text!r} cannot be read; write '1%' (absolute), '1%rel' or 0.01")
    value, unit = float(match[1]), match[2]
    if unit is None:
        return Limit(value, "absolute")
    return Limit(value / 100, "relative" if unit == "%rel" else "absolute")


def parse_latency(text: str) -> Limit:
    """`5ms` is a time, `0.5x` a ratio to dense."""
    match = re.fullmatch(_NUMBER + r"(us|ms|s|x)\s*", str(text))
    if not match:
        raise StudyError(f"max_latency {text!r} cannot be read; write '5ms' or '0.5x'")
    value, unit = float(match[1]), match[2]
    return Limit(value, "ratio") if unit == "x" else Limit(value * _SECONDS[unit], "ms")


def parse_size(text: str) -> Limit:
    """`2MB` is a size, `25%` (or `0.25x`) a share of dense."""
    match = re.fullmatch(_NUMBER + r"(%|x|" + "|".join(_BYTES) + r")\s*", str(text))
    if not match:
        raise StudyError(f"max_size {text!r} cannot be read; write '2MB' or '25%'")
    value, unit = float(match[1]), match[2]
    if unit in "%x":
        return Limit(value / 100 if unit == "%" else value, "ratio")
    return Limit(value * _BYTES[unit], "bytes")
