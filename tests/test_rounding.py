"""Weights rounded by calibration: never worse than plainly, exactly on the grid, and through hard cases."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranksearch import rounding
from ranksearch.compression import compress
from ranksearch.errors import StudyError
from ranksearch.layers import evaluating, layer_spec
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import (
    Int4,
    Int8,
    WeightFormat,
    compensated,
    freeze,
    observe_ranges,
    quantize_module,
)
from ranksearch.rounding import Rounding, round_weights, sample_outputs
from ranksearch.scoring import output_distance
from ranksearch.surgery import replace_modules
from ranksearch.workbench import Workbench

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 6), (400, 40)),
    "no_bias": (lambda: nn.Linear(40, 6, bias=False), (400, 40)),
    "tokens": (lambda: nn.Linear(24, 6), (30, 9, 24)),
    "conv": (lambda: nn.Conv2d(5, 6, 3, padding=1), (60, 5, 6, 6)),
    "strided": (lambda: nn.Conv2d(5, 6, 3, stride=2, bias=False), (60, 5, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), (60, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (60, 6, 9, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (60, 4, 6, 6)),
    "sequence": (lambda: nn.Conv1d(4, 6, 5, padding=2), (60, 4, 15)),
    "one_input": (lambda: nn.Linear(1, 6), (400, 1)),
}
FORMATS: dict[str, WeightFormat] = {
    "int8": Int8(64),
    "int4": Int4(),
    "int4_symmetric": Int4(scheme="symmetric", group_size=64),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mixed(shape: tuple[int, ...]) -> Tensor:
    """Inputs that vary mostly in a few directions, so that rounding errors can make up for each other."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(shape[0], 6) @ torch.randn(6, math.prod(shape[1:]), generator=generator)
    return flat.reshape(shape) + 0.1 * torch.randn(shape)


def rounded(model: nn.Sequential, inputs: Tensor, weights: WeightFormat, *, rounds_inputs: bool) -> Any:
    """The model with all layers quantized and rounded on the inputs, and what was found of each."""
    names = [name for name, module in model.named_modules() if layer_spec(module) is not None]
    wanted = sample_outputs(model, names, inputs)
    quantized = {
        name: quantize_module(model.get_submodule(name), weights, rounds_inputs=rounds_inputs) for name in names
    }
    result = replace_modules(copy.deepcopy(model), quantized)
    observe_ranges(result, [inputs])
    return result, round_weights(result, wanted, inputs)


@pytest.mark.parametrize("rounds_inputs", [True, False])
@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_errs_more_than_plainly_rounded(name: str, weights: WeightFormat, rounds_inputs: bool) -> None:
    make, shape = LAYERS[name]
    model, inputs = nn.Sequential(make()).eval(), mixed(shape)
    result, found = rounded(model, inputs, weights, rounds_inputs=rounds_inputs)
    plain = quantize_module(model[0], weights, rounds_inputs=rounds_inputs)
    observe_ranges(plain, [inputs])
    with torch.no_grad():
        held_out = inputs[1::4]  # as many more were fitted to
        wanted = model(held_out)
        errors = [float((each(held_out) - wanted).norm()) for each in (result, plain)]
    assert "0" in found and errors[0] <= 1.02 * errors[1], "a part of the rows is sampled"
    before = result(inputs)
    assert bool(before.isfinite().all())
    freeze(result)
    assert torch.equal(result(inputs), before), "what is rounded lies on the grid"


def test_four_bits_err_far_less_where_inputs_vary_alike() -> None:
    model, inputs = nn.Sequential(nn.Linear(64, 32)).eval(), mixed((2000, 64))
    _, found = rounded(model, inputs, Int4(), rounds_inputs=False)
    assert found["0"].chosen < 0.3 * found["0"].plain


