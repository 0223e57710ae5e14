"""What OpenVINO's int8 kernels do on this device, found by running small models. Without torch."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ranksearch.runtimes.base import stayed_whole
from ranksearch.runtimes.openvino.runtime import (
    LAYER_PREFIX,
    core,
    load_openvino,
    model_kernels,
    model_layer_kernels,
)

if TYPE_CHECKING:
    from ranksearch.layers import ConvSpec, LayerSpec

Weights = NDArray[np.float32]
STEP = 0.01
PIXELS = 8
# The 4-bit format's default, which is offered.
GROUP_SIZE = 32


@cache
def layer_kernels(spec: "LayerSpec", device: str, precision: str) -> dict[str, str]:
    """The kernels that run a fake-quantized layer of this spec, with random weights, alone."""
    # With weights of zero the int8 kernels would silently not be taken.
    weights = np.random.default_rng(0).normal(size=spec.weight_shape).astype(np.float32)
    model = _linear(weights) if len(spec.weight_shape) == 2 else _convolution(weights, spec)  # type: ignore[arg-type]
    hint = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    return model_kernels(core().compile_model(model, device.upper(), hint))


@cache
def multiplies_compressed(spec: "LayerSpec", device: str, precision: str, weight_bits: int) -> bool:
    """Whether a layer of this spec multiplies floats by weights of 8 or 4 bits without making floats of them first."""
    if len(spec.weight_shape) > 2:
        return False
    n_outputs, n_inputs = spec.weight_shape
    ov = load_openvino()
    ops = ov.opset13
    n_groups = 1 if weight_bits == 8 else -(-n_inputs // GROUP_SIZE)
    if weight_bits == 4 and n_groups * GROUP_SIZE != n_inputs:
        return False  # such a weight is cut to size, which is done in floats
    shape = (n_outputs, n_inputs) if weight_bits == 8 else (n_outputs, n_groups, GROUP_SIZE)
    codes = np.random.default_rng(0).integers(0, 16, shape)
    weight = ops.convert(ops.constant(codes, dtype=ov.Type.i8 if weight_bits == 8 else ov.Type.u4), np.float32)
    steps = np.full((*shape[:-1], 1), STEP, dtype=np.float32)
    if weight_bits == 4:
        weight = ops.subtract(weight, ops.convert(ops.constant(steps * 0 + 8, dtype=ov.Type.u4), np.float32))
    weight = ops.reshape(ops.multiply(weight, ops.constant(steps)), np.array([n_outputs, n_inputs]), False)
    inputs = ops.parameter([1, n_inputs], dtype=np.float32)
    product = ops.matmul(inputs, weight, False, True)
    product.set_friendly_name(f"{LAYER_PREFIX}probed")
    hint = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
    compiled = core().compile_model(ov.Model([product], [inputs]), device.upper(), hint)
    return not stayed_whole(["probed"], model_layer_kernels(compiled))


@cache
def saturates(device: str) -> bool:
    """Whether sums of int8 products are cut off at 16 bits, as on CPUs without VNNI or AMX.

    Such kernels add 255 * 127 + 255 * 127 into 16 bits; weights of at most 64 never overflow them.
    """
    weights = np.full((16, 64), 127 * STEP, dtype=np.float32)
    model = core().compile_model(_linear(weights), device.upper(), {"INFERENCE_PRECISION_HINT": "f32"})
    largest = 255 * STEP
    (output,) = model(np.full((1, 64), largest, dtype=np.float32)).values()
    return bool(np.abs(output - 64 * largest * 127 * STEP).max() > 0.01 * np.abs(output).max())


def _linear(weights: Weights) -> Any:
    ov = load_openvino()
    ops = ov.opset13
    inputs = ops.parameter([1, weights.shape[1]], dtype=np.float32)
    output = ops.matmul(_activations(inputs), _rounded(weights), False, True)
    return ov.Model([output], [inputs])


def _convolution(weights: Weights, spec: "ConvSpec") -> Any:
    ov = load_openvino()
    ops = ov.opset13
    reach = [(size - 1) * gap + PIXELS for size, gap in zip(spec.kernel_size, spec.dilation, strict=True)]
    inputs = ops.parameter([1, spec.in_channels, *reach], dtype=np.float32)
    unpadded = [0] * len(spec.kernel_size)
    shared = ([*spec.stride], unpadded, unpadded, [*spec.dilation])
    if spec.groups == 1:
        output = ops.convolution(_activations(inputs), _rounded(weights), *shared)
    else:
        shape = [spec.groups, spec.out_channels // spec.groups, *weights.shape[1:]]
        grouped = ops.reshape(_rounded(weights), np.array(shape, dtype=np.int64), False)
        output = ops.group_convolution(_activations(inputs), grouped, *shared)
    return ov.Model([output], [inputs])


def _activations(values: Any) -> Any:
    low, high = np.float32(0.0), np.float32(255 * STEP)
    return load_openvino().opset13.fake_quantize(values, low, high, low, high, 256)


def _rounded(weights: Weights) -> Any:
    shape = (-1, *[1] * (weights.ndim - 1))
    high = np.abs(weights).reshape(len(weights), -1).max(1).reshape(shape)
    ops = load_openvino().opset13
    return ops.fake_quantize(ops.constant(weights), -high, high, -high, high, 255)
