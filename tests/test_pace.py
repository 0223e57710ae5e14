"""Work at a pace: how often, by a clock that tests turn."""

from itertools import count

from ranksearch.pace import FREE_S, SHARE, Pace, Paced


class Clock:
    """Stands still until it is turned."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_long_work_takes_its_share_of_the_time() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.due(), "the first time at once"
    with pace.working():
        clock.now += 2.0
    ended = clock.now
    clock.now = ended + 2.0 / SHARE - 2.1
    assert not pace.due()
    clock.now = ended + 2.0 / SHARE - 2.0
    assert pace.due()


def test_what_takes_hardly_any_time_is_always_due() -> None:
    clock = Clock()
    pace = Pace(clock)
    with pace.working():
        clock.now += FREE_S / 2
    assert pace.due()


def test_a_paced_value_is_the_last_until_a_new_one_is_due() -> None:
    clock, numbers = Clock(), count()

    def make() -> int:
        clock.now += 1.0
        return next(numbers)

    value = Paced(make, clock)
    assert [value(), value()] == [0, 0]
    clock.now += 1.0 / SHARE
    assert value() == 1
