"""How long to train, and at which learning rate."""

import math
from collections.abc import Iterator, Sized
from typing import Any

from ranksearch.errors import StudyError
from ranksearch.spec import Batches, Recovery

WARM_UP = 0.2


def count_steps(batches: Batches, recovery: Recovery) -> int:
    """The budget in steps; an epoch may be a fraction, and any budget above zero is at least one step."""
    if recovery.steps is not None:
        return recovery.steps
    if recovery.epochs == 0:
        return 0
    n_batches = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    return max(1, round(recovery.epochs * n_batches))


def one_cycle(step: int, n_steps: int) -> float:
    """The share of the learning rate at `step` of `n_steps`: up in a line from a tenth, down in a cosine to 1 %."""
    n_up = max(1.0, WARM_UP * n_steps)
    if step < n_up:
        return 0.1 + 0.9 * (step + 1) / (n_up + 1)
    done = (step - n_up) / max(n_steps - 1 - n_up, 1.0)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def repeated(batches: Batches, n_steps: int) -> Iterator[tuple[Any, Any]]:
    """Batches for `n_steps`, epoch after epoch. Raises StudyError where an epoch yields nothing."""
    n_given = 0
    while n_given < n_steps:
        before = n_given
        for batch in batches:
            yield batch
            n_given += 1
            if n_given == n_steps:
                return
        if n_given == before:
            raise StudyError(
                f"the training data yields nothing after {n_given} of {n_steps} batches; "
                "give a list, a DataLoader or an object whose __iter__ starts anew"
            )
