"""How layers' losses add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.loss_model import SATURATED, LossModel


def test_losses_add_up_in_power_or_in_amplitude() -> None:
    assert LossModel().predict([0.1, 0.2, 0.3]) == pytest.approx(0.6)
    assert LossModel(coherence=1.0).predict([0.04, 0.09, 0.0]) == pytest.approx(0.25)
    assert LossModel(coherence=0.5).predict([0.04, 0.09]) == pytest.approx((0.13 + 0.25) / 2)
    assert LossModel(coherence=0.7).predict([]) == 0.0


@given(st.floats(0, 1), st.integers(0, 1000))
def test_coherence_is_found_again(coherence: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    plans = [10 ** random.uniform(-5, -2, size=12) for _ in range(8)]
    truth = LossModel(coherence=coherence)
    fitted = LossModel.fit(plans, [truth.predict(plan) * random.uniform(0.97, 1.03) for plan in plans])
    assert fitted.coherence == pytest.approx(coherence, abs=0.08)


def test_ruined_plans_and_one_layer_alone_say_nothing() -> None:
    assert LossModel.fit([], []) == LossModel.fit([[0.02]], [0.9]) == LossModel()
    ruined = [0.9 * SATURATED] * 4
    plans = [[0.01] * 4, ruined]
    measured = [0.04, 50.0]
    assert LossModel.fit(plans, measured) == LossModel.fit(plans[:1], measured[:1]) == LossModel()
