"""The quantizers of an ONNX graph: weights stored as codes, BatchNorm folded into them. Without torch."""

from typing import Any

import numpy as np

from ranksearch.runtimes.onnx.graph import Array, Graph, attributes, make_node

MOVES = ("Pad", "Slice", "Concat")


def store_codes(graph: Graph) -> None:
    """Stores as codes the weights that are rounded at every run (in place)."""
    for node in graph.nodes("QuantizeLinear"):
        weight, scale, zero = (graph.constant(name) for name in node.input)
        if weight is None or scale is None or zero is None:
            continue
        shape = [1] * weight.ndim
        shape[attributes(node).get("axis", 0)] = -1
        limits = np.iinfo(zero.dtype)
        codes = np.rint(weight / scale.reshape(shape)) + zero.reshape(shape)
        codes = np.clip(codes, limits.min, limits.max).astype(zero.dtype)
        graph.remove(node)
        graph.redirect(node.output[0], graph.add_constant(codes, f"{node.input[0]}::codes"))


def share_quantizers(graph: Graph) -> None:
    """Rounds a value once where several readers round it alike (in place)."""
    made: dict[tuple[Any, ...], str] = {}
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        constants = [graph.constant(name) for name in node.input[1:]]
        if any(values is None or values.ndim > 0 for values in constants) or node.output[0] in graph.outputs:
            continue
        key = (node.op_type, node.input[0], *(values.item() for values in constants if values is not None))
        if key in made:
            graph.remove(node)
            graph.redirect(node.output[0], made[key])
        made.setdefault(key, node.output[0])


def round_after_moves(graph: Graph) -> None:
    """Rounds a convolution's input after it was padded by other than zeros, instead of before (in place)."""
    for node in graph.nodes("Conv"):
        found = _moves_before(graph, node) if layer_weight_of(graph, node) is not None else None
        if found is None:
            continue
        moves, dequantizer = found
        quantizer = graph.maker(dequantizer.input[0], "QuantizeLinear")
        for move in moves:
            inputs = [quantizer.input[0] if name == dequantizer.output[0] else name for name in move.input]
            graph.change(move, inputs=inputs)
        codes, rounded = (graph.fresh(node.input[0]) for _ in range(2))
        graph.add(make_node("QuantizeLinear", [node.input[0], *quantizer.input[1:]], codes))
        graph.add(make_node("DequantizeLinear", [codes, *quantizer.input[1:]], rounded))
        graph.change(node, inputs=[rounded, *node.input[1:]])


def fold_batch_norms(graph: Graph) -> None:
    """Folds each BatchNormalization into the codes, scales and bias of the quantized convolution before it (in place).

    ONNX Runtime does so for float weights only.
    """
    for node in graph.nodes("Conv"):
        norm = graph.only_reader(node.output[0], "BatchNormalization")
        dequantizer = layer_weight_of(graph, node)
        if norm is None or dequantizer is None:
            continue
        constants = [graph.constant(name) for name in (*norm.input[1:], *node.input[2:])]
        if any(values is None for values in constants):
            continue
        gain, shift, mean, variance, *bias = (np.asarray(values, np.float64) for values in constants)
        gain = gain / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
        shift = shift + ((bias[0] if bias else 0.0) - mean) * gain
        weight = _scaled(graph, node, dequantizer, gain)
        name = graph.add_constant(shift.astype(np.float32), "bias")
        graph.remove(norm)
        graph.change(node, inputs=[node.input[0], weight, name], output=norm.output[0])


def layer_weight_of(graph: Graph, node: Any) -> Any:
    """The DequantizeLinear of a layer's int8 weight, outputs first, or None."""
    name = node.input[1]
    transposed = graph.maker(name, "Transpose")
    if transposed is not None:
        name = transposed.input[0]
    found = graph.maker(name, "DequantizeLinear")
    if found is None or graph.constant(found.input[0]) is None or attributes(found).get("axis", 1) != 0:
        return None
    is_transposed = (transposed is not None) != bool(attributes(node).get("transB", 0))
    return found if node.op_type == "Conv" or is_transposed else None


def layer_codes(graph: Graph, node: Any) -> tuple[Array, Array]:
    """The codes (T, ...) and scales (T,) of a quantized layer's weight."""
    found = layer_weight_of(graph, node)
    codes, scale = graph.constant(found.input[0]), graph.constant(found.input[1])
    assert codes is not None and scale is not None
    return codes, scale


def _scaled(graph: Graph, node: Any, dequantizer: Any, gain: Array) -> str:
    """The name of a convolution's weight with each output multiplied by its gain (T,)."""
    codes, scale = layer_codes(graph, node)
    # Steps stay positive, as kernels want them: the codes take the sign, and a gain of zero.
    signs = np.sign(gain).astype(codes.dtype).reshape(-1, *[1] * (codes.ndim - 1))
    steps = np.where(gain == 0, scale, scale * np.abs(gain)).astype(np.float32)
    inputs = [
        graph.add_constant(codes * signs, dequantizer.input[0]),
        graph.add_constant(steps, dequantizer.input[1]),
        dequantizer.input[2],
    ]
    output = graph.fresh(dequantizer.output[0])
    graph.add(make_node("DequantizeLinear", inputs, output, axis=0))
    return output


def _moves_before(graph: Graph, node: Any) -> tuple[list[Any], Any] | None:
    """The nodes that move values between one dequantizer and the layer, and the dequantizer.

    None where there are none, or others read what they make.
    """
    moves: dict[int, Any] = {}
    ends: dict[str, Any] = {}
    names = [node.input[0]]
    while names:
        name = names.pop()
        end, move = graph.maker(name, "DequantizeLinear"), graph.maker(name, *MOVES)
        if end is not None:
            ends[name] = end
        elif move is None:
            return None
        else:
            moves[id(move)] = move
            names.extend(move.input if move.op_type == "Concat" else move.input[:1])
    own = {*moves, id(node)}
    are_read_elsewhere = any(id(reader) not in own for m in moves.values() for reader in graph.readers(m.output[0]))
    if not moves or len(ends) != 1 or are_read_elsewhere:
        return None
    return list(moves.values()), *ends.values()
