"""Rounded layers: the arithmetic of eight bits, the modules of every format, the ranges, the packed state."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import Conv1D, as_image
from torch import nn

from ranksearch.errors import PlanError, StudyError
from ranksearch.layers import layer_spec
from ranksearch.quantization import (
    Half,
    Int4,
    Int8,
    WeightFormat,
    activation_quantizers,
    freeze,
    load_packed,
    observe_ranges,
    packed_state,
    quantize_module,
    weight_codes,
    weight_scale,
)
from ranksearch.quantization.formats import affine_range, affine_step
from ranksearch.quantization.ranges import RunningHistogram
from ranksearch.runtimes import RUNTIMES
from ranksearch.runtimes.base import int8_kernels
from ranksearch.spec import Target

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "no_bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 7, 7)),
    "sequence": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 15)),
    "sequence_grouped": (lambda: nn.Conv1d(4, 8, 5, groups=4, dilation=2, bias=False), (2, 4, 15)),
    "sequence_circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 15)),
}


FORMATS: dict[str, WeightFormat] = {
    "float16": Half(),
    "bfloat16": Half(torch.bfloat16),
    "int8": Int8(),
    "int8_limited": Int8(64),
    "int4": Int4(),
    "int4_64": Int4(group_size=64),
    "int4_symmetric": Int4(scheme="symmetric"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _chain() -> nn.Sequential:
    float_chain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    float_chain[0] = quantize_module(float_chain[0])
    float_chain[4] = quantize_module(float_chain[4])
    return float_chain.eval()


@pytest.mark.parametrize("limit", [64, 127])
@pytest.mark.parametrize("name", LAYERS)
def test_quantized_layer_is_near_the_float_layer(name: str, limit: int) -> None:
    make, shape = LAYERS[name]
    layer, inputs = make(), torch.randn(shape)
    quantized = quantize_module(layer, Int8(limit))
    observe_ranges(quantized, [inputs])
    difference = (quantized(inputs) - layer(inputs)).norm() / layer(inputs).norm()
    assert 0 < difference < 0.05
    assert int(weight_codes(quantized.weight, quantized.weight_scale, limit).abs().max()) <= limit


def test_other_modules_are_refused() -> None:
    for module in (nn.BatchNorm2d(3), Conv1D(4, 4)):
        with pytest.raises(TypeError, match="only nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding can"):
            quantize_module(module)
    with pytest.raises(ValueError, match="weight_limit"):
        quantize_module(nn.Linear(2, 2), Int8(128))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("sequence")])
def test_a_conv1d_is_quantized_as_the_conv2d_of_height_one(name: str) -> None:
    make, shape = LAYERS[name]
    layer, inputs = make(), torch.randn(shape)
    quantized, image = quantize_module(layer), quantize_module(as_image(layer))
    for each, seen in ((quantized, inputs), (image, inputs.unsqueeze(2))):
        observe_ranges(each, [seen])
    assert torch.equal(quantized.weight_scale, image.weight_scale)
    torch.testing.assert_close(quantized(inputs), image(inputs.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_comes_back_from_its_packed_state(name: str, weights: WeightFormat) -> None:
    make, shape = LAYERS[name]
    (layer, other), inputs = (quantize_module(make(), weights) for _ in range(2)), torch.randn(shape)
    before = layer(inputs)
    freeze(layer)
    load_packed(other, packed_state(layer))
    assert packed_state(layer)["weight"].dtype == weights.dtype
    assert torch.equal(layer(inputs), before)
    assert torch.equal(other(inputs), before)
    assert all(torch.equal(tensor, packed_state(other)[name]) for name, tensor in packed_state(layer).items())


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_float_computes_with_the_rounded_weight(name: str, weights: WeightFormat) -> None:
    make, shape = LAYERS[name]
    layer, inputs = quantize_module(make(), weights, rounds_inputs=False), torch.randn(shape)
    assert layer_spec(layer.in_float()) == layer.spec
    assert torch.equal(layer.in_float()(inputs), layer(inputs))
    assert not activation_quantizers(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_frozen_stays_frozen(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    layer.weight.requires_grad_(False)
    quantized = copy.deepcopy(quantize_module(layer))
    assert not quantized.weight.requires_grad
    assert quantized.bias is None or quantized.bias.requires_grad
    other = quantize_module(layer)
    load_packed(other, packed_state(quantized))
    freeze(other)
    assert not other.weight.requires_grad
    inputs = torch.rand(shape, requires_grad=True)
    other(inputs).sum().backward()
    assert inputs.grad is not None and other.weight.grad is None


@pytest.mark.parametrize("name", LAYERS)
def test_openvino_offers_eight_bits_where_its_kernels_run_in_eight_bits(name: str) -> None:
    make, shape = LAYERS[name]
    layer, inputs = make(), torch.randn(shape)
    runtime, target = RUNTIMES["openvino"], Target(threads=1)
    quantized = quantize_module(layer, Int8(runtime.weight_limit(target))).eval()
    observe_ranges(quantized, [inputs])
    session = runtime.prepare(quantized, inputs, target)
    assert ((8, 8) in runtime.supported_bits(layer_spec(layer), target)) == bool(int8_kernels(session.kernels()))
    expected = quantized(inputs).detach()
    difference = torch.as_tensor(session.run(inputs.numpy())) - expected
    assert float(difference.abs().max()) < 0.02 * float(expected.abs().max())


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([64, 127]))
@settings(max_examples=40, deadline=None)
def test_weight_scale_is_no_worse_than_the_largest_weight(rows: int, columns: int, seed: int, limit: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (weight_codes(weight, scale, limit).float() * scale[:, None] - weight).square().sum(1)

    scale = weight_scale(weight, limit)
    assert scale.shape == (rows,)
    assert bool((error(scale) <= error(weight.abs().amax(1) / limit) * 1.001 + 1e-12).all())


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.tensor([[0.0, 0.0], [1e-38, 0.0], [1.0, 2.0]])])
def test_channels_of_zeros_keep_a_usable_step(weight: torch.Tensor) -> None:
    assert float(weight_scale(weight).min()) > 1e-4


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_affine_range_covers_what_was_asked_and_zero(first: float, second: float) -> None:
    low, high = sorted((first, second))
    step, zero_point = affine_step(low, high)
    covered_low, covered_high = affine_range(step, zero_point)
    assert step > 0
    assert 0 <= zero_point <= 255
    assert covered_low <= max(low, 0) + step
    assert covered_high >= min(high, 0) - step
    assert covered_low <= min(low, 0.0) + step
    assert covered_high >= max(high, 0.0) - step


def test_gradients_pass_straight_through() -> None:
    layer = quantize_module(nn.Linear(4, 3), Int8(64))
    inputs = torch.rand(5, 4, requires_grad=True)
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, layer.rounded_weight.sum(0).expand(5, 4))
    steps = int((layer.weight.grad.abs() > 0).sum())
    assert steps >= 8  # all but weights that were clipped


@given(st.integers(0, 2**31), st.sampled_from(list(LAYERS)), st.sampled_from(list(FORMATS.values())))
@settings(max_examples=30, deadline=None)
def test_freezing_changes_no_output(seed: int, name: str, weights: WeightFormat) -> None:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer, inputs = quantize_module(make(), weights), torch.rand(shape)
    before = layer(inputs)
    freeze(layer)
    assert torch.equal(layer(inputs), before)


def test_packed_state_gives_back_the_outputs_to_the_bit() -> None:
    model, inputs = _chain(), torch.randn(3, 1, 8, 8)
    observe_ranges(model, [inputs])
    freeze(model)
    state = packed_state(model)
    assert state["0.weight"].dtype == torch.int8
    assert state["weight_scale:float32"].shape == (len(state["0.weight"]) + len(state["4.weight"]),)
    assert state["activation.scale:float32"].shape == state["activation.zero_point:uint8"].shape == (2,)
    assert not any("weight_scale" in name or "weight_zero_point" in name for name in state if ":" not in name)
    other = _chain()
    load_packed(other, state)
    assert torch.equal(other(inputs), model(inputs))
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed_state(other).items())


def test_packed_state_of_a_root_layer() -> None:
    layer = quantize_module(nn.Linear(3, 2))
    freeze(layer)
    other = quantize_module(nn.Linear(3, 2))
    load_packed(other, packed_state(layer))
    assert torch.equal(other(torch.ones(1, 3)), layer(torch.ones(1, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.bias"), "1.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"0.weight": s["0.weight"].float()}), "'0.weight' is float32; the plan wants int8"),
        (lambda s: s.pop("0.weight"), "0.weight"),
        (lambda s: s.pop("weight_scale:float32"), "'weight_scale:float32' is missing"),
        (
            lambda s: s.update({"weight_scale:float16": torch.ones(9).half()}),
            "float16 of 9 values; the plan wants none",
        ),
        (
            lambda s: s.update({"activation.scale:float32": torch.ones(3)}),
            "'activation.scale:float32' is float32 of 3 values; the plan wants float32 of 2",
        ),
        (lambda s: s.update({"activation.scale:float32": torch.ones(2).half()}), "is float16 of 2 values"),
        (lambda s: s.update({"0.weight": s["0.weight"][:4]}), "0.weight"),
        (lambda s: s.update({"1.bias": s["1.bias"].to(torch.int8)}), "'1.bias' is int8"),
    ],
)
def test_packed_state_that_does_not_fit_is_refused(change: object, message: str) -> None:
    state = packed_state(_chain())
    change(state)  # type: ignore[operator]
    with pytest.raises(PlanError, match=message.replace(".", r"\.")):
        load_packed(_chain(), state)


def test_observed_ranges_follow_the_data_and_clip_outliers() -> None:
    model = _chain()
    torch.manual_seed(1)
    data = torch.rand(2000, 1, 8, 8)
    data[0, 0, 0, 0] = 8.0
    ranges = observe_ranges(model, [data[:1000], data[1000:]])
    assert set(ranges) == set(activation_quantizers(model)) == {"0.activation", "4.activation"}
    low, high = ranges["0.activation"]
    assert low == 0.0
    assert 1.0 <= high < 7.9
    assert ranges["4.activation"][0] == 0.0  # after a ReLU nothing is negative


def test_signed_inputs_get_a_zero_point() -> None:
    layer = quantize_module(nn.Linear(16, 2))
    (low, high) = observe_ranges(layer, [torch.randn(500, 16)])["activation"]
    assert low < -2
    assert high > 2


def test_observing_leaves_mode_and_quantizers_as_they_were() -> None:
    model = _chain().train()
    statistics = model[1].running_mean.clone()
    observe_ranges(model, [torch.randn(4, 1, 8, 8)])
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    assert all(quantizer.observe is None for quantizer in activation_quantizers(model).values())


@pytest.mark.parametrize(("batches", "message"), [([], "saw no data"), ([torch.full((1, 3), torch.nan)], "finite")])
def test_useless_data_is_an_error_that_names_the_quantizer(batches: list[torch.Tensor], message: str) -> None:
    with pytest.raises(StudyError, match=f"'activation'.*{message}"):
        observe_ranges(quantize_module(nn.Linear(3, 2)), batches)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50), st.integers(1, 5))
@settings(deadline=None)
def test_running_histogram_counts_every_value_once(values: list[float], n_batches: int) -> None:
    histogram = RunningHistogram()
    for part in np.array_split(np.array(values, dtype=np.float32), n_batches):
        if len(part):
            histogram.add(torch.from_numpy(part))
    assert histogram.counts.sum() == len(values)
    assert histogram.low == min(np.float32(values))
    assert histogram.high == max(np.float32(values))


def test_quantizing_copies_and_deepcopy_works() -> None:
    layer = nn.Linear(3, 2)
    quantized = copy.deepcopy(quantize_module(layer))
    with torch.no_grad():
        quantized.weight.zero_()
    assert bool((layer.weight != 0).all())
