"""A torch module, opened: on its device, in its precision, run by the engine of its mode."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranksearch.errors import MeasurementError
from ranksearch.layers import in_eval_mode
from ranksearch.memory_format import channels_last, takes_channels_last
from ranksearch.runtimes.base import AbstractSession, available_threads, host_isa
from ranksearch.runtimes.naming import named_layers
from ranksearch.runtimes.outputs import flat_outputs
from ranksearch.runtimes.pytorch.cuda import Accelerator, DeviceCall
from ranksearch.runtimes.pytorch.engines import ENGINES, Eager, Engine
from ranksearch.runtimes.pytorch.integers import IntegerProduct, integer_layers
from ranksearch.runtimes.rounding import fix_weights
from ranksearch.runtimes.structure import Structure, check_shape, leaves_of, named_leaves, structure_of
from ranksearch.spec import Target
from ranksearch.surgery import copy_model, replace_modules

DTYPES: Mapping[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}

with warnings.catch_warnings():
    # Torch 2.9 and its successors warn once, at the first look, that newer names exist; older ones lack those, and
    # whoever sets both kinds is refused.
    warnings.simplefilter("ignore", UserWarning)
    torch.get_float32_matmul_precision()


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """How torch multiplies float32: its word for products, and whether cuDNN's convolutions may use TF32."""

    matmul: str
    cudnn_tf32: bool


TORCH_DEFAULT = Numerics(matmul="highest", cudnn_tf32=True)
NUMERICS: Mapping[str, Numerics] = {
    "f32": Numerics(matmul="highest", cudnn_tf32=False),
    "tf32": Numerics(matmul="high", cudnn_tf32=True),
}


def numerics(precision: str) -> Numerics:
    """How float32 is multiplied at a precision; where it is not the precision of the model, torch's own defaults."""
    return NUMERICS.get(precision, TORCH_DEFAULT)


@final
class Settings:
    """A context in which torch computes with the target's threads and precision, in inference mode.

    The process's own settings come back. Where they are right already, entering takes two microseconds more than
    inference mode alone. Not nested.
    """

    def __init__(self, n_threads: int, wanted: Numerics, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._wanted = (n_threads, wanted.matmul, wanted.cudnn_tf32 if on_gpu else None)

    def __enter__(self) -> Self:
        cudnn_tf32 = torch.backends.cudnn.allow_tf32 if self._on_gpu else None
        self._before = (torch.get_num_threads(), torch.get_float32_matmul_precision(), cudnn_tf32)
        if self._before != self._wanted:
            _apply(*self._wanted)
        self._inference = torch.inference_mode()
        self._inference.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inference.__exit__(kind, error, traceback)
        if self._before != self._wanted:
            _apply(*self._before)


def _apply(n_threads: int, matmul: str, cudnn_tf32: bool | None) -> None:
    torch.set_num_threads(n_threads)
    torch.set_float32_matmul_precision(matmul)
    if cudnn_tf32 is not None:
        torch.backends.cudnn.allow_tf32 = cudnn_tf32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loaded:
    """A module of the target's precision, with its example and the kind of each of its parts by dotted name.

    Parts are what holds parameters; `layers` are those that multiply by weights.
    """

    module: nn.Module
    example: Any
    parts: Mapping[str, str]
    layers: frozenset[str]


def load_module(model: nn.Module, example: Any, target: Target) -> Loaded:
    """A copy of the model in eval mode, in the target's precision, its 8-bit layers as kernels compute them."""
    module = as_computed(model, target)
    layers = {name: module.get_submodule(name) for name in named_layers(model)}
    holders = {name: part for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))}
    return Loaded(
        module=module,
        example=in_precision(example, target),
        parts={name: type(part).__name__ for name, part in {**holders, **layers}.items()},
        layers=frozenset(layers),
    )


def as_computed(model: nn.Module, target: Target) -> nn.Module:
    """A copy of the model, its weights fixed; int8 products keep their steps in float32 whatever the precision."""
    module = fix_weights(in_eval_mode(copy_model(model)))
    integer = integer_layers(module, "cpu" if target.device == "cpu" else "cuda", host_isa())
    return replace_modules(module.to("cpu", DTYPES.get(target.precision)), integer)


def in_precision(example: Any, target: Target) -> Any:
    """The example's tensors, floating ones in the target's precision."""
    tensors = [torch.as_tensor(leaf).detach() for leaf in leaves_of(example)]
    half = DTYPES.get(target.precision)
    return structure_of(example).arrange([t.to(half) if half and t.is_floating_point() else t for t in tensors])


