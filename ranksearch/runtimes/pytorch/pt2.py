"""Torch programs on disk, by torch.export, and the names of the layers in them."""

import inspect
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.layers import in_eval_mode
from ranksearch.quantization import QuantizedConv1d, QuantizedConv2d, QuantizedLinear
from ranksearch.runtimes.axes import BATCH, LENGTH, FreeAxes
from ranksearch.runtimes.outputs import gives_flat_outputs
from ranksearch.runtimes.pytorch.integers import IntegerProduct
from ranksearch.runtimes.pytorch.session import DTYPES, Loaded, as_computed, in_precision
from ranksearch.runtimes.rounding import fix_weights
from ranksearch.runtimes.structure import leaves_of, structure_of
from ranksearch.spec import Target
from ranksearch.surgery import copy_model

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, QuantizedLinear, QuantizedConv1d, QuantizedConv2d, IntegerProduct)
# What torch.export keeps of a module's class.
LAYER_CLASSES = {f"{kind.__module__}.{kind.__qualname__}" for kind in _LAYERS} | {"transformers.pytorch_utils.Conv1D"}


def write_program(model: nn.Module, example: Any, target: Target, path: Path) -> None:
    """Exports a copy of the model in the target's precision to `path`, with its example.

    Raises MeasurementError where torch.export cannot.
    """
    module = gives_flat_outputs(as_computed(model, target))
    inputs = in_precision(example, target)
    named = inputs if structure_of(inputs).kind == "mapping" else None
    placed = () if named else tuple(tensor.cpu() for tensor in leaves_of(inputs))
    try:
        with _quietly():
            program = torch.export.export(module, placed, named, strict=False)
    except Exception as error:
        raise MeasurementError(
            f"torch.export cannot export {type(model).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    _save(program, path)


def write_portable_program(model: nn.Module, example: Any, path: Path, axes: FreeAxes) -> None:
    """Exports a copy of the model in float32, its quantizers as torch imitates them, so that any torch runs it.

    A batch that is free is of any size from 1 up, a length that is what the model's own code allows. Raises
    MeasurementError where torch.export cannot.
    """
    module, inputs = exportable(model), structure_of(example)
    leaves = tuple(torch.as_tensor(leaf).detach().cpu() for leaf in leaves_of(example))
    if axes.batch and len(leaves[0]) == 1:
        # An axis of one row counts as fixed.
        leaves = tuple(torch.cat([leaf, leaf]) for leaf in leaves)
    named = dict(zip(inputs.names, leaves, strict=True)) if inputs.kind == "mapping" else None
    # A table of positions bounds how long texts may be, which torch.export finds out by itself.
    sizes: dict[str, Any] = {BATCH: torch.export.Dim(BATCH, min=1), LENGTH: torch.export.Dim.AUTO}
    free = [{axis: sizes[name] for axis, name in of.items()} or None for of in axes.of(leaves)]
    shapes: Any = dict(zip(inputs.names, free, strict=True)) if named else tuple(free)
    _spell_out(module, list(named or [f"input_{i}" for i in range(len(leaves))]))
    try:
        with _quietly():
            program = torch.export.export(
                module, () if named else leaves, named, dynamic_shapes=shapes if any(free) else None, strict=False
            )
    except Exception as error:
        raise MeasurementError(
            f"torch.export cannot export {type(model).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    _save(program, path)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients, and without torch's warnings of what it assigns while it exports."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _spell_out(module: nn.Module, names: list[str]) -> None:
    """Has `forward` (in place) tell the names of what it gathers as `*inputs` or `**named`.

    Of neither torch.export knows how to free an axis.
    """
    gathering = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    forward = module.forward
    if any(parameter.kind in gathering for parameter in inspect.signature(forward).parameters.values()):

        def spelled_out(*inputs: Any, **named: Any) -> Any:
            return forward(*inputs, **named)

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        cast(Any, spelled_out).__signature__ = inspect.Signature(parameters)
        module.forward = spelled_out


def _save(program: ExportedProgram, path: Path) -> None:
    # By way of memory: on a full disk torch's own writer ends the process (`terminate called`).
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def exportable(model: nn.Module) -> nn.Module:
    """A copy of the model that torch.export takes: its quantizers as torch imitates them."""
    return gives_flat_outputs(fix_weights(in_eval_mode(copy_model(model).cpu())))


def read_program(path: Path, target: Target, place: torch.device | None) -> Loaded:
    """What write_program wrote, moved to `place` with the constants that its graph holds.

    Raises RuntimeUnavailableError where it was written in another precision than the target's.
    """
    with warnings.catch_warnings():
        # Torch 2.11 and its like tell of their own buffers while they read.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        program = torch.export.load(path)
    if place is not None:
        with torch.no_grad():
            program = move_to_device_pass(program, str(place))
    arguments, named = program.example_inputs
    example = dict(named) if named else tuple(arguments) if len(arguments) != 1 else arguments[0]
    _check_precision(path, program, leaves_of(example), target)
    module = program.module()
    kinds = _kinds(module)
    holders = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    layers = frozenset(name for name, kind in kinds.items() if kind in LAYER_CLASSES)
    parts = {name: kinds.get(name, "Module").rpartition(".")[2] for name in kinds | dict.fromkeys(sorted(holders))}
    return Loaded(
        module=module,
        example=example,
        parts={name: kind for name, kind in parts.items() if name in holders | layers},
        layers=layers,
    )


def _kinds(module: torch.fx.GraphModule) -> dict[str, str]:
    """The class of each module that the graph's nodes come from, by its name in the model that was exported."""
    kinds: dict[str, str] = {}
    for node in module.graph.nodes:
        for name, kind in (node.meta.get("nn_module_stack") or {}).values():
            kinds.setdefault(name, kind)
    return kinds


def _check_precision(path: Path, program: ExportedProgram, example: list[torch.Tensor], target: Target) -> None:
    floats = {t.dtype for t in (*program.state_dict.values(), *example) if t.is_floating_point()}
    wanted = DTYPES.get(target.precision)
    if floats and (wanted not in floats if wanted else floats & set(DTYPES.values())):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        raise RuntimeUnavailableError(
            f"{path} holds a model in {found}; serialise it anew for precision {target.precision!r}"
        )
