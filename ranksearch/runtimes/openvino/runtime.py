"""OpenVINO: opens a model, runs it, names its kernels. Without torch; what converts is conversion."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

import numpy as np
from numpy.typing import NDArray

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes.base import (
    FLOAT_BITS,
    FULL_WEIGHT_LIMIT,
    INT8_BITS,
    AbstractRuntime,
    AbstractSession,
    Bits,
    available_threads,
    float_bits,
    host_fingerprint,
    int8_kernels,
    require,
    stayed_float,
)
from ranksearch.runtimes.structure import Kind, Structure, check_fits, check_shape, named_leaves, named_shapes
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

    from ranksearch.layers import LayerSpec

PRECISIONS = ("f32", "bf16", "f16", "default")
INFO = "ranksearch"
# What multiplies by a layer's weight is named after the layer; what its further calls do has `#2` and so on behind.
LAYER_PREFIX = "layer:"
# Weights up to here never saturate: 255 * (64 + 64) fits the 16 bits in which some kernels add two products.
SATURATING_WEIGHT_LIMIT = 64


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """While open, openvino and nncf find no telemetry package, so they take their silent stub."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@cache
def load_openvino() -> Any:
    """The openvino module, imported when first needed and without telemetry."""
    with _no_telemetry():
        import openvino
    return openvino


@cache
def load_nncf() -> Any:
    """The nncf module, imported when first needed, silent and without telemetry."""
    load_openvino()
    os.environ.setdefault("NNCF_CI", "1")  # nncf's own switch for its telemetry
    with _no_telemetry():
        import nncf
    nncf.set_log_level(40)
    return nncf


@cache
def core() -> Any:
    """The one openvino.Core of this process."""
    return load_openvino().Core()


@final
class OpenVINOSession(AbstractSession):
    """A compiled model; `structure` metadata of inputs and outputs comes from the model itself."""

    def __init__(self, model: Any, target: Target, options: dict[str, str | int]) -> None:
        self._inputs = _read_structure(model, "inputs", len(model.inputs))
        self._outputs = _read_structure(model, "outputs", len(model.outputs))
        self._constant_bytes: int = sum(
            op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant"
        )
        self._compiled = _compile(model, target, options)
        self._request = self._compiled.create_infer_request()

    def run(self, inputs: Any) -> Any:
        arrays = self._arrays(inputs)
        self._request.infer(dict(enumerate(arrays)))
        leaves = [self._request.get_output_tensor(i).data.copy() for i in range(len(self._outputs.names))]
        return self._outputs.arrange(leaves)

    def bind(self, inputs: Any) -> Callable[[], None]:
        request = self._compiled.create_infer_request()
        for i, array in enumerate(self._arrays(inputs)):
            request.set_input_tensor(i, load_openvino().Tensor(np.array(array, order="C")))

        def call() -> None:
            request.infer(share_outputs=True)

        return call

    def kernels(self) -> dict[str, str]:
        return model_kernels(self._compiled)

    def layer_kernels(self) -> dict[str, str]:
        return model_layer_kernels(self._compiled)

    def constant_bytes(self) -> int:
        return self._constant_bytes

    def _arrays(self, inputs: Any) -> list[NDArray[Any]]:
        """The input arrays in the model's order. Raises MeasurementError where they do not fit it."""
        arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(inputs, self._inputs.names).items()}
        for (name, array), port in zip(arrays.items(), self._compiled.inputs, strict=True):
            check_shape(name, array.shape, port.shape)
        return list(arrays.values())


