"""Contract suites for decompositions and runtimes of your own: they raise AssertionError with what does not hold."""

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ranksearch.decompositions import AbstractDecomposition
from ranksearch.decompositions.cases import SPECS, convolution, example_input, ranks_up_to
from ranksearch.decompositions.contract import check_decomposition, fill
from ranksearch.layers import LayerSpec
from ranksearch.runtimes.contract import check_runtime
from ranksearch.runtimes.openvino.conversion import to_openvino
from ranksearch.runtimes.openvino.runtime import core

__all__ = ["SPECS", "check_decomposition", "check_runtime", "check_serialisation", "convolution"]

# Relative, between two implementations of float32 sums.
_TOLERANCE = 1e-4


def check_serialisation(
    decomposition: AbstractDecomposition, *, specs: Sequence[LayerSpec] = SPECS, seed: int = 0
) -> None:
    """Raises AssertionError where a format does not take the built modules or computes other numbers with them.

    The formats are torch.export's program, OpenVINO's model and, where onnx and onnxscript are installed, ONNX, which
    OpenVINO reads. Takes some seconds: `check_decomposition` does not do it.
    """
    for spec in specs:
        for options in decomposition.options_for(spec) if decomposition.refuse(spec) is None else ():
            path = ranks_up_to(decomposition.max_ranks(spec, options))
            ranks = path[len(path) // 2]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built = decomposition.build(spec, ranks, options).eval()
                weight = torch.randn(spec.weight_shape)
            fill(built, decomposition.factorise(weight, spec, options, None).factors(ranks))
            _check_formats(built, example_input(spec), f"{decomposition.name} {dict(options)} on {spec}, ranks {ranks}")


def _check_formats(built: nn.Module, inputs: Tensor, where: str) -> None:
    with torch.no_grad():
        expected = built(inputs)
    for name, compute in _formats():
        output = compute(built, inputs)
        assert output.shape == expected.shape, f"{where}: {name} gives {output.shape}, torch {expected.shape}"
        apart = float((output - expected).norm() / expected.norm().clamp_min(1e-30))
        assert apart <= _TOLERANCE, f"{where}: {name} computes something else than torch, off by {apart:.1e}"


def _formats() -> Iterator[tuple[str, Callable[[nn.Module, Tensor], Tensor]]]:
    yield "torch.export", _exported
    yield "OpenVINO", lambda built, inputs: _compiled(to_openvino(built, inputs), inputs)
    if all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript")):
        yield "ONNX", lambda built, inputs: _compiled(_onnx(built, inputs), inputs)


@torch.no_grad()
def _exported(built: nn.Module, inputs: Tensor) -> Tensor:
    output = torch.export.export(built, (inputs,)).module()(inputs)
    assert isinstance(output, Tensor)
    return output


def _onnx(built: nn.Module, inputs: Tensor) -> object:
    """The module by way of an ONNX file, as an openvino.Model."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter tells of its own deprecations
        path = Path(directory) / "module.onnx"
        torch.onnx.export(built, (inputs,), path, dynamo=False)
        read: object = core().read_model(path.read_bytes())
    return read


def _compiled(model: object, inputs: Tensor) -> Tensor:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(inputs.numpy())[0])
