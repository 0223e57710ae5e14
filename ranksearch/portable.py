"""Compressed models in files for other programs: ONNX, OpenVINO IR and pt2, each checked as it is written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ranksearch.errors import MeasurementError
from ranksearch.layers import call_model, evaluating, other_floats
from ranksearch.runtimes.axes import ANY_BATCH, ANY_BATCH_AND_LENGTH, STATIC, FreeAxes, cut, text_length
from ranksearch.runtimes.base import require
from ranksearch.runtimes.outputs import flat_outputs
from ranksearch.runtimes.structure import leaves_of, port_names, structure_of
from ranksearch.trees import count_rows, pick_rows, tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

# Integers round differently from their imitation in torch.
TOLERANCE = 0.05

Arrays = Sequence[NDArray[Any]]
# (model, example, folder, free axes) -> the file.
Write = Callable[["nn.Module", Any, Path, FreeAxes], Path]
# (file) -> what runs it on its inputs in their order.
Open = Callable[[Path], Callable[[Arrays], Arrays]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a file is written and run; `needs` are the modules that takes, `extra` the part that installs them.

    `runtime` is the one that times it.
    """

    file: str
    runtime: str
    needs: tuple[str, ...]
    extra: str | None
    write: Write
    open: Open


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A file that was written, and which sizes it takes; `note` says why a text's length is not free, if it is not."""

    path: Path
    axes: FreeAxes
    note: str | None = None

    @property
    def takes(self) -> str:
        """The sizes in words."""
        if not self.axes.batch:
            return "the example's batch"
        return "any batch and length" if self.axes.length else "any batch"


def write_portable(
    model: "nn.Module", example: Any, folder: Path, formats: Sequence[str], *, dynamic: bool = True
) -> list[Written]:
    """Writes the model in each of the `formats`, `portable.*` in the folder, and compares it with torch's outputs.

    The batch, and a text's length where the model and the format take any, are whatever comes where they are
    `dynamic`, else those of the example. Inputs and outputs bear the names of a mapping's keys, else `input_0`,
    `output_0` and so on. Raises MeasurementError where the model has other
    floats than float32, a format cannot hold it, or what is read gives other outputs; RuntimeUnavailableError where
    what writes or reads it is not installed.
    """
    if (told := other_floats(model)) is not None:
        raise MeasurementError(told)
    return [_write_checked(model, example, folder, name, dynamic) for name in formats]


def _write_checked(model: "nn.Module", example: Any, folder: Path, name: str, dynamic: bool) -> Written:
    found = FORMATS[name]
    for module in found.needs:
        require(module, f"an export to {name}", found.extra)
    if not dynamic:
        return Written(path=_written(model, example, folder, found, STATIC), axes=STATIC)
    note = None
    if _takes_shorter(model, example):
        try:
            path = _written(model, example, folder, found, ANY_BATCH_AND_LENGTH)
            return Written(path=path, axes=ANY_BATCH_AND_LENGTH)
        except MeasurementError as error:
            note = str(error)
    return Written(path=_written(model, example, folder, found, ANY_BATCH), axes=ANY_BATCH, note=note)


