"""The line from a table's sum to a plan's latency."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.latency_model import LatencyModel


def test_without_measurements_it_is_the_tables_own_figure() -> None:
    model = LatencyModel()
    assert [model.predict(total) for total in (0.2, 1.0, 1.7)] == [0.2, 1.0, 1.7]
    assert model.with_measured([], []) == model


@given(st.floats(-0.3, 0.6), st.floats(0.4, 1.6))
def test_a_line_is_found_again(intercept: float, slope: float) -> None:
    sums = np.linspace(0.4, 1.5, 12)
    measured = intercept + slope * sums
    if measured.min() < 0.1:
        return
    model = LatencyModel.fit(sums.tolist(), measured.tolist())
    for total, ratio in zip(sums, measured, strict=True):
        assert model.predict(float(total)) == pytest.approx(ratio, rel=0.05)


def test_an_outlier_hardly_turns_the_line() -> None:
    sums = np.linspace(0.3, 1.2, 10).tolist()
    measured = [0.1 + 0.9 * total for total in sums]
    measured[4] *= 3  # another process had the machine
    model = LatencyModel.fit(sums, measured)
    assert model.predict(0.3) == pytest.approx(0.37, rel=0.05) and model.predict(1.2) == pytest.approx(1.18, rel=0.05)


def test_plans_at_one_place_leave_the_slope_to_the_table() -> None:
    model = LatencyModel.fit([1.0, 1.0, 1.0], [1.0, 1.01, 0.99])
    assert model.slope == pytest.approx(1.0, abs=0.1)
    assert model.predict(1.0) == pytest.approx(1.0, rel=0.02)


def test_faster_layers_never_make_a_slower_model() -> None:
    model = LatencyModel.fit([0.4, 0.6, 0.8, 1.0] * 5, [1.3, 1.2, 1.1, 1.0] * 5)
    assert model.predict(0.5) < model.predict(0.9)


def test_further_measurements_correct_it() -> None:
    first = LatencyModel.fit([1.0, 0.5], [1.0, 0.5])
    more = first.with_measured([0.4, 0.5, 0.6, 0.7], [0.52, 0.6, 0.68, 0.76])
    assert more.sums == (1.0, 0.5, 0.4, 0.5, 0.6, 0.7)
    assert abs(more.predict(0.45) - 0.56) < abs(first.predict(0.45) - 0.56) / 2
    assert LatencyModel.model_validate_json(more.model_dump_json()) == more
