"""The ranks worth trying, as arithmetic on integers."""

import math
from collections.abc import Sequence

Ranks = tuple[int, ...]


def equal_share_path(max_ranks: Ranks, multiple: int) -> list[Ranks]:
    """All rank tuples, smallest first, in which every rank is the same share of its maximum.

    Ranks are rounded down to multiples, but not below one multiple; a maximum below that stays as it is.
    Without ranks the path is the empty tuple alone.
    """
    if not max_ranks:
        return [()]
    shares = {(step * multiple, most) for most in max_ranks for step in range(1, max(most // multiple, 1) + 1)}
    path = {
        tuple(on_grid(share * most // whole, most, multiple) for most in max_ranks)
        for share, whole in shares
        if share <= whole
    }
    path.add(tuple(on_grid(most, most, multiple) for most in max_ranks))
    return sorted(path)


def on_grid(rank: int, most: int, multiple: int) -> int:
    """`rank` rounded down to a multiple, between one multiple and `most`."""
    return min(max(rank // multiple, 1) * multiple, most // multiple * multiple or most)


def geometric_spread(path: Sequence[Ranks], n: int, start: float = 1.0) -> list[Ranks]:
    """At most `n` entries of the path, geometrically from its `start`-th (counted from 1) to its last."""
    if len(path) <= n and start <= 1:
        return list(path)
    if not path:
        return []
    first, last = min(max(start, 1.0), len(path)), float(len(path))
    ratio = (last / first) ** (1 / (n - 1))
    positions = {math.floor(first * ratio**step + 1e-9) for step in range(n)} | {len(path)}
    return [path[position - 1] for position in sorted(positions)[-n:]]


def neighbours(ranks: Ranks, max_ranks: Ranks, multiple: int) -> list[Ranks]:
    """For each rank, the tuple in which it is half as large again and the others are a third smaller."""
    return [
        tuple(
            on_grid(rank * 3 // 2 if axis == raised else -(-rank * 2 // 3), most, multiple)
            for axis, (rank, most) in enumerate(zip(ranks, max_ranks, strict=True))
        )
        for raised in range(len(ranks))
    ]