@final
class OpenVINORuntime(AbstractRuntime):
    """OpenVINO on a CPU or an Intel GPU; int8 by fake-quantized layers or by NNCF."""

    name: ClassVar[str] = "openvino"
    module: ClassVar[str] = "openvino"

    def check(self, target: Target) -> None:
        self.check_installed()
        if target.mode != "eager":
            raise RuntimeUnavailableError(f"runtime 'openvino' has no mode {target.mode!r}; leave it at 'eager'")
        if target.precision not in PRECISIONS:
            raise RuntimeUnavailableError(
                f"runtime 'openvino' has no precision {target.precision!r}; it has {', '.join(PRECISIONS)}"
            )
        devices = core().available_devices
        if target.device.upper() not in devices:
            raise RuntimeUnavailableError(
                f"OpenVINO finds no device {target.device!r} here; it finds {', '.join(devices).lower()}"
            )

    def supported_bits(self, spec: "LayerSpec", target: Target) -> tuple[Bits, ...]:
        from ranksearch.runtimes.openvino.probe import layer_kernels, multiplies_compressed

        place = spec, target.device, target.precision
        activations = float_bits(target)
        bits = [FLOAT_BITS] + ([(16, 16)] if activations == 16 else [])
        if int8_kernels(layer_kernels(*place)):
            bits.append(INT8_BITS)
        return (*bits, *((count, activations) for count in (8, 4) if multiplies_compressed(*place, count)))

    def weight_limit(self, target: Target) -> int:
        from ranksearch.runtimes.openvino.probe import saturates

        return SATURATING_WEIGHT_LIMIT if saturates(target.device) else FULL_WEIGHT_LIMIT

    def options(self, target: Target) -> dict[str, str | int]:
        options: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if target.device == "cpu":
            options["INFERENCE_NUM_THREADS"] = available_threads(target)
            # Rounding inputs by the way would be another layer than the one that was scored.
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
            # Its own pinning moves threads back to the cores that the process had at first.
            options["ENABLE_CPU_PINNING"] = "NO" if target.cores is not None else "YES"
        if target.precision != "default":
            options["INFERENCE_PRECISION_HINT"] = target.precision
        return options

    def fingerprint(self, target: Target) -> dict[str, str]:
        device = target.device.upper()
        capabilities = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
        return {
            **host_fingerprint(),
            "device": str(core().get_property(device, "FULL_DEVICE_NAME")).strip(),
            "capabilities": " ".join(sorted(str(capability) for capability in capabilities)),
            "openvino": load_openvino().get_version(),
        }

    def prepare(self, model: "nn.Module", example: Any, target: Target) -> AbstractSession:
        from ranksearch.runtimes.openvino.conversion import to_openvino

        return self._session(to_openvino(model, example), target)

    def serialise(self, model: "nn.Module", example: Any, target: Target, directory: Path) -> Path:
        from ranksearch.runtimes.openvino.conversion import to_openvino

        path = Path(directory) / "model.xml"
        load_openvino().save_model(to_openvino(model, example), path, compress_to_fp16=False)
        return path

    def open(self, path: Path, target: Target) -> AbstractSession:
        if not Path(path).is_file():
            raise RuntimeUnavailableError(f"there is no OpenVINO model {path}")
        return self._session(core().read_model(path), target)

    def open_portable(self, path: Path, inputs: Any, target: Target) -> AbstractSession:
        from ranksearch.runtimes.openvino.folding import fold_products

        model, shapes = core().read_model(path), named_shapes(inputs)
        for port in model.inputs:
            sizes = [None if size.is_dynamic else size.get_length() for size in port.partial_shape]
            check_fits(port.any_name, sizes, shapes.get(port.any_name, ()))
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        # A batch that is fixed makes constants of what was only repeated for each of its rows.
        fold_products(model)
        return self._session(model, target)

    def quantize_own(
        self, model: "nn.Module", calibration_inputs: Iterable[Any], example: Any, target: Target
    ) -> AbstractSession:
        require("nncf", "OpenVINO's own int8", "nncf")
        from ranksearch.runtimes.openvino.conversion import to_openvino_int8

        return self._session(to_openvino_int8(model, calibration_inputs, example), target)

    def _session(self, model: Any, target: Target) -> OpenVINOSession:
        return OpenVINOSession(model, target, self.options(target))


def _compile(model: Any, target: Target, options: dict[str, str | int]) -> Any:
    """The compiled model, its int8 layers as kernels of their own.

    With one thread OpenVINO 2026.4 fuses linear layers that follow one another, and computes fused int8 ones in float
    or, where two are the factors of one layer, wrongly. Such a model does without fused subgraphs.
    """
    compiled = core().compile_model(model, target.device.upper(), options)
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    fused = {name for _, kernel, origins in _executed(compiled) if kernel.startswith("Subgraph") for name in origins}
    if "FakeQuantize" in kinds.values() and any(kinds.get(name) == "MatMul" for name in fused):
        return core().compile_model(model, target.device.upper(), {**options, "SNIPPETS_MODE": "DISABLE"})
    return compiled


def model_kernels(compiled: Any) -> dict[str, str]:
    """Each executed node of a compiled model with its type and kernel: `Convolution jit_avx2_I8`."""
    return {name: kernel for name, kernel, _ in _executed(compiled)}


def model_layer_kernels(compiled: Any) -> dict[str, str]:
    """The kernel of each layer; of one that runs several times a kernel that is not int8, where there is one."""
    found: dict[str, set[str]] = {}
    for _, kernel, origins in _executed(compiled):
        for origin in origins:
            if origin.startswith(LAYER_PREFIX):
                # NNCF's quantizers put words of their own behind the name.
                name = re.split("[#/]", origin.removeprefix(LAYER_PREFIX))[0]
                found.setdefault(name, set()).add(kernel)
    return {name: min(kernels, key=lambda k: (not stayed_float([k], {k: k}), k)) for name, kernels in found.items()}


def _executed(compiled: Any) -> Iterator[tuple[str, str, list[str]]]:
    """The name, the kernel, and the original nodes of each node that computes."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, primitive = info["layerType"].astype(str), info["primitiveType"].astype(str)
        if kind not in ("Const", "Input", "Output"):
            origins = info["originalLayersNames"].astype(str).split(",")
            yield node.get_friendly_name(), f"{kind} {primitive}{_compressed_weight(node, kind)}", origins


def _compressed_weight(node: Any, kind: str) -> str:
    """` u4 weights` where a matrix product multiplies floats by such a weight."""
    if kind != "FullyConnected" or node.get_input_size() < 2:
        return ""
    sources = [value.get_node() for value in node.input_values()[:2]]
    inputs, weight = (source.get_rt_info()["outputPrecisions"].astype(str).lower() for source in sources)
    return f" {weight} weights" if weight in ("u4", "i4", "u8", "i8") and inputs not in ("u8", "i8") else ""


def write_structure(model: Any, side: str, structure: Structure) -> None:
    """Notes in the model (in place) how its inputs or outputs are arranged."""
    model.set_rt_info(structure.kind, [INFO, side, "kind"])
    model.set_rt_info("\n".join(structure.names), [INFO, side, "names"])


def _read_structure(model: Any, side: str, n_leaves: int) -> Structure:
    if not model.has_rt_info([INFO, side, "kind"]):
        return Structure(kind="single" if n_leaves == 1 else "tuple", names=tuple(str(i) for i in range(n_leaves)))
    kind, names = (model.get_rt_info([INFO, side, key]).astype(str) for key in ("kind", "names"))
    return Structure(kind=cast(Kind, kind), names=tuple(names.split("\n")))
