"""8-bit layers in torch: the int8 product gives what the quantized module gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranksearch.compression import rebuild
from ranksearch.layers import layer_spec
from ranksearch.plan import DENSE, Plan
from ranksearch.quantization import (
    SharedTensors,
    activation_quantizers,
    freeze,
    observe_ranges,
    quantize_module,
    shared_tensors,
)
from ranksearch.runtimes.pytorch.integers import CUDA_ROWS, IntegerProduct, integer_layers, takes
from ranksearch.runtimes.pytorch.runtime import TorchRuntime
from ranksearch.spec import Target
from ranksearch.surgery import replace_modules

VNNI = "avx2 avx512_vnni"
LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (5, 24)),
    "no bias": (lambda: nn.Linear(16, 7, bias=False), (3, 16)),
    "sequence": (lambda: nn.Linear(8, 4), (2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 4)),
    "strided": (lambda: nn.Conv2d(8, 6, 1, stride=(2, 3), bias=False), (2, 8, 5, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 1, stride=2), (2, 4, 9)),
}


def quantized(
    model: nn.Module, example: Tensor, names: Sequence[str], shared: SharedTensors | None = None
) -> nn.Module:
    rounded = rebuild(model, Plan(layers=dict.fromkeys(names, DENSE.with_bits(8, 8))), shared=shared).eval()
    observe_ranges(rounded, [example])
    freeze(rounded)
    return rounded


@given(st.sampled_from(list(LAYERS)), st.integers(0, 10_000), st.sampled_from([1, CUDA_ROWS]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_product_gives_the_modules_outputs(name: str, seed: int, least_rows: int, signed: bool) -> None:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    module, example = quantize_module(make()).eval(), torch.randn(shape) if signed else torch.rand(shape)
    observe_ranges(module, [example])
    freeze(module)
    product = IntegerProduct(module, module.activation, least_rows=least_rows)
    with torch.no_grad():
        expected, outputs = module(3 * example), product(3 * example)
    assert outputs.shape == expected.shape
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    half = product(example.bfloat16())
    assert half.dtype == torch.bfloat16


class Residual(nn.Module):
    """Two 1x1 convolutions read one tensor, which an addition reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.first(self.stem(inputs))
        return self.second(outputs + self.left(outputs)) + self.right(outputs)


def test_a_tensor_that_several_read_is_rounded_as_in_the_model() -> None:
    torch.manual_seed(0)
    model, example = Residual().eval(), torch.randn(2, 4, 6, 6)
    rounded = quantized(model, example, ["stem", "left", "right"], shared_tensors(model, example))
    moved = [quantizer for quantizer in activation_quantizers(rounded).values() if quantizer.readers]
    assert moved, "a quantizer moved to where the tensor is produced"
    with torch.no_grad():
        expected = rounded(example)
        layers = integer_layers(rounded, "cpu", VNNI)
        assert sorted(layers) == ["left", "right", "stem"]
        outputs = replace_modules(rounded, layers)(example)
    step = max(float(quantizer.scale) for quantizer in moved)
    assert float((outputs - expected).abs().max()) < 2 * step  # a rounding may fall to the other side
    assert float((outputs - expected).abs().mean()) < 0.02 * step


@pytest.mark.parametrize(
    ("layer", "on_cpu", "on_cuda"),
    [
        (nn.Linear(16, 8), True, True),
        (nn.Linear(12, 8), True, False),
        (nn.Linear(16, 10), True, False),
        (nn.Conv2d(16, 8, 1, stride=2), True, True),
        (nn.Conv2d(16, 8, 1, padding="same"), True, True),
        (nn.Conv2d(16, 8, 1, padding=1), False, False),
        (nn.Conv2d(16, 8, 1, groups=8), False, False),
        (nn.Conv2d(16, 8, (1, 3)), False, False),
        (nn.Conv1d(16, 8, 1), True, True),
    ],
)
def test_what_the_product_takes(layer: nn.Module, on_cpu: bool, on_cuda: bool) -> None:
    spec = layer_spec(layer)
    assert spec is not None
    assert (takes(spec, "cpu", VNNI), takes(spec, "cuda", "")) == (on_cpu, on_cuda)
    assert takes(spec, "cpu", "avx2 avx_vnni") == on_cpu and not takes(spec, "cpu", "avx2 avx512f")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_sessions_tell_integer_kernels_and_files_keep_eight_bits(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("runtime", "session"):
        monkeypatch.setattr(f"ranksearch.runtimes.pytorch.{room}.host_isa", lambda: VNNI)
    torch.manual_seed(0)
    runtime, target = TorchRuntime(), Target(runtime="torch", threads=1, batch_size=2, precision=precision)
    example = torch.randn(2, 3, 8, 8)
    model = quantized(network(), example, ["2", "6"])
    with torch.no_grad():
        expected = model(example).numpy()
    path = runtime.serialise(model, example, target, tmp_path)
    for session in (runtime.prepare(model, example, target), runtime.open(path, target)):
        outputs: Any = session.run(example.numpy())
        assert np.abs(outputs - expected).max() <= (1e-4 if precision == "f32" else 0.05) * np.abs(expected).max()
        kernels = session.layer_kernels()
        assert kernels["2"] == kernels["6"] == "IntegerProduct eager_i8"
        assert kernels["0"] == f"Conv2d eager_{precision}"
    spec = layer_spec(nn.Linear(64, 5))
    assert spec is not None
    half = () if precision == "f32" else ((16, 16),)
    assert runtime.supported_bits(spec, target) == ((32, 32), (8, 8), *half)
