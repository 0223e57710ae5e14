"""torch.compile with inductor and frozen weights, each model on its own."""

import itertools
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, final

import torch
from torch import nn

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.layers import call_model

_NUMBERS = itertools.count()


def check_compilers(kind: str) -> None:
    """Raises RuntimeUnavailableError where what inductor needs for this kind of device is missing."""
    import torch._inductor.config as inductor_config
    from torch._inductor.cpp_builder import get_cpp_compiler

    if kind == "cpu":
        try:
            get_cpp_compiler()
        except Exception as error:
            tried = ", ".join(str(name) for name in inductor_config.cpp.cxx if name)
            raise RuntimeUnavailableError(
                f"mode 'compile' on a CPU takes a C++ compiler, and there is no {tried}: install g++, or set CXX to one"
            ) from error
        return
    if not torch.utils._triton.has_triton_package():
        raise RuntimeUnavailableError("mode 'compile' on CUDA needs triton, which is not installed: pip install triton")
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        raise RuntimeUnavailableError(
            "mode 'compile' on CUDA takes a C compiler for what triton builds: install gcc, or set CC to one"
        )


@final
class Compiled:
    """A module that `compile` compiles for tensors of one shape; calls on others raise MeasurementError.

    `parts` are the names of the modules whose parameters are in a compiled graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.n_graphs = 0
        self.parts: set[str] = set()
        self._module = module
        self._compiling = False
        alone = _alone(module)
        self._call = torch.compile(alone, backend=_weakly(self._backend), dynamic=False)
        # What dynamo keeps of a function refers to itself where no garbage collection sees it.
        weakref.finalize(self, torch._C._dynamo.eval_frame.reset_code, alone.__code__).atexit = False

    def compile(self, tensors: Any) -> None:
        """Compiles for these tensors, and runs once. Raises MeasurementError where inductor cannot."""
        import torch._inductor.config as inductor_config

        self._compiling = True
        try:
            # Dynamo reads it too, so as an option of torch.compile it would not freeze.
            with inductor_config.patch(freezing=True), _forgetting_modules(), warnings.catch_warnings():
                # Its advice is to give up the precision that the target asks for.
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
                self._call(tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise MeasurementError(
                f"torch.compile fails for {type(self._module).__name__}: {str(error).strip().splitlines()[0]}; "
                "use mode 'eager'"
            ) from error
        finally:
            self._compiling = False

    def __call__(self, tensors: Any) -> Any:
        try:
            return self._call(tensors)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise error.inner_exception from None

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        if not self._compiling:
            raise MeasurementError(
                f"{type(self._module).__name__} would be compiled anew while it is timed: inputs or torch's settings "
                "are not those for which it was prepared"
            )
        self.n_graphs += 1
        held = {id(tensor) for tensor in (*graph.parameters(), *graph.buffers())}
        for name, part in self._module.named_modules():
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            if any(id(tensor) in held for tensor in own):
                self.parts.add(name)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(graph, inputs)
        return compiled


def _weakly(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend of an object that need not live for it: dynamo never forgets a backend."""
    reference = weakref.WeakMethod(backend)

    def call(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        method = reference()
        assert method is not None, "its object is being called"
        compiled: Callable[..., Any] = method(graph, inputs)
        return compiled

    return call


@contextmanager
def _forgetting_modules() -> Iterator[None]:
    """While open, modules that inductor writes are kept by what calls them alone, and the frozen weights they hold."""
    from torch._inductor.codecache import PyCodeCache

    n_known = len(PyCodeCache.modules)
    try:
        yield
    finally:
        for module in PyCodeCache.modules[n_known:]:
            sys.modules.pop(module.__name__, None)
        del PyCodeCache.modules[n_known:]


def _alone(module: nn.Module) -> FunctionType:
    """A function that calls the module, with a code object of its own.

    Dynamo keeps what it compiled by code object, which modules of one class share; after eight it would silently
    leave the rest uncompiled.
    """

    def call(tensors: Any) -> Any:
        return call_model(module, tensors)

    code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
