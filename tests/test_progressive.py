"""Compression in stages: ranks go down step by step, and what was trained in between is kept."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recovery_factors import LAYERS, METHODS, built
from tiny_study import make_spec, plans, split, trained
from torch import nn

from ranksearch.compression import compress
from ranksearch.ladder import Evaluator
from ranksearch.layers import layer_spec
from ranksearch.plan import LayerChoice, Plan
from ranksearch.progressive import compress_in_stages, multiplied_out
from ranksearch.recovery.factors import product
from ranksearch.recovery_settings import Recovery
from ranksearch.workbench import open_workbench

PARTS = split()


@given(st.sampled_from(METHODS), st.sampled_from(list(LAYERS)), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
@torch.no_grad()
def test_factors_multiplied_out_give_the_same_outputs(name: str, layer_name: str, seed: int) -> None:
    layer, shape = LAYERS[layer_name]
    module = built(name, layer, seed)
    if module is None:
        return
    source, plan = nn.Sequential(layer), Plan(layers={"0": LayerChoice(decomposition=name)})
    plain = multiplied_out(nn.Sequential(module), source, plan)
    before, after = layer_spec(layer), layer_spec(plain[0])
    assert before is not None and after is not None
    assert after.bias and dataclasses.replace(before, bias=True) == after
    weight, bias = product(tuple(module))
    assert bias is not None and weight.shape[0] == before.weight_shape[0]
    inputs = torch.randn(shape)
    expected = module(inputs)
    torch.testing.assert_close(plain(inputs), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["float", "mixed"])
def test_ranks_go_down_to_the_plans_and_bits_come_last(kind: str) -> None:
    model, plan = trained(PARTS["train"]), plans()[kind]
    seen: list[Plan] = []
    shares: list[float] = []

    def cut(source: nn.Module, step: Plan) -> nn.Module:
        seen.append(step)
        return compress(source, step, calibration=PARTS["train"])

    def train(model: nn.Module, share: float) -> None:
        shares.append(share)
        with torch.no_grad():  # what training would do to it
            model[10].bias += 1.0

    result = compress_in_stages(model, plan, 3, cut, train)
    assert shares == [1 / 3, 1 / 3] and len(seen) == 3 and seen[-1] == plan
    factored = [name for name, choice in plan.layers.items() if choice.decomposition != "none"]
    for step in seen[:-1]:
        assert list(step.layers) == factored
        assert all(choice.bits == "32/32" for choice in step.layers.values())
    for name in factored:
        first, second, last = (step.choice(name).ranks for step in seen)
        assert all(a >= b >= c for a, b, c in zip(first, second, last, strict=True))
    assert len({step.choice("8").ranks for step in seen}) == 3
    bias = result.get_submodule("10").bias.detach()
    assert float((bias - model[10].bias.detach()).mean()) == pytest.approx(2.0, abs=0.1)


def test_one_stage_is_a_plain_cut() -> None:
    model, plan = trained(PARTS["train"]), plans()["float"]
    asked: list[Plan] = []

    def cut(source: nn.Module, step: Plan) -> nn.Module:
        assert source is model
        asked.append(step)
        return source

    assert compress_in_stages(model, plan, 1, cut, lambda *_: pytest.fail("trained")) is model
    assert asked == [plan]
    bits_alone = plans()["8 bits"]
    assert compress_in_stages(model, bits_alone, 3, cut, lambda *_: pytest.fail("trained")) is model


def test_a_trial_in_stages_spends_the_same_budget() -> None:
    steps: list[int] = []
    bench = open_workbench(
        make_spec(trained(PARTS["train"]), PARTS, recovery=Recovery(steps=9, learning_rate=0.01, stages=3))
    )
    evaluator = Evaluator(
        bench=bench,
        factorisations=bench.factorisations(),
        dense_latency_ms=2.0,
        max_latency_seconds=0.05,
        on_step=lambda step: steps.append(step.number),
    )
    evaluation = evaluator.evaluate(plans()["mixed"])
    assert steps == [1, 2, 3] * 3
    steps.clear()
    evaluator.evaluate(plans()["8 bits"])
    assert steps == list(range(1, 10)), "what factors nothing is cut at once, and trained as long"
    assert evaluation.accuracy is not None and evaluation.accuracy > 0.7


@pytest.mark.parametrize(
    ("recovery", "part"),
    [
        (Recovery(steps=9), Recovery(steps=3)),
        (Recovery(epochs=1.5, seconds=30.0), Recovery(epochs=0.5, seconds=10.0)),
        (Recovery(steps=1), Recovery(steps=1)),
        (Recovery(steps=0), Recovery(steps=0)),
    ],
)
def test_a_part_of_a_budget(recovery: Recovery, part: Recovery) -> None:
    assert recovery.part(1 / 3) == part
