"""ONNX Runtime's sessions: opens a model, runs it, names its kernels. Without torch."""

import json
import re
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, cast, final

import numpy as np
from numpy.typing import NDArray

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.runtimes.base import AbstractSession
from ranksearch.runtimes.structure import Kind, Structure, check_shape, named_leaves
from ranksearch.spec import Target

# By (device, mode). What a provider cannot run, ONNX Runtime gives to the CPU's.
CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS = {
    ("cpu", "eager"): CPU_PROVIDER,
    ("cuda", "eager"): "CUDAExecutionProvider",
    ("cuda", "tensorrt"): "TensorrtExecutionProvider",
}
INFO = "ranksearch"
# What multiplies by a layer's weight is named after the layer; the number behind `#` counts the layer's calls.
LAYER_PREFIX = "layer:"
# ONNX Runtime puts words of its own before and behind the name.
_LAYER = re.compile(rf"{LAYER_PREFIX}([^#]*)#")
QUIET = 4


def layer_of(node: str) -> str | None:
    """The layer that a node of this name computes, or None."""
    found = _LAYER.search(node)
    return None if found is None else found[1]


@cache
def load_onnxruntime() -> Any:
    """The onnxruntime module, imported when first needed, quiet and without telemetry."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(QUIET)
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def session_settings(options: dict[str, str | int]) -> Any:
    """The onnxruntime.SessionOptions that OnnxRuntime.options describes."""
    ort = load_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = QUIET
    settings.intra_op_num_threads = options["intra_op_num_threads"]
    settings.inter_op_num_threads = options["inter_op_num_threads"]
    settings.execution_mode = getattr(ort.ExecutionMode, str(options["execution_mode"]))
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, str(options["graph_optimization_level"]))
    settings.enable_mem_pattern = bool(options["enable_mem_pattern"])
    settings.enable_cpu_mem_arena = bool(options["enable_cpu_mem_arena"])
    for name, value in options.items():
        if name.startswith("session."):
            settings.add_session_config_entry(name, str(value))
    return settings


def open_session(model: bytes, provider: str, device_id: int, settings: Any) -> Any:
    """An onnxruntime.InferenceSession on this provider.

    Raises RuntimeUnavailableError where the provider did not start, instead of running on the CPU.
    """
    own: dict[str, Any] = {} if provider == CPU_PROVIDER else {"device_id": device_id}
    rest = [] if not own else [CPU_PROVIDER]
    try:
        session = load_onnxruntime().InferenceSession(model, settings, providers=[(provider, own), *rest])
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise MeasurementError(f"ONNX Runtime cannot open the model: {str(error).strip().splitlines()[0]}") from error
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"ONNX Runtime offers {provider} but could not start it, and would run on "
            f"{', '.join(session.get_providers())}; check that its driver and libraries are installed"
        )
    session.disable_fallback()
    return session


@final
class OnnxSession(AbstractSession):
    """An InferenceSession; the structure of inputs and outputs comes from the model's own metadata."""

    def __init__(self, model: bytes, target: Target, options: dict[str, str | int]) -> None:
        self._model = model
        self._options = options
        self._provider, self._device, self._device_id = provider_of(target)
        self._session = open_session(model, self._provider, self._device_id, session_settings(options))
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._layers_of_outputs: dict[str, str] = json.loads(metadata.get(f"{INFO}.layers_of_outputs", "{}"))
        self._ports = self._session.get_inputs()
        self._inputs = _read_structure(metadata, "inputs", len(self._ports))
        self._outputs = _read_structure(metadata, "outputs", len(self._session.get_outputs()))

    def run(self, inputs: Any) -> Any:
        arrays = self._arrays(inputs)
        named = {port.name: array for port, array in zip(self._ports, arrays, strict=True)}
        return self._outputs.arrange(self._session.run(None, named))

    def bind(self, inputs: Any) -> Callable[[], None]:
        """A call on inputs that already lie on the device; it returns when the outputs are there."""
        values = load_onnxruntime().OrtValue
        binding = self._session.io_binding()
        for port, array in zip(self._ports, self._arrays(inputs), strict=True):
            value = values.ortvalue_from_numpy(np.array(array, order="C"), self._device, self._device_id)
            binding.bind_ortvalue_input(port.name, value)
        for port in self._session.get_outputs():
            binding.bind_output(port.name, self._device, self._device_id)
        session = self._session

        def call() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call

    def kernels(self) -> dict[str, str]:
        return self._kernels

    @cached_property
    def _kernels(self) -> dict[str, str]:
        """The kernel of each node, as a run of the same model tells that is profiled, once."""
        from ranksearch.runtimes.onnx.kernel_profile import executed_kernels

        return executed_kernels(self._model, self._provider, self._device_id, session_settings(self._options))

    def layer_kernels(self) -> dict[str, str]:
        from ranksearch.runtimes.onnx.kernel_profile import kernels_of_layers

        return kernels_of_layers(self.kernels(), self._layers_of_outputs)

    def constant_bytes(self) -> int:
        import onnx
        from onnx import numpy_helper

        graph = onnx.load_from_string(self._model).graph
        return sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)

    def _arrays(self, inputs: Any) -> list[NDArray[Any]]:
        """The input arrays in the model's order. Raises MeasurementError where they do not fit it."""
        arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(inputs, self._inputs.names).items()}
        for (name, array), port in zip(arrays.items(), self._ports, strict=True):
            check_shape(name, array.shape, port.shape)
        return list(arrays.values())


def provider_of(target: Target) -> tuple[str, str, int]:
    """The target's execution provider, its device, and which one of several.

    Raises RuntimeUnavailableError where there is none.
    """
    device, _, number = target.device.partition(":")
    provider = PROVIDERS.get((device, target.mode))
    if provider is None or (number and not number.isdecimal()):
        known = ", ".join(f"{device!r} with mode {mode!r}" for device, mode in PROVIDERS)
        raise RuntimeUnavailableError(
            f"runtime 'onnxruntime' has no device {target.device!r} with mode {target.mode!r}; it has {known}"
        )
    return provider, device, int(number or 0)


def write_structure(model: Any, side: str, structure: Structure) -> None:
    """Notes in the model (in place) how its inputs or outputs are arranged."""
    note = json.dumps({"kind": structure.kind, "names": structure.names})
    model.metadata_props.add(key=f"{INFO}.{side}", value=note)


def write_layers_of_outputs(model: Any, layers: dict[str, str]) -> None:
    """Notes in the model (in place) which layers make which of its outputs."""
    model.metadata_props.add(key=f"{INFO}.layers_of_outputs", value=json.dumps(layers))


def _read_structure(metadata: dict[str, str], side: str, n_leaves: int) -> Structure:
    noted = metadata.get(f"{INFO}.{side}")
    if noted is None:
        return Structure(kind="single" if n_leaves == 1 else "tuple", names=tuple(str(i) for i in range(n_leaves)))
    structure = json.loads(noted)
    return Structure(kind=cast(Kind, structure["kind"]), names=tuple(structure["names"]))
