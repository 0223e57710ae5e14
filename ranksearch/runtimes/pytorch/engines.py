"""The modes in which a torch module runs: as it is, compiled by inductor, or replayed as a CUDA graph."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, final

import torch
from torch import nn

from ranksearch.errors import MeasurementError
from ranksearch.layers import call_model
from ranksearch.runtimes.pytorch.compilation import Compiled
from ranksearch.runtimes.pytorch.cuda import Accelerator
from ranksearch.runtimes.structure import leaves_of

Settings = AbstractContextManager[Any]
# What PyTorch's manual of CUDA graphs does before it captures one.
N_WARM_UP_CALLS = 3


class Engine(Protocol):
    """Runs a module on tensors that are on its device, arranged as its example is."""

    @property
    def n_graphs(self) -> int:
        """How many graphs were compiled."""

    def warm_up(self, tensors: Any) -> None:
        """Makes ready all that the first run on such tensors would else have to."""

    def run(self, tensors: Any) -> Any:
        """The module's outputs, valid until the next run."""

    def bound(self, tensors: Any) -> Callable[[], Any]:
        """A call on these tensors, to be made within the settings and with the device current."""

    def word(self, part: str) -> str:
        """What runs a part of the module: `eager`."""


@final
class Eager:
    """The module, called as it is."""

    n_graphs = 0

    def __init__(self, module: nn.Module, settings: Settings, device: Accelerator | None) -> None:
        self._module = module
        self._settings = settings
        self._device = device

    def warm_up(self, tensors: Any) -> None:
        self.run(tensors)

    def run(self, tensors: Any) -> Any:
        with _current(self._device), self._settings:
            return call_model(self._module, tensors)

    def bound(self, tensors: Any) -> Callable[[], Any]:
        module = self._module
        return lambda: call_model(module, tensors)

    def word(self, part: str) -> str:
        return "eager"


@final
class Inductor:
    """The module, compiled for its example; parts that dynamo leaves alone run eagerly."""

    def __init__(self, module: nn.Module, settings: Settings, device: Accelerator | None) -> None:
        self._settings = settings
        self._device = device
        self._compiled = Compiled(module)

    @property
    def n_graphs(self) -> int:
        return self._compiled.n_graphs

    def warm_up(self, tensors: Any) -> None:
        with _current(self._device), self._settings:
            self._compiled.compile(tensors)

    def run(self, tensors: Any) -> Any:
        with _current(self._device), self._settings:
            return self._compiled(tensors)

    def bound(self, tensors: Any) -> Callable[[], Any]:
        compiled = self._compiled
        return lambda: compiled(tensors)

    def word(self, part: str) -> str:
        return "inductor" if part in self._compiled.parts else "eager"


@final
class CudaGraph:
    """The module's kernels, captured once and replayed without the host's work for each."""

    n_graphs = 0

    def __init__(self, module: nn.Module, settings: Settings, device: Accelerator | None) -> None:
        assert device is not None, "the runtime checks that the device is one of CUDA"
        self._module = module
        self._settings = settings
        self._device = device

    def warm_up(self, tensors: Any) -> None:
        self._inputs = tensors
        self._replay, self._outputs = self._capture(tensors)

    def run(self, tensors: Any) -> Any:
        with self._device.current(), self._settings:
            for held, given in zip(leaves_of(self._inputs), leaves_of(tensors), strict=True):
                held.copy_(given)
            self._replay()
        return self._outputs

    def bound(self, tensors: Any) -> Callable[[], Any]:
        # A graph of its own: the session's runs write over the inputs of theirs.
        return self._capture(tensors)[0]

    def word(self, part: str) -> str:
        return "cuda_graph"

    def _capture(self, tensors: Any) -> tuple[Callable[[], None], Any]:
        with self._device.current(), self._settings:
            with self._device.aside():
                for _ in range(N_WARM_UP_CALLS):
                    call_model(self._module, tensors)
            try:
                return self._device.capture(lambda: call_model(self._module, tensors))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise MeasurementError(
                    f"{type(self._module).__name__} cannot be captured as a CUDA graph: {str(error).splitlines()[0]}; "
                    "use mode 'eager' or 'compile'"
                ) from error


ENGINES: Mapping[str, Callable[[nn.Module, Settings, Accelerator | None], Engine]] = {
    "eager": Eager,
    "compile": Inductor,
    "cuda_graph": CudaGraph,
}


def _current(device: Accelerator | None) -> AbstractContextManager[Any]:
    return nullcontext() if device is None else device.current()
