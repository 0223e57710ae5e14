"""From torch modules to OpenVINO models."""

import contextlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranksearch.errors import MeasurementError
from ranksearch.layers import call_model, in_eval_mode
from ranksearch.runtimes.axes import STATIC, FreeAxes
from ranksearch.runtimes.calibration import calibration_batches
from ranksearch.runtimes.naming import named_layers
from ranksearch.runtimes.openvino.folding import MULTIPLYING, fold_products
from ranksearch.runtimes.openvino.runtime import LAYER_PREFIX, load_nncf, load_openvino, write_structure
from ranksearch.runtimes.openvino.striding import slice_strides
from ranksearch.runtimes.openvino.weights import keep_bits, weight_port
from ranksearch.runtimes.outputs import flat_outputs
from ranksearch.runtimes.pooling import fit_windows
from ranksearch.runtimes.rounding import fix_weights, stored_layers
from ranksearch.runtimes.structure import Structure, leaves_of, structure_of
from ranksearch.runtimes.tracing import KnownOperators
from ranksearch.surgery import copy_model

LOOKING_UP = "Gather"
NOTE = "ranksearch_layer"


def to_openvino(model: nn.Module, example: Any, *, axes: FreeAxes = STATIC) -> Any:
    """The model in eval mode as an openvino.Model of static shape but for the free `axes`, quantized weights as int8.

    Raises MeasurementError where inputs are nested, and, naming them, for operators without a rule.
    """
    converted = _convert(model, example, axes)
    from openvino._offline_transformations import compress_quantize_weights_transformation

    compress_quantize_weights_transformation(converted)
    return converted


def to_openvino_int8(model: nn.Module, calibration_inputs: Iterable[Any], example: Any) -> Any:
    """The model as NNCF quantizes it from up to 300 calibration examples, as an openvino.Model."""
    # NNCF stumbles over embeddings of constants that were folded.
    converted = _convert(model, example, STATIC, folds_constants=False)
    nncf = load_nncf()
    inputs = structure_of(example)
    n_rows = len(leaves_of(example)[0])
    batches = [_as_fed(arrays, inputs) for arrays in calibration_batches(calibration_inputs, n_rows)]
    # NNCF draws progress bars on stdout whatever its log level.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))
    slice_strides(quantized)
    from openvino._offline_transformations import compress_quantize_weights_transformation

    compress_quantize_weights_transformation(quantized)
    return quantized


def _convert(model: nn.Module, example: Any, axes: FreeAxes, *, folds_constants: bool = True) -> Any:
    load_openvino()
    from openvino._offline_transformations import apply_moc_transformations

    inputs = structure_of(example)
    leaves = tuple(torch.as_tensor(leaf).detach().cpu() for leaf in leaves_of(example))
    # OpenVINO shares memory with what it converts; a copy keeps later training out of the compiled model.
    frozen = in_eval_mode(copy_model(model).cpu()).requires_grad_(False)
    stored = stored_layers(frozen)
    frozen = fit_windows(fix_weights(frozen))
    outputs: list[Structure] = []

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        """The model from a flat list of tensors to a tuple of tensors, which tracing handles surely."""
        values = call_model(frozen, inputs.arrange(leaves))
        structure, given = flat_outputs(values)
        outputs.append(structure)
        return tuple(given)

    converted = _from_trace(_trace(flat, leaves))
    _note_layers(converted, named_layers(frozen) | {name: frozen.get_submodule(name) for name in stored})
    free = axes.of(leaves)
    shapes = [[-1 if i in of else n for i, n in enumerate(leaf.shape)] for leaf, of in zip(leaves, free, strict=True)]
    try:
        converted.reshape(dict(enumerate(shapes)))
    except RuntimeError as error:
        raise MeasurementError(f"OpenVINO cannot give the model its shapes: {str(error).strip()}") from error
    # Folds the quantizers' limits into constants, without which no int8 kernel is taken.
    apply_moc_transformations(converted, cf=folds_constants, smart_reshape=False)
    if folds_constants:
        fold_products(converted)
    noted = _noted(converted, *MULTIPLYING, LOOKING_UP)
    for layer, module in stored.items():
        keep_bits([op for op, name in noted if name == layer], module)
    slice_strides(converted)
    _name_layers(converted)
    write_structure(converted, "inputs", inputs)
    write_structure(converted, "outputs", outputs[0])
    return converted


