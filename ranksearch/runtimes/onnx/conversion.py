"""From torch modules to ONNX models."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from ranksearch.errors import MeasurementError
from ranksearch.layers import call_model, in_eval_mode
from ranksearch.quantization import QuantizedModule
from ranksearch.runtimes.axes import BATCH, LENGTH, STATIC, FreeAxes, cut, text_length
from ranksearch.runtimes.naming import named_layers
from ranksearch.runtimes.onnx.graph import Graph
from ranksearch.runtimes.onnx.integers import multiply_integers
from ranksearch.runtimes.onnx.quantizers import fold_batch_norms, round_after_moves, share_quantizers, store_codes
from ranksearch.runtimes.onnx.session import LAYER_PREFIX, layer_of, write_layers_of_outputs, write_structure
from ranksearch.runtimes.onnx.weights import keep_bits, weight_port
from ranksearch.runtimes.outputs import flat_outputs
from ranksearch.runtimes.pooling import fit_windows
from ranksearch.runtimes.rounding import fix_weights, stored_layers
from ranksearch.runtimes.structure import Structure, leaves_of, port_names, structure_of
from ranksearch.runtimes.tracing import KnownOperators
from ranksearch.surgery import copy_model

OPSET = 17
MULTIPLYING = ("Conv", "Gemm", "MatMul")
LOOKING_UP = "Gather"
# What a convolution may take in.
FUSED = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")
PER_CHANNEL = "aten::fake_quantize_per_channel_affine"
ADAPTIVE_POOL = "aten::adaptive_avg_pool2d"


class _Flat(nn.Module):
    """The model from a flat list of tensors to a tuple of tensors, which export handles surely."""

    def __init__(self, model: nn.Module, inputs: Structure) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs: Structure | None = None
        self.input_names = port_names(inputs, "input")
        # The exporter, which holds this list, reads it after it has called the model.
        self.output_names: list[str] = []

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        values = call_model(self.model, self.inputs.arrange(leaves))
        self.outputs, given = flat_outputs(values)
        self.output_names[:] = port_names(self.outputs, "output", self.input_names)
        return tuple(given)


def to_onnx(model: nn.Module, example: Any, *, on_integers: bool, axes: FreeAxes = STATIC) -> Any:
    """The model in eval mode as an onnx.ModelProto of static shape but for the free `axes`, quantized weights as int8.

    `on_integers` spells quantized layers out in what ONNX Runtime multiplies integers by on a CPU; else they stay as
    pairs of QuantizeLinear and DequantizeLinear, which TensorRT takes. Raises MeasurementError, which names the
    operator and the layer, where ONNX lacks an operator, and where inputs are nested.
    """
    flat, leaves, stored = _flattened(model, example)
    converted = _exported(flat, leaves, axes)
    graph = Graph(converted)
    write_layers_of_outputs(converted, _name_layers(graph, flat, list(stored)))
    calls = [(node, layer_of(node.name)) for node in graph.nodes(*MULTIPLYING, LOOKING_UP)]
    for layer, module in stored.items():
        keep_bits(graph, [node for node, name in calls if name == layer], module, in_products=on_integers)
    store_codes(graph)
    share_quantizers(graph)
    round_after_moves(graph)
    fold_batch_norms(graph)
    if on_integers:
        multiply_integers(graph)
        converted.opset_import.add(domain="com.microsoft", version=1)
    graph.store()
    write_structure(converted, "inputs", flat.inputs)
    write_structure(converted, "outputs", cast(Structure, flat.outputs))
    return converted


def _flattened(model: nn.Module, example: Any) -> tuple[_Flat, tuple[Tensor, ...], Mapping[str, QuantizedModule]]:
    """A copy of the model in eval mode, its weights fixed, and the layers of it whose weights alone are rounded."""
    frozen = in_eval_mode(copy_model(model).cpu()).requires_grad_(False)
    stored = stored_layers(frozen)
    frozen = fit_windows(fix_weights(frozen))
    leaves = tuple(torch.as_tensor(leaf).detach().cpu() for leaf in leaves_of(example))
    return _Flat(frozen, structure_of(example)).eval(), leaves, stored


def _exported(flat: _Flat, leaves: tuple[Tensor, ...], axes: FreeAxes) -> Any:
    import onnx

    written = io.BytesIO()
    free = _named_axes(flat, leaves, axes)
    try:
        # The newer exporter takes ten times as long.
        with _exporting(), torch.no_grad(), KnownOperators():
            torch.onnx.export(
                flat,
                leaves,
                cast(Any, written),
                dynamo=False,
                opset_version=OPSET,
                input_names=flat.input_names,
                output_names=flat.output_names,
                dynamic_axes=free or None,
                # As it stands: folding here would lose the names of the weights, and ONNX Runtime folds anyway.
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        where = _failed_layer(error)
        reason = str(error).strip().splitlines()[0]
        raise MeasurementError(f"the model cannot be written as ONNX{where}: {reason}") from error
    return onnx.load_from_string(written.getvalue())


def _named_axes(flat: _Flat, leaves: tuple[Tensor, ...], axes: FreeAxes) -> dict[str, dict[int, str]]:
    """The free axes of inputs and outputs; of outputs those that change their size with a text's length."""
    free = {name: of for name, of in zip(flat.input_names, axes.of(leaves), strict=True) if of}
    if not free:
        return {}
    length = text_length(leaves) if axes.length else None
    with torch.no_grad():
        outputs = flat(*leaves)
        shorter = outputs if length is None else flat(*cut(leaves, length // 2))
    for name, output, other in zip(flat.output_names, outputs, shorter, strict=True):
        sizes = enumerate(zip(output.shape, other.shape, strict=True))
        of = {i: LENGTH for i, (size, changed) in sizes if size != changed}
        if output.dim():
            free[name] = of | {0: BATCH}
    return free


@contextmanager
def _exporting() -> Iterator[None]:
    """While open, torch.onnx is quiet, and takes weight codes of -127..127 and means over windows of any size.

    Both it refuses by itself.
    """
    log, exporter = torch._C._jit_onnx_log, cast(Any, torch.onnx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exporter.register_custom_op_symbolic(PER_CHANNEL, _per_channel, OPSET)
        exporter.register_custom_op_symbolic(ADAPTIVE_POOL, _adaptive_pool, OPSET)
        # It writes the whole graph to stdout where an operator fails.
        torch._C._jit_onnx_log = _say_nothing
        try:
            yield
        finally:
            torch._C._jit_onnx_log = log
            exporter.unregister_custom_op_symbolic(PER_CHANNEL, OPSET)
            exporter.unregister_custom_op_symbolic(ADAPTIVE_POOL, OPSET)


def _say_nothing(*_: Any) -> None:
    pass


def _per_channel(g: Any, values: Any, scale: Any, zero_point: Any, axis: Any, low: Any, high: Any) -> Any:
    """A fake quantizer of weights as QuantizeLinear and DequantizeLinear, of int8 wherever the codes are signed."""
    axis, low = (int(value.node().t("value")) for value in (axis, low))
    dtype = torch.onnx.TensorProtoDataType.INT8 if low < 0 else torch.onnx.TensorProtoDataType.UINT8
    zero = g.op("Cast", zero_point, to_i=dtype)
    codes = g.op("QuantizeLinear", values, scale, zero, axis_i=axis)
    return g.op("DequantizeLinear", codes, scale, zero, axis_i=axis)


def _adaptive_pool(g: Any, values: Any, size: Any) -> Any:
    """Means over as many windows as `size` says, whatever the input: where they overlap, by products."""
    sizes, given = symbolic_helper._parse_arg(size, "is"), values.type().varyingSizes()[-2:]
    if list(sizes) == [1, 1]:
        return g.op("GlobalAveragePool", values)
    if None in given:
        raise RuntimeError(f"means over {sizes} windows need an input of known height and width")
    if all(n % k == 0 for n, k in zip(given, sizes, strict=True)):
        window = [n // k for n, k in zip(given, sizes, strict=True)]
        return g.op("AveragePool", values, kernel_shape_i=window, strides_i=window)
    by_row, by_column = (g.op("Constant", value_t=_windows(n, k)) for n, k in zip(given, sizes, strict=True))
    return g.op("MatMul", g.op("MatMul", by_row, values), g.op("Transpose", by_column, perm_i=[1, 0]))


def _windows(n_values: int, n_windows: int) -> Tensor:
    """The weights (windows, values) of the means that torch's adaptive pooling takes along one axis."""
    return F.adaptive_avg_pool1d(torch.eye(n_values), n_windows).T.contiguous()


def _failed_layer(error: BaseException) -> str:
    """` (layer 'features.3')` of the node that torch.onnx stumbled over, where its traceback still holds it."""
    for frame, _ in walk_tb(error.__traceback__):
        scope = getattr(frame.f_locals.get("node"), "scopeName", str)()
        names = [part.rsplit("::", 1)[-1] for part in scope.split("/") if "::" in part]
        # Members of a container are told with the container's own name in front.
        steps = [name.removeprefix(f"{before}.") for before, name in zip(["", *names], names, strict=False) if name]
        if steps:
            return f" (layer {'.'.join(steps[1:])!r})" if len(steps) > 1 else ""
    return ""


def _name_layers(graph: Graph, flat: _Flat, stored: Sequence[str]) -> dict[str, str]:
    """Names after its layer (in place) what multiplies by the layer's weight, or looks up the rows of a `stored` one.

    Gives the layers that make outputs of the model, by the output.
    """
    named = named_layers(flat.model) | {name: flat.model.get_submodule(name) for name in stored}
    owners = {id(layer._parameters["weight"]): name for name, layer in named.items()}
    parameters = flat.named_parameters(remove_duplicate=False)
    layers = {name: owners[id(parameter)] for name, parameter in parameters if id(parameter) in owners}
    n_calls: Counter[str] = Counter()
    layers_of_outputs = {}
    for node in graph.nodes(*MULTIPLYING, LOOKING_UP):
        weight = node.input[weight_port(node)]
        while (maker := graph.maker(weight, "Transpose", "QuantizeLinear", "DequantizeLinear")) is not None:
            weight = maker.input[0]
        if weight in layers:
            layer = layers[weight]
            n_calls[layer] += 1
            node.name = f"{LAYER_PREFIX}{layer}#{n_calls[layer]}"
            output = None if node.op_type == LOOKING_UP else _name_values(graph, node)
            if output is not None:
                layers_of_outputs[output] = layer
    return layers_of_outputs


def _name_values(graph: Graph, node: Any) -> str | None:
    """Names what a layer makes, and what is made of that alone, after the layer (in place).

    ONNX Runtime names a convolution on blocked channels after the value that it makes, together with what it took
    in. Gives the output of the model that this ends at, if it does.
    """
    last = node
    while last is not None:
        value: str = last.output[0]
        if value in graph.outputs:
            return value
        named = graph.fresh(f"{node.name}/{last.op_type}")
        graph.redirect(value, named)
        graph.change(last, output=named)
        last = graph.only_reader(named, *FUSED)
    return None
