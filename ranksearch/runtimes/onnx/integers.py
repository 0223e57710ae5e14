"""Quantized layers in ONNX graphs, arranged so that ONNX Runtime multiplies integers on a CPU. Without torch.

A layer arrives with the QuantizeLinear and DequantizeLinear of its input, and a DequantizeLinear of its int8 weight.
ONNX Runtime makes of that a QLinearConv where a quantizer takes the output; where floats are wanted it would
multiply floats, so such a convolution becomes a ConvInteger, and a matrix product a MatMulIntegerToFloat
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). The values stay what they were.
"""

from typing import Any

import numpy as np

from ranksearch.runtimes.onnx.graph import Array, Graph, attributes, make_node
from ranksearch.runtimes.onnx.quantizers import layer_codes, layer_weight_of

LARGEST_BIAS = float(2**31 - 1)
# ConvInteger is several times slower than floats unless both sides are unsigned.
UNSIGNED_ZERO = np.uint8(128)
PASSED = ("Relu", "Clip", "MaxPool")


def multiply_integers(graph: Graph) -> None:
    """Makes of every quantized layer what runs on integers on a CPU (in place)."""
    for quantizer in graph.nodes("QuantizeLinear"):
        _round_at_once(graph, quantizer)
    for node in graph.nodes("Conv", "Gemm", "MatMul"):
        dequantizer = graph.maker(node.input[0], "DequantizeLinear")
        if layer_weight_of(graph, node) is None or dequantizer is None:
            continue
        if len(node.input) > 2 and graph.constant(node.input[2]) is None:
            continue
        if node.op_type == "Conv":
            _convolve_integers(graph, node, dequantizer)
        else:
            _multiply_matrices(graph, node, dequantizer)


def _round_at_once(graph: Graph, quantizer: Any) -> None:
    """Rounds a quantized convolution's output before a Relu, Clip or MaxPool instead of after (in place).

    Rounding clips as they clip and keeps the order, so that codes come out the same.
    """
    passed = []
    value = quantizer.input[0]
    while (node := graph.maker(value, *PASSED)) is not None:
        if graph.only_reader(value, "QuantizeLinear", *PASSED) is None or len(node.output) > 1:
            return
        if node.op_type != "MaxPool" and not _clips_anyway(graph, quantizer, node):
            return
        passed.append(node)
        value = node.input[0]
    convolution = graph.maker(value, "Conv")
    if not passed or convolution is None or layer_weight_of(graph, convolution) is None:
        return
    if graph.only_reader(value, *PASSED) is None:
        return
    codes = graph.fresh(value)
    early = make_node("QuantizeLinear", [value, *quantizer.input[1:]], codes)
    for node in reversed(passed):
        if node.op_type == "MaxPool":
            before, codes = codes, graph.fresh(codes)
            graph.change(node, inputs=[before], output=codes)
        else:
            graph.remove(node)
    graph.remove(quantizer)
    graph.add(early)
    graph.redirect(quantizer.output[0], codes)


def _clips_anyway(graph: Graph, quantizer: Any, node: Any) -> bool:
    """Whether the quantizer's codes end where a Relu or Clip does, or before."""
    scale, zero = (graph.constant(name) for name in quantizer.input[1:])
    limits = _limits(graph, node)
    if scale is None or zero is None or limits is None:
        return False
    ends = np.iinfo(zero.dtype)
    lowest, highest = (np.rint(limit / float(scale)) + int(zero) for limit in limits)
    return bool(lowest <= ends.min and highest >= ends.max)


def _limits(graph: Graph, node: Any) -> tuple[float, float] | None:
    """The least and the largest value that a Relu or Clip lets through, where they are constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    found = [-np.inf, np.inf]
    for side, name in enumerate(node.input[1:]):
        limit = graph.constant(name)
        if name and limit is None:
            return None
        found[side] = found[side] if limit is None else float(limit)
    return found[0], found[1]


def _convolve_integers(graph: Graph, node: Any, dequantizer: Any) -> None:
    """What runs as QLinearConv where a quantizer takes the output, else a ConvInteger and its scaling (in place)."""
    codes, weight_scale = layer_codes(graph, node)
    input_scale = graph.constant(dequantizer.input[1])
    assert input_scale is not None
    bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
    scale = (np.float64(input_scale) * weight_scale).astype(np.float32)
    is_rounded = graph.only_reader(node.output[0], "QuantizeLinear") is not None
    if is_rounded and (bias is None or _fits(bias, scale)):
        if bias is not None:
            integers = graph.add_constant(np.rint(bias / scale.astype(np.float64)).astype(np.int32), "bias")
            inputs = [integers, graph.add_constant(scale, "bias_scale")]
            made = graph.add(make_node("DequantizeLinear", inputs, graph.fresh("bias"), axis=0))
            graph.change(node, inputs=[*node.input[:2], made.output[0]])
        return
    unsigned = graph.add_constant((codes.astype(np.int16) + UNSIGNED_ZERO).astype(np.uint8), "codes")
    zero = graph.add_constant(np.asarray(UNSIGNED_ZERO), "codes_zero")
    output = node.output[0]
    sums, scaled = graph.fresh(output), output if bias is None else graph.fresh(output)
    inputs = [dequantizer.input[0], unsigned, dequantizer.input[2], zero]
    graph.remove(node)
    product = graph.add(make_node("ConvInteger", inputs, sums, **attributes(node)))
    product.name = node.name
    graph.add(make_node("DequantizeLinear", [sums, graph.add_constant(scale, "scale")], scaled, axis=1))
    if bias is not None:
        shift = bias.reshape(-1, *[1] * (codes.ndim - 2)).astype(np.float32)
        graph.add(make_node("Add", [scaled, graph.add_constant(shift, "bias")], output))


def _multiply_matrices(graph: Graph, node: Any, dequantizer: Any) -> None:
    """A MatMulIntegerToFloat, its bias included (in place)."""
    codes, scale = layer_codes(graph, node)
    output = node.output[0]
    bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
    added = graph.only_reader(output, "Add") if node.op_type == "MatMul" else None
    if added is not None:
        (name,) = (name for name in added.input if name != output)
        found = graph.constant(name)
        if found is not None and found.shape == (len(codes),):
            graph.remove(added)
            output, bias = added.output[0], found
    steps = [dequantizer.input[1], graph.add_constant(scale, "scale"), dequantizer.input[2], ""]
    inputs = [dequantizer.input[0], graph.add_constant(codes.T, "codes"), *steps]
    inputs += [] if bias is None else [graph.add_constant(bias, "bias")]
    graph.remove(node)
    product = graph.add(make_node("MatMulIntegerToFloat", inputs, output, domain="com.microsoft"))
    product.name = node.name


def _fits(bias: Array, scale: Array) -> bool:
    """Whether a bias can be counted in steps of `scale` in 32 bits."""
    return bool(np.all(np.abs(bias) < LARGEST_BIAS * scale.astype(np.float64)))