def _takes_shorter(model: "nn.Module", example: Any) -> bool:
    """Whether the example has texts, and the model takes them at half their length."""
    if (length := text_length(_leaves(example))) is None or length < 2:
        return False
    try:
        with evaluating(model):
            call_model(model, _cut(example, length // 2))
    except Exception:  # whatever a model's own code raises: it wants the length that it has
        return False
    return True


def _leaves(inputs: Any) -> "list[Tensor]":
    return [torch.as_tensor(leaf) for leaf in leaves_of(inputs)]


def _cut(inputs: Any, length: int) -> Any:
    return structure_of(inputs).arrange(cut(_leaves(inputs), length))


def _written(model: "nn.Module", example: Any, folder: Path, found: Format, axes: FreeAxes) -> Path:
    path = found.write(model, example, folder, axes)
    try:
        run = found.open(path)
    except Exception as error:  # each runtime has its own
        raise MeasurementError(f"{path.name} cannot be read again: {_reason(error)}; choose another format") from error
    n_rows = count_rows(example)
    # A batch, or a length, that was baked in is found out by another one.
    for rows in dict.fromkeys([n_rows, max(1, n_rows // 2)] if axes.batch else [n_rows]):
        static = "; export with a static batch instead" if axes.batch else ""
        _check(model, pick_rows(example, slice(rows)), run, f"{path.name}, batch {rows}", hint=static)
    if axes.length and (length := text_length(_leaves(example))) is not None:
        _check(model, _cut(example, length // 2), run, f"{path.name}, length {length // 2}")
    return path


def _check(model: "nn.Module", inputs: Any, run: Callable[[Arrays], Arrays], where: str, hint: str = "") -> None:
    try:
        with evaluating(model):
            wanted = [value.numpy() for value in tensors(call_model(model, inputs))]
        given = run([torch.as_tensor(leaf).numpy() for leaf in leaves_of(inputs)])
    except Exception as error:  # each runtime has its own
        raise MeasurementError(f"{where} does not run: {_reason(error)}{hint}") from error
    for own, other in zip(given, wanted, strict=True):
        distance = relative_distance(own, other)
        if not distance <= TOLERANCE:
            raise MeasurementError(f"{where} gives other outputs than torch: relative difference {distance:.1e}")


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def relative_distance(actual: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The root mean square difference over what is wanted's root mean square.

    Infinite where the shape is another, or a number is not finite.
    """
    if actual.shape != wanted.shape or not np.isfinite(actual).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))) or 1.0
    return float(np.sqrt(np.mean(np.square(actual - wanted, dtype=np.float64)))) / scale


def _write_onnx(model: "nn.Module", example: Any, folder: Path, axes: FreeAxes) -> Path:
    from ranksearch.runtimes.onnx.conversion import to_onnx

    path = folder / "portable.onnx"
    path.write_bytes(to_onnx(model, example, on_integers=False, axes=axes).SerializeToString())
    return path


def _open_onnx(path: Path) -> Callable[[Arrays], Arrays]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _write_openvino(model: "nn.Module", example: Any, folder: Path, axes: FreeAxes) -> Path:
    from ranksearch.runtimes.openvino.conversion import to_openvino
    from ranksearch.runtimes.openvino.runtime import load_openvino

    converted = to_openvino(model, example, axes=axes)
    with evaluating(model):
        outputs = call_model(model, example)
    taken = port_names(structure_of(example), "input")
    for ports, names in (
        (converted.inputs, taken),
        (converted.outputs, port_names(flat_outputs(outputs)[0], "output", taken)),
    ):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    path = folder / "portable.xml"
    load_openvino().save_model(converted, path, compress_to_fp16=False)
    return path


def _open_openvino(path: Path) -> Callable[[Arrays], Arrays]:
    from ranksearch.runtimes.openvino.runtime import core

    compiled = core().compile_model(core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda arrays: [compiled(list(arrays))[port] for port in compiled.outputs]


def _write_pt2(model: "nn.Module", example: Any, folder: Path, axes: FreeAxes) -> Path:
    from ranksearch.runtimes.pytorch.pt2 import write_portable_program

    path = folder / "portable.pt2"
    write_portable_program(model, example, path, axes)
    return path


def _open_pt2(path: Path) -> Callable[[Arrays], Arrays]:
    program = torch.export.load(path)
    module, (_, named) = program.module(), program.example_inputs or ((), {})

    def run(arrays: Arrays) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        with torch.no_grad():
            values = module(**dict(zip(named, tensors, strict=True))) if named else module(*tensors)
        return [value.numpy() for value in leaves_of(values)]

    return run


FORMATS: Mapping[str, Format] = {
    "onnx": Format(
        file="portable.onnx",
        runtime="onnxruntime",
        needs=("onnx", "onnxruntime"),
        extra="onnxruntime",
        write=_write_onnx,
        open=_open_onnx,
    ),
    "openvino": Format(
        file="portable.xml",
        runtime="openvino",
        needs=("openvino",),
        extra=None,
        write=_write_openvino,
        open=_open_openvino,
    ),
    "pt2": Format(file="portable.pt2", runtime="torch", needs=("torch",), extra=None, write=_write_pt2, open=_open_pt2),
}
