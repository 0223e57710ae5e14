"""Weights of 16, 8 and 4 bits in ONNX graphs: few bits in the file, and what multiplies by them.

Linear layers of 8 and 4 bits become a MatMulNBits, which ONNX Runtime computes from the codes
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits). Before any
other operation the codes are turned into floats by plain operators, which it does once, when it loads the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ranksearch.quantization import Half, Int4, Int8, QuantizedModule
from ranksearch.runtimes.onnx.graph import Array, Graph, make_node

PRODUCTS = ("Gemm", "MatMul")
# Of inputs that share a step; 8-bit weights have one for all of an output's.
INT8_BLOCK = 128
INT8_ZERO = 128
# Inputs stay floats: the kernel's other levels round them.
FLOAT_INPUTS = 1


def weight_port(node: Any) -> int:
    """Which input of the node is a layer's weight: what looks up rows has it first, what multiplies second."""
    return 0 if node.op_type == "Gather" else 1


def keep_bits(graph: Graph, nodes: Sequence[Any], module: QuantizedModule, *, in_products: bool) -> None:
    """Puts the bits of a layer's weight in the place of the floats that `nodes` read (in place).

    They are the layer's calls, which share the bits. Where `in_products` is set, linear layers multiply by the codes
    themselves.
    """
    if in_products and all(node.op_type in PRODUCTS for node in nodes) and not isinstance(module.weight_format, Half):
        constants = _constants(graph, module)
        for node in nodes:
            _multiply_by_codes(graph, node, module, constants)
        return
    values: str | None = None
    for node in nodes:
        port = weight_port(node)
        values = values or _floats(graph, module, node.input[port])
        transposed = graph.maker(node.input[port], "Transpose")
        if transposed is None:
            graph.change(node, inputs=[*node.input[:port], values, *node.input[port + 1 :]])
        else:
            graph.change(transposed, inputs=[values])


def _constants(graph: Graph, module: QuantizedModule) -> list[str]:
    """The names of codes, steps and zero points; an empty one for zero points that the format shares."""
    codes, steps, zeros = _blocks(module, _block_size(module))
    names = [graph.add_constant(codes, "codes"), graph.add_constant(steps, "steps")]
    return [*names, "" if zeros is None else graph.add_constant(zeros, "zeros")]


def _multiply_by_codes(graph: Graph, node: Any, module: QuantizedModule, constants: list[str]) -> None:
    """A MatMulNBits, a Gemm's bias included (in place)."""
    bits, size = module.weight_format.bits, _block_size(module)
    bias = [] if len(node.input) < 3 else ["", node.input[2]]
    inputs = [node.input[0], *constants, *bias]
    n_outputs, n_inputs = module.weight.shape
    output, name = node.output[0], node.name
    graph.remove(node)
    settings = {"K": n_inputs, "N": n_outputs, "bits": bits, "block_size": size, "accuracy_level": FLOAT_INPUTS}
    product = graph.add(make_node("MatMulNBits", inputs, output, domain="com.microsoft", **settings))
    product.name = name


def _block_size(module: QuantizedModule) -> int:
    return module.weight_format.group_size if isinstance(module.weight_format, Int4) else INT8_BLOCK


def _blocks(module: QuantizedModule, size: int) -> tuple[Array, Array, Array | None]:
    """Codes, steps and zero points as MatMulNBits wants them: by output and block, the last block filled up."""
    assert module.weight_scale is not None and module.weight_zero_point is not None
    n_outputs, n_inputs = module.weight.shape
    n_blocks = -(-n_inputs // size)
    missing = n_blocks * size - n_inputs
    if isinstance(module.weight_format, Int4):
        codes = np.pad(module.weight_format.codes(module.weight, module.grid).numpy(), ((0, 0), (0, missing)))
        zeros = module.weight_zero_point.numpy().astype(np.uint8)
        packed = _nibbles(np.pad(zeros, ((0, 0), (0, n_blocks % 2))))
        blocks = _nibbles(codes).reshape(n_outputs, n_blocks, size // 2)
        return blocks, module.weight_scale.numpy().flatten(), packed.flatten()
    signed = module.weight_format.pack(module.weight, module.grid).numpy().astype(np.int16)
    codes = np.pad(signed + INT8_ZERO, ((0, 0), (0, missing)), constant_values=INT8_ZERO).astype(np.uint8)
    steps = np.repeat(module.weight_scale.numpy()[:, None], n_blocks, axis=1)
    return codes.reshape(n_outputs, n_blocks, size), steps.flatten(), None


def _nibbles(codes: Array) -> Array:
    """Codes (T, n) as bytes (T, n / 2), the even one in the lower half."""
    return np.asarray(codes[:, ::2] | (codes[:, 1::2] << 4), dtype=np.uint8)


def _floats(graph: Graph, module: QuantizedModule, name: str) -> str:
    """The name of the weight, made of its bits by plain operators."""
    made = name
    for kind, inputs, settings in _FLOATS[type(module.weight_format)](module):
        names = [made if given is None else graph.add_constant(given, f"{name}::bits") for given in inputs]
        made = graph.add(make_node(kind, names, graph.fresh(name), **settings)).output[0]
    return made


# An operator, its inputs (None is what the one before made) and its attributes.
Step = tuple[str, list[Array | None], dict[str, Any]]


def _half_steps(module: QuantizedModule) -> Iterator[Step]:
    # ONNX Runtime's CPU kernels know no bfloat16; its values are float32's, cut.
    values = module.rounded_weight.detach().numpy()
    yield "Cast", [values.astype(np.float16) if module.weight_format == Half() else values], {"to": FLOAT}


def _int8_steps(module: QuantizedModule) -> Iterator[Step]:
    assert module.weight_scale is not None, "the format has steps"
    codes = module.weight_format.pack(module.weight, module.grid).numpy()
    yield "Cast", [codes], {"to": FLOAT}
    yield "Mul", [None, module.weight_scale.numpy().reshape(-1, *[1] * (codes.ndim - 1))], {}


def _int4_steps(module: QuantizedModule) -> Iterator[Step]:
    assert isinstance(module.weight_format, Int4)
    assert module.weight_scale is not None and module.weight_zero_point is not None
    size = module.weight_format.group_size
    codes = module.weight_format.codes(module.weight, module.grid).numpy()
    steps, zeros = module.weight_scale.numpy(), module.weight_zero_point.numpy()
    (n_outputs, n_groups), n_inputs = steps.shape, codes.shape[1]
    packed = _nibbles(np.pad(codes, ((0, 0), (0, n_groups * size - n_inputs))))
    # A byte times 1 and 1/16, cut to integers, then what is beyond 16 taken off: both its halves, side by side.
    yield "Cast", [packed.reshape(n_outputs, -1, 1)], {"to": FLOAT}
    yield "Mul", [None, np.array([1, 1 / 16], dtype=np.float32)], {}
    yield "Floor", [None], {}
    yield "Mod", [None, np.array(16, dtype=np.float32)], {"fmod": 1}
    yield "Reshape", [None, np.array([n_outputs, n_groups, size])], {}
    yield "Sub", [None, zeros.astype(np.float32)[:, :, None]], {}
    yield "Mul", [None, steps[:, :, None]], {}
    yield "Reshape", [None, np.array([n_outputs, n_groups * size])], {}
    yield "Slice", [None, np.array([0]), np.array([n_inputs]), np.array([1])], {}
    yield "Reshape", [None, np.array(module.weight.shape)], {}


FLOAT = 1  # onnx.TensorProto.FLOAT
_FLOATS: Mapping[type, Any] = {Half: _half_steps, Int8: _int8_steps, Int4: _int4_steps}
