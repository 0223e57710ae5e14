"""How long to train, and at which learning rate."""

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from ranksearch.errors import StudyError
from ranksearch.recovery_settings import Recovery
from ranksearch.spec import Batches

WARM_UP = {"one_cycle": 0.2, "cosine": 0.05}
START, END = 0.1, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """How much of a budget is spent, by steps, by seconds, or by whichever goes first; None bounds nothing."""

    n_steps: int | None
    seconds: float | None
    clock: Callable[[], float]
    started: float

    def share(self, step: int) -> float:
        """The share that is spent once `step` steps were taken, 0 to 1."""
        by_steps = step / self.n_steps if self.n_steps else 0.0
        by_time = (self.clock() - self.started) / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)


def count_steps(batches: Batches, recovery: Recovery) -> int | None:
    """The budget in steps; an epoch may be a fraction, and any budget above zero is at least one step.

    None where only seconds bound it.
    """
    if recovery.steps is not None:
        return recovery.steps
    if recovery.epochs is None:
        return None
    if recovery.epochs == 0:
        return 0
    n_batches = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    return max(1, round(recovery.epochs * n_batches))


def one_cycle(share: float) -> float:
    """The share of the learning rate when `share` of the budget is spent: up in a line, down in a cosine to 1 %.

    Smith, Super-Convergence (2018); a fifth of the budget goes up.
    """
    return _warmed_up(share, WARM_UP["one_cycle"])


def cosine(share: float) -> float:
    """The same with a short warm-up, a twentieth of the budget."""
    return _warmed_up(share, WARM_UP["cosine"])


def _warmed_up(share: float, up: float) -> float:
    if share < up:
        return START + (1 - START) * share / up
    return END + (1 - END) * (1 + math.cos(math.pi * (share - up) / (1 - up))) / 2


SCHEDULES: Mapping[str, Callable[[float], float]] = {"one_cycle": one_cycle, "cosine": cosine}


def endless(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """Batches, epoch after epoch. Raises StudyError where an epoch yields nothing."""
    n_given = 0
    while True:
        before = n_given
        for batch in batches:
            yield batch
            n_given += 1
        if n_given == before:
            raise StudyError(
                f"the training data yields nothing after {n_given} batches; "
                "give a list, a DataLoader or an object whose __iter__ starts anew"
            )