def _note_layers(converted: Any, layers: Mapping[str, nn.Module]) -> None:
    """Notes at what multiplies by a layer's weight, or looks up its rows (in place), which layer that is.

    The front end keeps weights where they are, so that a constant's address tells whose weight it is.
    """
    owners = {module.get_parameter("weight").data_ptr(): name for name, module in layers.items()}
    for op in converted.get_ops():
        if op.get_type_name() in (*MULTIPLYING, LOOKING_UP):
            address = _constant_address(op.input_value(weight_port(op)))
            if address in owners:
                op.get_rt_info()[NOTE] = owners[address]


def _name_layers(converted: Any) -> None:
    """Names after its layer (in place) what was noted; transformations carry notes over but not names."""
    n_calls: Counter[str] = Counter()
    for op, name in _noted(converted, *MULTIPLYING):
        n_calls[name] += 1
        own = f"{LAYER_PREFIX}{name}" + (f"#{n_calls[name]}" if n_calls[name] > 1 else "")
        op.set_friendly_name(own)
        # A kernel that adds the bias as well goes by the name of the addition.
        for follower in _arithmetic_behind(op):
            follower.set_friendly_name(f"{own}/{follower.get_type_name()}")


def _noted(converted: Any, *kinds: str) -> list[tuple[Any, str]]:
    """The operations of these kinds that read a layer's weight, in order, each with the layer's name."""
    return [
        (op, op.get_rt_info()[NOTE].astype(str))
        for op in converted.get_ordered_ops()
        if NOTE in op.get_rt_info() and op.get_type_name() in kinds
    ]


def _arithmetic_behind(op: Any) -> Iterator[Any]:
    """The scaling by a constant and the addition of one that follow an operation and nothing else reads."""
    while len(readers := op.output(0).get_target_inputs()) == 1:
        (reader,) = readers
        op = reader.get_node()
        sources = [value.get_node().get_type_name() for value in op.input_values()]
        if op.get_type_name() not in ("Add", "Multiply") or "Constant" not in sources:
            return
        yield op


def _constant_address(source: Any) -> int | None:
    """The address of the constant that a value is made from, by way of each operation's first input."""
    node = source.get_node()
    while node.get_type_name() != "Constant":
        if node.get_input_size() == 0:
            return None
        node = node.input_value(0).get_node()
    return int(node.data.__array_interface__["data"][0])


def _trace(flat: Callable[..., Any], leaves: tuple[Tensor, ...]) -> Any:
    """The graph of the function. A function, not a module: torch would script each submodule, which takes longest.

    Not by torch.jit.trace, which keeps every function, with its weights, until the process ends.
    """
    with warnings.catch_warnings(), torch.no_grad(), KnownOperators():
        # torch.jit is deprecated, but what replaces it takes seconds per model.
        warnings.simplefilter("ignore")
        graph = cast(Any, torch.jit)._get_trace_graph(flat, leaves, strict=False)[0]
    # Functions of TorchScript, which OpenVINO does not call.
    cast(Any, torch._C)._jit_pass_inline(graph)
    return graph


def _from_trace(graph: Any) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    # The front end calls back into the decoder, which Python must keep alive until the end.
    decoder = TorchScriptPythonDecoder(None, graph, alias_db=graph.alias_db())
    try:
        return frontend.convert(frontend.load(decoder))
    except Exception as error:  # of openvino's own types, which derive from nothing narrower
        raise MeasurementError(f"OpenVINO cannot convert the model: {_operators(str(error))}") from error


def _operators(message: str) -> str:
    """What the front end's report says of operators; its whole message where it says nothing of any."""
    found = re.findall(r"(?:for operations?: |while converting |exception for op: )[^\n]+", message)
    return "; ".join(line.strip() for line in found) or message.strip()


def _as_fed(arrays: list[NDArray[Any]], inputs: Structure) -> Any:
    return arrays[0] if inputs.kind == "single" else cast(Any, dict(enumerate(arrays)))
