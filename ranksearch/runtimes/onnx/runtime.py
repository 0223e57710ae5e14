"""ONNX Runtime. Without torch; what converts is conversion."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes.base import (
    FLOAT_BITS,
    FULL_WEIGHT_LIMIT,
    INT8_BITS,
    AbstractRuntime,
    AbstractSession,
    Bits,
    available_threads,
    host_fingerprint,
    require,
)
from ranksearch.runtimes.onnx.session import OnnxSession, load_onnxruntime, provider_of
from ranksearch.runtimes.structure import named_shapes
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

    from ranksearch.layers import LayerSpec

# ONNX Runtime computes in the types that the model has, so that its own choice is float32 as well.
PRECISIONS = ("f32", "default")
# Weights up to here never saturate: 255 * (64 + 64) fits the 16 bits in which some kernels add two products.
SATURATING_WEIGHT_LIMIT = 64


@final
class OnnxRuntime(AbstractRuntime):
    """ONNX Runtime on a CPU or, not yet measured, on an NVIDIA GPU by CUDA or TensorRT.

    int8 by quantized layers on a CPU, or by onnxruntime.quantization.
    """

    name: ClassVar[str] = "onnxruntime"
    module: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnxruntime"

    def check_installed(self) -> None:
        for module in (self.module, "onnx"):
            require(module, f"runtime {self.name!r}", self.extra)

    def check(self, target: Target) -> None:
        self.check_installed()
        provider, _, _ = provider_of(target)
        if target.precision not in PRECISIONS:
            raise RuntimeUnavailableError(
                f"runtime 'onnxruntime' has no precision {target.precision!r}; it has {', '.join(PRECISIONS)}"
            )
        offered = load_onnxruntime().get_available_providers()
        if provider not in offered:
            raise RuntimeUnavailableError(
                f"device {target.device!r} with mode {target.mode!r} needs {provider}; the installed onnxruntime "
                f"offers {', '.join(offered)}: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )

    def supported_bits(self, spec: "LayerSpec", target: Target) -> tuple[Bits, ...]:
        if target.device != "cpu":
            # CUDA multiplies floats; what TensorRT multiplies cannot be read from here.
            return (FLOAT_BITS,)
        from ranksearch.runtimes.onnx.probe import runs_int8

        int8 = [INT8_BITS] if runs_int8(spec) else []
        # MatMulNBits takes any size; it has no float kernel to fall back to.
        compressed = [(8, 32), (4, 32)] if len(spec.weight_shape) == 2 else []
        return (FLOAT_BITS, *int8, *compressed)

    def weight_limit(self, target: Target) -> int:
        if target.device != "cpu":
            return FULL_WEIGHT_LIMIT
        from ranksearch.runtimes.onnx.probe import saturates

        return SATURATING_WEIGHT_LIMIT if saturates() else FULL_WEIGHT_LIMIT

    def options(self, target: Target) -> dict[str, str | int]:
        return {
            "execution_provider": provider_of(target)[0],
            "intra_op_num_threads": available_threads(target),
            "inter_op_num_threads": 1,
            "execution_mode": "ORT_SEQUENTIAL",
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "enable_mem_pattern": 1,
            "enable_cpu_mem_arena": 1,
            "session.intra_op.allow_spinning": "1",
            # Else the threads of a model that has just run take time from the next one.
            "session.force_spinning_stop": "1",
            "precision": "f32",
        }

    def fingerprint(self, target: Target) -> dict[str, str]:
        ort = load_onnxruntime()
        return {
            **host_fingerprint(),
            "providers": " ".join(ort.get_available_providers()),
            "onnxruntime": ort.__version__,
            "build": ort.get_build_info(),
        }

    def prepare(self, model: "nn.Module", example: Any, target: Target) -> AbstractSession:
        return self._session(self._converted(model, example, target), target)

    def serialise(self, model: "nn.Module", example: Any, target: Target, directory: Path) -> Path:
        path = Path(directory) / "model.onnx"
        path.write_bytes(self._converted(model, example, target))
        return path

    def open(self, path: Path, target: Target) -> AbstractSession:
        if not Path(path).is_file():
            raise RuntimeUnavailableError(f"there is no ONNX model {path}")
        return self._session(Path(path).read_bytes(), target)

    def open_portable(self, path: Path, inputs: Any, target: Target) -> AbstractSession:
        from ranksearch.runtimes.onnx.graph import with_shapes

        return self._session(with_shapes(Path(path).read_bytes(), named_shapes(inputs)), target)

    def quantize_own(
        self, model: "nn.Module", calibration_inputs: Iterable[Any], example: Any, target: Target
    ) -> AbstractSession:
        from ranksearch.runtimes.onnx.own_int8 import to_onnx_int8

        is_saturating = self.weight_limit(target) < FULL_WEIGHT_LIMIT
        return self._session(to_onnx_int8(model, calibration_inputs, example, is_saturating=is_saturating), target)

    def _converted(self, model: "nn.Module", example: Any, target: Target) -> bytes:
        from ranksearch.runtimes.onnx.conversion import to_onnx

        return cast(bytes, to_onnx(model, example, on_integers=target.device == "cpu").SerializeToString())

    def _session(self, model: bytes, target: Target) -> OnnxSession:
        return OnnxSession(model, target, self.options(target))
