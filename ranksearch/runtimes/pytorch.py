"""PyTorch eager on the CPU, float32: channels last, inference mode. Torch is imported only when used."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes.base import (
    FLOAT_BITS,
    AbstractRuntime,
    AbstractSession,
    Bits,
    available_threads,
    host_fingerprint,
)
from ranksearch.runtimes.structure import leaves_of, structure_of
from ranksearch.spec import Target

if TYPE_CHECKING:
    from torch import nn

    from ranksearch.layers import LayerSpec

PRECISIONS = ("f32", "default")


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """Torch computes with so many threads while open; the process's own number comes back."""
    import torch

    before = torch.get_num_threads()
    if before != n_threads:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        if before != n_threads:
            torch.set_num_threads(before)


@final
class TorchSession(AbstractSession):
    """A module called as it is, with the target's threads."""

    def __init__(self, module: "nn.Module", n_threads: int) -> None:
        self._module = module
        self._n_threads = n_threads

    def run(self, inputs: Any) -> Any:
        outputs = self._call(self._tensors(inputs))
        leaves = [leaf.numpy().copy() for leaf in leaves_of(outputs)]
        return structure_of(outputs).arrange(leaves)

    def bind(self, inputs: Any) -> Callable[[], None]:
        tensors = self._tensors(inputs)

        def call() -> None:
            self._call(tensors)

        return call

    def kernels(self) -> dict[str, str]:
        return {
            name: f"{type(module).__name__} eager_f32"
            for name, module in self._module.named_modules()
            if module._parameters
        }

    def constant_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._module.state_dict().values())

    def _call(self, tensors: Any) -> Any:
        import torch

        from ranksearch.layers import call_model

        with _threads(self._n_threads), torch.inference_mode():
            return call_model(self._module, tensors)

    def _tensors(self, inputs: Any) -> Any:
        import torch

        return structure_of(inputs).arrange([_channels_last(torch.tensor(leaf)) for leaf in leaves_of(inputs)])


@final
class TorchRuntime(AbstractRuntime):
    """PyTorch eager on the CPU in float32; serialised by torch.export."""

    name: ClassVar[str] = "torch"
    module: ClassVar[str] = "torch"

    def check(self, target: Target) -> None:
        self.check_installed()
        for what, value, allowed in (
            ("mode", target.mode, ("eager",)),
            ("device", target.device, ("cpu",)),
            ("precision", target.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise RuntimeUnavailableError(f"runtime 'torch' has no {what} {value!r}; it has {', '.join(allowed)}")

    def supported_bits(self, spec: "LayerSpec", target: Target) -> tuple[Bits, ...]:
        return (FLOAT_BITS,)

    def options(self, target: Target) -> dict[str, str | int]:
        return {"mode": "eager", "memory_format": "channels_last", "threads": available_threads(target)}

    def fingerprint(self, target: Target) -> dict[str, str]:
        import torch

        return {
            **host_fingerprint(),
            "capabilities": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }

    def prepare(self, model: "nn.Module", example: Any, target: Target) -> AbstractSession:
        module = _to_channels_last(copy.deepcopy(model).eval())
        return TorchSession(module, available_threads(target))

    def serialise(self, model: "nn.Module", example: Any, target: Target, directory: Path) -> Path:
        import torch

        path = Path(directory) / "model.pt2"
        module = copy.deepcopy(model).eval()
        inputs = structure_of(example)
        tensors = [torch.as_tensor(leaf) for leaf in leaves_of(example)]
        named = inputs.arrange(tensors) if inputs.kind == "mapping" else None
        with torch.no_grad():
            program = torch.export.export(module, () if named else tuple(tensors), named, strict=False)
        torch.export.save(program, path)
        return path

    def open(self, path: Path, target: Target) -> AbstractSession:
        import torch

        if not Path(path).is_file():
            raise RuntimeUnavailableError(f"there is no exported model {path}")
        module = _to_channels_last(torch.export.load(path).module())
        return TorchSession(module, available_threads(target))


def _to_channels_last(module: "nn.Module") -> "nn.Module":
    """The module with its convolution weights in channels-last order (in place)."""
    for parameter in module.parameters():
        parameter.data = _channels_last(parameter.data)
    return module


def _channels_last(tensor: Any) -> Any:
    import torch

    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
