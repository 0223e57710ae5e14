"""The runtimes: each serialises a model for a target, opens it, says which bits run there and which kernels ran.

Nothing here imports torch until a model is prepared or serialised: the side that opens and times does without.
"""

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes.base import (
    AbstractRuntime,
    AbstractSession,
    DeviceTimed,
    differing_keys,
    int8_kernels,
    stayed_float,
    stayed_whole,
)
from ranksearch.runtimes.onnx.runtime import OnnxRuntime
from ranksearch.runtimes.openvino.runtime import OpenVINORuntime
from ranksearch.runtimes.pytorch.runtime import TorchRuntime

RUNTIMES: dict[str, AbstractRuntime] = {
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVINORuntime(),
    "torch": TorchRuntime(),
}


def register_runtime(runtime: AbstractRuntime) -> AbstractRuntime:
    """Adds a runtime to the table, under its name, and gives it back."""
    RUNTIMES[runtime.name] = runtime
    return runtime


def get_runtime(name: str) -> AbstractRuntime:
    """The runtime of that name.

    Raises RuntimeUnavailableError where there is none, or what it needs is not installed.
    """
    runtime = RUNTIMES.get(name)
    if runtime is None:
        raise RuntimeUnavailableError(f"there is no runtime {name!r}; there are {', '.join(sorted(RUNTIMES))}")
    runtime.check_installed()
    return runtime


__all__ = [
    "RUNTIMES",
    "AbstractRuntime",
    "AbstractSession",
    "DeviceTimed",
    "OnnxRuntime",
    "OpenVINORuntime",
    "TorchRuntime",
    "differing_keys",
    "get_runtime",
    "int8_kernels",
    "register_runtime",
    "stayed_float",
    "stayed_whole",
]
