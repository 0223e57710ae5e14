"""At equal bytes: low rank and 8 bits together, low rank alone, fewer bits alone."""

from collections.abc import Callable, Iterator

from decompositions_networks import Subject
from recovery_plans import shares

from ranksearch.compression import rebuild
from ranksearch.plan import DENSE, Plan
from ranksearch.weights import packed_bytes

N_HALVINGS = 12


def plans(subject: Subject) -> Iterator[tuple[str, Plan]]:
    """Plans by name, in pairs of equal bytes: those of all layers but the first in 8 bits, then of 4 bits."""
    names = list(subject.layers)[1:]
    eight = Plan(layers=dict.fromkeys(names, DENSE.with_bits(8, 8)))
    four = Plan(layers=dict.fromkeys(names, DENSE.with_bits(4, 32)))
    yield "8/8 alone", eight
    yield "low rank alone, as small", _as_small(subject, _size(subject, eight), lambda share: shares(subject, share))
    yield "4/32 alone", four
    yield "low rank alone, as small", _as_small(subject, _size(subject, four), lambda share: shares(subject, share))
    yield "low rank 8/8, as small", _as_small(subject, _size(subject, four), lambda share: _rounded(subject, share))


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
