"""What ONNX Runtime's int8 kernels do on this CPU, found by running small models. Without torch."""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ranksearch.runtimes.base import stayed_float
from ranksearch.runtimes.onnx.graph import Graph, make_node
from ranksearch.runtimes.onnx.integers import multiply_integers
from ranksearch.runtimes.onnx.kernel_profile import executed_kernels, kernels_of_layers
from ranksearch.runtimes.onnx.runtime import OnnxRuntime
from ranksearch.runtimes.onnx.session import CPU_PROVIDER, LAYER_PREFIX, open_session, session_settings
from ranksearch.spec import Target

if TYPE_CHECKING:
    from ranksearch.layers import ConvSpec, LayerSpec

Codes = NDArray[np.int8]
STEP = np.float32(0.01)
PIXELS = 8
LARGEST = 255 * STEP


@cache
def runs_int8(spec: "LayerSpec") -> bool:
    """Whether integers are multiplied for a quantized layer of this spec, alone and between others of its kind."""
    codes = np.random.default_rng(0).integers(-64, 65, spec.weight_shape).astype(np.int8)
    for is_rounded in (False, True):
        model = _layer(codes, spec, is_rounded) if len(spec.weight_shape) > 2 else _product(codes)  # type: ignore[arg-type]
        kernels = executed_kernels(model, CPU_PROVIDER, 0, session_settings(_options()))
        if stayed_float(["probed"], kernels_of_layers(kernels, {})):
            return False
    return True


@cache
def saturates() -> bool:
    """Whether sums of int8 products are cut off at 16 bits, as on CPUs without VNNI.

    Such kernels add 255 * 127 + 255 * 127 into 16 bits; weights of at most 64 never overflow them.
    """
    model = _product(np.full((16, 64), 127, np.int8))
    session = open_session(model, CPU_PROVIDER, 0, session_settings(_options()))
    (output,) = session.run(None, {"input": np.full((1, 64), LARGEST, np.float32)})
    expected = 64 * LARGEST * 127 * STEP
    return bool(np.abs(output - expected).max() > 0.01 * expected)


def _options() -> dict[str, str | int]:
    return OnnxRuntime().options(Target(runtime="onnxruntime", threads=1))


def _product(codes: Codes) -> bytes:
    nodes = [make_node("Gemm", ["values", "weight"], "output", transB=1)]
    return _model(nodes, codes, (1, codes.shape[1]))


def _layer(codes: Codes, spec: "ConvSpec", is_rounded: bool) -> bytes:
    sizes = [(size - 1) * gap + PIXELS for size, gap in zip(spec.kernel_size, spec.dilation, strict=True)]
    settings = {"strides": spec.stride, "dilations": spec.dilation, "group": spec.groups}
    output = "made" if is_rounded else "output"
    nodes = [make_node("Conv", ["values", "weight"], output, kernel_shape=spec.kernel_size, **settings)]
    if is_rounded:
        nodes.append(make_node("QuantizeLinear", ["made", "step", "zero"], "made_codes"))
        nodes.append(make_node("DequantizeLinear", ["made_codes", "step", "zero"], "output"))
    return _model(nodes, codes, (1, spec.in_channels, *sizes))


def _model(nodes: list[Any], codes: Codes, shape: tuple[int, ...]) -> bytes:
    """A layer of these weight codes, named `probed`, behind the quantizer of its input."""
    from onnx import TensorProto, helper, numpy_helper

    nodes[0].name = f"{LAYER_PREFIX}probed#1"
    constants = {
        "step": STEP,
        "zero": np.uint8(0),
        "codes": codes,
        "steps": np.full(len(codes), STEP),
        "zeros": np.zeros(len(codes), np.int8),
    }
    quantizers = [
        make_node("QuantizeLinear", ["input", "step", "zero"], "input_codes"),
        make_node("DequantizeLinear", ["input_codes", "step", "zero"], "values"),
        make_node("DequantizeLinear", ["codes", "steps", "zeros"], "weight", axis=0),
    ]
    graph = helper.make_graph(
        [*quantizers, *nodes],
        "probe",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    arranged = Graph(model)
    multiply_integers(arranged)
    arranged.store()
    return bytes(model.SerializeToString())
