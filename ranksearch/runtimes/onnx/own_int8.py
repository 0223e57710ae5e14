"""ONNX Runtime's own static int8."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ranksearch.errors import MeasurementError
from ranksearch.runtimes.calibration import calibration_batches
from ranksearch.runtimes.onnx.conversion import to_onnx
from ranksearch.runtimes.onnx.session import load_onnxruntime
from ranksearch.runtimes.structure import leaves_of


def to_onnx_int8(model: nn.Module, calibration_inputs: Iterable[Any], example: Any, *, is_saturating: bool) -> bytes:
    """The model as onnxruntime.quantization makes it static int8 from up to 300 calibration examples.

    QuantizeLinear and DequantizeLinear in pairs, weights per output channel, ranges from the least to the largest
    value; weights of 7 bits where the kernels saturate, as its documentation advises. Raises MeasurementError where
    there are fewer calibration examples than the example has.
    """
    load_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    converted = to_onnx(model, example, on_integers=False)
    names = [value.name for value in converted.graph.input]
    rows = len(leaves_of(example)[0])
    batches = [dict(zip(names, arrays, strict=True)) for arrays in calibration_batches(calibration_inputs, rows)]
    if not batches:
        raise MeasurementError(f"ONNX Runtime's own int8 needs {rows} calibration examples, one batch; there are fewer")
    with tempfile.TemporaryDirectory() as directory, _quiet():
        plain, folded, quantized = (Path(directory) / f"{name}.onnx" for name in ("plain", "folded", "quantized"))
        plain.write_bytes(converted.SerializeToString())
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            quantized,
            _Reader(batches),
            per_channel=True,
            reduce_range=is_saturating,
            # With its default, signed activations, convolutions before additions stay float on x86.
            activation_type=QuantType.QUInt8,
        )
        return _with_notes(quantized, converted)


class _Reader:
    """Batches, one at a time, as onnxruntime.quantization asks for them."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def _with_notes(path: Path, converted: Any) -> bytes:
    """The model in the file, with the metadata of the model that it was made from."""
    import onnx

    quantized = onnx.load(path)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(converted.metadata_props)
    return bytes(quantized.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, the root logger, to which the quantizer gives its advice, says nothing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
