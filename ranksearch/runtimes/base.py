"""What every runtime can do. No torch here: the side that opens and times a serialised model does without."""

import abc
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.machine import isa_flags
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

    from ranksearch.layers import LayerSpec

Bits = tuple[int, int]
FLOAT_BITS: Bits = (32, 32)
INT8_BITS: Bits = (8, 8)
# Precisions of which weights and activations take 16 bits, with the type.
HALF_PRECISIONS: Mapping[str, str] = {"f16": "float16", "bf16": "bfloat16"}

# The largest int8 weight code where a kernel's sums cannot saturate.
FULL_WEIGHT_LIMIT = 127


@runtime_checkable
class DeviceTimed(Protocol):
    """A bound call that runs on a device which works on while the host goes ahead, so that the device must time it."""

    def __call__(self) -> None: ...

    def device_seconds(self, n_calls: int) -> list[float]:
        """The seconds of each of so many calls in a row, as the device's own clock tells."""


class AbstractSession(abc.ABC):
    """A model, opened on its target for inputs of one shape."""

    @abc.abstractmethod
    def run(self, inputs: Any) -> Any:
        """The outputs as numpy arrays: one, or a tuple or dict of them as the model gives.

        `inputs` is an array, a tuple of arrays, or a mapping of names to arrays, shaped as the example was.
        """

    @abc.abstractmethod
    def bind(self, inputs: Any) -> Callable[[], None]:
        """A call that runs the model once on these inputs, and nothing besides, for timing.

        Where the device works on after the call has returned, the call is DeviceTimed.
        """

    @abc.abstractmethod
    def kernels(self) -> dict[str, str]:
        """Which kernel runs each node: `Convolution jit_avx2_I8`."""

    @abc.abstractmethod
    def layer_kernels(self) -> dict[str, str]:
        """Which kernel runs each layer, by the layer's dotted name in the model that was prepared or serialised.

        A kernel that multiplies integers ends in `i8` or `u8`, whatever the case; one that multiplies floats by
        weights of few bits in ` weights`, as `u4 weights`. A layer that the runtime took away is missing.
        """

    @abc.abstractmethod
    def constant_bytes(self) -> int:
        """The size of the constants that the model holds, weights above all, as the runtime stores them."""


class AbstractRuntime(abc.ABC):
    """A way to run models. `extra` is the part of `ranksearch[...]` that installs `module`; None needs none."""

    name: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str | None] = None

    def check_installed(self) -> None:
        """Raises RuntimeUnavailableError, with the command that mends it, where the runtime is not installed."""
        require(self.module, f"runtime {self.name!r}", self.extra)

    @abc.abstractmethod
    def check(self, target: Target) -> None:
        """Raises RuntimeUnavailableError where this target cannot be run here, and says what can."""

    @abc.abstractmethod
    def supported_bits(self, spec: "LayerSpec", target: Target) -> tuple[Bits, ...]:
        """The (weight, activation) bits for which a kernel runs a layer of this spec; (32, 32) always."""

    @abc.abstractmethod
    def options(self, target: Target) -> dict[str, str | int]:
        """The runtime's own settings for this target, as they are recorded."""

    @abc.abstractmethod
    def fingerprint(self, target: Target) -> dict[str, str]:
        """What a latency depends on: the device, its instructions, cores, and versions."""

    @abc.abstractmethod
    def prepare(self, model: "nn.Module", example: Any, target: Target) -> AbstractSession:
        """The model in eval mode on the target, for inputs shaped as `example`; the model stays as it is."""

    @abc.abstractmethod
    def serialise(self, model: "nn.Module", example: Any, target: Target, directory: Path) -> Path:
        """Writes what `open` reads into `directory`, and gives its path."""

    @abc.abstractmethod
    def open(self, path: Path, target: Target) -> AbstractSession:
        """What `serialise` wrote, on the target."""

    def open_portable(self, path: Path, inputs: Any, target: Target) -> AbstractSession:
        """A `portable.*` file of this runtime's kind, on the target for inputs shaped as these arrays.

        Raises RuntimeUnavailableError where the runtime reads none, MeasurementError where the file was written for
        inputs of other shapes alone.
        """
        raise RuntimeUnavailableError(
            f"runtime {self.name!r} reads no portable file, so it cannot open {path.name}; "
            "name the runtime that the export was measured on"
        )

    def weight_limit(self, target: Target) -> int:
        """The largest int8 weight code whose sums the target's kernels hold without saturating: 64 or 127."""
        return FULL_WEIGHT_LIMIT

    def quantize_own(
        self, model: "nn.Module", calibration_inputs: Iterable[Any], example: Any, target: Target
    ) -> AbstractSession:
        """The model as the runtime's own int8 quantizer makes it.

        Raises RuntimeUnavailableError where the runtime has none, or it is not installed.
        """
        raise RuntimeUnavailableError(
            f"runtime {self.name!r} has no int8 quantizer of its own; "
            "runtime 'openvino' with pip install 'ranksearch[nncf]' has one"
        )


def stayed_float(wanted: Iterable[str], layer_kernels: Mapping[str, str]) -> dict[str, str]:
    """Of the layers that are `wanted` in int8 those that run otherwise, with the kernel that runs each."""
    kernels = {name: layer_kernels.get(name, "none") for name in wanted}
    return {name: kernel for name, kernel in kernels.items() if not re.search(r"[iu]8$", kernel, re.IGNORECASE)}


def int8_kernels(kernels: Mapping[str, str]) -> dict[str, str]:
    """The convolutions, products and fully connected nodes that run in int8, out of a session's kernels."""
    wanted = re.compile(r"\w*(Conv|FullyConnected|MatMul|Gemm)\w*\b.*[iu]8$", re.IGNORECASE)
    return {node: kernel for node, kernel in kernels.items() if wanted.match(kernel)}


def stayed_whole(wanted: Iterable[str], layer_kernels: Mapping[str, str]) -> dict[str, str]:
    """Of the layers that are `wanted` with weights of few bits those that do without, with the kernel of each."""
    kernels = {name: layer_kernels.get(name, "none") for name in wanted}
    return {name: kernel for name, kernel in kernels.items() if not kernel.endswith(" weights")}


def float_bits(target: Target) -> int:
    """The bits of activations that are not rounded on the target."""
    return 16 if target.precision in HALF_PRECISIONS else 32


def require(module: str, wanted_by: str, extra: str | None) -> None:
    """Raises RuntimeUnavailableError where `module` is not installed."""
    if find_spec(module) is None:
        package = module if extra is None else f"'ranksearch[{extra}]'"
        raise RuntimeUnavailableError(f"{wanted_by} needs {module}, which is not installed: pip install {package}")


def available_threads(target: Target) -> int:
    """The target's threads, or one for each of its cores, or for each that this process may use."""
    if target.threads is not None:
        return target.threads
    if target.cores is not None:
        return len(target.core_numbers())
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def differing_keys(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what two fingerprints differ; what the earlier one did not record yet does not count."""
    return [key for key in now if then.get(key, now[key]) != now[key]]


def host_fingerprint() -> dict[str, str]:
    """The machine, whatever the runtime: system, processor, the instruction sets that choose kernels, cores."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "isa": host_isa(),
        "cores": str(os.cpu_count() or 1),
    }


def host_isa() -> str:
    """The processor's instruction sets that choose kernels."""
    return isa_flags(_cpuinfo())


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""
