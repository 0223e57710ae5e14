"""At equal bytes: low rank and 8 bits together, low rank alone, fewer bits alone."""

import functools
from collections.abc import Callable, Iterator, Sequence

from decompositions_networks import Subject
from recovery_plans import shares

from ranksearch.compression import rebuild
from ranksearch.plan import DENSE, Plan
from ranksearch.weights import packed_bytes

N_HALVINGS = 12


EIGHT, LOW_AS_EIGHT = "8/8 alone", "low rank alone, as small as 8/8"
FOUR, LOW_AS_FOUR, BOTH_AS_FOUR = "4/32 alone", "low rank alone, as small as 4/32", "low rank 8/8, as small as 4/32"
NAMES = (EIGHT, LOW_AS_EIGHT, FOUR, LOW_AS_FOUR, BOTH_AS_FOUR)


def plans(subject: Subject, wanted: Sequence[str] = NAMES) -> Iterator[tuple[str, Plan]]:
    """The wanted plans by name, of the bytes of all layers but the first in 8 bits, or in 4."""
    names = list(subject.layers)[1:]
    eight = Plan(layers=dict.fromkeys(names, DENSE.with_bits(8, 8)))
    four = Plan(layers=dict.fromkeys(names, DENSE.with_bits(4, 32)))
    low, both = functools.partial(shares, subject), functools.partial(_rounded, subject)
    made: dict[str, Callable[[], Plan]] = {
        EIGHT: lambda: eight,
        LOW_AS_EIGHT: lambda: _as_small(subject, _size(subject, eight), low),
        FOUR: lambda: four,
        LOW_AS_FOUR: lambda: _as_small(subject, _size(subject, four), low),
        BOTH_AS_FOUR: lambda: _as_small(subject, _size(subject, four), both),
    }
    for name in wanted:
        yield name, made[name]()


def _rounded(subject: Subject, share: float) -> Plan:
    low = shares(subject, share)
    return Plan(layers={name: low.choice(name).with_bits(8, 8) for name in list(subject.layers)[1:]})


def _as_small(subject: Subject, most: int, plan_of: Callable[[float], Plan]) -> Plan:
    """The plan of the largest share with at most so many bytes."""
    low, high = 0.0, 1.0
    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(subject, plan_of(middle)) <= most else (low, middle)
    return plan_of(low)


def _size(subject: Subject, plan: Plan) -> int:
    return packed_bytes(rebuild(subject.model, plan))
