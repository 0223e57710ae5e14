"""PyTorch as a runtime: eager, compiled, and on CUDA as a graph. Torch is imported only when used."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes.base import (
    FLOAT_BITS,
    INT8_BITS,
    AbstractRuntime,
    AbstractSession,
    Bits,
    available_threads,
    float_bits,
    host_fingerprint,
    host_isa,
)
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

    from ranksearch.layers import LayerSpec
    from ranksearch.runtimes.pytorch.cuda import Accelerators
    from ranksearch.runtimes.pytorch.session import Loaded

_CPU = ("f32", "bf16", "f16", "default")
_CUDA = ("f32", "tf32", "bf16", "f16", "default")
# The precisions of each mode, by kind of device.
COMBINATIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {"eager": _CPU, "compile": _CPU},
    "cuda": {"eager": _CUDA, "compile": _CUDA, "cuda_graph": _CUDA},
}
# The compute capability from which on a GPU multiplies in a precision, where not every one does.
CAPABILITIES: Mapping[str, tuple[int, int]] = {"tf32": (8, 0), "bf16": (8, 0)}


@final
class TorchRuntime(AbstractRuntime):
    """PyTorch in channels-last order and inference mode; serialised by torch.export.

    `accelerators` are the GPUs of this machine, those of CUDA unless given. Timed calls find what the one before left
    in the GPU's cache; DeviceCall.cold empties it.
    """

    name: ClassVar[str] = "torch"
    module: ClassVar[str] = "torch"

    def __init__(self, accelerators: "Accelerators | None" = None) -> None:
        self._given_accelerators = accelerators

    def check(self, target: Target) -> None:
        self.check_installed()
        kind = _kind(target)
        if kind not in COMBINATIONS:
            raise RuntimeUnavailableError(
                f"runtime 'torch' has no device {target.device!r}; it has cpu, and cuda or cuda:N on a machine with one"
            )
        modes = COMBINATIONS[kind]
        if target.mode not in modes:
            why = "; a CUDA graph needs a CUDA device" if target.mode == "cuda_graph" else ""
            raise RuntimeUnavailableError(
                f"runtime 'torch' has no mode {target.mode!r} on {kind}; it has {', '.join(modes)}{why}"
            )
        if target.precision not in modes[target.mode]:
            raise RuntimeUnavailableError(
                f"runtime 'torch' has no precision {target.precision!r} on {kind}; "
                f"it has {', '.join(modes[target.mode])}"
            )
        if kind == "cuda":
            self._check_gpu(target)
        if target.mode == "compile":
            from ranksearch.runtimes.pytorch.compilation import check_compilers

            check_compilers(kind)

    def supported_bits(self, spec: "LayerSpec", target: Target) -> tuple[Bits, ...]:
        from ranksearch.runtimes.pytorch.integers import takes

        integer = (INT8_BITS,) if takes(spec, "cpu" if target.device == "cpu" else "cuda", host_isa()) else ()
        half = ((16, 16),) if float_bits(target) == 16 else ()
        return (FLOAT_BITS, *integer, *half)

    def options(self, target: Target) -> dict[str, str | int]:
        from ranksearch.runtimes.pytorch.session import numerics

        options: dict[str, str | int] = {
            "mode": target.mode,
            "memory_format": "channels_last where the model allows it",
            "precision": target.precision,
            "threads": available_threads(target),
            "cache": "warm",
            "float32_matmul_precision": numerics(target.precision).matmul,
        }
        if _kind(target) == "cuda":
            options["cudnn_allow_tf32"] = str(numerics(target.precision).cudnn_tf32)
        if target.mode == "compile":
            options["freezing"] = "True"
        return options

    def fingerprint(self, target: Target) -> dict[str, str]:
        import torch

        facts = {
            **host_fingerprint(),
            "capabilities": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        return facts if _kind(target) == "cpu" else facts | self._accelerators().facts(_index(target))

    def prepare(self, model: "nn.Module", example: Any, target: Target) -> AbstractSession:
        from ranksearch.runtimes.pytorch.session import load_module, out_of_memory_told

        with out_of_memory_told(target):
            return self._session(load_module(model, example, target), target)

    def serialise(self, model: "nn.Module", example: Any, target: Target, directory: Path) -> Path:
        from ranksearch.runtimes.pytorch.pt2 import write_program

        path = Path(directory) / "model.pt2"
        write_program(model, example, target, path)
        return path

    def open(self, path: Path, target: Target) -> AbstractSession:
        from ranksearch.runtimes.pytorch.pt2 import read_program
        from ranksearch.runtimes.pytorch.session import out_of_memory_told

        if not Path(path).is_file():
            raise RuntimeUnavailableError(f"there is no exported model {path}")
        with out_of_memory_told(target):
            place = None if _kind(target) == "cpu" else self._accelerators().open(_index(target)).place
            return self._session(read_program(Path(path), target, place), target)

    def open_portable(self, path: Path, inputs: Any, target: Target) -> AbstractSession:
        from ranksearch.runtimes.pytorch.pt2 import read_program
        from ranksearch.runtimes.pytorch.session import in_precision, out_of_memory_told

        with out_of_memory_told(target):
            place = None if _kind(target) == "cpu" else self._accelerators().open(_index(target)).place
            loaded = read_program(Path(path), target, place)
            return self._session(replace(loaded, example=in_precision(inputs, target)), target)

    def _session(self, loaded: "Loaded", target: Target) -> AbstractSession:
        from ranksearch.runtimes.pytorch.session import open_session

        device = None if _kind(target) == "cpu" else self._accelerators().open(_index(target))
        return open_session(loaded, target, device)

    def _accelerators(self) -> "Accelerators":
        from ranksearch.runtimes.pytorch.cuda import Cuda

        return self._given_accelerators or Cuda()

    def _check_gpu(self, target: Target) -> None:
        gpus = self._accelerators()
        if (why := gpus.absence()) is not None:
            raise RuntimeUnavailableError(f"torch has no device {target.device!r} here: {why}; it has cpu")
        if _index(target) >= gpus.count():
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(gpus.count()))])
            raise RuntimeUnavailableError(f"torch has no device {target.device!r} here; it has {there}")
        found, needed = gpus.capability(_index(target)), CAPABILITIES.get(target.precision, (0, 0))
        if found < needed:
            raise RuntimeUnavailableError(
                f"device {target.device!r} does not multiply in {target.precision}: its compute capability is "
                f"{found[0]}.{found[1]}, and {needed[0]}.{needed[1]} would do; use precision f32 or f16"
            )


def _kind(target: Target) -> str:
    """`cuda` for `cuda` and `cuda:1`; any other device as it is written."""
    return "cuda" if re.fullmatch(r"cuda(:\d+)?", target.device) else target.device


def _index(target: Target) -> int:
    """Which GPU: the first where the target does not say."""
    return int(target.device.partition(":")[2] or 0)