def test_later_layers_make_up_for_what_earlier_ones_lost() -> None:
    layers = [nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)]
    model, inputs, unseen = nn.Sequential(*layers).eval(), mixed((4000, 32)), mixed((1000, 32))
    result, _ = rounded(model, inputs, Int4(), rounds_inputs=False)
    names = ["0", "2", "4"]
    plain = replace_modules(
        copy.deepcopy(model),
        {name: quantize_module(model.get_submodule(name), Int4(), rounds_inputs=False) for name in names},
    )
    with torch.no_grad():
        expected = model(unseen)
        errors = [float((each(unseen) - expected).norm()) for each in (result, plain)]
    assert errors[0] < 0.6 * errors[1]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_weight_lands_on_a_level(groups: int, outputs: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    rows = torch.randn(groups, max(1, inputs // 2), inputs, generator=generator).double()  # linearly dependent
    weights = Int4()
    grid = weights.fit(weight.flatten(0, 1))
    levels = weights.levels(grid, weight.flatten(0, 1).shape)
    found = compensated(weight, rows.mT @ rows, levels).flatten(0, 1)
    codes = found / levels.step
    assert bool(found.isfinite().all())
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-6)
    assert bool(((codes.round() >= levels.lowest) & (codes.round() <= levels.highest)).all())


@pytest.mark.parametrize("moment", ["zeros", "ones", "nan"])
def test_a_moment_of_no_use_gives_plain_rounding(moment: str) -> None:
    weight = torch.randn(1, 4, 20)
    weights = Int8()
    grid = weights.fit(weight[0])
    levels = weights.levels(grid, weight[0].shape)
    moments = {"zeros": torch.zeros(1, 20, 20), "ones": torch.eye(20)[None], "nan": torch.full((1, 20, 20), torch.nan)}
    torch.testing.assert_close(
        compensated(weight, moments[moment], levels)[0].float(), weights.round(weight[0], grid), rtol=0, atol=1e-6
    )


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(100, 4)
    wanted = sample_outputs(model, ["0"], inputs)
    result = replace_modules(model, {"0": quantize_module(model[0], rounds_inputs=False)})
    inputs[3, 1] = torch.inf
    with pytest.raises(StudyError, match="layer '0': its inputs on calibration data are not finite"):
        round_weights(result, wanted, inputs)


@pytest.mark.parametrize(("what", "n_examples"), [("few", 3), ("constant", 400), ("frozen", 400), ("twice", 400)])
def test_layers_that_cannot_be_solved_are_rounded_plainly(what: str, n_examples: int) -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, layer) if what == "twice" else nn.Sequential(layer)
    layer.weight.requires_grad_(what != "frozen")
    inputs = torch.ones(n_examples, 16) if what == "constant" else torch.randn(n_examples, 16)
    wanted = sample_outputs(model.eval(), ["0"], inputs)
    quantized = quantize_module(layer, Int4(), rounds_inputs=False)
    expected = quantized.rounded_weight.detach().clone()
    result = replace_modules(copy.deepcopy(model), {"0": quantized})
    found = round_weights(result, wanted, inputs)
    assert found.get("0", Rounding(plain=1.0, chosen=1.0)).chosen <= 1.0
    if what != "constant":
        assert "0" not in found and torch.equal(quantized.rounded_weight, expected)
    assert bool(result(inputs).isfinite().all())


@pytest.mark.parametrize("bits", [(8, 8), (4, 32)])
def test_compressed_models_are_nearer_to_dense_than_plainly_rounded_ones(
    bits: tuple[int, int], bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: LayerChoice(weight_bits=bits[0], activation_bits=bits[1]) for name in bench.found.layers}  # type: ignore[arg-type]
    inputs = torch.cat([batch for batch, _ in bench.data.validation])

    def distance() -> float:
        model = compress(bench.model, Plan(layers=layers), calibration=bench.calibration, weight_limit=64)
        with evaluating(model), evaluating(bench.model):
            return output_distance(model(inputs), bench.model(inputs), bench.spec.loss)

    calibrated = distance()
    monkeypatch.setattr("ranksearch.compression.round_weights", lambda *_: {})
    assert calibrated < distance()


def test_the_outputs_of_all_layers_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network of wide layers would keep gigabytes."""
    model, inputs = nn.Sequential(nn.Linear(600, 8), nn.Linear(8, 4)), torch.randn(5000, 600)
    assert [len(rows.index) for rows in sample_outputs(model, ["0", "1"], inputs).values()] == [4800, 4096]
    monkeypatch.setattr(rounding, "MAX_OUTPUT_BYTES", 4500 * 4 * (8 + 4))
    assert [len(rows.index) for rows in sample_outputs(model, ["0", "1"], inputs).values()] == [4500, 4096]