def open_session(loaded: Loaded, target: Target, device: Accelerator | None) -> "TorchSession":
    """The module on its device, ready to run: compiled or captured for the example."""
    place = torch.device("cpu") if device is None else device.place
    module = loaded.module.to(place)
    settings = Settings(available_threads(target), numerics(target.precision), on_gpu=device is not None)
    plain, eager = _Inputs(loaded.example, device, is_channels_last=False), Eager(module, settings, device)

    def run(is_channels_last: bool) -> Any:
        tensors = plain.tensors(loaded.example)
        return flat_outputs(eager.run(channels_last(tensors) if is_channels_last else tensors))[1]

    inputs = _Inputs(loaded.example, device, is_channels_last=takes_channels_last(module, run))
    engine = ENGINES[target.mode](module, settings, device)
    engine.warm_up(inputs.tensors(loaded.example))
    precision = "f32" if target.precision == "default" and device is None else target.precision
    return TorchSession(loaded, engine, inputs, settings, precision, device)


@final
class TorchSession(AbstractSession):
    """A module with the engine of its mode; see open_session."""

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        inputs: "_Inputs",
        settings: Settings,
        precision: str,
        device: Accelerator | None,
    ) -> None:
        self._loaded = loaded
        self._engine = engine
        self._inputs = inputs
        self._settings = settings
        self._precision = precision
        self._device = device

    def run(self, inputs: Any) -> Any:
        outputs = self._engine.run(self._inputs.tensors(inputs))
        structure, leaves = flat_outputs(outputs)
        return structure.arrange([_array(leaf) for leaf in leaves])

    def bind(self, inputs: Any) -> Callable[[], None]:
        bound = self._engine.bound(self._inputs.tensors(inputs))
        settings = self._settings
        if self._device is not None:
            return DeviceCall(bound, self._device, settings)

        def call() -> None:
            with settings:
                bound()

        return call

    def kernels(self) -> dict[str, str]:
        graphs = {f"graph {number}": f"Graph inductor_{self._precision}" for number in range(self._engine.n_graphs)}
        return graphs | {name: self._kernel(name) for name in self._loaded.parts}

    def layer_kernels(self) -> dict[str, str]:
        return {name: self._kernel(name) for name in self._loaded.parts if name in self._loaded.layers}

    def constant_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._loaded.module.state_dict().values())

    def _kernel(self, part: str) -> str:
        kind = self._loaded.parts[part]
        return f"{kind} {self._engine.word(part)}_{'i8' if kind == IntegerProduct.__name__ else self._precision}"


@final
class _Inputs:
    """What the model was prepared for: the names, shapes and types of its inputs."""

    def __init__(self, example: Any, device: Accelerator | None, *, is_channels_last: bool) -> None:
        self._is_channels_last = is_channels_last
        self._structure: Structure = structure_of(example)
        self._wanted: dict[str, Tensor] = {
            name: leaf.to("meta") for name, leaf in zip(self._structure.names, leaves_of(example), strict=True)
        }
        self._move = device.move if device is not None else _kept

    def tensors(self, inputs: Any) -> Any:
        """The inputs on the device, in the order and the types of the example, never the caller's own memory.

        Raises MeasurementError where names or shapes differ from the example's.
        """
        leaves = named_leaves(inputs, list(self._wanted))
        return self._structure.arrange([self._tensor(name, leaf) for name, leaf in leaves.items()])

    def _tensor(self, name: str, leaf: Any) -> Tensor:
        wanted, tensor = self._wanted[name], torch.as_tensor(leaf)
        check_shape(name, tensor.shape, wanted.shape)
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise MeasurementError(f"input {name!r} has type {tensor.dtype}; the model was prepared for {wanted.dtype}")
        copied = tensor.to(wanted.dtype, copy=True)
        return self._move(channels_last(copied) if self._is_channels_last else copied.contiguous())


def _kept(tensor: Tensor) -> Tensor:
    return tensor


def _array(leaf: Tensor) -> NDArray[Any]:
    """An output as an array of its own; half precision as float32, which numpy has."""
    single = leaf.float() if leaf.dtype in DTYPES.values() else leaf
    return np.array(single.detach().cpu().numpy())


@contextmanager
def out_of_memory_told(target: Target) -> Iterator[None]:
    """Raises MeasurementError, in a sentence, where the device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            f"device {target.device!r} has too little memory for the model at batch size {target.batch_size} "
            f"({str(error).splitlines()[0]}); a smaller batch_size would do, or a device that nobody else uses"
        ) from error
