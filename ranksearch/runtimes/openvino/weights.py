"""Weights of 16, 8 and 4 bits as OpenVINO keeps them: few bits, and what makes floats of them.

Its matrix products and look-ups take such weights as they are; before other operations it makes floats of them when it
loads the model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ranksearch.quantization import Half, Int4, Int8, QuantizedModule
from ranksearch.runtimes.openvino.runtime import load_openvino

Floats = NDArray[np.float32]
AsFloats = Callable[[Any], Any]

# How far off, relative to the largest weight, constants may be from the layer's weights, each output times a factor.
TOLERANCE = 1e-5


def weight_port(operation: Any) -> int:
    """Which input of the operation is a layer's weight: what looks up rows has it first, what multiplies second."""
    return 0 if operation.get_type_name() == "Gather" else 1


def keep_bits(operations: Sequence[Any], module: QuantizedModule) -> None:
    """Puts the bits of a layer's weight in the place of the float constants that `operations` read (in place).

    They are the layer's calls, which share their bits where they share the constant. A BatchNorm that was folded into
    the constant is a factor of each output. A constant that is anything else stays.
    """
    by_constant: dict[str, list[Any]] = {}
    for operation in operations:
        constant = operation.input_value(weight_port(operation)).get_node()
        by_constant.setdefault(constant.get_name(), []).append(operation)
    for readers in by_constant.values():
        _keep_bits(readers, module)


def _keep_bits(readers: Sequence[Any], module: QuantizedModule) -> None:
    constant = readers[0].input_value(weight_port(readers[0])).get_node()
    if constant.get_type_name() != "Constant":
        return
    weight = module.rounded_weight.detach().numpy()
    gain = _gain(np.asarray(constant.data), weight)
    if gain is not None:
        as_floats = _read_as_used if readers[0].get_type_name() in ("MatMul", "Gather") else _read_at_load
        kept = _KEEPERS[type(module.weight_format)](module, gain, list(constant.shape), as_floats)
        for reader in readers:
            # Each at its own: a tied table is looked up in, and multiplied by.
            reader.input(weight_port(reader)).replace_source_output(kept.output(0))


def _read_as_used(codes: Any) -> Any:
    """Floats of codes in the form that matrix products and look-ups take for compressed weights."""
    return load_openvino().opset13.convert(codes, np.float32)


def _read_at_load(codes: Any) -> Any:
    """Floats of codes by way of another type: else OpenVINO 2026.4 makes those of 1x1 convolutions at every run."""
    ops = load_openvino().opset13
    return ops.convert(ops.convert(codes, np.int32), np.float32)


def _gain(found: Floats, weight: Floats) -> Floats | None:
    """By what (T,) the outputs of `weight` (T, ...) are multiplied in the constant that was found; None by nothing."""
    rows = weight.reshape(len(weight), -1)
    if found.size != rows.size:
        return None
    found = found.reshape(rows.shape)
    largest = np.abs(rows).argmax(1)[:, None]
    divisor = np.take_along_axis(rows, largest, 1)[:, 0]
    is_zero = divisor == 0
    gain = np.where(is_zero, 1.0, np.take_along_axis(found, largest, 1)[:, 0] / np.where(is_zero, 1.0, divisor))
    off = np.abs(gain[:, None] * rows - found).max(initial=0.0)
    return gain.astype(np.float32) if off <= TOLERANCE * np.abs(found).max(initial=1e-30) else None


def _half(module: QuantizedModule, gain: Floats, shape: list[int], _as_floats: AsFloats) -> Any:
    ov = load_openvino()
    kind = ov.Type.bf16 if module.weight_format.dtype == torch.bfloat16 else ov.Type.f16
    # In float, since numpy knows no bfloat16: the values have one already.
    values = module.rounded_weight.detach().numpy().reshape(shape)
    floats = ov.opset13.convert(ov.opset13.constant(values, dtype=kind), np.float32)
    return floats if bool((gain == 1).all()) else ov.opset13.multiply(floats, _by_output(gain, shape))


def _int8(module: QuantizedModule, gain: Floats, shape: list[int], as_floats: AsFloats) -> Any:
    ops = load_openvino().opset13
    codes = module.weight_format.pack(module.weight, module.grid).numpy().reshape(shape)
    assert module.weight_scale is not None, "the format has steps"
    steps = module.weight_scale.numpy() * gain
    return ops.multiply(as_floats(ops.constant(codes)), _by_output(steps, shape))


def _int4(module: QuantizedModule, gain: Floats, shape: list[int], as_floats: AsFloats) -> Any:
    ov = load_openvino()
    ops, weights = ov.opset13, module.weight_format
    assert isinstance(weights, Int4) and module.weight_scale is not None and module.weight_zero_point is not None
    steps, zeros = module.weight_scale.numpy() * gain[:, None], module.weight_zero_point.numpy()
    (n_outputs, n_groups), size = steps.shape, weights.group_size
    codes = weights.codes(module.weight, module.grid).numpy()
    n_inputs = codes.shape[1]
    padded = np.pad(codes, ((0, 0), (0, n_groups * size - n_inputs))).reshape(n_outputs, n_groups, size)
    whole = as_floats(ops.constant(padded, dtype=ov.Type.u4))
    grid = n_outputs, n_groups, 1
    shift = as_floats(ops.constant(zeros.astype(np.uint8).reshape(grid), dtype=ov.Type.u4))
    floats = ops.multiply(ops.subtract(whole, shift), ops.constant(steps.astype(np.float32).reshape(grid)))
    if n_inputs < n_groups * size:
        rows = ops.reshape(floats, np.array([n_outputs, n_groups * size]), False)
        floats = ops.slice(rows, np.array([0]), np.array([n_inputs]), np.array([1]), np.array([1]))
    return ops.reshape(floats, np.array(shape), False)


_KEEPERS: Mapping[type, Any] = {Half: _half, Int8: _int8, Int4: _int4}


def _by_output(values: Floats, shape: list[int]) -> Any:
    """`values` (T,) as a constant that multiplies a weight of this shape, (T, ...) or (groups, T / groups, ...)."""
    axes: list[int] = []
    while int(np.prod(axes)) < values.size:
        axes.append(shape[len(axes)])
    return load_openvino().opset13.constant(values.astype(np.float32).reshape([*axes, *[1] * (len(shape) - len(axes))]))
