"""Weights of few bits in the runtimes' own files: kept there, made floats of once, multiplied as they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ranksearch.layers import weight_spec
from ranksearch.quantization import Half, Int4, Int8, WeightFormat, quantize_module
from ranksearch.runtimes import get_runtime, stayed_whole
from ranksearch.spec import Target
from ranksearch.surgery import replace_modules

RUNTIMES = ("openvino", "onnxruntime")
FORMATS: dict[str, WeightFormat] = {"16": Half(), "8": Int8(), "4": Int4()}
# Bits, and what comes with them: steps and zero points, which ONNX's files hold in float32.
BYTES = {"16": 2.0, "8": 1.0, "4": 0.5 + 8 / 32}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Twice(nn.Module):
    """Runs its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        values = self.conv(self.conv(x).relu()).mean(3).flatten(1)
        return self.linear(self.linear(values).relu())  # type: ignore[no-any-return]


def convolutions() -> nn.Sequential:
    """Convolutions of every kind, one with a BatchNorm that runtimes fold into it."""
    layers = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 1),
        nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(128, 36, 3),
    )  # fmt: skip
    norm = layers[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    return layers


def embedded() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "twice": (Twice, lambda: torch.randn(2, 64, 4, 4)),
    "convolutions": (convolutions, lambda: torch.randn(2, 64, 6, 6)),
    "embedded": (embedded, lambda: torch.randint(0, 500, (2, 7))),
}


def stored(model: nn.Module, weights: WeightFormat) -> nn.Module:
    layers = {name: module for name, module in model.named_modules() if weight_spec(module) is not None}
    quantized = {name: quantize_module(layer, weights, rounds_inputs=False) for name, layer in layers.items()}
    return replace_modules(model, quantized).eval()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("runtime_name", RUNTIMES)
def test_files_keep_the_bits_and_give_the_rounded_models_outputs(
    runtime_name: str, name: str, bits: str, tmp_path: Path
) -> None:
    make, inputs = MODELS[name]
    model, example = stored(make(), FORMATS[bits]), inputs()
    runtime, target = get_runtime(runtime_name), Target(runtime=runtime_name, threads=1)
    with torch.no_grad():
        expected = model(example)
    session = runtime.open(runtime.serialise(model, example, target, tmp_path), target)
    torch.testing.assert_close(torch.as_tensor(session.run(example.numpy())), expected, rtol=1e-3, atol=1e-3)
    n_weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1)
    written = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".bin", ".onnx"))
    assert written < 1.1 * BYTES[bits] * n_weights + 16_000


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("runtime_name", RUNTIMES)
def test_nothing_is_made_floats_of_at_every_run(runtime_name: str, bits: str) -> None:
    model, example = convolutions(), torch.randn(2, 64, 6, 6)
    runtime, target = get_runtime(runtime_name), Target(runtime=runtime_name, threads=1)

    def operations(model: nn.Module) -> list[str]:
        return sorted(kernel.split()[0] for kernel in runtime.prepare(model, example, target).kernels().values())

    assert operations(stored(convolutions(), FORMATS[bits])) == operations(model.eval())


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("runtime_name", RUNTIMES)
def test_linear_layers_are_multiplied_by_their_codes(runtime_name: str, bits: str) -> None:
    model = stored(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)), FORMATS[bits])
    runtime, target = get_runtime(runtime_name), Target(runtime=runtime_name, threads=2)
    for example in (torch.randn(3, 64), torch.randn(2, 5, 64)):
        session = runtime.prepare(model, example, target)
        assert not stayed_whole(["0", "2"], session.layer_kernels())
        with torch.no_grad():
            torch.testing.assert_close(
                torch.as_tensor(session.run(example.numpy())), model(example), rtol=1e-3, atol=1e-3
            )
